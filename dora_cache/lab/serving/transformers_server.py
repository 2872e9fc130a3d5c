"""Transformers' own server, with one adapter: ``... MODEL ADAPTER PORT BLOCKS BATCH_TOKENS``."""

import sys
from typing import Any

from transformers.cli.serve import Serve
from transformers.cli.serving.model_manager import ModelManager

__all__ = ["main"]


def main(model: str, adapter: str, port: str, blocks: str, batch_tokens: str) -> None:
    """Serve a model with an adapter by continuous batching."""
    load = ModelManager._load_model

    def with_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load(self, *args, **kwargs)
        loaded.load_adapter(adapter)
        return loaded

    ModelManager._load_model = with_adapter
    Serve(
        force_model=model,
        continuous_batching=True,
        attn_implementation="sdpa",
        device="cpu",
        dtype="float32",
        cb_num_blocks=int(blocks),
        cb_max_batch_tokens=int(batch_tokens),
        host="127.0.0.1",
        port=int(port),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
