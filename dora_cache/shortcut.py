"""The short way to a hit: what a call got last time, and how to tell that it would get it again.

The long way signs every dependency and asks the backend. A :class:`Shortcut` remembers the facts
that a signature is made of, and compares them one by one; whatever is out of the ordinary fails
the comparison, and then the long way decides.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from dora_cache.copying import Uncopyable
from dora_cache.stamps import place, untraceable

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from dora_cache.backends import Entry, Ready, Value
    from dora_cache.stamps import Stamp

__all__ = ["Shortcut", "make_shortcut"]

_SCALARS = frozenset({str, int, bool, float, torch.Size})


class Shortcut(Uncopyable):
    """One call's last answer.

    Attributes:
        spelled: the arguments that lead to it.
        holds: compares the same as ``guards``, of the value; None where it has to be asked.
        key: the call's key in the backend.
        stamp: of the entry; None once the entry has gone.
        entry: the entry itself, where the backend never drops one of its own accord; else None.
        ready: the entry's.
        check: whether everything is as it was, given the dependencies and the shortcut; raises if
            the dependencies are of other kinds.
        facts: identity, version, storage and address of the tensors, and the scalars.
        guards: compares the tensors' types, dtypes, devices, shapes, strides and
            ``requires_grad``; and what follows operations at present (autocast, transforms,
            tracing, inference mode), which must be what it was.
        place: where new tensors are made, see :func:`dora_cache.stamps.place`.
        precision: that of float32 matrix products.
        default_dtype: PyTorch's.
        gradients: whether the value must not be used while gradients are enabled.
        count: counts a hit; atomic, since it is one call into C.
        phase: at which of so many hits the audit compares contents; -1 for never.
    """

    __slots__ = (
        "check",
        "count",
        "default_dtype",
        "entry",
        "facts",
        "gradients",
        "guards",
        "holds",
        "key",
        "phase",
        "place",
        "precision",
        "ready",
        "spelled",
        "stamp",
    )

    check: Callable[[Sequence[object], Shortcut], bool]
    count: Callable[[], int]
    entry: Entry | None
    facts: tuple[object, ...]
    gradients: bool
    guards: Callable[..., bool]
    holds: Callable[..., bool] | None
    key: Hashable
    phase: int
    place: tuple[torch.device, int]
    precision: object
    default_dtype: torch.dtype
    ready: Ready | None
    spelled: Hashable
    stamp: Stamp | None

    def clear(self) -> None:
        """Lead nowhere from now on, and keep nothing alive."""
        self.stamp = self.entry = self.ready = None


def make_shortcut(
    dependencies: Sequence[object],
    *,
    gradients: bool,
    value: Value | None = None,
    form: str = "items",
) -> Shortcut | None:
    """Note the facts of now; None where they cannot be told shortly, as under autocast.

    Args:
        dependencies: tensors, None, scalars, and shapes.
        gradients: whether the value must not be used while gradients are enabled.
        value: what the entry holds.
        form: how the dependencies will be given to ``check``: one by one as the ``"items"`` of
            something, as the keys and values of a ``"mapping"``, or as a ``"tensor"``.
    """
    if (
        torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_function_stack()  # a default device, which hits have none of
        or not _trusted()
    ):
        return None
    pattern = ""
    facts: list[object] = []
    tensors: list[Tensor] = []
    for item in dependencies:
        kind = type(item)
        if kind is nn.Parameter or kind is Tensor:
            assert isinstance(item, Tensor)  # noqa: S101 - for the type checker
            if any(item is other for other in tensors):  # the guards take no tensor twice
                pattern += "r"
            else:
                pattern += "t"
                tensors.append(item)
            address = torch._C._storage_address(item)  # type: ignore[attr-defined]
            facts += (id(item), item._version, address, item.data_ptr())
        elif item is None:
            pattern += "n"
        elif kind in _SCALARS and (kind is not float or item != 0):  # 0.0 equals -0.0
            pattern += "s"
            facts += (kind, item)
        else:
            return None
    if not tensors:
        return None
    shortcut = Shortcut()
    try:
        shortcut.precision = torch._C._get_float32_matmul_precision()
    except RuntimeError:  # it was set for each backend by itself
        return None
    shortcut.default_dtype = torch.get_default_dtype()
    shortcut.check = _checker(pattern, form)
    shortcut.facts = tuple(facts)
    shortcut.guards = _guards(tensors)
    parts = value if isinstance(value, tuple) else () if value is None else (value,)
    distinct = len({id(part) for part in parts}) == len(parts)
    shortcut.holds = _guards(parts) if parts and distinct else None
    shortcut.place = place()
    shortcut.gradients = gradients
    return shortcut


@functools.cache
def _checker(pattern: str, form: str) -> Callable[[Sequence[object], Shortcut], bool]:
    """Write the comparison out for dependencies of certain kinds, as one expression.

    It runs at every hit, where each call of a function would cost a twentieth of the whole.
    """
    names = [f"d{index}" for index in range(len(pattern))]
    facts, nones, tensors = [], [], []
    for name, kind in zip(names, pattern, strict=True):
        if kind in "tr":
            facts.append(f"id({name}), {name}._version, address({name}), {name}.data_ptr()")
            if kind == "t":
                tensors.append(name)
        elif kind == "n":
            nones.append(f"{name} is None")
        else:
            facts.append(f"type({name}), {name}")
    terms = [
        *nones,
        f"({', '.join(facts)},) == shortcut.facts",
        f"shortcut.guards({', '.join(tensors)})",
        "not function_modes()",
        "not any_autocast()",
        "forward_ad._current_level < 0",
        "precision() == shortcut.precision",
        "default_dtype() is shortcut.default_dtype",
        "not (shortcut.gradients and grad_enabled())",
        "(shortcut.ready is None or not capturing())",
    ]
    if torch.cuda.is_available():  # else there is one place only
        terms.append("default_device() == shortcut.place[0].type")
        if torch.cuda.device_count() > 1:
            terms.append("place() == shortcut.place")
    given = "*dependencies, *dependencies.values()" if form == "mapping" else "dependencies"
    source = (
        f"def check(dependencies, shortcut):\n"
        f"    {', '.join(names)}{'' if form == 'tensor' else ','} = {given}\n"
        f"    return {' and '.join(terms)}\n"
    )
    namespace: dict[str, Any] = {
        "any_autocast": torch._C._is_any_autocast_enabled,
        "address": torch._C._storage_address,  # type: ignore[attr-defined]
        "capturing": getattr(torch._C, "_cuda_isCurrentStreamCapturing", bool),
        "default_device": torch._C._get_default_device,
        "default_dtype": torch.get_default_dtype,
        "forward_ad": forward_ad,
        "function_modes": torch._C._len_torch_function_stack,
        "grad_enabled": torch.is_grad_enabled,
        "place": place,
        "precision": torch._C._get_float32_matmul_precision,
    }
    exec(source, namespace)  # noqa: S102 - made of the letters above alone
    check: Callable[[Sequence[object], Shortcut], bool] = namespace["check"]
    return check


def _guards(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    from torch._C._dynamo.guards import TensorGuards

    make: Any = TensorGuards
    check: Callable[..., bool] = make(
        *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
    ).check
    return check


@functools.cache
def _trusted() -> bool:
    """Try PyTorch's tensor guards, which are no public interface, on all that they are to notice.

    Called where nothing follows operations, so that the guards are made in an ordinary state.
    """
    if untraceable() or torch._C._is_any_autocast_enabled():
        return False
    with torch.inference_mode(mode=False):
        tensor = torch.zeros(2, 2)
        noticed = []
        try:
            guards = _guards([tensor])
            held = guards(tensor) and guards(torch.ones(2, 2))
            others = (
                tensor.clone().requires_grad_(),
                nn.Parameter(tensor, requires_grad=False),
                tensor.double(),
                tensor.view(4),
                torch.zeros(2, 2).as_strided((2, 2), (1, 2)),
                tensor.to("meta"),
            )
            noticed += [not guards(other) for other in others]
            for context in (
                lambda: torch.autocast("cpu", dtype=torch.bfloat16),
                torch.inference_mode,
                _Mode,
            ):
                with context():
                    noticed.append(not guards(tensor))

            def look(x: Tensor) -> Tensor:
                noticed.append(not guards(tensor))
                return x

            torch.vmap(look)(tensor)
        except Exception:  # noqa: BLE001 - they are not there, or are something else
            return False
        return bool(held and all(noticed))


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows operations, and does nothing about them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})
