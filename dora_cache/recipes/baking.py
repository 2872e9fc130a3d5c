"""Layers for export: copies in which what the weights alone determine is a constant.

While a model is baked, copies of its adapter layers are in their places, and an exporter traces
these. A copy has weights of its own, so that the program does not follow the model afterwards, and
reads what the cache would store from buffers that were derived from them.

- As *values*: calls of decorated functions return buffers. What a layer's own forward does with
  them, and the adapter's factors, are as they are.
- As *weights*: PEFT's ``merge()`` of the copy. Nothing is left of the adapter.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dora_cache.attributes import SLOT
from dora_cache.backends.storage import storage_bytes
from dora_cache.core.baked import Baked, BakedLayer
from dora_cache.core.decorator import derivation_of, derivations_of
from dora_cache.core.facts import UncheckableError, read
from dora_cache.core.keys import PLAIN_KEYS
from dora_cache.core.naming import names_of_owners
from dora_cache.errors import BakedError
from dora_cache.lifecycle import plain_class
from dora_cache.lifecycle.observe import PLAIN

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from dora_cache.core.binding import Binding
    from dora_cache.core.decorator import Derivation
    from dora_cache.core.engine import Engine

__all__ = ["DIRECT", "bake"]


@contextmanager
def bake(cache: Engine, *, weights: bool) -> Iterator[Baked]:
    """Put copies with constants in the places of adapter layers for a while.

    Args:
        cache: the model's.
        weights: whether to add adapters to the base layers' weights, where that can be done.

    Raises:
        BakedError: the model is in training mode, its adapters are merged or disabled, or no layer
            has anything to bake; at the end, or when a program is traced, the weights are not what
            they were.
    """
    roots = [part for weak in cache.parts.values() if (part := weak()) is not None]
    names = names_of_owners({name: root for name, weak in cache.parts.items() if (root := weak())})
    layers, derived = [], {}
    places = list(_places(cache, roots))
    owners = {id(owner): owner for _, _, owner in places}
    for owner in owners.values():
        name = names.get(id(owner), type(owner).__name__)
        try:
            layers.append(_Layer(name, owner, weights=weights))
        except _DerivedError as error:
            if error.reason:
                derived[name] = error.reason
    if not layers:
        raise BakedError(_nothing(roots, derived))
    copies = {id(layer.owner): layer for layer in layers}
    swapped = []
    try:
        for parent, name, owner in places:
            layer = copies.get(id(owner))
            if layer is not None:
                swapped.append((parent, name, layer))
                parent._modules[name] = layer.copy  # past whoever follows registrations
        yield Baked(tuple(layer.described() for layer in layers), derived, weights)
    finally:
        others = [one for one in swapped if not one[2].restore(one[0], one[1])]
    for _, name, _ in others:
        msg = f"{name!r} was replaced within baked(): replace modules before it, and export again"
        raise BakedError(msg)
    for layer in layers:
        layer.check()


class _DerivedError(Exception):
    """A layer has nothing to bake; its values, if any, are derived in the program."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


