"""An adapter's tensors in one piece of memory, on the host and on the device."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from dora_cache.serving.files import AdapterFiles, Part
    from dora_cache.serving.layers import PooledLayer, Substitute

__all__ = ["Layout", "Placed", "Resident"]

_ALIGNMENT = 256
_ALLOCATED = 512
"""What PyTorch's allocator for CUDA rounds to."""


_ROW = 8
"""Numbers that a table has for a layer: four addresses, the rank, the scaling, and two unused."""


@dataclass(frozen=True, slots=True)
class _Field:
    """Where a tensor lies, in bytes from the beginning."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def of(self, memory: Tensor) -> Tensor:
        """Return the tensor that lies there."""
        return memory[self.offset : self.end].view(self.dtype).view(self.shape)


class Layout:
    """Where an adapter's tensors lie: its weights first, then what is derived, then its table.

    The host has the weights alone.

    Args:
        device: where the layers are.
        parts: of the adapter on that device, each with the layer that it is for.
        layers: how many layers the model has; a table has a row for each.

    Attributes:
        weights: bytes of the weights.
        nbytes: bytes of all, on the device.
    """

    def __init__(
        self, device: torch.device, parts: Sequence[tuple[PooledLayer, Part]], layers: int
    ) -> None:
        self.device = device
        self.parts = tuple(parts)
        self._end = 0
        self.of_weights: list[dict[str, _Field]] = []
        for layer, part in self.parts:
            fields = {}
            for name, shape in part.shapes.items():
                exact = part.kind == "replaced" or name in {"A", "B"}
                fields[name] = self._add(shape, layer.dtype if exact else layer.accumulated)
            self.of_weights.append(fields)
        self.weights = self._end
        self.of_derived: list[dict[str, _Field]] = []
        for layer, part in self.parts:
            shape = (layer.outputs,)
            fields = {}
            if "magnitude" in part.shapes:
                fields["scale"] = self._add(shape, layer.accumulated)
            if part.kind != "replaced" and (
                {"bias", "bias_B"} & set(part.shapes) or ("scale" in fields and layer.biased)
            ):
                fields["shift"] = self._add(shape, layer.accumulated)
            self.of_derived.append(fields)
        self.table = self._add((layers, _ROW), torch.int64)
        self.nbytes = -(-self._end // _ALLOCATED) * _ALLOCATED

    def _add(self, shape: Sequence[int], dtype: torch.dtype) -> _Field:
        field = _Field(self._end, tuple(shape), dtype)
        self._end = -(-field.end // _ALIGNMENT) * _ALIGNMENT
        return field

    def sizes(self) -> Iterator[tuple[PooledLayer, int]]:
        """Yield each layer with the bytes that it takes; the table, and gaps, come on top."""
        fields = zip(self.parts, self.of_weights, self.of_derived, strict=True)
        for (layer, _), of_weights, of_derived in fields:
            each = (*of_weights.values(), *of_derived.values())
            yield layer, sum(field.end - field.offset for field in each)

    def pack(self, files: AdapterFiles, *, pinned: bool) -> Tensor:
        """Read an adapter's weights; return them packed: uint8, on the CPU."""
        memory = torch.empty(self.weights, dtype=torch.uint8, pin_memory=pinned)
        for (_, part), fields in zip(self.parts, self.of_weights, strict=True):
            for name, tensor in files.read(part).items():
                field = fields[name]
                field.of(memory).copy_(tensor.reshape(field.shape))
        return memory


