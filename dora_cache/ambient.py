"""State that affects operations: autocast, modes, tracing, gradients, default dtype and device.

The only module of the core that calls PyTorch's private functions. Each is tried at import on what
it must notice. One that fails, or is missing, is replaced by a public way that is slower or notices
too much: then calls go past the cache, and no output is wrong.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _modules
from torch.nn.utils import parametrize
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

__all__ = [
    "any_autocast",
    "cuda_device",
    "current_device",
    "default_device",
    "dispatch_modes",
    "environment",
    "forward",
    "function_modes",
    "functorch_stack",
    "global_forward_hooks",
    "grad_enabled",
    "is_capturing",
    "is_quiet",
    "parametrizations_cached",
    "place",
    "precision",
    "raw_stream",
    "storage_numbered",
    "storage_of",
    "storage_uses",
    "tensor_guards",
    "tracing_state",
    "untraceable",
    "without_functions",
]

_C: Any = torch._C
_AUTOCAST_KINDS = ("cpu", "cuda", "xpu", "mps")
grad_enabled = torch.is_grad_enabled
_CPU = torch.device("cpu"), 0


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows operations, and changes none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


def _tried(
    find: Callable[[], Callable[..., Any]],
    works: Callable[[Callable[..., Any]], bool],
    otherwise: Callable[..., Any],
) -> Any:
    """Return a private function of PyTorch's if it notices what it must, else ``otherwise``.

    Args:
        find: returns the function; raises AttributeError or ImportError if it is missing.
        works: whether it does what it is used for, tried on what it must notice.
        otherwise: a public way, slower, or one that takes every state for an unusual one.
    """
    with suppress(Exception), torch.inference_mode(mode=False):
        found = find()
        if works(found):
            return found
    return otherwise


def _autocast_is_on() -> bool:
    return any(torch.is_autocast_enabled(kind) for kind in _AUTOCAST_KINDS)


def _notices_autocast(found: Callable[[], bool]) -> bool:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return found() is True


def _notices_function_modes(found: Callable[[], int]) -> bool:
    before = found()
    with torch.device("cpu"):
        return found() == before + 1


def _notices_dispatch_modes(found: Callable[[], int]) -> bool:
    before = found()
    with _Mode():  # type: ignore[no-untyped-call]
        return found() == before + 1


def _notices_functorch(found: Callable[[], object]) -> bool:
    seen: list[object] = []

    def look(x: Tensor) -> Tensor:
        seen.append(found())
        return x

    torch.vmap(look)(torch.zeros(1))
    return found() is None and seen[0] is not None


def _notices_storages(found: Callable[[Tensor], int]) -> bool:
    one = torch.zeros(4)
    return found(one) == found(one[1:]) == one.untyped_storage()._cdata != found(one.clone())


def _notices_devices(found: Callable[[], str]) -> bool:
    return torch.device(found()) == torch.get_default_device() or bool(function_modes())


def _storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


any_autocast: Callable[[], bool] = _tried(
    lambda: _C._is_any_autocast_enabled, _notices_autocast, _autocast_is_on
)
"""Whether autocast is on for any device type."""

function_modes: Callable[[], int] = _tried(
    lambda: _C._len_torch_function_stack, _notices_function_modes, lambda: 1
)
"""Return how many function modes are active; a default device set with ``with`` is one."""

dispatch_modes: Callable[[], int] = _tried(
    lambda: _C._len_torch_dispatch_stack, _notices_dispatch_modes, lambda: 1
)

tracing_state: Callable[[], object] = getattr(
    _C,
    "_get_tracing_state",
    lambda: torch.jit.is_tracing() or None,  # type: ignore[attr-defined, no-untyped-call]
)
"""Return what ``torch.jit.trace`` records into; None if nothing is traced."""

functorch_stack: Callable[[], object] = _tried(
    lambda: _C._functorch.peek_interpreter_stack, _notices_functorch, lambda: True
)
"""Return the innermost functorch transform (vmap, grad, ...), or None."""

storage_of: Callable[[Tensor], int] = _tried(
    lambda: _C._storage_address, _notices_storages, _storage_of
)
"""Return a number that no other living storage has."""

default_device: Callable[[], str] = _tried(
    lambda: _C._get_default_device, _notices_devices, lambda: str(torch.get_default_device())
)
"""Return the default device, function modes aside."""

precision: Callable[[], str] = _tried(
    lambda: _C._get_float32_matmul_precision,
    lambda found: found() == torch.get_float32_matmul_precision(),
    torch.get_float32_matmul_precision,
)
"""Return that of float32 matrix products; raises RuntimeError if each backend has its own."""


class _Differentiating:
    """Stands for forward-mode differentiation at all times."""

    _current_level = 0


def _forward() -> Any:
    with suppress(Exception), forward_ad.dual_level():
        if forward_ad._current_level >= 0:
            return forward_ad
    return _Differentiating


forward: Any = _forward()
"""Its ``_current_level`` is negative outside forward-mode differentiation."""

without_functions: Callable[[], AbstractContextManager[object]] = getattr(
    _C, "DisableTorchFunctionSubclass", nullcontext
)
"""A block in which tensors' classes do not follow what is done with them."""

is_capturing: Callable[[], bool] = getattr(
    _C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)
"""Whether the current stream records a CUDA graph."""

