"""LyCORIS' own modules: LoCon, LoHa, LoKr, GLoRA, OFT, BOFT, IA3, T-LoRA and norms.

Each takes the place of one layer's ``forward``: it adds to the layer's output what a weight of its
own makes of the input. That weight is derived in every forward, from factors, from the layer's
weight and from a few numbers; it is what is stored. It is derived by the module's own forward, run
on an empty input, so that none of LyCORIS' arithmetic is repeated here.

A module that parametrizes a weight (``LohaModule.parametrize(layer, "weight")``) has its whole
result stored.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from lycoris.modules.tlora import TLoraModule, get_timestep_mask
from torch import Tensor, nn

from dora_cache.attributes import SLOT
from dora_cache.core.decorator import cached
from dora_cache.lifecycle import plain_class
from dora_cache.reasons import Reason
from dora_cache.recipes.hooks import LayerRecipe, UnusualError, guard, memo, own_parameter
from dora_cache.recipes.peft_layers import (
    drops,
    follow_module,
    is_hooked,
    weights_of,
    why_training,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dora_cache.core.binding import Binding
    from dora_cache.core.engine import Engine
    from dora_cache.recipes.peft_layers import Recipe

__all__ = ["RECIPE", "follow_model", "layers_in"]


class _Kind(NamedTuple):
    """What a class's weight depends on, beside all its own buffers and the layer's weight.

    Attributes:
        numbers: its attributes that are no tensors.
        weights: its parameters by name; a kind of adapter need not have all of them.
        parts: its submodules whose weight counts, likewise.
    """

    numbers: tuple[str, ...]
    weights: tuple[str, ...]
    parts: tuple[str, ...] = ()


_OFT = ("rescaled", "constraint", "block_size", "block_num")
_KINDS: dict[type, _Kind] = {
    LoConModule: _Kind(
        ("shape", "scale", "tucker", "wd", "wd_on_out"),
        ("scalar", "dora_scale"),
        ("lora_up", "lora_down", "lora_mid"),
    ),
    LohaModule: _Kind(
        ("shape", "scale", "tucker", "wd", "wd_on_out"),
        (
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
            *("scalar", "dora_scale"),
        ),
    ),
    LokrModule: _Kind(
        ("shape", "scale", "tucker", "wd", "wd_on_out", "use_w1", "use_w2"),
        (
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
            *("scalar", "dora_scale"),
        ),
    ),
    GLoRAModule: _Kind(("scale", "tucker"), ("scalar",), ("a1", "a2", "b1", "b2", "bm")),
    DiagOFTModule: _Kind(_OFT, ("oft_blocks", "rescale"), ("rank_drop",)),
    ButterflyOFTModule: _Kind((*_OFT, "boft_b", "boft_m"), ("oft_blocks", "rescale")),
    IA3Module: _Kind(("train_input",), ("weight",)),
    TLoraModule: _Kind(
        ("shape", "scale", "lora_dim", "isconv"), ("lambda_layer",), ("q_layer", "p_layer")
    ),
    NormModule: _Kind(("dim",), ("w_norm", "b_norm")),
}


def _depends_on(layer: Any, *_: object, **__: object) -> Iterator[object]:
    state = layer.__dict__
    parameters, modules = state["_parameters"], state["_modules"]
    kind = _KINDS[next(base for base in type(layer).__mro__ if base in _KINDS)]
    yield state["multiplier"]
    for name in kind.numbers:
        yield state[name]
    for name in kind.weights:
        if name in parameters:
            yield parameters[name]
        elif name in state or "parametrizations" in modules:  # pruned, or computed
            msg = f"{name!r} of {type(layer).__name__} is no parameter"
            raise UnusualError(msg)
    yield from state["_buffers"].values()
    for name in kind.parts:
        part = modules.get(name)
        if isinstance(part, nn.Dropout):
            if drops(part) or is_hooked(part):
                msg = f"{name!r} of {type(layer).__name__} is in training mode or has hooks"
                raise UnusualError(msg)
        elif part is not None and type(part) is not nn.Identity:
            yield own_parameter(part, "weight")
    org = state["org_module"][0]
    yield from weights_of(org)
    if isinstance(layer, NormModule):
        yield org._parameters.get("bias")
    elif isinstance(layer, TLoraModule):
        yield state["mask_group_id"]
        yield get_timestep_mask(state["mask_group_id"])
    yield os.environ.get("LYCORIS_KERNEL_BACKEND")  # which LyCORIS reads at each call


class _Captured:
    """Stands in for the operation that a module applies its weight by, and keeps the weight."""

    def __init__(self) -> None:
        self.value: tuple[Tensor, ...] = ()

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: object
    ) -> Tensor:
        self.value = (weight,) if bias is None else (weight, bias)
        return x


@cached("LyCORIS weight", depends_on=_depends_on)
def _weight(layer: Any, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Derive what the layer applies to an input on a device and of a dtype: a weight, and a bias.

    Raises:
        UnusualError: it applies none.
    """
    plain: Any = plain_class(type(layer))
    captured = _Captured()
    stand_in = object.__new__(plain)
    stand_in.__dict__.update(layer.__dict__)
    stand_in.__dict__.pop(SLOT, None)
    stand_in.__dict__.update(op=captured, org_forward=lambda x, *_, **__: x)
    plain.forward(stand_in, torch.empty(0, device=device, dtype=dtype))
    if not captured.value:
        msg = f"a {plain.__name__} that applies no weight"
        raise UnusualError(msg)
    return captured.value