class _Layer:
    """A layer, and the copy that stands in for it.

    Args:
        name: the layer's.
        owner: the layer.
        weights: see :func:`bake`.

    Raises:
        BakedError: the layer is trained, or has merged or disabled adapters.
        _DerivedError: nothing can be baked.
    """

    def __init__(self, name: str, owner: nn.Module, *, weights: bool) -> None:
        self.name = name
        self.owner = owner
        self._binding: Binding = owner.__dict__[SLOT]
        self.adapters = _active(name, owner, self._binding)
        for module in owner.modules():
            if "forward" in module.__dict__:
                msg = "a forward is set on the layer or a part of it, as offloading does"
                raise _DerivedError(msg)
        self._state = self._read()
        with torch.inference_mode(mode=False), torch.no_grad():
            self._copy()
            reason = self._fold() if weights else None
            self.holds: tuple[str, ...]
            if weights and not reason:
                self.holds = ("weight",)
                tensors = [*_base(self.copy).parameters(), *_base(self.copy).buffers()]
            else:
                tensors = self._record()
                if not tensors:
                    raise _DerivedError(reason or "")
            self.nbytes = storage_bytes(tuple(tensors))
        if self._read() != self._state:
            msg = f"the weights of {name!r} changed while it was baked: write to them before it"
            raise BakedError(msg)

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """Copy and pickle as None: a copy of the copy is of no block."""
        return type(None), ()

    def described(self) -> BakedLayer:
        """Return what users see."""
        return BakedLayer(self.name, self.adapters, self.holds, self.nbytes)

    def check(self) -> None:
        """Raise a :class:`BakedError` if the layer is not what the copy was made of."""
        if self._read() != self._state:
            msg = (
                f"{self.name!r} has changed within baked(), whose constants are of what it was: "
                "change weights, adapters and scalings before it, and export again"
            )
            raise BakedError(msg)

    def restore(self, parent: nn.Module, name: str) -> bool:
        """Put the layer back; return whether the copy was where it had been put."""
        there = parent._modules.get(name) is self.copy
        if there:
            parent._modules[name] = self.owner
        return there

    def _read(self) -> tuple[object, ...]:
        """Return the facts of everything in the layer that a program depends on."""
        owner: Any = self.owner
        settings = [
            owner.__dict__.get(name)
            for name in ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters")
        ]
        voided = [self._binding.voided(name) for name in (*self.adapters, None)]
        try:
            reading = read([*owner.parameters(), *owner.buffers()])
        except UncheckableError as error:
            msg = f"{self.name!r} cannot be baked, since its weights cannot be checked: {error}"
            raise BakedError(msg) from None
        return reading.rows, repr(settings), voided, owner.training

    def _copy(self) -> None:
        """Make the copy, with the active adapters alone."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.copy: Any = copy.deepcopy(self.owner)
        for part in self.copy.modules():
            if isinstance(part, BaseTunerLayer):
                for adapter in _keys(part).difference(self.adapters):
                    part.delete_adapter(adapter)

    def _fold(self) -> str | None:
        """Make the adapters part of the copy's weights; return why not, or None."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        tuners: list[Any] = [one for one in self.copy.modules() if isinstance(one, BaseTunerLayer)]
        if not tuners:
            return "it is no layer of PEFT's"
        base = _base(self.copy)
        inputs = _probes(base)
        if inputs is None:
            return f"a {type(base).__name__} cannot be merged and compared with what it was"
        try:
            expected = [self.copy(x) for x in inputs]
            for tuner in reversed(tuners):
                tuner.merge(safe_merge=True)
            if not all(map(_close, map(base, inputs), expected)):  # of some kinds PEFT's is not
                reason = "PEFT's merge() gives other outputs than the adapter"
            else:
                reason = None
        except Exception as error:  # noqa: BLE001 - a kind that cannot be merged
            reason = f"PEFT cannot merge it: {type(error).__name__}: {error}"
        if reason is not None:
            self._copy()
            return reason
        for tuner in tuners:
            tuner.__class__ = _refusing(plain_class(type(tuner)), {"forward": _base_forward})
            tuner.merged_adapters = []  # else PEFT unmerges before it asks
            for name in (*tuner.adapter_layer_names, *tuner.other_param_names):
                for where in (tuner._modules, tuner._parameters, tuner._buffers, tuner.__dict__):
                    where.pop(name, None)
        self._watch()
        return None

    def _record(self) -> list[Tensor]:
        """Have the copy read its values from buffers; return these."""
        found: list[Tensor] = []
        held: dict[str, None] = {}
        parts = dict(self.copy.named_modules())
        for where, original in self.owner.named_modules():
            binding: Binding | None = original.__dict__.get(SLOT)
            part = parts.get(where)
            if binding is None or part is None:
                continue
            constants = _Constants(part, binding)
            part.__dict__[SLOT] = constants
            part.__class__ = _refusing(plain_class(type(part)), _overrides(type(original)))
            if binding.bake is not None:
                for one in self.adapters:
                    binding.bake(part, one, constants.keep)
            for adapter, job in (binding.warmers or _none)(part, list(self.adapters)):
                if adapter is None or adapter in self.adapters:
                    job()
            constants.recording = False
            found += [part._buffers[name] for names in constants.names.values() for name in names]
            held.update(constants.kinds)
        self.holds = tuple(held)
        self._watch()
        return found

    def _watch(self) -> None:
        """Have the copy compare the layer with what it was before each forward."""
        self.copy.__dict__[_LAYER] = self


