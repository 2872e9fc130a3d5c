"""Adapters as PEFT saves them: what a folder holds for a model, and the weights when wanted.

A folder has ``adapter_config.json`` and ``adapter_model.safetensors``. Opening reads the first and
the header of the second, and compares both with the model; the weights are read part by part. What
is not certain to be computed as PEFT would is refused: each field of the configuration, each
tensor of the file and each layer that has one must be known here.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from dora_cache.errors import AdapterFileError
from dora_cache.lifecycle import plain_class

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["AdapterFiles", "Part", "open_adapter"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."

_HARMLESS = frozenset({
    # what made the adapter, and for what
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision",
    "runtime_config", "task_type",
    # which modules have it, and which a bias: the file's tensors say so
    "bias", "exclude_modules", "layers_pattern", "layers_to_transform", "target_modules",
    # training, and the first values of what the file has
    "corda_config", "eva_config", "lora_dropout", "lora_ga_config", "loftq_config",
    # PEFT goes by the class of the layer
    "fan_in_fan_out",
    # only of use with another field, which is checked
    "megatron_core", "qalora_group_size",
})  # fmt: skip
_SERVED = frozenset({
    "alpha_pattern", "ensure_weight_tying", "init_lora_weights", "lora_alpha", "lora_bias",
    "modules_to_save", "peft_type", "r", "rank_pattern", "use_dora", "use_rslora",
})  # fmt: skip
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""What PEFT adds to ``modules_to_save`` for a task."""

_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
_WRITING_INITS = ("pissa", "corda", "olora", "lora_ga")
"""Kinds of ``init_lora_weights`` with which PEFT changes the base weight on loading."""

_ADAPTER_KEY = re.compile(
    r"(.+)\.(lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector(?:\.weight)?)"
)
_SHORT = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias_B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
_LONG = {
    "A": "lora_A",
    "B": "lora_B",
    "magnitude": "lora_magnitude_vector",
    "bias_B": "lora_B.bias",
}

_FLOATS = ("F64", "F32", "F16", "BF16")
_WHOLE = ("BOOL", "U8", "I8", "I16", "I32", "I64")

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_QUANTIZED = ("QuantLinear", "HQQLinear", "EetqLinear", "QuantizedLinear")
"""How the classes of quantized linear layers end that PEFT knows and that are no ``nn.Linear``."""

_CHUNK = 1 << 22
"""How many elements are compared at once."""


@dataclass(frozen=True, slots=True)
class Part:
    """What an adapter has for one module of the model.

    Attributes:
        module: the module's name, as ``model.named_modules()`` has it; in a PeftModel that of
            PEFT's layer.
        kind: ``"linear"``, ``"embedding"``, ``"conv"``, or ``"replaced"``: parameters and buffers
            that stand in for the module's own. Those are all of them for ``modules_to_save``, and
            the bias alone where a module of no other kind has a trained bias (``bias="all"``).
        rank: of A and B; 0 for ``"replaced"``, and where there is a bias alone.
        scaling: what the product of A and B is multiplied by; ``rank_pattern``, ``alpha_pattern``
            and ``use_rslora`` are in it.
        shapes: of the tensors, by name: A, B, magnitude, bias_B, bias, those that there are; for
            ``"replaced"`` the names that the module's ``state_dict`` has. Linear: A (rank, in), B
            (out, rank). Embedding: A (rank, entries), B (width, rank). Convolution: A (rank, in,
            *kernel), to be applied with the stride and padding of the base layer, in one group; B
            (out, rank), block-diagonal where the base layer has groups. The others (out,).
    """

    module: str
    kind: str
    rank: int
    scaling: float
    shapes: Mapping[str, tuple[int, ...]] = field(hash=False)


@dataclass(slots=True)
class _Place:
    """A module of the base model.

    Attributes:
        outer: its name in the model, or that of PEFT's layer around it.
        module: the module itself, out of PEFT's layers.
        parent: what it was found in.
        shared: whether it was found in several places.
    """

    outer: str
    module: nn.Module
    parent: nn.Module | None
    shared: bool = False


@dataclass(slots=True)
class _Source:
    """Where the tensors of a part are: their keys, and how many groups a convolution has."""

    keys: dict[str, str]
    groups: int = 1