raw_stream: Callable[[int], int] = getattr(
    _C, "_cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream
)
"""Return the current CUDA stream of a device, as CUDA knows it."""

cuda_device: Callable[[], int] = getattr(_C, "_cuda_getDevice", torch.cuda.current_device)
_cuda_is_used: Callable[[], bool] = torch.cuda.is_initialized
_HAS_CUDA: bool = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]


def _modes_but_devices() -> bool:
    """Whether a function mode other than a default device is active."""
    try:
        from torch.overrides import _get_current_function_mode_stack
    except ImportError:
        return True
    return not all(
        isinstance(mode, DeviceContext)
        for mode in _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    )


def untraceable() -> bool:
    """Whether somebody follows the operations, so that a stored value must not stand in for them.

    True under jit tracing, functorch transforms (vmap, grad, ...), forward-mode differentiation,
    dispatch and function modes (fake and proxy tensors have one; a default device does not count),
    and while a CUDA graph is captured. Callers look for torch.compile themselves.
    """
    if (
        torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or functorch_stack() is not None
        or forward._current_level >= 0
        or dispatch_modes()
    ):
        return True
    if function_modes() and _modes_but_devices():
        return True
    return _cuda_is_used() and torch.cuda.is_current_stream_capturing()


def place() -> tuple[torch.device, int]:
    """Return the default device of this thread, and which CUDA device ``"cuda"`` means."""
    if not function_modes():
        if not _HAS_CUDA:
            return _CPU
        device = torch.device(default_device())
    else:
        device = torch.get_default_device()
    return device, current_device()


def current_device() -> int:
    """Return the index of the CUDA device that ``"cuda"`` means in this thread."""
    return cuda_device() if _cuda_is_used() else 0


def global_forward_hooks() -> bool:
    """Whether hooks run at the forward of every module."""
    return bool(_modules._global_forward_hooks or _modules._global_forward_pre_hooks)


def parametrizations_cached() -> bool:
    """Whether this is within ``parametrize.cached()``, which does not notice writes."""
    return getattr(parametrize, "_cache_enabled", 1) > 0


def storage_uses(storage: torch.UntypedStorage) -> int:
    """Return how many hold a storage.

    Raises:
        AttributeError: PyTorch does not tell.
    """
    uses: int = _C._storage_Use_Count(storage._cdata)
    return uses


def storage_numbered(number: int) -> torch.UntypedStorage | None:
    """Return the storage that :func:`storage_of` gives a number; None if it has been freed.

    Something must hold a weak reference to it, which keeps the number from being used again.
    """
    found: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(number)
    return found


def environment() -> tuple[object, ...]:
    """Return the settings that change what the same operations compute; equal if they are.

    Autocast for every device type, the precision of float32 matrix products, the default dtype, and
    where new tensors are made that are told no device.
    """
    products: object
    try:
        products = precision()
    except RuntimeError:  # it was set for each backend by itself
        products = (
            torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
            torch.backends.cuda.matmul.fp32_precision,
        )
    default = torch.get_default_dtype()
    if not any_autocast():
        return (products, default, place())
    autocast = tuple(
        (kind, torch.get_autocast_dtype(kind))
        for kind in _AUTOCAST_KINDS
        if torch.is_autocast_enabled(kind)
    )
    return (products, default, place(), autocast)


def is_quiet() -> bool:
    """Whether autocast, function modes and forward-mode differentiation are all off."""
    return not (any_autocast() or function_modes() or forward._current_level >= 0)


def tensor_guards(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """Compile a check of tensors' types, dtypes, devices, shapes, strides and requires_grad.

    It also fails under autocast, inference mode, functorch transforms and dispatch modes that are
    not active now. It is TorchDynamo's own check, in C.

    Tensors that are alike get the same function, so that it stays in the processor's caches.

    Args:
        tensors: each once.

    Returns:
        A function of as many tensors; None if this version of PyTorch has no such check.
    """
    if not _guards_work():
        return None
    alike = tuple([(type(one), one.dtype, one.device, one.size(), one.stride()) for one in tensors])
    found = _known_guards.get(alike)
    # What else it checks is as it was when it was made if it holds at present.
    if found is None or not found(*tensors):
        if len(_known_guards) >= _MOST_GUARDS:
            _known_guards.clear()
        found = _known_guards[alike] = _guards(tensors)
    return found


_known_guards: dict[tuple[object, ...], Callable[..., bool]] = {}
_MOST_GUARDS = 1024


def _guards(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    from torch._C._dynamo.guards import TensorGuards

    make: Any = TensorGuards
    check: Callable[..., bool] = make(
        *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
    ).check
    return check


@functools.cache
def _guards_work() -> bool:
    """Try the tensor guards on all that they must notice, once, in an ordinary state."""
    with torch.inference_mode(mode=False), torch.autocast("cpu", enabled=False):
        tensor = torch.zeros(2, 2, device="cpu")
        noticed = []
        try:
            guards = _guards([tensor])
            held = guards(tensor) and guards(torch.ones(2, 2, device="cpu"))
            others = (
                tensor.clone().requires_grad_(),
                nn.Parameter(tensor, requires_grad=False),
                tensor.double(),
                tensor.view(4),
                torch.zeros(2, 2, device="cpu").as_strided((2, 2), (1, 2)),
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
        except Exception:  # noqa: BLE001 - they are missing, or something else
            return False
        return bool(held and all(noticed))
