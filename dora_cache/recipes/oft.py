"""OFT (https://arxiv.org/abs/2306.07280): the orthogonal blocks of each layer's rotation.

They are few numbers (block size times inputs), so ``numerics="fast"`` has no smaller form.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import OFTConfig
from peft.tuners.oft.layer import OFTLayer, OFTRotationModule
from torch import Tensor

from dora_cache.attributes import SLOT
from dora_cache.core.decorator import cached
from dora_cache.lifecycle import plain_class
from dora_cache.reasons import Reason
from dora_cache.recipes.blocks import rotate
from dora_cache.recipes.compiled import viewed
from dora_cache.recipes.examples import TARGETS, Example, conv2d, embedding
from dora_cache.recipes.hooks import UnusualError, guard, own_parameter
from dora_cache.recipes.peft_layers import derive_ahead, follow_layer, follow_part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

    from dora_cache.core.engine import Engine

__all__ = ["RECIPE"]


def _depends_on(rotation: Any) -> list[object]:
    state = rotation.__dict__
    buffers = state["_buffers"]
    return [
        own_parameter(rotation, "weight"),
        buffers["rows"],
        buffers["cols"],
        state["block_size"],
        state["use_cayley_neumann"],
        state["num_cayley_neumann_terms"],
        state["coft"],
        state["eps"],
    ]


@cached("OFT rotation", depends_on=_depends_on)
def _blocks(rotation: Any) -> Tensor:
    """Derive the blocks of a rotation; shape (blocks, size, size), of the weight's dtype.

    Constrained OFT projects its weight in place in every forward. That ends after a few of them,
    when the weight is its own projection to the bit; until then there is nothing to keep.

    Returns:
        The blocks, one if they are shared.

    Raises:
        UnusualError: forward would change the weight.
    """
    weight = rotation.weight
    if rotation.coft:
        with torch.no_grad():
            if not torch.equal(rotation._project_batch(weight, eps=rotation.eps), weight):
                msg = "the weight is not its own projection yet"
                raise UnusualError(msg, Reason.CHANGED)
    blocks: Tensor = rotation._cayley_batch(
        weight,
        rotation.block_size,
        rotation.use_cayley_neumann,
        rotation.num_cayley_neumann_terms,
    )
    return blocks


def _rotated(rotation: Any, x: Tensor) -> Tensor:
    """Rotate an input as PEFT does, by stored blocks."""
    blocks = _blocks(rotation)
    if rotation.block_share and len(blocks) > 1:
        msg = "shared blocks that are more than one"
        raise UnusualError(msg)
    size: int = rotation.block_size
    count = rotation.in_features // size if rotation.block_share else rotation.r
    parts, images = x.to(blocks.dtype), x.dim() == 4  # noqa: PLR2004 - of a convolution
    if images:
        parts = rotation._unfold(parts)
    rotated = rotate(parts, blocks, count)
    if images:
        rotated = rotation._fold(rotated, x.shape)
    return rotated.to(x.dtype)


_hook = guard(_rotated, idle=lambda _: False)


def _warmers(rotation: Any, _: object) -> Iterator[tuple[str | None, Callable[[], object]]]:
    adapter = rotation.__dict__[SLOT].adapter
    yield adapter, partial(derive_ahead, lambda one, _: _blocks(one), rotation, adapter)


def _is_known(rotation: Any) -> bool:
    return plain_class(type(rotation)) is OFTRotationModule


def _config(size: int, **more: Any) -> OFTConfig:
    settings = {
        "r": 0,
        "oft_block_size": 32 if size % 32 == 0 else 4,
        "init_weights": False,
        "target_modules": TARGETS,
    }
    return OFTConfig(**(settings | more))


# Rotating needs whole patches of the kernel's size.
_images = replace(
    conv2d, sample=lambda inputs, tokens: torch.randn(1, inputs, 4, max(3, tokens // 4))
)


def _settle(model: Any) -> None:
    """Bring constrained weights well within their bound, where forward leaves them as they are.

    On the bound, rounding decides whether projecting them ever leaves them as they are.
    """
    for module in model.modules():
        if isinstance(module, OFTRotationModule):
            module.weight.data.copy_(module._project_batch(module.weight, eps=module.eps) / 2)


class _OFT:
    name = "OFT"
    relies_on: Mapping[str, str] = {
        "peft.tuners.oft.layer:OFTRotationModule.forward": "e020e4dfcabe",
        "peft.tuners.oft.layer:OFTRotationModule._cayley_batch": "90c6c9b8ab25",
        "peft.tuners.oft.layer:OFTRotationModule._project_batch": "843c16135148",
        "peft.tuners.oft.layer:OFTRotationModule._pytorch_skew_symmetric": "8d68b04ab51f",
        "peft.tuners.oft.layer:OFTRotationModule._pytorch_skew_symmetric_inv": "fe74f04e1cfd",
        "peft.tuners.oft.layer:OFTRotationModule._unfold": "5ceed5c73ce3",
        "peft.tuners.oft.layer:OFTRotationModule._fold": "f315065c8187",
    }
    examples = (
        Example("OFT", lambda inputs, _: _config(inputs)),
        Example("OFT, solve", lambda inputs, _: _config(inputs, use_cayley_neumann=False)),
        Example(
            "OFT, coft",
            lambda inputs, _: _config(inputs, coft=True, eps=0.05),
            settle=_settle,
        ),
        Example("OFT, block_share", lambda inputs, _: _config(inputs, block_share=True)),
        Example("OFT, Embedding", lambda _, outputs: _config(outputs), embedding),
        Example("OFT, Conv2d", lambda inputs, _: _config(inputs), _images),
    )

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, OFTLayer)

    def apply(self, cache: Engine, layer: Any) -> bool:
        rotations = [
            (adapter, rotation)
            for attribute in layer.adapter_layer_names
            for adapter, rotation in getattr(layer, attribute, {}).items()
        ]
        known = [(adapter, rotation) for adapter, rotation in rotations if _is_known(rotation)]
        if len(known) < len(rotations):
            where = f"{plain_class(type(layer)).__module__}.{plain_class(type(layer)).__qualname__}"
            cache.decline(self.name, where, "its rotations are not PEFT's OFTRotationModule")
        if not known:
            return False
        forward = viewed(plain_class(type(layer)).forward)  # type: ignore[attr-defined]
        binding = follow_layer(cache, layer, self, {"forward": forward})
        for adapter, rotation in known:
            follow_part(cache, binding, rotation, adapter, {"forward": _hook.function}, _warmers)
        return True


RECIPE = _OFT()