class AdapterFiles:
    """One adapter's files, found to fit a model; made by :func:`open_adapter`.

    Attributes:
        name: the adapter's.
        path: of its folder.
        parts: what it has, in the order of the model's modules.
    """

    def __init__(self, name: str, path: Path, stamp: tuple[tuple[int, ...], ...]) -> None:
        self.name = name
        self.path = path
        self.parts: tuple[Part, ...] = ()
        self._stamp = stamp
        self._sources: dict[str, _Source] = {}
        self._carried: list[tuple[str, weakref.ref[nn.Module], str]] = []
        self._weights: Any = None
        self._lock = threading.Lock()

    def read(self, part: Part) -> dict[str, Tensor]:
        """Read the tensors of a part.

        Args:
            part: one of :attr:`parts`.

        Returns:
            Tensors of memory of their own, on the CPU, contiguous, in the file's dtype, by the
            names and with the shapes of ``part.shapes``.

        Raises:
            AdapterFileError: the files were changed or removed since they were opened, cannot be
                read, or have base weights that are not the model's.
        """
        source = self._sources[part.module]
        with self._lock:
            self._require_unchanged()
            try:
                if self._weights is None:
                    self._weights = _safe_open(self.path / WEIGHTS)
                self._require_base_weights()
                # What get_tensor returns is a view of the mapped file.
                found = {
                    name: self._weights.get_tensor(key).clone() for name, key in source.keys.items()
                }
            except AdapterFileError:
                raise
            except _damage() as error:
                self.refuse(f"{WEIGHTS} cannot be read ({error}); save the adapter again.")
            # What was copied while another process wrote it is of no use.
            self._require_unchanged()
        if source.groups > 1 and "B" in found:
            blocks = found["B"].flatten(1).chunk(source.groups)
            found["B"] = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        return {name: tensor.reshape(part.shapes[name]) for name, tensor in found.items()}

    def close(self) -> None:
        """Let go of the mapped file; a later :meth:`read` maps it again."""
        with self._lock:
            self._weights = None

    def refuse(self, text: str) -> NoReturn:
        """Raise an error that names the adapter."""
        raise AdapterFileError(f"Adapter {self.name!r} ({self.path}): {text}") from None

    def _require_unchanged(self) -> None:
        if _stamp(self.path) != self._stamp:
            self._weights = None
            self.refuse("its files were changed or removed since it was added; add it again.")

    def _require_base_weights(self) -> None:
        """Compare base weights that were saved with the adapter with the model's, once.

        PEFT writes them into the model, which does nothing where they are the same already.
        """
        for key, module, name in self._carried:
            own = getattr(module(), name, None)
            if own is None or own.device.type == "meta" or not _same(self._weights, key, own):
                self.refuse(
                    f"it has {key}, a weight of the base model, which differs from this model's or "
                    "cannot be compared with it. If it was trained, train it by modules_to_save; "
                    "otherwise save the adapter with save_pretrained(..., "
                    "save_embedding_layers=False)."
                )
        self._carried.clear()


def open_adapter(name: str, path: str | Path, model: nn.Module) -> AdapterFiles:
    """Read an adapter's configuration and the header of its weights, and check both.

    Args:
        name: what the adapter is called in errors.
        path: of the folder that PEFT's ``save_pretrained`` made.
        model: what the adapter is for, plain or with PEFT's layers in it; it is only looked at.

    Raises:
        AdapterFileError: something is missing, damaged, unsupported, or for another model.
    """
    path = Path(path)
    files = AdapterFiles(name, path, ())
    if not path.is_dir():
        files.refuse(
            "there is no such folder. Give the path of a local folder that PEFT's save_pretrained "
            "made; huggingface_hub.snapshot_download(...) fetches one and returns its path."
        )
    stamp = _stamp(path)
    _Reader(files, _read_config(files), _read_header(files), model).read()
    if _stamp(path) != stamp:
        files.refuse("its files were changed while they were read; add it again.")
    files._stamp = stamp
    return files


def _stamp(path: Path) -> tuple[tuple[int, ...], ...]:
    """What changes when one of the files is written or replaced; empty if one is not there."""
    try:
        found = [(path / name).stat() for name in (CONFIG, WEIGHTS)]
    except OSError:
        return ()
    return tuple((one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) for one in found)


