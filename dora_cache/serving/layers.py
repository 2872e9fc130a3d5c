"""Layers of a model that adapters of a pool are on."""

from __future__ import annotations

import copy
import functools
import itertools
import threading
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dora_cache.ambient import current_device
from dora_cache.attributes import POOLED, SLOT
from dora_cache.core.decorator import cached, derivation_of
from dora_cache.errors import ConfigError
from dora_cache.lifecycle import plain_class
from dora_cache.recipes.dora.values import bias_of, dense
from dora_cache.recipes.peft_layers import base_layer, weights_of
from dora_cache.serving import kernels, routing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dora_cache.serving.kernels import WithoutKernel
    from dora_cache.serving.residents import Placed
    from dora_cache.serving.routing import Route

__all__ = ["PooledLayer", "Substitute", "pooled_forward"]

_AT_ONCE = 1 << 24
"""Elements of a base weight that are brought to a larger dtype at once."""

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {
    3: functional.conv1d,
    4: functional.conv2d,
    5: functional.conv3d,
}
_counting = threading.Lock()
_FLOATING = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


class Base(nn.Module):
    """Tells whether a base layer is still what adapters' scales were derived from."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = weakref.ref(module)
        self.eval()

    def module(self) -> Any:
        """Return the module that computes ``base(x)``."""
        module: Any = self._module()
        if module is None:
            msg = "the pool's model is gone"
            raise ReferenceError(msg)
        module = base_layer(module) if hasattr(module, "get_base_layer") else module
        return getattr(module, "original_module", module)

    def depends_on(self) -> list[object]:
        """Return what determines the weight, and the bias."""
        base = self.module()
        return [*weights_of(base), bias_of(base)]

    @cached("base weights", depends_on=depends_on, detach=True)
    def mark(self) -> Tensor:
        """Return a tensor that is another one whenever the base layer has changed.

        What adapters derive from the layer is kept with them; this tells whether it still holds.
        """
        return torch.empty(1, dtype=torch.int64)

    def latest(self) -> Tensor:
        """Return :meth:`mark`; in less time where parameters are all that the layer has."""
        state = self.__dict__
        binding: Any = state.get(SLOT)
        try:
            module = state["_module"]()
            of_base = module._modules.get("base_layer", module)._parameters
            weight, bias = of_base["weight"], of_base["bias"]
            shortcut, cache = binding.shortcuts[_MARK], binding.cache
        except (AttributeError, KeyError):  # not where they mostly are, or not asked for before
            return self.mark()
        if type(weight) is nn.Parameter and not cache.bypassing:
            entry = cache.recall(shortcut, (weight, bias))
            if entry is not None:
                return entry.value
        return self.mark()


_MARK = (derivation_of(Base.mark).number,)  # type: ignore[union-attr]


def _rows_at_once(weight: Tensor) -> int:
    return max(1, _AT_ONCE // max(1, weight.shape[1]))


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def rows_of(base: Any) -> Tensor:
    """Return a base layer's weight with a row for each output, dequantized."""
    weight = dense(base)
    if isinstance(base, nn.Embedding) or _is_conv1d(base):
        weight = weight.T
    return weight.detach().flatten(1)


def _is_conv1d(base: nn.Module) -> bool:
    """Whether a base layer is Transformers' Conv1D, whose weight is (in, out)."""
    return plain_class(type(base)).__name__ == "Conv1D" and hasattr(base, "nf")