def _forward(layer: Any, x: Any) -> Tensor:
    state = layer.__dict__
    if state["bypass_mode"]:
        msg = "bypass_mode is set"
        raise UnusualError(msg, Reason.FACTORED)
    if isinstance(layer, TLoraModule) and torch.compiler.is_dynamo_compiling():
        msg = "no event tells that its mask has changed"
        raise UnusualError(msg)
    if not isinstance(x, Tensor):
        msg = f"a {type(x).__name__} as input"
        raise UnusualError(msg, Reason.UNUSUAL_INPUT)
    weight, *bias = _weight(layer, x.device, x.dtype)
    base: Tensor = state["org_forward"](x)
    applied: Tensor = state["op"](
        x, **{**state["kw_dict"], "weight": weight, "bias": bias[0] if bias else None}
    )
    return base + applied


def _warm(layer: Any, _: object) -> object:
    if layer.bypass_mode or _is_parametrization(layer):
        return None
    weight = layer.org_module[0].weight
    return _weight(layer, weight.device, weight.dtype)


def _is_parametrization(layer: Any) -> bool:
    return "forward" in layer.__dict__


def _declines(layer: Any) -> str | None:
    if layer.not_supported:
        return "LyCORIS does not support the layer that it is for"
    if isinstance(layer, DyLoraModule):
        return "it draws a rank in each forward"
    if isinstance(layer, FullModule):
        return "it is a weight of its own, and derives nothing with a multiplier of 1"
    if isinstance(layer, NormModule) and layer.org_norm is not None:
        return "it applies its weight by other means than the layer's operation"
    if isinstance(layer, TLoraModule) and layer.isconv and any(k != 1 for k in layer.shape[2:]):
        return "it applies its factors one by one to kernels of more than one element"
    return None


# Where modules are, and what happens to them

_HOLDING = ("forward", "_lycoris_original_forward", "_old_forward")
"""Attributes of a layer that may hold a module's forward; the last one is Accelerate's."""


def layers_in(model: nn.Module) -> Iterator[nn.Module]:
    """Yield LyCORIS' modules that are in a model, that it is wrapped in, or that a network lists.

    Args:
        model: a ``LycorisNetwork``, applied or not, or a model that one is applied to.
    """
    for part in list(model.modules()):
        if isinstance(part, LycorisBaseModule):
            yield part
        state = vars(part)
        for listed in (state.get("loras"), state.get("_lycoris_wrappers")):
            if isinstance(listed, list):
                yield from (one for one in listed if isinstance(one, LycorisBaseModule))
        for _, _, method in _held_by(part):
            yield method.__self__


