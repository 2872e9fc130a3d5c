"""What each recipe is for, as small models: for tests, measurements, and the page of coverage."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from peft import PeftConfig

__all__ = ["BOTH", "TARGETS", "Base", "Example", "conv2d", "embedding", "linear", "make_model"]


@dataclass(frozen=True, slots=True)
class Base:
    """A kind of layer to adapt.

    Attributes:
        name: e.g. ``"Linear"``.
        make: called with the numbers of inputs and outputs; returns the layer.
        sample: called with the number of inputs and of tokens; returns an input of one sequence.
        whole: whether it is a model by itself.
    """

    name: str
    make: Callable[[int, int], nn.Module]
    sample: Callable[[int, int], Tensor]
    whole: bool = False


linear = Base("Linear", nn.Linear, lambda inputs, tokens: torch.randn(1, tokens, inputs))
head = Base("Head", nn.Linear, linear.sample)
"""A linear layer whose outputs are scores of tokens."""
embedding = Base(
    "Embedding",
    nn.Embedding,
    lambda inputs, tokens: torch.randint(0, inputs, (1, tokens)),
)
conv2d = Base(
    "Conv2d",
    lambda inputs, outputs: nn.Conv2d(inputs, outputs, 3, padding=1),
    lambda inputs, tokens: torch.randn(1, inputs, 4, max(1, tokens // 4)),
)


@dataclass(frozen=True, slots=True)
class Example:
    """One way to use a kind of adapter.

    Attributes:
        name: the kind, and what is special about it: ``"OFT, block_share"``.
        config: called with the numbers of inputs and outputs; returns PEFT's config, with
            ``target_modules=TARGETS`` and weights that are not the identity.
        base: the layer that is adapted.
        dtypes: those in which PEFT runs it.
        layers: how many layers the model has, at most (the second maps back to the inputs).
        second: likewise the config of a second adapter, if it has to differ from the first's.
        prepare: called with the model, to finish what the config cannot say.
        settle: likewise, when its weights have got the values that they start with.
        numerics: those between which the recipe makes a difference: ``BOTH`` if it has a form of
            its own for ``"fast"``.
    """

    name: str
    config: Callable[[int, int], PeftConfig]
    base: Base = linear
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    layers: int = 2
    second: Callable[[int, int], PeftConfig] | None = None
    prepare: Callable[[Any], object] = field(default=lambda _: None)
    settle: Callable[[Any], object] = field(default=lambda _: None)
    numerics: tuple[str, ...] = ("peft",)


BOTH = ("peft", "fast")
TARGETS = ["layer", "back"]
"""Names of the layers to adapt, for ``target_modules``."""


class _Net(nn.Module):
    """One layer, and for linear ones another that maps back, with a nonlinearity between."""

    def __init__(self, base: Base, inputs: int, outputs: int, layers: int) -> None:
        super().__init__()
        self.layer = base.make(inputs, outputs)
        self.back = base.make(outputs, inputs) if layers > 1 and base is linear else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if self.back is None else self.back(torch.tanh(y))


def make_model(
    example: Example,
    inputs: int = 16,
    outputs: int = 24,
    *,
    dtype: torch.dtype = torch.float32,
    adapters: Sequence[str] = ("first",),
    tokens: int = 3,
    layers: int = 2,
    seed: int = 0,
) -> tuple[Any, Tensor]:
    """Make an example's model and an input for it; the same ones for the same arguments.

    Returns:
        A ``PeftModel`` in eval mode, whose first adapter is active, and an input with a batch of
        one.
    """
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        if example.base.whole:
            net = example.base.make(inputs, outputs)
        else:
            net = _Net(example.base, inputs, outputs, min(layers, example.layers))
        net.to(dtype)
        # PEFT's models keep the config that they are given.
        model: Any = get_peft_model(net, example.config(inputs, outputs), adapter_name=adapters[0])
        for name in adapters[1:]:
            model.add_adapter(name, (example.second or example.config)(inputs, outputs))
        example.prepare(model)
        # No parameter keeps the special value that it is initialised to.
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape)
                parameter.copy_((parameter * (1 + 0.1 * noise) + 0.05 * noise).to(parameter))
            example.settle(model)
        x = example.base.sample(inputs, tokens)
    return model.eval(), x.to(dtype) if x.is_floating_point() else x
