"""Layers of a model that adapters of a pool are on."""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dora_cache.decorator import cached
from dora_cache.errors import ConfigError
from dora_cache.lifecycle import POOLED, plain_class
from dora_cache.recipes.dora.values import bias_of, dense
from dora_cache.recipes.peft_layers import base_layer, weights_of
from dora_cache.serving import kernels, routing

if TYPE_CHECKING:
    from collections.abc import Callable

    from dora_cache.serving.residents import Placed
    from dora_cache.serving.routing import Route

__all__ = ["Bases", "PooledLayer", "pooled_forward"]

_AT_ONCE = 1 << 24
"""Elements of a base weight that are brought to a larger dtype at once."""

_FLOATING = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


class Bases:
    """The base layers, and what all adapters of one share."""

    def __init__(self) -> None:
        self.modules: list[weakref.ref[nn.Module]] = []

    def module(self, layer: int) -> Any:
        """Return the module of a layer that computes ``base(x)``."""
        module = self.modules[layer]()
        if module is None:
            msg = "the pool's model is gone"
            raise ReferenceError(msg)
        return base_layer(module) if hasattr(module, "get_base_layer") else module

    def depends_on(self, layer: int) -> list[object]:
        """Return what :meth:`squares` is derived from, and the bias, which others rest on."""
        base = self.module(layer)
        return [*weights_of(base), bias_of(base)]

    @cached("base weights", depends_on=depends_on, detach=True)
    def mark(self, layer: int) -> Tensor:  # noqa: ARG002 - it is in the key
        """Return a tensor that is another one whenever the base layer has changed.

        What adapters derive from the layer is kept with them; this tells whether it still holds.
        """
        return torch.empty(1, dtype=torch.int64)


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
        bases: of the pool.
        module: the layer; a PEFT layer, for a model that PEFT has wrapped.
        name: of the module.
        nested: see :meth:`Route.check`.

    Attributes:
        index: its number.
        kind: ``"linear"``, ``"embedding"`` or ``"conv"``; ``"other"`` if no adapter can have factors
            for it.
        outputs: how many it has, channels for convolutions; 0 for ``"other"``.
        dtype: of factors: the base weight's.
        accumulated: float32; float64 if that is the dtype.
        biased: whether the base layer has a bias.
        device: where the layer computes.
    """

    def __init__(
        self,
        pool: Any,
        bases: Bases,
        module: nn.Module,
        name: str,
        *,
        nested: bool,
    ) -> None:
        self.pool = pool
        self.name = name
        self.index = len(bases.modules)
        self._bases = bases
        self._nested = nested
        self._wrapped = hasattr(module, "get_base_layer") or hasattr(module, "original_module")
        bases.modules.append(weakref.ref(module))
        self.kind = _kind_of(self._base())
        self.look()
        self.outputs = 0 if self.kind == "other" else _outputs_of(self._base())
        self.biased = bias_of(self._base()) is not None

    def _base(self) -> Any:
        module: Any = self._bases.module(self.index)
        return getattr(module, "original_module", module)

    def look(self) -> bool:
        """Find out where and in which dtype the layer computes; return whether that has changed."""
        before = getattr(self, "dtype", None), getattr(self, "device", None)
        self.dtype = _dtype_of(self._base())
        self.accumulated = _accumulated(self.dtype)
        self.device = self._device()
        return before != (self.dtype, self.device)

    def _device(self) -> torch.device:
        base = self._base()
        hook = getattr(base, "_hf_hook", None)
        execution = getattr(hook, "execution_device", None)
        if execution is not None:
            return torch.empty(0, device=execution).device
        tensor = next((t for t in (*base.parameters(), *base.buffers())), None)
        return torch.device("cpu") if tensor is None else tensor.device

    def mark(self) -> Tensor:
        """Return a tensor that is another one whenever the base layer has changed."""
        return self._bases.mark(self.index)

    def derive(self, placed: Placed) -> None:
        """Fill an adapter's scale and shift from the base layer's weight and bias.

        DoRA's scale is ``m / ||W + g B A||``, row by row (Liu et al., 2024); the square of the norm
        is ``||W||^2 + 2 g <W, B A> + g^2 ||B A||^2``, and neither product needs ``B A``.
        """
        with torch.inference_mode(mode=False), torch.no_grad():
            with torch.autocast(self.device.type, enabled=False):
                self._derive(placed)

    def _derive(self, placed: Placed) -> None:
        base = self._base()
        scale: Tensor | float = 1.0
        weights, wide = placed.weights, self.accumulated
        if placed.scale is not None:
            assert placed.a is not None  # noqa: S101 - magnitudes come with factors
            assert placed.b is not None  # noqa: S101
            a, b = placed.a.flatten(1).to(wide), placed.b.to(wide)
            weight = rows_of(base)
            step = _rows_at_once(weight)
            squares, mixed = [], []
            for part, factors in zip(weight.split(step), b.split(step), strict=True):
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
            output = self._without(module, original)(*args, **kwargs)
            x = args[0] if args else next(iter(kwargs.values()))
            torch.ops.dora_cache.adapt_(
                output, x, self.pool.static_rows(x.device), self.index, self.pool.number
            )
            return output
        route = routing.find(self.pool)
        if route is None:
            return original(module, *args, **kwargs)
        output = self._without(module, original)(*args, **kwargs)
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # The graph is to serve other adapters, too, which may be on other layers.
            x = args[0] if args else next(iter(kwargs.values()))
            self.pool.adapt_(output, x, self.pool.static_rows(x.device), self.index)
            return output
        if not route.touched >> self.index & 1:
            return output
        if self.kind != "other":
            x = args[0] if args else next(iter(kwargs.values()))
            output = self.adapt(output.clone() if output.requires_grad else output, x, route)
        if route.replaced >> self.index & 1:
            output = self._replace(route, output, args, kwargs)
        return output

    def _without(self, module: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return the layer without any adapter: the base layer, where PEFT has wrapped it."""
        return self._base() if self._wrapped else functools.partial(original, module)

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
            mark = self.mark()
            if route.checked.get(self.index) is not mark:
                for one in route.distinct:
                    placed = one.placed[self.index]
                    if placed is not None:
                        placed.refresh(mark)
                route.checked[self.index] = mark
        if convolved:
            for placed, where in route.groups(self.index, len(output), output.device):
                if not placed.whole:
                    self._change(output, where, self._delta_of_conv(placed, x[where]), placed)
            return output
        rows = shape.numel()
        flat = output.view(rows, -1) if output.is_contiguous() else output.reshape(rows, -1)
        if self.kind == "embedding":
            ids = x.reshape(-1)
            for placed, where in route.groups(self.index, rows, output.device):
                if placed.a is not None:
                    self._change(flat, where, functional.embedding(ids[where], placed.a.T), placed)
        else:
            x = x.reshape(rows, -1)
            if not self._launched(flat, x, route):
                for placed, where in route.groups(self.index, rows, output.device):
                    if not placed.whole:
                        self._change(flat, where, _first(placed, x[where]), placed)
        return flat.view(output.shape)

    def adapt_captured(self, output: Tensor, x: Tensor, rows: Tensor, max_rank: int) -> None:
        """Have a CUDA graph add what the adapters add that ``rows`` names when it is replayed."""
        flat = output.view(-1, self.outputs)
        x = x.reshape(len(flat), -1).contiguous()
        if not (
            self.kind == "linear"
            and x.dtype is flat.dtype is self.dtype
            and kernels.available(flat.device, self.dtype)
            and kernels.adapt_(flat, x, rows, self.index, max_rank)
        ):
            msg = (
                f"{self.name} cannot be part of a CUDA graph: only linear layers in float32, "
                "bfloat16 or float16 can, whose inputs have the weight's dtype"
            )
            raise ConfigError(msg)

    def _launched(self, flat: Tensor, x: Tensor, route: Route) -> bool:
        if not (
            flat.is_cuda
            and x.dtype is flat.dtype is self.dtype
            and not flat.requires_grad
            and kernels.available(flat.device, self.dtype)
        ):
            return False
        rows = route.rows(flat.device)
        return kernels.adapt_(flat, x.contiguous(), rows, self.index, route.max_rank)

    def _delta_of_conv(self, placed: Placed, x: Tensor) -> Tensor | None:
        if placed.a is None:
            return None
        return self._base()._conv_forward(x.to(placed.a.dtype), placed.a, None)  # type: ignore[no-any-return]

    def _change(
        self, output: Tensor, where: slice | Tensor, reduced: Tensor | None, placed: Placed
    ) -> None:
        """Change some rows of a base layer's output to ``scale * (row + g B reduced) + shift``.

        Args:
            output: shape (rows, out, ...).
            where: which rows.
            reduced: shape (rows, rank, ...); None for none.
            placed: what the adapter has here.
        """
        part = output[where]
        work = part.to(self.accumulated)
        if reduced is not None:
            assert placed.b is not None  # noqa: S101 - files has checked it
            if work.dim() > 2:  # noqa: PLR2004 - a convolution's
                delta = torch.einsum("nr...,or->no...", reduced, placed.b)
                work.add_(delta, alpha=placed.scaling)
            elif reduced.dtype is work.dtype:
                work.addmm_(reduced, placed.b.T, alpha=placed.scaling)
            else:
                work.add_(reduced @ placed.b.T, alpha=placed.scaling)
        if placed.scale is not None:
            work.mul_(_over_outputs(placed.scale, work))
        if placed.shift is not None:
            work.add_(_over_outputs(placed.shift, work))
        if work is not part or not isinstance(where, slice):
            output[where] = work

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
        outer = routing.current.set(None)
        try:
            for placed, where in route.groups(self.index, len(x), x.device):
                if not placed.whole:
                    continue
                rows = (x[where], *args[1:]) if args else ()
                named = kwargs if args else kwargs | {next(iter(kwargs)): x[where]}
                found = torch.func.functional_call(self._base(), placed.weights, rows, named)
                output[where] = found.to(output.dtype)
        finally:
            routing.current.reset(outer)
        return output


def _over_outputs(vector: Tensor, output: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (output.dim() - 2))


def _first(placed: Placed, x: Tensor) -> Tensor | None:
    return None if placed.a is None else x.to(placed.a.dtype) @ placed.a.T


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
def pooled_forward(kind: type[nn.Module]) -> Callable[..., Any]:
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
