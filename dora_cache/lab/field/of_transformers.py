"""Set-ups of transformers."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from dora_cache.lab.field.setup import Built, SetUp, moved_magnitudes

__all__ = ["SETUPS", "config", "llama", "running"]


def llama(width: int, **others: Any) -> Any:
    """Return a small random causal language model of two layers, in eval mode.

    Args:
        width: of its hidden states.
        **others: settings, as ``LlamaConfig`` takes them.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        **others,
    )
    return LlamaForCausalLM(settings).eval()


def config(dora: bool, **others: Any) -> LoraConfig:  # noqa: FBT001
    """Return the settings of an adapter that changes the outputs, for all projections."""
    torch.manual_seed(1)
    return LoraConfig(
        **{
            "r": 4,
            "use_dora": dora,
            "target_modules": r".*\.(self_attn|mlp)\..*_proj",
            "init_lora_weights": False,
        }
        | others
    )


def running(model: Any, attached: Any = None) -> Built:
    """Return what runs a causal language model on five tokens."""
    devices = {one.device for one in model.parameters()} - {torch.device("meta")}
    ids = torch.arange(1, 6, device=max(devices, key=str, default=None))[None]  # cuda before cpu
    return Built(model if attached is None else attached, lambda: model(ids).logits)


def _peft_model(dora: bool, width: int) -> Built:  # noqa: FBT001
    return running(moved_magnitudes(get_peft_model(llama(width), config(dora)).eval()))


def _generate(dora: bool, width: int) -> Built:  # noqa: FBT001
    model = moved_magnitudes(get_peft_model(llama(width), config(dora)).eval())
    prompt = torch.arange(1, 6)[None]

    def run() -> Any:
        return model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
        )

    return Built(model, run)


def _load_adapter(dora: bool, width: int) -> Built:  # noqa: FBT001
    model = llama(width)
    with tempfile.TemporaryDirectory() as folder:
        moved_magnitudes(get_peft_model(llama(width), config(dora))).save_pretrained(folder)
        model.load_adapter(folder, "a")
    return running(model)


def _encoder(dora: bool, width: int) -> Built:  # noqa: FBT001
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    settings = BertConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    targets = ["query", "key", "value", "dense"]
    adapted = get_peft_model(BertModel(settings), config(dora, target_modules=targets))
    model = moved_magnitudes(adapted.eval())
    ids = torch.arange(1, 9)[None]
    return Built(model, lambda: model(ids).last_hidden_state)


def _add_adapter(dora: bool, width: int) -> Built:  # noqa: FBT001
    model = llama(width)
    model.add_adapter(config(dora), "a")
    return running(moved_magnitudes(model))


SETUPS = [
    SetUp("get_peft_model", "transformers", _peft_model),
    SetUp("generate()", "transformers", _generate),
    SetUp("an encoder (BERT)", "transformers", _encoder),
    SetUp("add_adapter", "transformers", _add_adapter),
    SetUp("load_adapter", "transformers", _load_adapter),
]