class PooledLayer:
    """One layer that a pool's adapters may be on.

    Args:
        pool: names the pool; see :func:`dora_cache.serving.routing.find`.
        index: its number.
        module: the layer; a PEFT layer, for a model that PEFT has wrapped.
        name: of the module.
        nested: see :meth:`Route.check`.

    Attributes:
        base: of the layer.
        kind: ``"linear"``, ``"embedding"`` or ``"conv"``; ``"other"`` if adapters can only replace
            it.
        outputs: how many it has, channels for convolutions; 0 for ``"other"``.
        dtype: of factors: the base weight's.
        accumulated: float32; float64 if that is the dtype.
        biased: whether the base layer has a bias.
        device: where the layer computes.
        without_kernel: how often no kernel ran on CUDA, and why.
    """

    def __init__(
        self,
        pool: Any,
        index: int,
        module: nn.Module,
        name: str,
        *,
        nested: bool,
    ) -> None:
        self.pool = pool
        self.name = name
        self.index = index
        self.base = Base(module)
        self._bound: _Bound | None = None
        self.without_kernel: Counter[WithoutKernel] = Counter()
        self._nested = nested
        self._wrapped = hasattr(module, "get_base_layer") or hasattr(module, "original_module")
        self.kind = _kind_of(self.base.module())
        self.look()
        self.outputs = 0 if self.kind == "other" else _outputs_of(self.base.module())
        self.biased = bias_of(self.base.module()) is not None

    def look(self) -> bool:
        """Find out where and in which dtype the layer computes; return whether that has changed."""
        before = getattr(self, "dtype", None), getattr(self, "device", None)
        self.dtype = _dtype_of(self.base.module())
        self.accumulated = _accumulated(self.dtype)
        self.device = self._device()
        return before != (self.dtype, self.device)

    def _device(self) -> torch.device:
        base = self.base.module()
        hook = getattr(base, "_hf_hook", None)
        execution = getattr(hook, "execution_device", None)
        if execution is not None:
            return torch.empty(0, device=execution).device
        tensor = next((t for t in (*base.parameters(), *base.buffers())), None)
        return torch.device("cpu") if tensor is None else tensor.device

    def derive(self, placed: Placed) -> None:
        """Fill an adapter's scale and shift from the base layer's weight and bias.

        DoRA's scale is ``m / ||W + g B A||``, row by row (Liu et al., 2024); the square of the norm
        is ``||W||^2 + 2 g <W, B A> + g^2 ||B A||^2``, and neither product needs ``B A``.
        """
        exact = torch.autocast(self.device.type, enabled=False)
        with torch.inference_mode(mode=False), torch.no_grad(), exact:
            self._derive(placed)

    def _derive(self, placed: Placed) -> None:
        base = self.base.module()
        scale: Tensor | float = 1.0
        weights, wide = placed.weights, self.accumulated
        if placed.scale is not None:
            assert placed.a is not None  # noqa: S101 - magnitudes come with factors
            assert placed.b is not None  # noqa: S101
            a, b = placed.a.flatten(1).to(wide), placed.b.to(wide)
            weight = rows_of(base)
            step = _rows_at_once(weight)
            squares, mixed = [], []
            pairs = zip(torch.split(weight, step), torch.split(b, step), strict=True)
            for part, factors in pairs:
                rows = part.to(wide)
                squares.append(torch.linalg.vector_norm(rows, dim=1).square())
                mixed.append(((rows @ a.T) * factors).sum(1))
            own = ((b @ (a @ a.T)) * b).sum(1)
            g = placed.scaling
            norms = (torch.cat(squares) + 2 * g * torch.cat(mixed) + g**2 * own).clamp(min=0)
            scale = weights["magnitude"] / norms.sqrt()
            placed.scale.copy_(scale)
        if placed.shift is None:
            return
        bias = bias_of(base)
        bias = 0.0 if bias is None else bias.detach().to(wide)
        shift = weights.get("bias", bias) - scale * bias
        if "bias_B" in weights:
            shift = shift + scale * placed.scaling * weights["bias_B"]
        placed.shift.copy_(torch.as_tensor(shift))

    def run(self, module: Any, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the module's forward, and add what the adapters of the batch's rows add."""
        if torch.compiler.is_compiling():
            base = self.base.module() if self._wrapped else functools.partial(original, module)
            output = base(*args, **kwargs)
            x = args[0] if args else next(iter(kwargs.values()))
            torch.ops.dora_cache.adapt_(
                output, x, self.pool.static_rows(x.device), self.index, self.pool.number
            )
            return output
        route = routing.find(self.pool)
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if route is None and (self._wrapped or not capturing):
            return original(module, *args, **kwargs)
        if self._wrapped:
            output = self.base.module()(*args, **kwargs)
        else:
            output = original(module, *args, **kwargs)
        if route is None or capturing:
            # The graph is to serve other adapters, too, which may be on other layers.
            x = args[0] if args else next(iter(kwargs.values()))
            self.pool.adapt_(output, x, self.pool.static_rows(x.device), self.index)
            return output
        if not route.touched >> self.index & 1:
            return output
        if self.kind != "other":
            x = args[0] if args else next(iter(kwargs.values()))
            bound = self._bound
            if bound is None or not bound.run(output, x, route):
                output = self.adapt(output.clone() if output.requires_grad else output, x, route)
        if route.replaced >> self.index & 1:
            output = self._replace(route, output, args, kwargs)
        return output

    def adapt(self, output: Tensor, x: Tensor, route: Route) -> Tensor:
        """Add what adapters add to a base layer's output, in place if it can be.

        Args:
            output: shape (..., out), or (rows, out, ...) for convolutions.
            x: the layer's input.
            route: which row has which.
        """
        convolved = self.kind == "conv"
        leading = x.shape if self.kind == "embedding" else x.shape[:-1]
        shape = x.shape[:1] if convolved else leading
        route.check(self.name, shape, nested=self._nested, positions=not convolved)
        if route.derived >> self.index & 1:
            self.refresh(route)
        if convolved:
            return self._sorted(output, x, route)
        rows, given = shape.numel(), x
        flat = output.view(rows, -1) if output.is_contiguous() else output.reshape(rows, -1)
        x = x.reshape(-1) if self.kind == "embedding" else x.reshape(rows, -1)
        if not self._launched(flat, x, route):
            flat = self._sorted(flat, x, route)
        elif flat.data_ptr() == output.data_ptr():
            self._bound = _Bound(self, output, given, route)
        return flat.view(output.shape)

    def _sorted(self, output: Tensor, x: Tensor, route: Route) -> Tensor:
        """Add what adapters add, one adapter after the other, in place if rows are sorted.

        Args:
            output: shape (rows, out, ...).
            x: shape (rows, ...).
            route: which row has which.
        """
        order, sizes, residents = route.plan(len(x), x.device)
        if order is not None:
            whole, output, x = output, output.index_select(0, order), x.index_select(0, order)
        if output.requires_grad:  # autograd takes no writes to what is split
            ends = list(itertools.accumulate(sizes))
            own_rows = [output[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        else:
            own_rows = output.split(sizes)  # type: ignore[no-untyped-call]
        # Factors first, since one call then scales the rows of all.
        scaled, scales, shifted, shifts = [], [], [], []
        plain = self.kind == "linear" and output.dtype is x.dtype is self.accumulated
        parts = zip(residents, own_rows, x.split(sizes), strict=True)  # type: ignore[no-untyped-call]
        for resident, part, own in parts:
            placed = None if resident is None else resident.placed[self.index]
            if placed is None or placed.whole is not None:
                continue
            if not plain:
                self._change(part, own, placed)
                continue
            if placed.a is not None:
                part.addmm_(own.mm(placed.a_transposed), placed.b_transposed, alpha=placed.scaling)
            if placed.scale is not None:
                scaled.append(part)
                scales.append(placed.scale)
            if placed.shift is not None:
                shifted.append(part)
                shifts.append(placed.shift)
        if scaled:
            torch._foreach_mul_(scaled, scales)
        if shifted:
            torch._foreach_add_(shifted, shifts)
        return output if order is None else whole.index_copy(0, order, output)

    def adapt_captured(self, output: Tensor, x: Tensor, rows: Tensor, max_rank: int) -> bool:
        """Have a CUDA graph add what the adapters add that ``rows`` names when it is replayed.

        Returns:
            Whether that is possible. Else the graph has the base layer alone.
        """
        if (
            self.kind != "linear"
            or not x.dtype is output.dtype is self.dtype
            or not output.is_contiguous()
            or x.is_neg()
            or output.is_neg()
            or not kernels.available(output.device, self.dtype)
        ):
            return False
        flat = output.view(-1, self.outputs)
        return kernels.adapt_(
            flat, x.reshape(len(flat), -1).contiguous(), rows, self.index, max_rank
        )

    def refresh(self, route: Route) -> None:
        """Have what a route's adapters derive from the base layer be of its weights of now."""
        mark = self.base.latest()
        if route.checked.get(self.index) is not mark:
            for one in route.distinct:
                placed = one.placed[self.index]
                if placed is not None:
                    placed.refresh(mark)
            route.checked[self.index] = mark

    def _launched(self, flat: Tensor, x: Tensor, route: Route) -> bool:
        """Have kernels do it; return whether they did."""
        if (
            x.dtype is flat.dtype is self.dtype
            and not (flat.requires_grad or flat.is_neg())
            and kernels.available(flat.device, self.dtype)
        ):
            rows = route.rows(flat.device)
            if kernels.adapt_(flat, x.resolve_neg().contiguous(), rows, self.index, route.max_rank):
                return True
        if flat.is_cuda and self.kind == "linear":
            with _counting:
                self.without_kernel[kernels.why_not(flat, x, self.dtype)] += 1
        return False

    def _change(self, part: Tensor, x: Tensor, placed: Placed) -> None:
        """Change rows of a base layer's output to ``scale * (row + g B A x) + shift``, in place.

        Args:
            part: shape (rows, out, ...).
            x: shape (rows, ...).
            placed: what the adapter has here.
        """
        work = part if part.dtype is self.accumulated else part.to(self.accumulated)
        a, b, scaling = placed.a, placed.b, placed.scaling
        if a is not None and b is not None:
            if self.kind == "embedding":
                reduced = functional.embedding(x, a.T)
            elif self.kind == "conv":
                base = self.base.module()
                convolve = _CONVOLUTIONS[a.dim()]
                reduced = convolve(x.to(a.dtype), a, None, base.stride, base.padding)
            else:
                reduced = (x if x.dtype is a.dtype else x.to(a.dtype)) @ a.T
            if self.kind == "conv":
                work.add_(torch.einsum("nr...,or->no...", reduced, b), alpha=scaling)
            elif reduced.dtype is work.dtype:
                work.addmm_(reduced, b.T, alpha=scaling)
            else:
                work.add_(reduced @ b.T, alpha=scaling)
        if placed.scale is not None:
            work.mul_(_over_outputs(placed.scale, work))
        if placed.shift is not None:
            work.add_(_over_outputs(placed.shift, work))
        if work is not part:
            part.copy_(work)

    def _replace(self, route: Route, output: Any, args: Any, kwargs: Any) -> Tensor:
        """Compute the rows of adapters that have parameters of their own for the whole module."""
        x = args[0] if args else next(iter(kwargs.values()))
        if not isinstance(output, Tensor) or not isinstance(x, Tensor) or len(output) != len(x):
            msg = (
                f"{self.name} is a module to save of an adapter in use, and does not return a row "
                "for each row: a pool cannot serve it; use PEFT for this adapter"
            )
            raise ConfigError(msg)
        route.check(self.name, x.shape[:1], nested=self._nested, positions=False)
        output = output.clone()
        order, sizes, residents = route.plan(len(x), x.device)
        places = torch.arange(len(x), device=x.device) if order is None else order
        for resident, where in zip(residents, torch.split(places, sizes), strict=True):
            placed = None if resident is None else resident.placed[self.index]
            if placed is not None and placed.whole is not None:
                rows = (x[where], *args[1:]) if args else ()
                named = kwargs if args else kwargs | {next(iter(kwargs)): x[where]}
                output[where] = placed.whole(*rows, **named).to(output.dtype)
        return output

    def copy_with(self, weights: Mapping[str, Tensor]) -> Substitute:
        """Return a copy of the base layer with other parameters."""
        return Substitute(self.base.module(), weights)


class Substitute:
    """A copy of a module with parameters and buffers of its own; the others are the module's.

    A copy, since parameters that are swapped for a call would be seen by other threads.
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        tensors: dict[int, Any] = {}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            own = weights.get(name)
            if own is None:
                tensors[id(tensor)] = tensor
            elif isinstance(tensor, nn.Parameter):
                tensors[id(tensor)] = nn.Parameter(own, requires_grad=False)
            else:
                tensors[id(tensor)] = own.to(tensor.dtype)
        self._copy = copy.deepcopy(module, tensors)
        self._parts: list[tuple[nn.Module, nn.Module]] = []
        self._shared: list[tuple[dict[str, Any], nn.Module, str, str]] = []
        parts = zip(module.named_modules(), self._copy.modules(), strict=True)
        for (path, theirs), own_part in parts:
            self._parts.append((own_part, theirs))
            prefix = f"{path}." if path else ""
            for kind in ("_parameters", "_buffers"):
                held = getattr(own_part, kind)
                self._shared += [
                    (held, theirs, kind, name) for name in held if prefix + name not in weights
                ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        for own_part, theirs in self._parts:
            if own_part.training is not theirs.training:
                own_part.training = theirs.training
        for held, theirs, kind, name in self._shared:  # those may have been replaced
            held[name] = getattr(theirs, kind)[name]
        return self._copy(*args, **kwargs)


class _Bound:
    """A linear layer's kernels, for inputs of one shape in batches of one kind.

    Args:
        layer: the layer.
        output: of the base layer, contiguous, on a CUDA device.
        x: the input.
        route: which row has which adapter.
    """

    __slots__ = (
        "_called",
        "_device",
        "_dtype",
        "_expanded",
        "_inputs",
        "_launches",
        "_layer",
        "_max_rank",
        "_names",
        "_outputs",
    )

    def __init__(self, layer: PooledLayer, output: Tensor, x: Tensor, route: Route) -> None:
        self._layer = layer
        self._inputs, self._outputs = x.shape, output.shape
        self._dtype, self._device = x.dtype, x.get_device()
        # What Route.check has looked at.
        self._names = len(route.residents)
        self._called = routing.batch.get()
        self._expanded = routing.expanded.get()
        self._max_rank = route.max_rank
        self._launches = kernels.launches(
            self._device,
            x.dtype,
            x.shape[:-1].numel(),
            x.shape[-1],
            output.shape[-1],
            route.max_rank,
        )

    def run(self, output: Tensor, x: Tensor, route: Route) -> bool:
        """Add what the adapters add, as :meth:`PooledLayer.adapt`; return whether it was done."""
        layer = self._layer
        if not (
            type(x) is type(output) is Tensor
            and x.shape == self._inputs
            and output.shape == self._outputs
            and x.dtype is output.dtype is layer.dtype is self._dtype
            and x.get_device() == output.get_device() == self._device == current_device()
            and x.is_contiguous()
            and output.is_contiguous()
            and not (output.requires_grad or x.is_neg() or output.is_neg())
            and route.max_rank == self._max_rank
            and len(route.residents) == self._names
            and routing.batch.get() == self._called
            and routing.expanded.get() is self._expanded
        ):
            return False
        if route.derived >> layer.index & 1:
            layer.refresh(route)
        rows = route.rows(x.device)
        return self._launches.again(output, x, rows, layer.index, route.spaces)


def _over_outputs(vector: Tensor, output: Tensor) -> Tensor:
    if output.dim() == 2:  # noqa: PLR2004 - it fits as it is
        return vector
    return vector.view(-1, *[1] * (output.dim() - 2))


def _kind_of(base: nn.Module) -> str:
    if isinstance(base, nn.Embedding):
        return "embedding"
    if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    return "linear" if hasattr(base, "out_features") or _is_conv1d(base) else "other"


def _dtype_of(base: nn.Module) -> torch.dtype:
    """Return the dtype that a base layer computes in."""
    weight: Any = getattr(base, "weight", None)
    state = getattr(weight, "quant_state", None)
    for dtype in (
        getattr(weight, "dtype", None),
        getattr(state, "dtype", None),
        getattr(base, "compute_dtype", None),
        *(parameter.dtype for parameter in base.parameters()),
    ):
        if dtype in _FLOATING:
            return dtype
    return torch.float32


def _outputs_of(base: Any) -> int:
    for name in ("out_features", "embedding_dim", "out_channels", "nf"):
        found = getattr(base, name, None)
        if isinstance(found, int):
            return found
    return int(rows_of(base).shape[0])


@functools.cache
def pooled_forward(kind: Any) -> Callable[..., Any]:
    """Return the forward of a class's modules that may be on a pool."""
    original = kind.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        layer = self.__dict__.get(POOLED)
        if layer is None:  # a copy
            return original(self, *args, **kwargs)
        return layer.run(self, original, args, kwargs)

    return forward


@torch.library.custom_op("dora_cache::adapt_", mutates_args=("output",))
def _adapt(output: Tensor, x: Tensor, rows: Tensor, layer: int, pool: int) -> None:
    """Add what adapters add, in compiled code; which ones is found out when it runs."""
    routing.pools[pool].adapt_(output, x, rows, layer)


@_adapt.register_fake
def _(output: Tensor, x: Tensor, rows: Tensor, layer: int, pool: int) -> None:
    pass
