"""Set-ups of LyCORIS: its own modules, on linear layers and convolutions."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dora_cache.lab.field.setup import Built, SetUp
from dora_cache.reasons import Reason

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SETUPS", "Net", "applied", "network"]


class Net(nn.Module):
    """A convolution, a norm, and two linear layers.

    Args:
        width: of the linear layers, a multiple of 4.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, width // 4, 3, padding=1)
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.norm.bias)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.width = width

    def sample(self) -> Tensor:
        """Return an input, (1, 4, 8, 4), which gives 8 tokens; the same one each time."""
        return torch.linspace(-1, 1, 4 * 8 * 4).sin().reshape(1, 4, 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, tokens, width) for an input of (batch, 4, height, 4)."""
        features = self.conv(x).transpose(1, 2).flatten(2)
        hidden: Tensor = self.down(torch.tanh(self.up(self.norm(features))))
        return hidden


def network(model: nn.Module, algo: str = "loha", *, seed: int = 0, **settings: Any) -> Any:
    """Return a ``LycorisNetwork`` for a model, in eval mode, whose weights are all random.

    Args:
        model: the model; the network is not applied to it yet.
        algo: LyCORIS' name of the kind of adapter.
        seed: of the weights.
        **settings: as ``create_lycoris`` takes them.
    """
    from lycoris import create_lycoris

    torch.manual_seed(seed)
    made = create_lycoris(
        model, 0.8, linear_dim=4, linear_alpha=2, algo=algo, warn_on_unmatched=False, **settings
    )
    with torch.no_grad():
        for lora in made.loras:  # no part of the network before it is applied
            lora.eval()
            for parameter in lora.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def applied(algo: str = "loha", width: int = 32, **settings: Any) -> tuple[Net, Any]:
    """Return a model in eval mode and the network that is applied to it."""
    torch.manual_seed(1)
    model = Net(width).eval()
    made = network(model, algo, **settings)
    made.apply_to()
    return model, made


def _build(algo: str, settings: dict[str, Any], dora: bool, width: int) -> Built:  # noqa: FBT001
    model, made = applied(algo, width, **settings) if dora else applied("lora", width)
    return Built(made, partial(model, model.sample()))


def _of_model(dora: bool, width: int) -> Built:  # noqa: FBT001
    model, _ = applied("loha" if dora else "lora", width)
    return Built(model, partial(model, model.sample()))


def _parametrized(dora: bool, width: int) -> Built:  # noqa: FBT001
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule

    torch.manual_seed(1)
    model = Net(width)
    kind = LohaModule if dora else LoConModule
    for layer in (model.up, model.down):
        made = kind.parametrize(layer, "weight", lora_dim=4, alpha=2)
        with torch.no_grad():
            for parameter in made.parameters(recurse=not dora):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval()
    return Built(model, partial(model, model.sample()))


def _setup(name: str, algo: str, reason: Reason | None = None, **settings: Any) -> SetUp:
    return SetUp(name, "lycoris", partial(_build, algo, settings), reason)


SETUPS = [
    _setup("LoCon", "locon"),
    _setup("LoCon, weight decomposition", "locon", dora_wd=True),
    _setup("LoCon, weight decomposition of columns", "locon", dora_wd=True, wd_on_output=False),
    _setup("LoCon, Tucker, scalar", "locon", use_tucker=True, use_scalar=True),
    _setup("LoHa", "loha"),
    _setup("LoHa, weight decomposition", "loha", dora_wd=True),
    _setup("LoHa, Tucker, scalar", "loha", use_tucker=True, use_scalar=True),
    _setup("LoKr", "lokr"),
    _setup("LoKr, weight decomposition", "lokr", dora_wd=True),
    _setup("LoKr, both factored", "lokr", decompose_both=True, factor=4),
    _setup("LoKr, Tucker, scalar", "lokr", use_tucker=True, use_scalar=True, factor=2),
    _setup("GLoRA", "glora"),
    _setup("diag-OFT", "diag-oft", constraint=0.01, rescaled=True),
    _setup("BOFT", "boft", constraint=0.01, rescaled=True),
    _setup("IA3", "ia3"),
    _setup("norms", "loha", train_norm=True),
    _setup("bypass_mode", "loha", Reason.FACTORED, bypass_mode=True),
    SetUp("a model that LoHa is applied to", "lycoris", _of_model),
    SetUp("LoHa by parametrize", "lycoris", _parametrized),
]
