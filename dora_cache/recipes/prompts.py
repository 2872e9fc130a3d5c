"""P-tuning and projected prefix tuning: what the prompt encoder makes of the virtual tokens.

With ``inference_mode=False`` in its config, PEFT runs the encoder (an LSTM or MLP, or the prefix's
projection) on the same virtual tokens at each call of ``PeftModel.get_prompt``. The encoder's
output is stored. The ``Cache`` of keys and values that PEFT makes of a prefix is not: models write
into it.
"""

from __future__ import annotations

import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig
from peft.tuners.p_tuning.model import PromptEncoder
from peft.tuners.prefix_tuning.model import PrefixEncoder
from torch import Tensor, nn

from dora_cache.attributes import SLOT
from dora_cache.core.decorator import cached
from dora_cache.core.keys import own_state
from dora_cache.lifecycle import Observer, observe, plain_class
from dora_cache.reasons import Reason
from dora_cache.recipes.compiled import view_of
from dora_cache.recipes.examples import Base, Example
from dora_cache.recipes.holder import Holder
from dora_cache.recipes.hooks import UnusualError
from dora_cache.recipes.peft_layers import follow_whole, is_hooked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dora_cache.core.binding import Binding
    from dora_cache.core.engine import Engine

__all__ = ["RECIPE"]


class _Here(threading.local):
    """The virtual tokens of the ``get_prompt`` that this thread is in, and whose encoder's."""

    encoder: nn.Module | None = None
    tokens: Tensor | None = None


_here = _Here()


def _get_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
    original = plain_class(type(self)).get_prompt  # type: ignore[attr-defined]
    if torch.compiler.is_dynamo_compiling():
        return original(self, *args, **kwargs)
    before = _here.encoder, _here.tokens
    adapter = self.active_adapter
    # Both are looked up as PEFT's method does; what is missing, it will say.
    _here.encoder = self.prompt_encoder._modules.get(adapter)
    _here.tokens = self.prompt_tokens.get(adapter)
    try:
        return original(self, *args, **kwargs)
    finally:
        _here.encoder, _here.tokens = before


def _depends_on(encoder: Any, *_: object) -> Iterator[object]:
    _, *inner = encoder.modules()
    if is_hooked(*inner):
        msg = "hooks would see the encoder's layers run"
        raise UnusualError(msg)
    yield from encoder._parameters.values()
    yield encoder.__dict__.get("encoder_type")
    yield encoder.__dict__.get("prefix_projection")
    for module in inner:
        if module.training:
            msg = "one of the encoder's layers is in training"
            raise UnusualError(msg)
        if module._modules:
            if type(module) is not nn.Sequential:
                msg = f"{type(module).__name__} is not of PEFT's encoder"
                raise UnusualError(msg)
        elif isinstance(module, nn.LSTM):  # it has attributes that cannot be compared
            yield from module._parameters.values()
            yield list(module._flat_weights)  # those that it reads
            yield module.num_layers
            yield module.bidirectional
            yield module.batch_first
            yield module.proj_size
        else:
            yield from own_state(module)