def _held_by(layer: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """Yield where methods of LyCORIS' modules are that a layer's forward leads to, and these."""
    waiting: list[tuple[Any, str]] = [(layer, name) for name in _HOLDING]
    seen: set[tuple[int, str]] = set()
    while waiting:
        holder, name = waiting.pop()
        method = vars(holder).get(name)
        if (id(holder), name) in seen or not isinstance(method, MethodType):
            continue
        if isinstance(method.__self__, LycorisBaseModule):
            seen.add((id(holder), name))
            yield holder, name, method
            waiting += [(method.__self__, "org_forward"), (method.__self__, "forward")]


def _place(layer: Any, kind: type) -> None:
    """Have whoever holds a method of the layer's hold that of a class."""
    for start in (layer.org_module[0], layer):
        for holder, name, method in list(_held_by(start)):
            if method.__self__ is layer:
                function = getattr(kind, method.__func__.__name__)
                holder.__dict__[name] = MethodType(function, layer)


def _place_plain(reference: weakref.ref[Any]) -> None:
    layer = reference()
    if layer is not None:
        _place(layer, plain_class(type(layer)))


def _follow(
    cache: Engine, layer: Any, recipe: Recipe, overrides: dict[str, Callable[..., Any]]
) -> Binding:
    def own_written(layer: Any, *_: object, **__: object) -> None:
        # Loading writes to the scalar through .data, T-LoRA's regularization to its weights.
        cache.touched([*layer.parameters(), *layer.buffers()])

    def base_written(layer: Any) -> None:
        base = layer.org_module[0]
        cache.touched([*base.parameters(), *base.buffers()])

    binding = follow_module(
        cache,
        layer,
        recipe,
        overrides,
        loaded=own_written,
        assigned={"org_weight": base_written},
        # Merging is followed for all modules there are: WRITERS in lifecycle/writers.py.
        calls={"apply_max_norm": own_written},
    )
    if binding.infers is None:
        binding.infers = partial(why_training, drops_out=_drops_out)  # networks begin in training
        binding.undo.callback(_place_plain, weakref.ref(layer))
        _place(layer, type(layer))
    return binding


def _drops_out(layer: Any) -> bool:
    return bool(layer.rank_dropout or layer.module_dropout)


def follow_model(*_: object) -> None:
    """Follow nothing more: what happens to a network happens to its modules."""


_parametrization = memo(
    LycorisBaseModule,
    "parametrize_forward",
    "LyCORIS parametrization",
    adapter=None,
    depends_on=_depends_on,
)
_hooks = [
    guard(_forward, warm=_warm, idle=lambda _: False),
    replace(_parametrization, warm=None),
]

RECIPE = LayerRecipe(
    name="LyCORIS",
    hooks=dict.fromkeys((*_KINDS, DyLoraModule, FullModule), _hooks),
    adapters=None,
    relies_on={
        "lycoris.modules.base:LycorisBaseModule._current_weight": "79985453c735",
        "lycoris.modules.base:LycorisBaseModule.org_weight": "68872977c1e3",
        "lycoris.modules.base:LycorisBaseModule.parametrize_forward": "9319e3fb7165",
        "lycoris.modules.base:LycorisBaseModule.apply_to": "0c1c19d66508",
        "lycoris.modules.base:LycorisBaseModule.restore": "4ef8d15f4f73",
        "lycoris.modules.locon:LoConModule.forward": "e82a84c3b870",
        "lycoris.modules.locon:LoConModule.make_weight": "4eeea785cdaa",
        "lycoris.modules.locon:LoConModule.get_diff_weight": "232aa8103e11",
        "lycoris.modules.locon:LoConModule.get_merged_weight": "b98eb181700f",
        "lycoris.modules.locon:LoConModule.apply_weight_decompose": "8938c1ccb7e2",
        "lycoris.modules.loha:LohaModule.forward": "5b60a2aa8718",
        "lycoris.modules.loha:LohaModule.get_weight": "7b0f1e3e582d",
        "lycoris.modules.loha:LohaModule.get_diff_weight": "ad7a3fb3cc26",
        "lycoris.modules.loha:LohaModule.get_merged_weight": "b98eb181700f",
        "lycoris.modules.loha:LohaModule.apply_weight_decompose": "8938c1ccb7e2",
        "lycoris.modules.lokr:LokrModule.forward": "92defb74273e",
        "lycoris.modules.lokr:LokrModule._rebuild_forward": "c30c2f70e4a0",
        "lycoris.modules.lokr:LokrModule.get_weight": "828aa61e59b7",
        "lycoris.modules.lokr:LokrModule.get_diff_weight": "ad7a3fb3cc26",
        "lycoris.modules.lokr:LokrModule.get_merged_weight": "b98eb181700f",
        "lycoris.modules.lokr:LokrModule.apply_weight_decompose": "8938c1ccb7e2",
        "lycoris.modules.glora:GLoRAModule.forward": "6a71dfd4d738",
        "lycoris.modules.glora:GLoRAModule.make_weight": "964b4abf9bbf",
        "lycoris.modules.glora:GLoRAModule.get_diff_weight": "4340bd2d5bb8",
        "lycoris.modules.glora:GLoRAModule.get_merged_weight": "95afd7d47650",
        "lycoris.modules.diag_oft:DiagOFTModule.forward": "53fe70ec3aba",
        "lycoris.modules.diag_oft:DiagOFTModule.make_weight": "1fe014b1491e",
        "lycoris.modules.diag_oft:DiagOFTModule.get_r": "7963878705ce",
        "lycoris.modules.diag_oft:DiagOFTModule.I": "193c05b7e421",
        "lycoris.modules.diag_oft:DiagOFTModule.get_merged_weight": "2670b9ca65df",
        "lycoris.modules.boft:ButterflyOFTModule.forward": "7ab6fb395fee",
        "lycoris.modules.boft:ButterflyOFTModule.make_weight": "61dcb9afb57b",
        "lycoris.modules.boft:ButterflyOFTModule.get_merged_weight": "2670b9ca65df",
        "lycoris.modules.ia3:IA3Module.forward": "061204618be9",
        "lycoris.modules.ia3:IA3Module.make_weight": "54a3836d1197",
        "lycoris.modules.ia3:IA3Module.get_merged_weight": "35fd9bbbc8e7",
        "lycoris.modules.tlora:TLoraModule.forward": "61e840424780",
        "lycoris.modules.tlora:TLoraModule._get_mask": "cee12ec42308",
        "lycoris.modules.tlora:TLoraModule.get_diff_weight": "75ece6e5c183",
        "lycoris.modules.tlora:TLoraModule.get_merged_weight": "0f83980c4aa9",
        "lycoris.modules.norms:NormModule.forward": "161a1b3e0cbd",
        "lycoris.modules.norms:NormModule.make_weight": "57f512b4f4cd",
        "lycoris.modules.norms:NormModule.get_merged_weight": "62437f3b6288",
        "lycoris.modules.glora:_glora_weight": "6675abadaa60",
        "lycoris.modules.ia3:_ia3_weight": "72809b3caec2",
        "lycoris.modules.tlora:get_timestep_mask": "4f4a525c6f70",
        "lycoris.functional.general:weight_decompose": "959cebf79b44",
        "lycoris.functional.general:_weight_decompose": "e1c92d995802",
        "lycoris.functional.general:add_scaled": "2fe59e727578",
        "lycoris.functional.general:rebuild_tucker": "5b73546ab0a1",
        "lycoris.functional.general:tucker_weight_from_conv": "1dd6f725fbfe",
        "lycoris.functional.locon:diff_weight": "56165635755f",
        "lycoris.functional.locon:_diff_weight": "e4603d119881",
        "lycoris.functional.loha:diff_weight": "291a2711046f",
        "lycoris.functional.loha:_diff_weight": "abaf8ef6c7cb",
        "lycoris.functional.lokr:kron_weight": "33393345b858",
        "lycoris.functional.lokr:_kron_weight": "9b7f3961a058",
        "lycoris.functional.diag_oft:diff_weight": "d760ad66cfd3",
        "lycoris.functional.boft:diff_weight": "a711ed19e51e",
        "lycoris.kernels.select:choose": "d84e6c26bdaf",
        "lycoris.kernels.dispatch:resolve_backend": "c9982935e571",
    },
    declines=_declines,
    follow=_follow,
)
