"""OFT (https://arxiv.org/abs/2306.07280): the orthogonal blocks of each layer's rotation."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from peft import OFTConfig
from peft.tuners.oft.layer import OFTLayer, OFTRotationModule

from dora_cache.decorator import SLOT
from dora_cache.recipes.examples import TARGETS, Example
from dora_cache.recipes.peft_layers import follow_layer, follow_part, memoised

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from dora_cache.cache import AdapterCache

__all__ = ["RECIPE"]


class _OFT:
    name = "OFT"
    relies_on = {  # noqa: RUF012
        "peft.tuners.oft.layer:OFTRotationModule.forward": "e020e4dfcabe",
        "peft.tuners.oft.layer:OFTRotationModule._cayley_batch": "90c6c9b8ab25",
    }
    examples = (
        Example(
            "OFT",
            lambda inputs, _: OFTConfig(
                r=0,
                oft_block_size=32 if inputs % 32 == 0 else 4,
                init_weights=False,
                target_modules=TARGETS,
            ),
        ),
    )

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, OFTLayer)

    def apply(self, cache: AdapterCache, layer: Any) -> bool:
        rotations = [
            (adapter, rotation)
            for attribute in layer.adapter_layer_names
            for adapter, rotation in getattr(layer, attribute, {}).items()
            # Constrained OFT writes its weight in every forward, so nothing derived from it lasts.
            if isinstance(rotation, OFTRotationModule) and not rotation.coft
        ]
        if not rotations:
            return False
        binding = follow_layer(cache, layer, self)
        for adapter, rotation in rotations:
            follow_part(
                cache, binding, rotation, adapter, {"_cayley_batch": _cayley_batch}, _warmers
            )
        return True


RECIPE = _OFT()


def _depends_on(rotation: Any, *_: object, **__: object) -> Iterator[object]:
    yield rotation.rows
    yield rotation.cols


def _derive(
    self: Any,
    Q: Tensor,  # noqa: N803 - PEFT's name, by which it may be passed
    block_size: int,
    use_cayley_neumann: bool = True,  # noqa: FBT001, FBT002 - PEFT's signature
    num_neumann_terms: int = 5,
) -> Tensor:
    blocks: Tensor = OFTRotationModule._cayley_batch(
        self, Q, block_size, use_cayley_neumann, num_neumann_terms
    )
    return blocks


_cayley_batch = memoised(_derive, "OFT rotation", depends_on=_depends_on)


def _warmers(rotation: Any, _: object) -> Iterator[tuple[str | None, Callable[[], object]]]:
    # Exactly as forward calls it, for the same key.
    yield (
        rotation.__dict__[SLOT].adapter,
        partial(
            rotation._cayley_batch,
            rotation.weight,
            rotation.block_size,
            rotation.use_cayley_neumann,
            rotation.num_cayley_neumann_terms,
        ),
    )