def _same(weights: Any, key: str, own: Tensor) -> bool:
    """Whether a tensor of the file, in the dtype of the model's, has its values."""
    if own.ndim == 0:
        return torch.equal(weights.get_tensor(key).to(own.dtype), own.detach().cpu())
    rows = weights.get_slice(key)
    step = max(1, _CHUNK * len(own) // max(1, own.numel()))
    return all(
        torch.equal(rows[at : at + step].to(own.dtype), own[at : at + step].detach().cpu())
        for at in range(0, len(own), step)
    )


def _safe_open(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="pt", device="cpu")


def _damage() -> tuple[type[Exception], ...]:
    """What safetensors raises for files that are damaged or cannot be read."""
    from safetensors import SafetensorError

    return (SafetensorError, OSError, ValueError, RuntimeError)


def _read_config(files: AdapterFiles) -> dict[str, Any]:
    try:
        found = json.loads((files.path / CONFIG).read_text("utf-8"))
    except FileNotFoundError:
        files.refuse(f"the folder has no {CONFIG}; give the folder that save_pretrained made.")
    except (OSError, ValueError, RecursionError) as error:
        files.refuse(f"{CONFIG} cannot be read ({error}); save the adapter again.")
    if not isinstance(found, dict):
        files.refuse(f"{CONFIG} is no JSON object; save the adapter again.")
    return found


def _read_header(files: AdapterFiles) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each tensor of the file."""
    path = files.path / WEIGHTS
    if not path.exists():
        if (files.path / PICKLE).exists():
            files.refuse(
                f"its weights are a pickle, {PICKLE}, which can run code when it is read. If you "
                f"trust it, convert it: peft.PeftModel.from_pretrained(base_model, "
                f"{str(files.path)!r}).save_pretrained({str(files.path)!r})"
            )
        files.refuse(f"the folder has no {WEIGHTS}; save the adapter again, with PEFT.")
    try:
        weights = _safe_open(path)
        slices = {key: weights.get_slice(key) for key in weights.keys()}  # noqa: SIM118
        return {key: (one.get_dtype(), tuple(one.get_shape())) for key, one in slices.items()}
    except _damage() as error:
        files.refuse(f"{WEIGHTS} is damaged ({error}); copy or save the adapter again.")


def _defaults() -> dict[str, Any]:
    """Return the defaults of the fields that the installed PEFT knows."""
    from peft import LoraConfig

    return {
        one.name: None
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        else one.default
        if one.default_factory is dataclasses.MISSING
        else one.default_factory()
        for one in dataclasses.fields(LoraConfig)
    }


class _Reader:
    """Compares configuration, header and model, and fills in :class:`AdapterFiles`."""

    def __init__(
        self,
        files: AdapterFiles,
        config: dict[str, Any],
        header: dict[str, tuple[str, tuple[int, ...]]],
        model: nn.Module,
    ) -> None:
        self.files = files
        self.refuse = files.refuse
        self.config = config
        self.header = header
        self.model = model

    def read(self) -> None:
        self.check_config()
        self.places = _places(self.model)
        self.saved = (
            *(self.config["modules_to_save"] or ()),
            *_HEADS.get(str(self.config["task_type"]), ()),
        )
        self.tied = self.find_tied()
        adapters, replaced = self.sort_keys()
        parts: dict[str, Part] = {}
        for module in sorted(adapters, key=len):
            parts[module] = self.adapter_part(module, adapters[module])
            self.require_one_name(module)
        for module, keys in replaced.items():
            parts[module] = self.replaced_part(module, keys)
            self.require_one_name(module)
        self.check_tied(adapters, replaced)
        if not parts:
            self.refuse(f"{WEIGHTS} has no adapter's weights; save the adapter again.")
        self.files.parts = tuple(parts[module] for module in self.places if module in parts)

    def check_config(self) -> None:
        """Refuse what the configuration says that is not served."""
        from peft import PeftType

        kind = self.config.get("peft_type")
        if kind != PeftType.LORA:
            known = isinstance(kind, str) and kind in set(PeftType)
            self.refuse(
                f"its peft_type is {kind!r}; a pool serves LORA only, which is LoRA, rsLoRA and "
                "DoRA. "
                + (
                    "Load it with PEFT and give the model to dora_cache.attach, which serves that "
                    "kind one adapter at a time."
                    if known
                    else "The installed PEFT does not know that kind either."
                )
            )
        defaults = _defaults()
        for key, value in self.config.items():
            if key in _HARMLESS or key in _SERVED:
                continue
            if key not in defaults:
                if value not in (None, [], {}) and value is not False:
                    self.refuse(
                        f"its configuration has {key} = {value!r}, which the installed PEFT does "
                        "not know; update PEFT, and dora-cache if that does not help."
                    )
            elif value != defaults[key] and (value or defaults[key]):
                self.refuse(
                    f"its configuration has {key} = {value!r}, which a pool does not serve. Load "
                    "it with PEFT, one adapter at a time, or train without it."
                )
        self.config = defaults | self.config
        self.check_init(self.config["init_lora_weights"])
        if self.config["lora_bias"] and self.config["use_dora"]:
            self.refuse("its configuration has both lora_bias and use_dora, which PEFT refuses.")
        saved = self.config["modules_to_save"]
        if saved is not None and not _are_strings(saved):
            self.refuse("modules_to_save in its configuration is no list of names; correct it.")
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(self.config[name] or {}, dict):
                self.refuse(f"{name} in its configuration is no mapping; correct it.")

    def check_init(self, init: Any) -> None:
        if any(init is one or (one == init and isinstance(init, str)) for one in _INITS):
            return
        lowered = str(init).lower()
        if lowered.startswith(_WRITING_INITS):
            self.refuse(
                f"its init_lora_weights is {init!r}, with which PEFT changes the base model's "
                "weights. Convert it to plain LoRA: model.save_pretrained(..., "
                "path_initial_model_for_weight_conversion=...)."
            )
        if lowered == "loftq":
            self.refuse(
                "its init_lora_weights is 'loftq', with which PEFT changes the base model's "
                "weights. If the model has those weights already, save the adapter with "
                "init_lora_weights=True in its configuration."
            )
        self.refuse(
            f"its init_lora_weights is {init!r}, which is not known here. If it leaves the base "
            "model's weights as they are, save the adapter with init_lora_weights=True."
        )

    def sort_keys(self) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
        """Sort the file's keys by module: those of adapters, and those of replaced modules."""
        adapters: dict[str, dict[str, str]] = {}
        replaced: dict[str, dict[str, str]] = {}
        rest: list[tuple[str, str]] = []
        for key in self.header:
            body = key.removeprefix(PREFIX)
            if body == key:
                self.refuse(
                    f"{key} does not begin with {PREFIX}, as what PEFT saves does; save it with "
                    "PeftModel.save_pretrained."
                )
            match = _ADAPTER_KEY.fullmatch(body)
            if match is None or self.replaced_module(body) is not None:
                rest.append((key, body))
                continue
            module, suffix = match.groups()
            keys = adapters.setdefault(module, {})
            short = _SHORT[suffix]
            if short in keys:
                self.refuse(f"it has both {keys[short]} and {key}; remove one.")
            keys[short] = key
        wrapped = frozenset(adapters)
        for key, body in rest:
            owner = self.replaced_module(body)
            if owner is None:
                self.sort_base(key, body, wrapped, adapters)
                continue
            leaf = body[len(owner) + 1 :]
            # With bias="all" PEFT saves such a bias three times, and on loading uses the one
            # under its plain name.
            if not leaf.startswith(("original_module.", "modules_to_save.")):
                replaced.setdefault(owner, {})[leaf] = key
        self.require_saved(replaced)
        return adapters, replaced

    def sort_base(
        self, key: str, body: str, wrapped: frozenset[str], adapters: dict[str, dict[str, str]]
    ) -> None:
        """Sort a key of a parameter of the base model: a trained bias, or a weight as it is."""
        path, _, leaf = body.rpartition(".")
        inner = path.removesuffix(".base_layer")
        if inner != path and inner in wrapped:
            path = inner
        elif path in wrapped and leaf == "bias":
            self.refuse(
                f"{key} is an old spelling, which PEFT does not load; rename it to "
                f"{PREFIX}{path}.base_layer.bias."
            )
        owner = self.place(path).module
        own: Tensor | None = owner._parameters.get(leaf)
        own = owner._buffers.get(leaf) if own is None else own
        if own is None:
            self.refuse(
                f"{key} is neither of an adapter nor of the model, whose {path} has no {leaf}; "
                "add it to the model that it was trained for."
            )
        if leaf == "bias":
            adapters.setdefault(path, {})["bias"] = key
            return
        self.require(key, tuple(own.shape), path, _FLOATS if own.is_floating_point() else _WHOLE)
        self.files._carried.append((key, weakref.ref(owner), leaf))

    def replaced_module(self, body: str) -> str | None:
        """Return the module named by ``modules_to_save`` that a key of the file is of."""
        steps = body.split(".")
        for count in range(1, len(steps)):
            module = ".".join(steps[:count])
            if module in self.places and self.is_saved(module):
                return module
        return None

    def is_saved(self, module: str) -> bool:
        """Whether the adapter has a copy of a module of its own."""
        return module.endswith(self.saved) or module in self.tied

    def find_tied(self) -> frozenset[str]:
        """Return what shares its weight with a saved module, where that is to stay so."""
        if not self.config["ensure_weight_tying"]:
            return frozenset()
        saved = [module for module in self.places if module.endswith(self.saved)]
        return frozenset(other for module in saved for other in self.sharing(module))

    def sharing(self, module: str) -> list[str]:
        """Return the other modules whose weight is the same parameter."""
        weight = self.places[module].module._parameters.get("weight")
        return [
            other
            for other, place in self.places.items()
            if weight is not None
            and other != module
            and place.module._parameters.get("weight") is weight
        ]

    def check_tied(self, adapters: Iterable[str], replaced: Iterable[str]) -> None:
        """Require that the file has what PEFT ties on loading."""
        if not self.config["ensure_weight_tying"]:
            return
        for having in (frozenset(adapters), frozenset(replaced)):
            for module in having:
                for other in self.sharing(module):
                    if other not in having:
                        self.refuse(
                            f"it has ensure_weight_tying, and weights for {module} but not for "
                            f"{other}, which shares its weight; save it with a newer PEFT."
                        )

    def require_saved(self, replaced: Mapping[str, Mapping[str, str]]) -> None:
        """Require the tensors of all modules that the adapter should have a copy of."""
        for module, place in self.places.items():
            if not self.is_saved(module) or any(
                module.startswith(f"{owner}.") for owner in replaced
            ):
                continue
            for leaf in _state(place.module):
                if leaf not in replaced.get(module, {}):
                    self.refuse(
                        f"modules_to_save has {module}, but {WEIGHTS} has no {module}.{leaf}; "
                        "save the adapter again."
                    )

    def adapter_part(self, module: str, keys: dict[str, str]) -> Part:
        place = self.place(module)
        base = place.module
        kind = _kind(base)
        why = _why_unserved(place, dora=self.config["use_dora"])
        if why:
            self.refuse(f"it has weights for {module}, and {why}.")
        if keys.keys() == {"bias"}:
            shape = tuple(base.bias.shape)  # type: ignore[arg-type]
            self.require(keys["bias"], shape, module)
            alone = kind if kind in {"linear", "conv"} else "replaced"
            return self.part(module, alone, 0, 1.0, {"bias": shape}, _Source(keys))
        self.require_complete(module, keys)
        spelled = "lora_embedding_" in keys["A"]
        if kind is None or spelled != ("lora_embedding_" in keys["B"]):
            self.refuse_layer(module, base)
        if spelled != (kind == "embedding"):
            self.refuse(
                f"{keys['A']} is for {'an embedding' if spelled else 'another kind of layer'}, but "
                f"{module} is {type(base).__name__}; add it to the model that it was trained for."
            )
        rank, scaling = self.resolve(module)
        groups = base.groups if isinstance(base, _CONVOLUTIONS) else 1
        if rank % groups:
            self.refuse(f"its rank for {module} is {rank}, no multiple of its {groups} groups.")
        needed = _file_shapes(base, rank)
        for short, key in keys.items():
            self.require(key, needed[short], module)
        inner, out = needed["A"], needed["B"][0]
        shapes = {
            short: inner if short == "A" else (out, rank) if short == "B" else (out,)
            for short in keys
        }
        return self.part(module, kind, rank, scaling, shapes, _Source(keys, groups))

    def replaced_part(self, module: str, keys: dict[str, str]) -> Part:
        own = _state(self.place(module).module)
        shapes: dict[str, tuple[int, ...]] = {}
        for leaf, key in keys.items():
            if leaf not in own:
                self.refuse(
                    f"the model's {module} has no {leaf}, of which the file has {key}; add the "
                    "adapter to the model that it was trained for."
                )
            shapes[leaf] = tuple(own[leaf].shape)
            dtypes = _FLOATS if own[leaf].is_floating_point() else _WHOLE
            self.require(key, shapes[leaf], module, dtypes)
        return self.part(module, "replaced", 0, 1.0, shapes, _Source(keys))

    def part(
        self,
        module: str,
        kind: str,
        rank: int,
        scaling: float,
        shapes: dict[str, tuple[int, ...]],
        source: _Source,
    ) -> Part:
        outer = self.place(module).outer
        self.files._sources[outer] = source
        return Part(outer, kind, rank, scaling, MappingProxyType(shapes))

    def resolve(self, module: str) -> tuple[int, float]:
        """Return rank and scaling of the adapter on a module, as PEFT resolves them."""
        from peft.utils.other import get_pattern_key

        found = []
        for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            patterns = self.config[pattern] or {}
            try:
                value = patterns.get(get_pattern_key(patterns, module), self.config[default])
            except re.error as error:
                self.refuse(f"{pattern} in its configuration has a bad pattern: {error}.")
            found.append(value)
        rank, alpha = found
        if type(rank) is not int or rank < 1:
            self.refuse(f"its rank for {module} is {rank!r}; it must be a whole number above 0.")
        if type(alpha) not in {int, float} or not math.isfinite(alpha):
            self.refuse(f"its lora_alpha for {module} is {alpha!r}; it must be a number.")
        return rank, alpha / (math.sqrt(rank) if self.config["use_rslora"] else rank)

    def require_complete(self, module: str, keys: Mapping[str, str]) -> None:
        """Refuse tensors without those that belong to them, and those that PEFT would not load."""
        needed = {"A", "B"}
        for setting, short in (("use_dora", "magnitude"), ("lora_bias", "bias_B")):
            if self.config[setting]:
                needed.add(short)
            elif short in keys:
                self.refuse(
                    f"it has {keys[short]}, but its configuration does not have {setting}; save "
                    "the adapter again."
                )
        for short in sorted(needed - keys.keys()):
            self.refuse(f"{WEIGHTS} has no {_LONG[short]} for {module}; save the adapter again.")

    def require(
        self, key: str, shape: tuple[int, ...], module: str, dtypes: tuple[str, ...] = _FLOATS
    ) -> None:
        """Require that a tensor of the file has a shape and one of the dtypes."""
        dtype, found = self.header[key]
        if dtype not in dtypes:
            self.refuse(f"{key} is {dtype}, not one of {', '.join(dtypes)}; save it as one.")
        if found != shape:
            self.refuse(
                f"{key} is {found}, but the model's {module} needs {shape}; add it to the model "
                "that it was trained for."
            )

    def require_one_name(self, module: str) -> None:
        if self.place(module).shared:
            self.refuse(
                f"it has weights for {module}, which the model has under several names; PEFT "
                "adapts only one of them, and a pool cannot tell them apart."
            )

    def place(self, module: str) -> _Place:
        found = self.places.get(module)
        if found is None:
            near = difflib.get_close_matches(module, [one for one in self.places if one], 1)
            self.refuse(
                f"the model has no module {module!r}"
                + (f" (the nearest is {near[0]!r})" if near else "")
                + ". Add the adapter to the model that it was trained for; if another version of "
                "its library names modules differently, load it with PEFT and save it again."
            )
        return found

    def refuse_layer(self, module: str, base: nn.Module) -> NoReturn:
        self.refuse(
            f"it has weights for {module}, a {type(base).__name__}, which a pool does not serve; "
            "linear layers, embeddings and convolutions are served. Train without it in "
            "target_modules, or give the model to dora_cache.attach."
        )


def _are_strings(found: object) -> bool:
    return isinstance(found, list) and all(isinstance(one, str) and one for one in found)


def _places(model: nn.Module) -> dict[str, _Place]:
    """Return the modules of the base model by the names that they have without PEFT's layers."""
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper
    from torch._dynamo import OptimizedModule

    around: tuple[tuple[Any, str], ...] = (
        (OptimizedModule, "_orig_mod"),
        ((PeftModel, PeftMixedModel), "base_model"),
        (BaseTuner, "model"),
        (BaseTunerLayer, "base_layer"),
        (AuxiliaryTrainingWrapper, "original_module"),
    )
    found: dict[str, _Place] = {}
    seen: dict[int, _Place] = {}

    def visit(name: str, outer: str, module: nn.Module, parent: nn.Module | None) -> None:
        place = seen.get(id(module))
        if place is not None:
            place.shared = True
            found[name] = place
            return
        base, base_name = module, outer
        while attribute := next((one for kind, one in around if isinstance(base, kind)), ""):
            inner = base._modules.get(attribute)
            if inner is None:
                break
            base_name = f"{base_name}.{attribute}".removeprefix(".")
            if isinstance(base, OptimizedModule):
                outer = base_name
            base = inner
        found[name] = seen[id(module)] = _Place(outer, base, parent)
        for step, child in base._modules.items():
            if child is not None:
                inner_name = f"{name}.{step}".removeprefix(".")
                visit(inner_name, f"{base_name}.{step}".removeprefix("."), child, base)

    visit("", "", model, None)
    return found


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)
    }


