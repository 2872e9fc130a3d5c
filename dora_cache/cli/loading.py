"""Models and adapters from local folders, with a clear word about whatever is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dora_cache.cli.console import CliError, quiet
from dora_cache.cli.options import DTYPES
from dora_cache.lab.shapes import SHAPES, shaped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dora_cache.cli.options import Dtype

__all__ = [
    "about",
    "check_source",
    "load_adapters",
    "load_base",
    "load_measured",
    "load_model",
    "parse_adapters",
    "parse_device",
    "read_adapters",
    "read_model",
    "tokenizer_of",
]

_CONFIG = "adapter_config.json"
_SAFETENSORS, _PICKLE = "adapter_model.safetensors", "adapter_model.bin"
_SHOWN = 160


def parse_adapters(given: Sequence[str]) -> dict[str, Path]:
    """Read ``name=PATH`` for each adapter.

    Raises:
        CliError: a name or a path is missing, a name is given twice or cannot be one.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals:
            raise CliError(f"--adapter {text} has no name: write --adapter name={text}")
        if not (name and path):
            raise CliError(f"--adapter {text} is incomplete: write --adapter name=PATH")
        if name in found:
            msg = f"two adapters are called {name!r}: give each --adapter a name of its own"
            raise CliError(msg)
        if "." in name:
            msg = f"an adapter cannot be called {name!r}: choose a name without a dot"
            raise CliError(msg)
        found[name] = Path(path)
    return found


def parse_device(given: str | None) -> torch.device:
    """Return the device of that name; by default the GPU if there is one, or else the CPU.

    Raises:
        CliError: there is no such device.
    """
    try:
        device = torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        msg = f"no device {given!r} here: write --device cpu, or --device cuda with a GPU"
        raise CliError(msg) from None
    return device


def load_model(path: Path, device: torch.device) -> Any:
    """Load a causal language model, in eval mode.

    Raises:
        CliError: there is none in the folder, or it cannot be read.
    """
    from transformers import AutoModelForCausalLM

    _check_model(path)
    try:
        with quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - whatever a damaged file makes its reader raise
        msg = f"cannot load the model in {path}: {_brief(error)}; save it again or give another one"
        raise CliError(msg) from None
    return model.to(device).eval()


def read_model(path: Path) -> Any:
    """Read the configuration of a causal language model.

    Raises:
        CliError: there is none in the folder, or it cannot be read.
    """
    from transformers import AutoConfig

    _check_model(path)
    try:
        with quiet():
            return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - as above
        msg = f"cannot read {path / 'config.json'}: {_brief(error)}; save the model again"
        raise CliError(msg) from None


def _check_model(path: Path) -> None:
    # Given the name of no folder, Transformers would look for a model of that name on the Hub.
    if not path.is_dir():
        msg = f"no model folder {path}: give the folder that save_pretrained() made"
        raise CliError(msg)
    if not (path / "config.json").is_file():
        msg = f"{path} holds no model (no config.json): give the folder that save_pretrained() made"
        raise CliError(msg)


def check_source(model: Path | None, shape: str | None, layers: int | None) -> None:
    """Check that there is one model, in a folder or of a known shape.

    Raises:
        CliError: there is none, or there are two, or what is said of it does not go with it.
    """
    if model is None and shape is None:
        raise CliError("there is no model: give a MODEL folder, or a shape, as --shape tiny")
    if model is not None and shape is not None:
        raise CliError(f"there are two models: give either {model} or --shape {shape}")
    if shape is not None and shape not in SHAPES:
        raise CliError(f"there is no shape {shape!r}: choose from {', '.join(SHAPES)}")
    if shape is None and layers is not None:
        raise CliError("--layers is for shapes: a MODEL has the layers that it has")


def load_base(
    model: Path | None,
    shape: str | None,
    device: torch.device,
    *,
    layers: int | None,
    dtype: torch.dtype | None,
) -> Any:
    """Load a model, or make one of a named shape with random weights; in eval mode.

    Args:
        model: its folder; None for a shape. See :func:`check_source`.
        shape: the shape's name.
        device: where it goes.
        layers: of a shape, how many; by default all.
        dtype: of the weights; by default the model's own, or float32.

    Raises:
        CliError: the model cannot be loaded, or the shape has fewer layers than that, or does not
            fit on the device.
    """
    if model is not None:
        loaded = load_model(model, device)
        return loaded if dtype is None else loaded.to(dtype)
    assert shape is not None  # noqa: S101 - for the type checker
    try:
        return shaped(shape, layers=layers, dtype=dtype or torch.float32, device=device)
    except ValueError as error:
        raise CliError(f"--layers {layers}: {error}") from None
    except torch.OutOfMemoryError:
        msg = f"{shape} does not fit in the memory of {device}: give fewer layers, as --layers 8"
        raise CliError(msg) from None