@cached("prompt", depends_on=_depends_on)
def _encoded(encoder: Any, tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Derive the output for some rows of the first virtual tokens.

    Returns:
        A tensor of shape (rows, columns, features); of shape (1, columns, features) if all rows
        come out alike. As a rule they do, and they need not be those of a single row computed by
        itself: a matrix product of another size may be rounded otherwise.
    """
    indices = tokens[:columns].unsqueeze(0).expand(rows, -1)
    found: Tensor = plain_class(type(encoder)).forward(  # type: ignore[attr-defined]
        encoder, indices.to(encoder.embedding.weight.device)
    )
    return found[:1] if bool((found == found[:1]).all()) else found


_tokens: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()


@cached(
    "prompt, compiled", depends_on=lambda encoder, *_: [*_depends_on(encoder), _tokens[encoder]]
)
def _rows(encoder: Any, rows: str, columns: str) -> Tensor:
    """Derive the output for the first virtual tokens, as :func:`_encoded` does."""
    found: Tensor = _encoded.__wrapped__(encoder, _tokens[encoder], int(rows), int(columns))
    return found


class _Stored(nn.Module):
    """Stands for an encoder in the view of its model: there it gets nothing but virtual tokens."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.embedding = encoder.embedding
        self.__dict__["encoder"] = encoder

    def forward(self, indices: Tensor) -> Tensor:
        encoder = self.__dict__["encoder"]
        view = None if torch.is_grad_enabled() else view_of(encoder)
        if view is None:
            found: Tensor = encoder(indices)
            return found
        rows, columns = indices.shape
        found = _rows(view, str(int(rows)), str(int(columns)))
        return found if len(found) == rows else found.repeat(rows, 1, 1)


def _finish(_: Any, view: Any) -> None:
    """Have the encoders in a model's view read what is stored."""
    encoders = view._modules["prompt_encoder"]._modules
    for name, encoder in encoders.items():
        if SLOT in encoder.__dict__:
            encoders[name] = _Stored(encoder)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:  # the input has another name in each
    original = plain_class(type(self)).forward  # type: ignore[attr-defined]
    binding, tokens = self.__dict__.get(SLOT), _here.tokens
    if torch.compiler.is_dynamo_compiling() or binding is None:
        return original(self, *args, **kwargs)
    if torch.is_grad_enabled():  # LSTMs then compute in another way, to other bits
        binding.passed_by(Reason.BYPASS if binding.cache.bypassing else Reason.GRADIENTS)
        return original(self, *args, **kwargs)
    indices = args[0] if len(args) == 1 and not kwargs else None
    if (
        indices is None
        or tokens is None
        or _here.encoder is not self
        or indices.dim() != 2  # noqa: PLR2004 - (rows, columns)
        or tokens.dim() != 1
        or indices.shape[1] > len(tokens)
    ):
        binding.passed_by(Reason.UNUSUAL_INPUT)
        return original(self, *args, **kwargs)
    rows, columns = indices.shape
    fast = binding.cache.config.numerics == "fast"
    found = _encoded(self, tokens, 1 if fast else rows, columns)
    return found if len(found) == rows else found.repeat(rows, 1, 1)


class _Prompts:
    name = "prompt encoders"
    relies_on = {  # noqa: RUF012
        "peft.peft_model:PeftModel.get_prompt": "04459b34261b",
        "peft.tuners.p_tuning.model:PromptEncoder.forward": "6431457d41eb",
        "peft.tuners.prefix_tuning.model:PrefixEncoder.forward": "a3a40f37c509",
    }

    def __init__(self) -> None:
        self.examples = _EXAMPLES

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, PeftModel) and "prompt_encoder" in layer._modules

    def apply(self, cache: Engine, layer: Any) -> bool:
        encoders = [
            (adapter, encoder)
            for adapter, encoder in layer.prompt_encoder.items()
            if _recomputes(plain_class(type(encoder)), encoder)
        ]
        if not encoders:
            return False
        plain = plain_class(type(layer))
        if plain.get_prompt is not PeftModel.get_prompt:  # type: ignore[attr-defined]
            where = f"{plain.__module__}.{plain.__qualname__}"
            cache.decline(self.name, where, "its get_prompt() is not that of PEFT's PeftModel")
            return False
        if layer.__dict__.get(SLOT) is None:

            def added(model: Any, *_: object, **__: object) -> None:
                self.apply(cache, model)

            def deleted(_: Any, adapter_name: str) -> None:
                cache.event(layer.__dict__[SLOT], adapter_name)

            calls: dict[str, Any] = dict.fromkeys(("add_adapter", "load_adapter"), added)
            calls["delete_adapter"] = deleted
            holder: Any = follow_whole(cache, layer, {"get_prompt": _get_prompt}, calls).holder
            holder.finish = _finish
        binding = layer.__dict__[SLOT]
        for adapter, encoder in encoders:
            if encoder.__dict__.get(SLOT) is None:
                part = cache.bind(encoder, adapter=adapter)
                holder = Holder(part, partial(_named, adapter))
                _tokens[encoder] = layer.prompt_tokens[adapter]
                part.warmers = partial(_warmers, layer.prompt_tokens)
                binding.adopt(part)
                observer = Observer(
                    mode_switched=partial(_void, cache, part),
                    moved=partial(_revalidate, cache, part),
                    changed=holder.changed,
                )
                part.undo.callback(observe(encoder, observer, {"forward": _forward}))
        return True


def _void(cache: Engine, binding: Binding, _: object) -> None:
    cache.event(binding)


def _named(adapter: str, _: object) -> tuple[str]:
    return (adapter,)


def _revalidate(cache: Engine, binding: Binding, _: object) -> None:
    cache.revalidate(binding)


def _warmers(
    tokens: dict[str, Tensor], encoder: Any, _: object
) -> Iterator[tuple[str, Callable[[], object]]]:
    adapter = encoder.__dict__[SLOT].adapter
    if adapter in tokens:  # for the first forward of a single sequence
        columns = encoder.embedding.num_embeddings
        yield adapter, partial(_encoded, encoder, tokens[adapter], 1, columns)


def _recomputes(plain: Any, encoder: Any) -> bool:
    """Whether an encoder does more than to look embeddings up."""
    if plain.forward is PromptEncoder.forward:
        return "mlp_head" in encoder._modules
    return plain.forward is PrefixEncoder.forward and "transform" in encoder._modules


# Examples


def _llama(inputs: int, _: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=inputs,
        intermediate_size=2 * inputs,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


_LLAMA = Base(
    "causal language model",
    _llama,
    lambda _, tokens: torch.randint(0, 64, (1, tokens)),
    whole=True,
)


def _p_tuning(kind: str) -> Callable[[int, int], PromptEncoderConfig]:
    return lambda inputs, _: PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=20,
        encoder_reparameterization_type=kind,
        encoder_num_layers=1 if kind == "LSTM" else 2,
        encoder_hidden_size=inputs,
    )


_EXAMPLES = (
    Example("p-tuning, LSTM", _p_tuning("LSTM"), _LLAMA),
    Example("p-tuning, MLP", _p_tuning("MLP"), _LLAMA, (torch.float32,)),
    Example(
        "prefix tuning, projected",
        lambda inputs, _: PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=20,
            prefix_projection=True,
            encoder_hidden_size=inputs,
        ),
        _LLAMA,
    ),
)

RECIPE = _Prompts()
