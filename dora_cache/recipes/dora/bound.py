"""Bound layers: the forward of a linear layer with one active DoRA adapter, past all that is fixed.

Such a layer's hit is a few tensor operations, and finding out which takes longer than they do. So
what is found out once is kept with the variant that stands in for PEFT's: a :class:`Bound` has the
:class:`~dora_cache.core.shortcuts.Shortcut` to the stored value, and what follows from the dtypes,
devices and shapes that the shortcut has checked. It holds neither the value nor a weight.

Each call checks all that may have changed. What it finds out of the ordinary it leaves to the long
way, PEFT's own forward, which looks the value up; then the layer is bound again.

The product of an ordinary base layer is computed here. Any other one, such as one with quantized
weights or with hooks, is called as PEFT calls it, and the value is looked up after that, since the
call may change the weights.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as modules_of_torch

from dora_cache.ambient import cuda_device, tracing_state
from dora_cache.attributes import SLOT
from dora_cache.copying import Uncopyable
from dora_cache.core.shortcuts import Shortcut
from dora_cache.lifecycle import stays_in_place
from dora_cache.recipes.dora import kernels
from dora_cache.recipes.dora.outputs import add_exact, add_fast, exact_sum, fast_sum
from dora_cache.recipes.dora.values import FAST, STORED, bias_of
from dora_cache.recipes.peft_layers import base_layer, weights_of, why_training

if TYPE_CHECKING:
    from dora_cache.recipes.dora.kernels import FewRows, Launch
    from dora_cache.recipes.dora.variants import CachedVariant

__all__ = ["Bound", "bind"]

_grad_enabled = torch.is_grad_enabled
_cast_input_dtype = Linear._cast_input_dtype
_linear_forward = nn.Linear.forward
_dora_forward = DoraLinearLayer.forward


def bind(layer: Any, adapter: str, variant: CachedVariant) -> None:
    """Bind a layer to what its latest lookup has found; a no-op if there is nothing new.

    Args:
        layer: a linear LoRA layer.
        adapter: its active adapter.
        variant: the adapter's.
    """
    binding = layer.__dict__.get(SLOT)
    if binding is None or type(layer)._cast_input_dtype is not _cast_input_dtype:
        return
    if variant.numerics == "fast":
        spelled: tuple[Any, ...] = (FAST.number, adapter)
    else:
        try:
            factor = layer._modules["lora_A"]._modules[adapter]._parameters["weight"]
        except (KeyError, AttributeError):  # elsewhere, as where they are parametrized
            return
        spelled = (STORED.number, adapter, factor.dtype)
    shortcut = binding.shortcuts.get(spelled)
    bound = variant.bound
    if shortcut is not None and (bound is None or bound.shortcut is not shortcut):
        variant.bound = Bound(layer, adapter, shortcut, fast=variant.numerics == "fast")


class Bound(Uncopyable):
    """A linear layer and adapter, bound to a stored value.

    Args:
        layer: the LoRA layer, of which a weak reference is kept.
        adapter: the adapter's name.
        shortcut: to the value, among the shortcuts of the layer's binding.
        fast: whether it is that of ``numerics="fast"``.

    Attributes:
        shortcut: likewise. It is cleared when the value is dropped, and then nothing holds it.
    """

    __slots__ = ("_adapter", "_fast", "_layer", "_operands", "_sum", "shortcut")

    def __init__(self, layer: Any, adapter: str, shortcut: Shortcut, *, fast: bool) -> None:
        self.shortcut = shortcut
        self._layer = weakref.ref(layer)
        self._adapter = adapter
        self._fast = fast
        self._sum: _Exact | _Fast | None = None
        self._operands: tuple[Any, Any] | None = None

    def run(self, layer: Any, x: Tensor) -> Tensor | None:
        """Return the layer's output; None unless everything is as it was.

        One flat function: it runs for each layer and token, and a call costs as much as ten of
        these comparisons. What is compared is read from the instances' dictionaries, past
        ``nn.Module.__getattr__``.
        """
        state = layer.__dict__
        binding = state.get(SLOT)
        if (
            binding is None  # detached
            or self._layer() is not layer  # a copy that shares the variant
            or (state["training"] and why_training(layer, binding))
            or state["_disable_adapters"]
            or state["merged_adapters"]
            or not state.get("cast_input_dtype_enabled")
            or _grad_enabled()  # without gradients, hooks of backward do nothing
            or tracing_state() is not None  # it follows sizes as well
            or modules_of_torch._global_forward_hooks
            or modules_of_torch._global_forward_pre_hooks
            or nn.Linear.forward is not _linear_forward
            or DoraLinearLayer.forward is not _dora_forward
        ):
            return None
        adapter, modules = self._adapter, state["_modules"]
        of_base: Any
        of_first: Any
        of_last: Any
        try:
            base = modules["base_layer"]
            first = modules["lora_A"]._modules[adapter]
            last = modules["lora_B"]._modules[adapter]
            magnitude = modules["lora_magnitude_vector"]._modules[adapter]
            if not (type(first) is type(last) is nn.Linear and type(magnitude) is DoraLinearLayer):
                return None
            of_base = base._parameters
            of_part = base.__dict__
            plain = (
                type(base) is nn.Linear
                and type(of_base["weight"]) is nn.Parameter
                and not of_part["_forward_hooks"]
                and not of_part["_forward_pre_hooks"]
                and "forward" not in of_part
                and of_part.get("_compiled_call_impl") is None
            )
            for part in (first, last, magnitude):
                of_part = part.__dict__
                if (
                    of_part["_forward_hooks"]
                    or of_part["_forward_pre_hooks"]
                    or "forward" in of_part
                    or of_part.get("_compiled_call_impl") is not None
                ):
                    return None
            if "get_weight_norm" in of_part or "get_lora_weight" in of_part:  # the magnitude's
                return None
            of_first, of_last = first._parameters, last._parameters
            if not plain:
                return self._around(layer, x, base, of_first, of_last, magnitude)
            scaling = state["scaling"][adapter]
            weight, bias = of_base["weight"], of_base["bias"]
            a, b = of_first["weight"], of_last["weight"]
            parts = (
                scaling,
                magnitude._parameters["weight"],
                a,
                of_first["bias"],
                b,
                of_last["bias"],
                weight,
            )
        except (KeyError, AttributeError):  # not where they were: replaced, pruned, parametrized
            return None
        if not (
            type(x) is Tensor
            and of_first["bias"] is of_last["bias"] is None
            and (bias is None or type(bias) is nn.Parameter)
            and weight.dim() == 2  # noqa: PLR2004
            and x.dtype is weight.dtype
            and x.device == weight.device
            and x.layout is torch.strided
            and x.is_contiguous()
            and 2 <= x.dim() <= 3  # noqa: PLR2004
            and x.numel() > 0
        ):
            return None
        cache = binding.cache
        if cache.bypassing:
            return None
        # Tensors' identities, versions and addresses, and whatever follows operations.
        entry = cache.recall(self.shortcut, (*parts, bias) if self._fast else parts)
        if entry is None:
            return None
        value = entry.value
        total = self._sum
        if total is None:
            kind = _Fast if self._fast else _Exact
            try:
                total = self._sum = kind(scaling, weight, bias, a, b, value)
            except Exception as error:  # noqa: BLE001 - never an inference failure
                self.shortcut = Shortcut()  # it leads nowhere; a new value is bound again
                self.shortcut.clear()
                cache.failed("binding a layer to its value", error)
                return None
        if x.dim() == 2:  # noqa: PLR2004
            return total(x, functional.linear(x, weight, bias), a, b, bias, value)
        # Matrix products of three dimensions come down to those of two: once here, not in each.
        shape = x.shape
        x = x.view(-1, shape[2])
        output = total(x, functional.linear(x, weight, bias), a, b, bias, value)
        return output.view(shape[0], shape[1], output.shape[1])

    def _around(
        self, layer: Any, x: Tensor, base: nn.Module, of_first: Any, of_last: Any, magnitude: Any
    ) -> Tensor | None:
        """Return the layer's output, its base layer called as a module.

        Args:
            layer: the layer.
            x: its input.
            base: its base layer, another LoRA layer perhaps.
            of_first: the parameters of the adapter's first factor.
            of_last: those of the second one.
            magnitude: the adapter's.
        """
        adapter = self._adapter
        variant = layer.lora_variant[adapter]
        cache = layer.__dict__[SLOT].cache
        of_base = base.__dict__
        wrapped = "forward" in of_base
        if (
            type(x) is not Tensor
            or cache.bypassing
            or (wrapped and not stays_in_place(base))  # its weights are in place within its forward
            or not of_first["bias"] is of_last["bias"] is None
        ):
            return None
        result: Tensor = base(x)
        a, b = of_first["weight"], of_last["weight"]
        dtype = result.dtype
        if x.dtype is not a.dtype:
            x = x.to(a.dtype)
        scaling = layer.__dict__["scaling"][adapter]
        inner = base_layer(layer)
        parts = (scaling, magnitude._parameters["weight"], a, None, b, None, *weights_of(inner))
        bias = bias_of(inner)
        entry = cache.recall(self.shortcut, (*parts, bias) if self._fast else parts)
        if entry is None:  # the rest of the long way
            total: Tensor = variant.forward(layer, active_adapter=adapter, x=x, result=result)
            return total if total.dtype is dtype else total.to(dtype)
        value, shape = entry.value, result.shape
        flat = (
            not (wrapped or of_base["_forward_hooks"])  # which may return another shape
            and x.dim() == result.dim() == 3  # noqa: PLR2004
            and x.is_contiguous()
            and result.is_contiguous()
            and x.numel() > 0
        )
        if flat:  # as for plain ones
            x, result = x.view(-1, x.shape[2]), result.view(-1, shape[2])
        delta = functional.linear(functional.linear(x, a), b)
        if self._fast:
            total = add_fast(result, delta, value, scaling)
        else:
            if self._operands is None:
                self._operands = _operands(scaling, b, value)
            one, factor = self._operands
            total = add_exact(result, delta, value, bias, scaling, one=one, factor=factor)
        if total.dtype is not dtype:
            total = total.to(dtype)
        return total.view(shape) if flat else total


class _Exact:
    """What PEFT adds to a base layer's result, for what a shortcut has checked.

    Args:
        scaling: the adapter's.
        weight: the base layer's.
        bias: likewise, or None.
        a: the adapter's first factor.
        b: the second.
        scale: the stored value.
    """

    __slots__ = ("_bias", "_device", "_inner", "_launch", "_number", "_one", "_scaling")

    def __init__(
        self, scaling: Any, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: Any
    ) -> None:
        self._one, self._scaling = _operands(scaling, b, scale)
        self._inner = None if a.dtype is weight.dtype else a.dtype
        self._bias = None if bias is None else bias.dtype
        self._device = weight.get_device()
        self._launch: Launch | None = None
        if _kernels_take(scaling, weight, a, b, scale):
            found = kernels.combiner(
                self._device,
                weight.shape[0],
                weight.dtype,
                b.dtype,
                scale.dtype,
                self._bias,
                weight.dtype,
            )
            if found is not None:
                self._launch = found[0]
                self._number = (float(scaling),)

    def __call__(
        self, x: Tensor, result: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: Any
    ) -> Tensor:
        """Return the layer's output, of the shape and dtype of ``result``, which is overwritten."""
        linear = functional.linear
        delta = linear(linear(x if self._inner is None else x.to(self._inner), a), b)
        launch = self._launch
        if launch is not None and cuda_device() == self._device:
            if bias is None:
                fits, subtracted = self._bias is None, result  # not read
            else:  # the one part that the shortcut has not checked
                fits, subtracted = bias.dtype is self._bias and bias.is_contiguous(), bias
                fits = fits and bias.numel() == result.shape[1] and not bias.is_neg()
            if fits and launch(
                result.shape[0], (result, delta, scale, subtracted, result), self._number
            ):
                return result
        total = exact_sum(result, bias, delta, scale, self._scaling, owned=True, one=self._one)
        return total if total.dtype is result.dtype else total.to(result.dtype)