def _active(name: str, owner: Any, binding: Binding) -> tuple[str, ...]:
    """Return the adapters that are active in a layer; ``""`` stands for one without a name."""
    if binding.why_training(owner) is not None:
        msg = f"nothing is baked in training mode: call eval() on the model ({name!r} trains)"
        raise BakedError(msg)
    if not hasattr(owner, "active_adapters"):
        return ()
    if owner.merged_adapters:
        merged = ", ".join(map(repr, owner.merged_adapters))
        msg = (
            f"{merged} is merged into the weights of {name!r}: "
            "export it as it is, without baked(), or call unmerge_adapter() first"
        )
        raise BakedError(msg)
    if owner.disable_adapters:
        msg = f"the adapters of {name!r} are disabled: enable them, or export without baked()"
        raise BakedError(msg)
    there = _keys(owner)
    found = tuple(one for one in owner.active_adapters if one in there)
    if not found:
        raise _DerivedError
    return found


def _keys(layer: Any) -> set[str]:
    """Return the names of the adapters that a layer of PEFT's has."""
    parts: list[Any] = [getattr(layer, name, None) for name in layer.adapter_layer_names]
    return {key for part in parts if hasattr(part, "keys") for key in part.keys()}  # noqa: SIM118


def _probes(base: Any) -> list[Tensor] | None:
    """Return inputs of a base layer that involve all of its weight; None for an unknown one."""
    weight = base._parameters.get("weight")
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return None
    if type(base) is nn.Embedding:
        rows = torch.arange(len(weight), device=weight.device)
        return [some[None] for some in torch.split(rows, _ROWS)]
    if type(base) is nn.Linear:
        shape: tuple[int, ...] = (_SAMPLES, base.in_features)
    elif type(base).__name__ == "Conv1D" and weight.dim() == 2:  # noqa: PLR2004 - Transformers'
        shape = (_SAMPLES, len(weight))
    elif type(base) in {nn.Conv1d, nn.Conv2d, nn.Conv3d}:
        reach = [d * (k - 1) + 1 for d, k in zip(base.dilation, base.kernel_size, strict=True)]
        shape = (1, base.in_channels, *(2 * one for one in reach))
    else:
        return None
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(shape, generator=generator, dtype=torch.float32)
    return [found.to(weight.device, weight.dtype)]


_ROWS = 4096
_SAMPLES = 8


def _close(output: Any, expected: Any) -> bool:
    """Whether two outputs differ by no more than what rounding the merged weight changes."""
    if output.shape != expected.shape or output.dtype != expected.dtype:
        return False
    exact = expected.double()
    limit = max(4 * torch.finfo(output.dtype).eps, 1e-5)
    return bool((output.double() - exact).norm() <= limit * exact.norm())


def _base(layer: Any) -> nn.Module:
    base: nn.Module = layer.get_base_layer()
    return base


def _none(*_: object) -> tuple[()]:
    return ()


def _nothing(roots: Sequence[nn.Module], derived: dict[str, str]) -> str:
    reasons = "; ".join(f"{name}: {why}" for name, why in list(derived.items())[:3])
    kinds = ", ".join(type(root).__name__ for root in roots)
    return (
        f"{kinds or 'the target'} has no layer to bake"
        f"{f': {reasons}' if reasons else ': no active adapter derives a value'}; "
        "export without baked(), and the program derives what it needs"
    )


