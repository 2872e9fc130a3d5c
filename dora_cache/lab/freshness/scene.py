"""A small real PEFT model to try operations on, the same every time."""

from __future__ import annotations

import copy
import io
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ADAPTERS", "KINDS", "LAYERS", "Net", "Pick", "Scene", "quiet"]

LAYERS = ("embedding", "conv", "linear")
"""Names of the adapted layers; each has another kind of DoRA."""

KINDS = ("A", "B", "magnitude")
"""The parameters of an adapter in one layer."""

ADAPTERS = ("ada", "bob")
"""The adapters that every scene begins with; the first is the active one."""


class Net(nn.Module):
    """An embedding, a convolution and a linear layer.

    Maps token ids of shape (batch, 2) to (batch, 5).
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 9)
        self.conv = nn.Conv2d(2, 3, 2)
        self.linear = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """Run all three layers."""
        x = self.embedding(ids).unflatten(-1, (3, 3))
        found: Tensor = self.linear(torch.tanh(self.conv(x)).flatten(1))
        return found


@dataclass(frozen=True, slots=True)
class Pick:
    """What an operation is to work on.

    Attributes:
        adapter: name of the adapter.
        other: name of another one, for operations that take two.
        layer: name of one layer, or None for all of them.
        kind: one kind of parameter, or None for all of them.
        factor: what to multiply by.
        seed: for random numbers.
    """

    adapter: str = ADAPTERS[0]
    other: str = ADAPTERS[1]
    layer: str | None = None
    kind: str | None = None
    factor: float = 1.25
    seed: int = 0


class Scene:
    """A model with DoRA adapters on every layer, in eval mode, and an input for it.

    Two scenes of the same dtype and seed are equal to the bit.

    Attributes:
        model: the ``PeftModel``.
        ids: its input.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dropout: float = 0.0,
    ) -> None:
        self.device = torch.device(device)
        self.dropout = dropout
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            self.model: Any = get_peft_model(
                Net().to(dtype), self.config(2), adapter_name=ADAPTERS[0]
            )
            for rank, name in enumerate(ADAPTERS[1:], start=3):
                self.model.add_adapter(name, self.config(rank))
            with torch.no_grad():
                for parameter in self.model.parameters():
                    noise = torch.randn(parameter.shape)
                    parameter.mul_((1 + 0.1 * noise).to(parameter))
            self.ids = torch.randint(0, 11, (3, 2)).to(self.device)
        self.model.to(self.device)
        self.model.eval()

    def config(self, rank: int, *, use_dora: bool = True) -> LoraConfig:
        """Return a config for all layers with random weights."""
        return LoraConfig(
            use_dora=use_dora,
            r=rank,
            lora_alpha=3,
            lora_dropout=self.dropout,
            target_modules=list(LAYERS),
            init_lora_weights=False,
        )

    @property
    def tuner(self) -> Any:
        """PEFT's ``LoraModel``."""
        return self.model.base_model

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters there are."""
        return list(self.model.peft_config)

    def layers(self, pick: Pick) -> list[Any]:
        """Return the adapted layers that are meant."""
        names = LAYERS if pick.layer is None else (pick.layer,)
        return [getattr(self.tuner.model, name) for name in names]

    def parts(self, pick: Pick) -> list[tuple[Any, str]]:
        """Return where the parameters that are meant are kept: an owner and a name in it."""
        found: list[tuple[Any, str]] = []
        for layer in self.layers(pick):
            embedded = pick.adapter in layer.lora_embedding_A
            for kind in KINDS if pick.kind is None else (pick.kind,):
                if kind == "magnitude":
                    if pick.adapter in layer.lora_magnitude_vector:
                        found.append((layer.lora_magnitude_vector[pick.adapter], "weight"))
                elif embedded:
                    found.append((getattr(layer, f"lora_embedding_{kind}"), pick.adapter))
                elif pick.adapter in layer.lora_A:
                    found.append((getattr(layer, f"lora_{kind}")[pick.adapter], "weight"))
        return found

    def weights(self, pick: Pick) -> list[nn.Parameter]:
        """Return the adapter's parameters that are meant."""
        return [
            owner[name] if isinstance(owner, nn.ParameterDict) else getattr(owner, name)
            for owner, name in self.parts(pick)
        ]

    def state(self, pick: Pick) -> dict[str, Tensor]:
        """Return the adapter's entries of ``state_dict()``, changed by the factor."""
        wanted = {id(weight) for weight in self.weights(pick)}
        names = [name for name, weight in self.model.named_parameters() if id(weight) in wanted]
        full = self.model.state_dict()
        return {name: full[name].clone() * pick.factor for name in names}

    def run(self) -> Tensor:
        """Run the active adapters, without gradients."""
        with torch.no_grad():
            found: Tensor = self.model(self.ids)
        return found

    def run_each(self) -> list[Tensor]:
        """Run as it is, then each adapter by itself, and return to what was active."""
        found = [self.run()]
        if any(layer.merged_adapters for layer in self.layers(Pick())):
            return found
        before = list(self.tuner.active_adapters)
        for adapter in self.adapters:
            self.activate(adapter)
            found.append(self.run())
        self.activate(*before)
        return found

    def activate(self, *adapters: str) -> None:
        """Make adapters the active ones, in this order."""
        with quiet():
            self.tuner.set_adapter(list(adapters))

    def step(self, optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> None:
        """Take a step with gradients of one."""
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def change(self, pick: Pick) -> None:
        """Multiply the parameters that are meant by the factor, in place."""
        with torch.no_grad():
            for weight in self.weights(pick):
                weight.mul_(pick.factor)

    def copied(self) -> Scene:
        """Return a scene with a deep copy of the model."""
        return self._with(copy.deepcopy(self.model))

    def unpickled(self) -> Scene:
        """Return a scene with the model saved and loaded again."""
        file = io.BytesIO()
        torch.save(self.model, file)
        file.seek(0)
        return self._with(torch.load(file, weights_only=False))

    def _with(self, model: Any) -> Scene:
        scene = object.__new__(Scene)
        scene.__dict__.update(self.__dict__, model=model)
        return scene


@contextmanager
def quiet() -> Iterator[None]:
    """Hide PEFT's advice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