def _kind(base: nn.Module) -> str | None:
    """Return what kind of layer a module is, or None if PEFT or a pool cannot adapt it."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(base, nn.Embedding):
        return "embedding"
    if isinstance(base, _CONVOLUTIONS):
        return "conv"
    if isinstance(base, (nn.Linear, Conv1D)):
        return "linear"
    quantized = type(base).__name__.endswith(_QUANTIZED) and _features(base) is not None
    return "linear" if quantized else None


def _features(base: Any) -> tuple[int, int] | None:
    """Return the widths of a linear layer's input and output."""
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures"), ("nx", "nf")):
        found = tuple(getattr(base, name, None) for name in names)
        if all(type(one) is int for one in found):
            return found  # type: ignore[return-value]
    return None


def _file_shapes(base: Any, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the tensors of an adapter on a layer have in the file."""
    kernel: tuple[int, ...] = ()
    groups = 1
    if isinstance(base, nn.Embedding):
        inner, out = base.num_embeddings, base.embedding_dim
    elif isinstance(base, _CONVOLUTIONS):
        inner, out, groups = base.in_channels, base.out_channels, base.groups
        kernel = tuple(base.kernel_size)
    else:
        inner, out = _features(base)  # type: ignore[misc]
    ones = (1,) * len(kernel)
    return {
        "A": (rank, inner, *kernel),
        "B": (out, rank // groups, *ones),
        "magnitude": (1, out, *ones) if kernel else (out,),
        "bias_B": (out,),
        "bias": (out,),
    }


def _why_unserved(place: _Place, *, dora: bool) -> str:
    """Say what about a layer of a known kind would make a pool's output other than PEFT's."""
    base: Any = place.module
    if isinstance(place.parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return f"{type(place.parent).__name__} reads that layer's weight and may not call it"
    if isinstance(base, nn.Embedding):
        # PEFT multiplies what the adapter adds by embed_scale, too.
        if _forward_of(base) is not nn.Embedding.forward or hasattr(base, "embed_scale"):
            return f"{type(base).__name__} has a forward or scale of its own, not nn.Embedding's"
        if base.max_norm is not None:
            return "that embedding has max_norm, which changes weights in its forward"
    elif isinstance(base, _CONVOLUTIONS):
        plain = next(one for one in _CONVOLUTIONS if isinstance(base, one))
        if (_forward_of(base), type(base)._conv_forward) != (
            plain.forward,
            plain._conv_forward,
        ):
            return f"{type(base).__name__} has a forward of its own, not {plain.__name__}'s"
        if any(one != 1 for one in base.dilation) or base.padding_mode != "zeros":
            return "it has a dilation or padding_mode that PEFT's own layers do not follow"
        if base.groups > 1 and dora:
            return "PEFT's norm of a grouped convolution is not that of its weight"
    return ""


def _forward_of(base: nn.Module) -> Any:
    """Return the forward of a module's class, whether or not a pool or a cache stands in for it."""
    kind: Any = plain_class(type(base))
    return kind.forward