class _Constants:
    """Resolves the calls of one copy: returns the buffers that hold their values.

    Attributes:
        adapter: as the binding's.
        dense: whether the base layer's weight is an ordinary parameter.
        cache: itself, for decorated functions.
        reader: likewise.
        holder: None.
        recording: whether values are derived and kept.
        names: of the buffers, by call.
        kinds: names of the values.
    """

    def __init__(self, owner: Any, binding: Binding) -> None:
        self.adapter = binding.adapter
        base = owner.get_base_layer() if hasattr(owner, "get_base_layer") else owner
        self.dense = type(base._parameters.get("weight")) is nn.Parameter
        self.cache = self
        self.reader = self
        self.holder = None  # compiled code reads the copy
        self.recording = True
        self.names: dict[Hashable, list[str]] = {}
        self.kinds: dict[str, None] = {}
        self._single: dict[Hashable, bool] = {}
        self._owner = owner

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """Copy and pickle as None."""
        return type(None), ()

    def lookup(
        self, derivation: Derivation, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return the constants of a call; derive them if there are none."""
        return self.read(derivation, args, kwargs)

    def read(self, derivation: Derivation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Likewise."""
        spelled: Hashable = None
        if all([type(one) in PLAIN_KEYS for one in (*args[1:], *kwargs.values())]):  # noqa: C419
            spelled = (derivation.number, args[1:], tuple(kwargs.items()))
            names = self.names.get(spelled)
            if names is not None:
                values = tuple([args[0]._buffers[name] for name in names])
                return values[0] if self._single[spelled] else values
        value = derivation.function(*args, **kwargs)
        if self.recording and spelled is not None:
            self._keep(derivation.name, spelled, value)
        return value

    def keep(self, name: str, value: Any) -> list[str]:
        """Keep a value; return the names of its buffers."""
        self._keep(name, (name, len(self.names)), value)
        return list(self.names.values())[-1]

    def _keep(self, name: str, spelled: Hashable, value: Any) -> None:
        single = isinstance(value, Tensor)
        values = (value,) if single else value
        if type(values) is not tuple or not all(isinstance(one, Tensor) for one in values):
            return
        names = []
        for one in values:
            names.append(f"derived_{len(self._owner._buffers)}")
            # A storage of its own: what is counted is what programs hold.
            self._owner.register_buffer(names[-1], one.detach().clone())
        self.names[spelled], self._single[spelled] = names, single
        self.kinds[name] = None


_LAYER = "_dora_cache_baked"
DIRECT = "__dora_cache_direct__"
"""Where what stands in for a method keeps what is called in a copy: it returns None, or raises an
UncheckableError, for the library's own method to run."""


def _overrides(observed: type) -> dict[str, Callable[..., Any]]:
    """Return what stands in for a layer's methods, for its copy."""
    found: dict[str, Callable[..., Any]] = {}
    for name, value in vars(observed).items():
        direct = getattr(value, DIRECT, None)
        if direct is not None:
            found[name] = _falling_back(direct, getattr(plain_class(observed), name))
        elif callable(value) and derivation_of(value) is not None:
            found[name] = value
    return found


def _falling_back(direct: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = None
        with suppress(UncheckableError):  # the library's own code deals with it
            result = direct(self, *args, **kwargs)
        return plain(self, *args, **kwargs) if result is None else result

    return method


def _base_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.base_layer(*args, **kwargs)


_REFUSED = (
    "_apply",
    "_load_from_state_dict",
    "delete_adapter",
    "enable_adapters",
    "merge",
    "scale_layer",
    "set_adapter",
    "set_scale",
    "unmerge",
    "unscale_layer",
    "update_layer",
)


def _refusing(plain: type, overrides: dict[str, Callable[..., Any]]) -> type:
    """Return a class of copies: they check before each forward, and refuse to be changed."""
    forward: Any = overrides.get("forward", plain.forward)  # type: ignore[attr-defined]

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            layer = self.__dict__.get(_LAYER)
            if layer is not None:
                layer.check()
        return forward(self, *args, **kwargs)

    def train(self: Any, mode: bool = True) -> Any:  # noqa: FBT001, FBT002 - as nn.Module's
        if mode:
            _refuse("train")
        return plain.train(self, mode)  # type: ignore[attr-defined]

    def refusing(name: str) -> Callable[..., None]:
        return lambda *_, **__: _refuse(name)

    namespace = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        PLAIN: plain,
        **{name: refusing(name) for name in _REFUSED if hasattr(plain, name)},
        **overrides,
        "forward": checked,
        "train": train,
    }
    return type(plain.__name__, (plain,), namespace)


def _refuse(name: str) -> None:
    msg = f"{name}() within baked(): the model is being exported; do it before or after the block"
    raise BakedError(msg)


def _places(
    cache: Engine, roots: Sequence[nn.Module]
) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield where in the models the outermost layers are that the cache is bound to."""
    seen: set[int] = set()
    waiting = list(roots)
    while waiting:
        parent = waiting.pop()
        if id(parent) in seen:
            continue
        seen.add(id(parent))
        for name, child in parent._modules.items():
            if child is not None:
                binding = child.__dict__.get(SLOT)
                if binding is not None and binding.cache is cache and _is_run(child):
                    yield parent, name, child
                else:
                    waiting.append(child)


def _is_run(owner: nn.Module) -> bool:
    """Whether an owner is run where it is in the model: LyCORIS' modules, for one, are not."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(owner, BaseTunerLayer) or bool(derivations_of(plain_class(type(owner))))
