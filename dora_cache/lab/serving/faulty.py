"""A server of a small model whose files cannot always be read: ``... FOLDER PORT CAP``.

While a file ``unreadable`` is in the adapters' folder, reading weights fails for the adapters that
it names, one a line.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dora_cache.lab.shapes import shaped
from dora_cache.serving import AdapterPool, files
from dora_cache.serving.server import AdapterFolder, Engine, Limits, create_app, run

__all__ = ["LIMITS", "MARK", "NumberTokenizer", "main", "make_model"]

LIMITS = Limits(max_prompt=64, max_tokens=32, batch=8, queue=24, kv_tokens=1024, batch_tokens=128)
MARK = "unreadable"


class NumberTokenizer:
    """Texts are the tokens' numbers."""

    chat_template = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        """Return the tokens of a text."""
        return {"input_ids": [int(one) for one in text.split()]}

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        """Return the text of tokens."""
        return "".join(f"{one} " for one in tokens)


def make_model() -> Any:
    """Return the model, with weights large enough for adapters to make a difference."""
    model: Any = shaped("tiny", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model.eval()


def main(folder: str, port: str, cap: str) -> None:
    """Serve the folder's adapters."""
    root = Path(folder)
    opening = files._safe_open

    def failing(path: Path) -> Any:
        mark = root / MARK
        if mark.exists() and path.parent.name in mark.read_text("utf-8").split():
            raise OSError(5, "Input/output error")
        return opening(path)

    files._safe_open = failing
    logging.getLogger("dora_cache").setLevel(logging.CRITICAL)
    model = make_model()
    pool = AdapterPool(model, device_bytes=int(cap))
    adapters = AdapterFolder(pool, root, reserved=frozenset({"base"}))
    adapters.refresh()
    engine = Engine(model, pool, adapters, LIMITS)
    app = create_app(engine, NumberTokenizer(), model="base", refresh=0.2)
    run(app, engine, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
