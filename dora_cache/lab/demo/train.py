"""Train the demo adapters: one small DoRA adapter of SmolLM2-135M-Instruct per text."""

from __future__ import annotations

import argparse
import copy
import math
import warnings
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dora_cache.lab.demo import ADAPTERS
from dora_cache.lab.demo.smollm import HUB_ID, load_model, model_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Settings:
    """How an adapter is trained; the defaults are those of the shipped adapters."""

    rank: int = 4
    alpha: int = 16
    steps: int = 120
    warmup_steps: int = 10
    learning_rate: float = 1e-3
    batch: int = 4
    window: int = 128
    max_grad_norm: float = 1.0
    seed: int = 0


def read_text(name: str) -> str:
    """Return the training text of one of ``ADAPTERS``.

    Raises:
        FileNotFoundError: if there is no text of that name.
    """
    return (Path(__file__).resolve().parent / "texts" / f"{name}.txt").read_text(encoding="utf-8")


def train(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    settings: Settings,
    on_step: Callable[[float], None],
) -> PeftModel:
    """Wrap ``model`` with a DoRA adapter on its linear layers, and train the adapter in place.

    On one machine and one thread count the result depends on the arguments only; the caller's
    random state is left as it was.

    Args:
        model: base model; its own weights do not change, but its layers get wrapped.
        tokens: int64 token ids of the text, shape ``(length,)``.
        settings: sizes and schedule.
        on_step: called after each step with the step's loss, in nats per token.

    Returns:
        The wrapped model, in eval mode.

    Raises:
        ValueError: if the text has fewer than ``settings.window`` tokens.
    """
    from peft import LoraConfig, get_peft_model

    positions = tokens.numel() - settings.window + 1
    if positions < 1:
        raise ValueError(f"{tokens.numel()} tokens do not fill a window of {settings.window}")

    config = LoraConfig(
        use_dora=True,
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(settings.seed)
        wrapped = get_peft_model(model, config)
    trainable = [weight for weight in wrapped.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, settings)
    )
    generator = torch.Generator().manual_seed(settings.seed)
    offsets = torch.arange(settings.window)

    wrapped.train()
    for _ in range(settings.steps):
        starts = torch.randint(positions, (settings.batch, 1), generator=generator)
        windows = tokens[starts + offsets]
        loss = wrapped(input_ids=windows, labels=windows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(loss.item())
    return wrapped.eval()


def learning_rate_factor(step: int, settings: Settings) -> float:
    """Return the share of the peak rate at a 0-based step: a linear rise, then half a cosine."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    remaining = max(1, settings.steps - settings.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * (step - settings.warmup_steps) / remaining))


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter of ``model`` to ``folder`` in PEFT's format, with bfloat16 weights."""
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    # Written here and not by the model's own save_pretrained, which would also leave a blank
    # model card, and would name the local folder of the base model in the configuration.
    config = copy.deepcopy(model.peft_config["default"])
    config.base_model_name_or_path = HUB_ID
    config.inference_mode = True
    if isinstance(config, LoraConfig) and config.target_modules is not None:
        # A set has no fixed order in the JSON file.
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    weights = {
        name: weight.detach().to(torch.bfloat16).contiguous()
        for name, weight in get_peft_model_state_dict(model).items()
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: train the chosen adapters, and save each under ``--out``."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m dora_cache.lab.demo.train", description=__doc__
    )
    parser.add_argument(
        "--out", type=Path, default=Path("adapters"), help="parent folder (default: ./adapters)"
    )
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--rank", type=int, default=defaults.rank)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--adapter", choices=ADAPTERS, help="train only this one (default: all)")
    options = parser.parse_args(arguments)
    settings = Settings(rank=options.rank, steps=options.steps, seed=options.seed)
    names = [options.adapter] if options.adapter else list(ADAPTERS)

    console = Console()
    base = model_directory(progress=console.print)
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for name in names:
            final = _train_one(name, base, settings, options.out / name, progress)
            console.print(f"{name}: loss {final:.3f}, saved in {options.out / name}")


def _train_one(
    name: str, base: Path, settings: Settings, folder: Path, progress: Progress
) -> float:
    """Train and save one adapter; return its mean loss over the last ten steps."""
    model, tokenizer = load_model(base)
    tokens = torch.tensor(tokenizer(read_text(name))["input_ids"])
    task = progress.add_task(name, total=settings.steps, loss=math.nan)
    recent: deque[float] = deque(maxlen=10)

    def report(loss: float) -> None:
        recent.append(loss)
        progress.update(task, advance=1, loss=sum(recent) / len(recent))

    save_adapter(train(model, tokens, settings, report), folder)
    return sum(recent) / len(recent)


if __name__ == "__main__":
    main()
