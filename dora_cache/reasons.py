"""Reasons for which a call bypasses the cache or a value is not kept: one closed list."""

from __future__ import annotations

import enum
from typing import NamedTuple, Self

__all__ = ["Advised", "Declined", "Reason"]


class Advised(enum.Enum):
    """A closed list of reasons, each with what to do about it.

    Attributes:
        advice: what to do, for reports.
    """

    advice: str

    def __new__(cls, value: str, advice: str) -> Self:
        """Keep the advice beside the value."""
        member = object.__new__(cls)
        member._value_ = value
        member.advice = advice
        return member


class Reason(Advised):
    """Why a call was not answered from the cache, or its value not stored.

    The value is the name under which ``CacheStats.reasons`` counts it.

    Attributes:
        advice: what to do about it, for reports.
    """

    # The call goes past the cache.
    BYPASS = "bypass()", "leave the block of cache.bypass()"
    DETACHED = "cache detached", "attach again with dora_cache.attach(model)"
    COPY = "copied owner", "attach a cache to the copy"
    TRAINING = (
        "training mode",
        "call model.eval() for inference; likewise of a LycorisNetwork, which has its own mode",
    )
    DROPOUT = "dropout at work", "call model.eval() for inference"
    GRADIENTS = "gradients wanted", "run inference under torch.no_grad() or inference_mode()"
    TRACED = (
        "operations traced or transformed",
        "nothing: whoever traces, transforms or captures operations must see them",
    )
    WRITTEN = (
        "compiled code writes to the weights first",
        "write to weights and scalings outside of the function that is compiled",
    )
    AUTOCAST = (
        "autocast in compiled code",
        "nothing: the library may derive another value there; without autocast it is read",
    )
    IN_GRAPH = (
        "cheaper to derive in compiled code than to read",
        "nothing: it is a product of small factors",
    )
    FROZEN = (
        "weights frozen by the compiler",
        "nothing: with torch._inductor.config.freezing it derives once, from constants",
    )
    HOOKED = (
        "hooks on a part",
        "remove global hooks, and hooks and forwards set on the adapter's own modules",
    )
    UNUSUAL_PART = (
        "unusual part of a layer",
        "use the library's own classes and parameters in layers; a recipe knows no others",
    )
    UNUSUAL_INPUT = (
        "unusual input",
        "call layers with one tensor of the usual shape and of the weights' dtype and device",
    )
    LARGE_INPUT = (
        "large input",
        "nothing: beside the product with it, deriving takes little time",
    )
    SEVERAL = "several adapters at once", "activate one adapter at a time"
    FACTORED = (
        "factors applied one by one",
        "nothing, if they are small; in LyCORIS, bypass_mode=False derives a weight that is kept",
    )
    REFILLED = (
        "storage that is refilled",
        "keep parameters in place, or shard by FSDP2 with reshard_after_forward=True or False",
    )
    OFFLOADED = (
        "weights in place for one forward alone",
        "offload or cast whole blocks, not single layers, and leave the files alone",
    )
    SHARDED = (
        "sharded weights (DTensor)",
        "use FSDP2 or DDP, under which weights are whole during a forward",
    )
    SUBCLASS = (
        "tensor subclass without data of its own",
        "use weights that are plain tensors, or that name those they wrap (__tensor_flatten__)",
    )
    QUANTIZED = (
        "dense value on a quantized weight",
        "nothing: what there is to store would be many times as large as the weight",
    )
    UNVERSIONED = (
        "weights without version counter",
        "load, clone or (with FSDP) first gather the weights outside torch.inference_mode()",
    )
    UNKEYABLE = (
        "argument that cannot be a key",
        "pass tensors, modules, numbers, strings, or containers of these",
    )
    UNSIGNABLE = (
        "dependency that cannot be compared",
        "have depends_on return tensors and plain scalars",
    )
    DEPENDS_ON_FAILED = "depends_on failed", "see the warning that says how"
    NEVER_REUSED = (
        "values never reused lately",
        "nothing, if weights change at every call; the cache tries again now and then",
    )
    REENTERED = "called from within the cache", "nothing: garbage collection ran the call"

    # The value was derived and is not kept; see is_bypass.
    CAP = "no room under the cap", "raise max_bytes, or use backend='budget'"
    DECLINED = (
        "declined by the backend",
        "raise max_bytes: under this cap other values save more time",
    )
    CHANGED = (
        "dependencies changed while deriving",
        "do not write to weights in use; leave what the method itself changes out of depends_on",
    )
    UNSTORABLE = "result is not tensors", "return a tensor or a non-empty tuple of tensors"
    OUT_OF_MEMORY = "out of memory", "lower max_bytes to leave the device more room"
    BACKEND_FAILED = "the backend failed", "see the warning that says how"

    @property
    def is_bypass(self) -> bool:
        """Whether it is of calls that go past the cache, not of derived values that are not kept.

        A result that cannot be stored makes a call past the cache of the one that derived it.
        """
        return self not in _NOT_KEPT


_NOT_KEPT = {
    Reason.CAP,
    Reason.DECLINED,
    Reason.CHANGED,
    Reason.OUT_OF_MEMORY,
    Reason.BACKEND_FAILED,
}


class Declined(NamedTuple):
    """Something that could have been cached and is not.

    Attributes:
        kind: the adapter kind, e.g. ``"OFT"``.
        adapter: the adapter's name; None where it is not one adapter's matter.
        where: the layer's name, or what else says where.
        reason: why.
    """

    kind: str
    adapter: str | None
    where: str
    reason: str