def _kernels_take(scaling: Any, weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> bool:
    """Whether there are kernels for what a shortcut has checked; they do not broadcast."""
    return (
        type(scaling) in {int, float}
        and kernels.available(weight.device, weight.dtype, a.dtype, b.dtype)
        and a.shape[1] == weight.shape[1]
        and b.shape[0] == scale.numel() == weight.shape[0]
        and scale.get_device() == weight.get_device()
    )


def _operands(scaling: Any, delta: Tensor, scale: Tensor) -> tuple[Any, Any]:
    """Return 1 and the scaling as operands that give the same bits in the least time.

    On a CPU, PyTorch takes three times as long for a number as for a tensor without dimensions. In
    lower precisions the two may round differently.
    """
    dtype = delta.dtype
    if not (
        delta.device.type == "cpu"
        and dtype is scale.dtype
        and dtype in {torch.float32, torch.float64}
        and type(scaling) in {int, float}
    ):
        return 1, scaling
    one = torch.ones((), dtype=dtype)
    return one, scaling if scaling == 1 else torch.tensor(scaling, dtype=dtype)


class _Fast:
    """What is added to a base layer's result under ``numerics="fast"``; as :class:`_Exact`."""

    __slots__ = ("_device", "_few", "_inner", "_launch", "_number", "_scaling")

    def __init__(
        self, scaling: Any, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, value: Any
    ) -> None:
        self._scaling = scaling
        self._inner = None if a.dtype is weight.dtype else a.dtype
        self._device = weight.get_device()
        self._few: FewRows | None = None
        self._launch: Launch | None = None
        if value[0].dtype is torch.float32 and _kernels_take(scaling, weight, a, b, value[0]):
            shift = None if bias is None else value[1]
            self._few = kernels.few_rows(weight, weight.dtype, a, b, value[0], shift)
            self._launch = kernels.fast_combiner(
                self._device,
                weight.shape[0],
                weight.dtype,
                b.dtype,
                weight.dtype,
                shift=bias is not None,
            )
            self._number = (float(scaling),)

    def __call__(
        self, x: Tensor, result: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, value: Any
    ) -> Tensor:
        """Return the layer's output, of the shape and dtype of ``result``, which is overwritten."""
        scale, shift = value[0], None if bias is None else value[1]
        launch, few = self._launch, self._few
        usable = launch is not None and cuda_device() == self._device
        if (
            usable
            and few is not None
            and x.shape[0] <= kernels.FEW_ROWS
            and not x.is_neg()
            and few(x, result, a, b, scale, shift, self._scaling, result)
        ):
            return result
        linear = functional.linear
        delta = linear(linear(x if self._inner is None else x.to(self._inner), a), b)
        if usable and launch is not None:
            added = result if shift is None else shift  # not read if there is none
            if launch(result.shape[0], (result, delta, scale, added, result), self._number):
                return result
        total = fast_sum(result, delta, scale, shift, self._scaling, owned=True)
        return total if total.dtype is result.dtype else total.to(result.dtype)