class Placed:
    """What an adapter has on one layer: ``y = scale * (base(x) + scaling * B A x) + shift``.

    Attributes:
        a: shape (rank, in).
        b: shape (out, rank).
        a_transposed: shape (in, rank).
        b_transposed: shape (rank, out).
        scale: shape (out,); None for 1.
        shift: shape (out,); None for 0.
        scaling: LoRA's.
        weights: the other tensors of the adapter, by name.
        whole: what stands in for the whole module, instead of all these; else None.
        derives: fills ``scale`` and ``shift``, which rest on the base layer; None without them.
        rests_on: the base layer's mark as it was then.
    """

    __slots__ = (
        "a",
        "a_transposed",
        "b",
        "b_transposed",
        "derives",
        "rests_on",
        "scale",
        "scaling",
        "shift",
        "weights",
        "whole",
    )

    def __init__(
        self,
        weights: dict[str, Tensor],
        derived: Mapping[str, Tensor],
        scaling: float,
        whole: Substitute | None,
    ) -> None:
        self.whole = whole
        self.a = weights.get("A")
        self.b = weights.get("B")
        if self.a is not None and self.b is not None:
            self.a_transposed = self.a.flatten(1).T
            self.b_transposed = self.b.T
        self.weights = weights
        self.scale = derived.get("scale")
        self.shift = derived.get("shift")
        self.scaling = scaling
        self.derives: Callable[[Placed], None] | None = None
        self.rests_on: Tensor | None = None

    @property
    def rank(self) -> int:
        """The adapter's rank on this layer; 0 for none."""
        return 0 if self.a is None else self.a.shape[0]

    def row(self) -> list[int]:
        """Return the row of the table that kernels read it by."""
        parts = (self.a, self.b, self.scale, self.shift)
        addresses = [0 if part is None else part.data_ptr() for part in parts]
        (bits,) = struct.unpack("q", struct.pack("d", self.scaling))
        return [*addresses, self.rank, bits, 0, 0]

    def refresh(self, mark: Tensor) -> None:
        """Derive anew what rests on the base layer, unless its mark is still this one."""
        if self.derives is not None and self.rests_on is not mark:
            self.derives(self)
            self.rests_on = mark


class Resident:
    """An adapter on the device.

    Args:
        layers: how many the model has.

    Attributes:
        memory: all that it has, for each device: uint8.
        placed: what it has on each layer, by the layer's number.
        touched: bit i is set if it has anything there.
        derived: bit i is set if some of that rests on the base layer.
        replaced: bit i is set if it has parameters for the whole module.
        max_rank: the largest of its ranks.
    """

    def __init__(self, layers: int) -> None:
        self.memory: list[Tensor] = []
        self.placed: list[Placed | None] = [None] * layers
        self.touched = self.derived = self.replaced = self.max_rank = 0
        self._tables: dict[torch.device, Tensor] = {}
        self._ready: list[torch.cuda.Event] = []
        self._streams: set[torch.cuda.Stream] = set()

    def place(self, layout: Layout, packed: Tensor) -> None:
        """Copy an adapter's weights to one device, on the current stream.

        Args:
            layout: how they lie there.
            packed: uint8, on the CPU.
        """
        device = layout.device
        memory = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
        memory[: layout.weights].copy_(packed, non_blocking=True)
        self.memory.append(memory)
        numbers = [0] * math.prod(layout.table.shape)
        fields = zip(layout.parts, layout.of_weights, layout.of_derived, strict=True)
        for (layer, part), of_weights, of_derived in fields:
            weights = {name: field.of(memory) for name, field in of_weights.items()}
            derived = {name: field.of(memory) for name, field in of_derived.items()}
            whole = layer.copy_with(weights) if part.kind == "replaced" else None
            placed = self.placed[layer.index] = Placed(weights, derived, part.scaling, whole)
            self.touched |= 1 << layer.index
            self.max_rank = max(self.max_rank, placed.rank)
            if derived:
                placed.derives = layer.derive
                self.derived |= 1 << layer.index
            if whole is not None:
                self.replaced |= 1 << layer.index
            else:
                start = layer.index * _ROW
                numbers[start : start + _ROW] = placed.row()
        table = self._tables[device] = layout.table.of(memory)
        rows = torch.tensor(numbers, pin_memory=device.type == "cuda").view(table.shape)
        table.copy_(rows, non_blocking=True)

    def refresh(self, layout: Layout) -> None:
        """Derive what rests on the base layers of one device."""
        for layer, _ in layout.parts:
            placed = self.placed[layer.index]
            if placed is not None and placed.derives is not None:
                placed.refresh(layer.base.mark())

    def set_ready(self, device: torch.device) -> None:
        """Note that all has been launched, on a device's current stream, that is to be there."""
        if device.type == "cuda":
            self._ready.append(torch.cuda.current_stream(device).record_event())

    def join(self) -> None:
        """Have the current streams wait until all is there, and keep the memory until they ran."""
        for event, memory in zip(self._ready, self.memory, strict=False):
            stream = torch.cuda.current_stream(memory.device)
            stream.wait_event(event)
            self._streams.add(stream)

    def leave(self) -> None:
        """Let go of the memory, once the streams that have used it have run."""
        for stream in self._streams:
            for memory in self.memory:
                if memory.device == stream.device:
                    memory.record_stream(stream)

    def table_on(self, device: torch.device) -> int:
        """Return the address of the table for a device's layers; 0 if there is none."""
        table = self._tables.get(device)
        return 0 if table is None else table.data_ptr()