def load_measured(
    model: Path | None,
    shape: str | None,
    device: torch.device,
    *,
    layers: int | None,
    dtype: Dtype | None,
) -> Any:
    """Load a model as :func:`load_base` does; a shape's weights are bfloat16 on a GPU by default.

    Raises:
        CliError: as there.
    """
    usual: Dtype | None = "bf16" if shape and device.type == "cuda" else None
    kind = dtype or usual
    return load_base(
        model, shape, device, layers=layers, dtype=None if kind is None else DTYPES[kind]
    )


def about(base: Any, model: Path | None, shape: str | None) -> dict[str, Any]:
    """Return what is to be known of a model beside what was measured with it."""
    return {
        "model": shape or ("" if model is None else model.resolve().name),
        "layers": getattr(base.config, "num_hidden_layers", None),
        "dtype": str(base.dtype).removeprefix("torch."),
    }


def tokenizer_of(path: Path) -> Any:
    """Load the tokenizer from a model's folder.

    Raises:
        CliError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - as above
        msg = (
            f"cannot load a tokenizer from {path}: {_brief(error)}; "
            "save one there with tokenizer.save_pretrained()"
        )
        raise CliError(msg) from None


def load_adapters(model: Any, adapters: dict[str, Path]) -> Any:
    """Wrap a model with adapters, at least one, and return the PEFT model, in eval mode.

    Raises:
        CliError: an adapter is missing, damaged, or one of another model.
    """
    from peft import PeftModel

    for name, path in adapters.items():
        _check_files(name, path)
    wrapped: Any = None
    for name, path in adapters.items():
        try:
            with quiet():
                if wrapped is None:
                    wrapped = PeftModel.from_pretrained(model, str(path), adapter_name=name)
                # For the first one too, once more: only this call says which weights did not fit.
                loaded = wrapped.load_adapter(str(path), adapter_name=name)
        except Exception as error:  # noqa: BLE001 - PEFT has many ways to refuse an adapter
            msg = f"{_does_not_fit(name, path)}: {_brief(error)}"
            raise CliError(msg) from None
        # PEFT tells adapters apart by their names as parts of keys, and may list another's as well.
        missing = [key for key in loaded.missing_keys if name in key.split(".")]
        strays = [*missing, *loaded.unexpected_keys]
        if strays:
            msg = (
                f"{_does_not_fit(name, path)}: {len(missing)} weights are missing and "
                f"{len(loaded.unexpected_keys)} have no place, such as {strays[0]}"
            )
            raise CliError(msg)
    return wrapped.eval()


def read_adapters(adapters: dict[str, Path]) -> dict[str, Any]:
    """Read the PEFT configurations of adapters, whose weights need not be there.

    Raises:
        CliError: one is missing or damaged.
    """
    from peft import PeftConfig

    found = {}
    for name, path in adapters.items():
        _check_config(name, path)
        try:
            with quiet():
                found[name] = PeftConfig.from_pretrained(str(path))
        except Exception as error:  # noqa: BLE001 - as above
            msg = f"cannot read {path / _CONFIG}: {_brief(error)}; save the adapter again"
            raise CliError(msg) from None
    return found


def _hint(name: str) -> str:
    return f"write --adapter {name}=PATH with the folder that PEFT's save_pretrained() made"


def _check_config(name: str, path: Path) -> None:
    # Given a folder without this file, PEFT would look for it on the Hub.
    hint = _hint(name)
    if not path.is_dir():
        raise CliError(f"no adapter folder {path}: {hint}")
    config = path / _CONFIG
    if not config.is_file():
        raise CliError(f"{path} holds no adapter (no {_CONFIG}): {hint}")
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CliError(f"cannot read {config}: {_brief(error)}; save the adapter again") from None
    if not isinstance(data, dict) or "peft_type" not in data:
        raise CliError(f"{config} is no PEFT configuration (no peft_type): {hint}")


def _check_files(name: str, path: Path) -> None:
    _check_config(name, path)
    hint = _hint(name)
    weights = path / _SAFETENSORS
    if not weights.is_file():
        if (path / _PICKLE).is_file():
            return
        raise CliError(f"{path} holds no weights (no {_SAFETENSORS}): {hint}")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        msg = f"cannot read {weights}: {_brief(error)}; save or copy the adapter again"
        raise CliError(msg) from None


def _does_not_fit(name: str, path: Path) -> str:
    return f"adapter {name!r} in {path} does not fit this model, give one that was trained on it"


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
