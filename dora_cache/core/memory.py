"""Backends, caps, pins, and the share of compiled code's buffers."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from dora_cache.backends import Pinning, Resizable
from dora_cache.backends.per_device import PerDeviceBackend
from dora_cache.config import parse_size, resolve_size
from dora_cache.copying import Uncopyable
from dora_cache.core.keys import concerns
from dora_cache.errors import ConfigError, PinError
from dora_cache.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Container, Hashable, Iterable, Sequence

    import torch

    from dora_cache.backends import Backend, Entry
    from dora_cache.config import CacheConfig
    from dora_cache.core.binding import Buffer
    from dora_cache.core.cells import Cell
    from dora_cache.core.keys import Adapters

__all__ = ["Memory", "Part"]


class Part(Uncopyable):
    """One backend under a cap, and the buffers of compiled code that share it.

    Args:
        backend: knows nothing of buffers.
        cap: the ``max_bytes`` that it was made with.
        device: whose memory the cap is of.
        evicted: called with the key of each entry evicted here, once it is gone.

    Attributes:
        reserved: bytes that buffers hold.
        pinned: sizes of the pinned entries held, by key.
    """

    def __init__(
        self,
        backend: Backend,
        cap: int | None,
        device: torch.device,
        evicted: Callable[[Hashable], object],
    ) -> None:
        self.backend = backend
        self.cap = cap
        self.device = device
        self.reserved = 0
        self.pinned: dict[Hashable, int] = {}
        self._evicted = evicted
        # Then it makes room for buffers by itself, choosing what to evict by its own policy. Not
        # if it has another tier beside what the cap is of.
        self._yields = (
            cap is not None and isinstance(backend, Resizable) and backend.max_bytes == cap
        )

    @property
    def limit(self) -> int | None:
        """The most bytes that entries and buffers may take together."""
        return self.cap if self._yields else self.backend.max_bytes

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the pinned entries held."""
        return sum(self.pinned.values())

    def put(self, key: Hashable, entry: Entry, *, pinned: bool) -> bool:
        """Put an entry into what buffers leave of the cap; say whether it was kept."""
        backend = self.backend
        pinned = pinned and isinstance(backend, Pinning)
        if pinned:
            backend.pin(key)  # type: ignore[attr-defined]
        kept = False
        try:
            if self._yields or not self.reserved:
                kept = backend.put(key, entry)
            else:
                kept = self.room(entry.nbytes) and backend.put(key, entry) and self.room(0)
        finally:
            if pinned and kept:
                self.pinned[key] = entry.nbytes
            elif pinned:
                backend.unpin(key)  # type: ignore[attr-defined]
        return kept

    def reserve(self, nbytes: int) -> bool:
        """Set bytes aside for a buffer; pinned entries and other buffers make no room."""
        limit = self.limit
        if limit is not None and self.reserved + nbytes + self.pinned_bytes > limit:
            return False
        if self._yields:
            self.resize_backend(self.reserved + nbytes)
        elif not self.room(nbytes):
            return False
        self.reserved += nbytes
        return True

    def release(self, nbytes: int) -> None:
        """Give back what was set aside."""
        self.reserved -= nbytes
        if self._yields:
            self.resize_backend(self.reserved)

    def resize_backend(self, reserved: int) -> None:
        """Leave so many bytes of the cap to buffers."""
        assert self.cap is not None  # noqa: S101 - for the type checker
        self.backend.resize(self.cap - reserved)  # type: ignore[attr-defined]

    def room(self, nbytes: int) -> bool:
        """Evict entries until there is room for some bytes beside them and the buffers.

        Pinned entries go only where the cap would not hold otherwise.
        """
        limit, backend = self.limit, self.backend
        if limit is None:
            return True
        most = limit - self.reserved - nbytes
        if nbytes and most < self.pinned_bytes:
            return False
        if most >= 0 and backend.nbytes > most:
            for key in sorted(backend.keys(), key=self.pinned.__contains__):
                if backend.delete(key):
                    self._evicted(key)
                if backend.nbytes <= most:
                    break
        return most >= 0

    def resize(self, cap: int) -> None:
        """Change the cap; the buffers must fit."""
        self.cap = cap
        self.resize_backend(self.reserved if self._yields else 0)
        self.room(0)


class Memory(Uncopyable):
    """All that a cache holds; the cache's lock is held wherever anything is changed.

    Args:
        config: the settings.
        devices: where the model is. Each gets a cap of its own if it spans several, and if the cap
            is one of device memory.

    Attributes:
        backend: where entries are.
        evicted: keys of the entries evicted, by a backend or from here, that the cache has not
            taken note of yet.
        parts: one for each device that has a cap of its own, or a single one.
        pins: names of the pinned adapters.
    """

    def __init__(self, config: CacheConfig, devices: Sequence[torch.device]) -> None:
        self.pins: set[str] = set()
        self.evicted: deque[Hashable] = deque()
        self._config = config
        self._parts: dict[torch.device, Part] = {}
        self._buffers: dict[Buffer, tuple[Part, torch.device]] = {}
        self._size: int | str | None = None
        self.backend: Backend
        if len(devices) > 1 and config.caps_devices:
            self.backend = PerDeviceBackend(self._make, devices)
        else:
            self.backend = self._make(devices[0])
        self.backend.on_evict(self.evicted.append)

    def _make(self, device: torch.device) -> Backend:
        memory = self._config.memory(device)
        size = self._config.max_bytes if self._size is None else self._size
        cap = resolve_size(size, memory)
        backend = self._config.make_backend(device, max_bytes=cap)
        self._parts[device] = Part(backend, cap, memory, self.evicted.append)
        return backend

    @property
    def parts(self) -> list[Part]:
        """The parts, the first device's first."""
        return list(self._parts.values())

    @property
    def reserved(self) -> int:
        """Bytes that buffers hold."""
        return sum(part.reserved for part in self._parts.values())

    @property
    def max_bytes(self) -> int | None:
        """The most bytes that may be held on all devices together; None if unbounded."""
        limits = [part.limit for part in self._parts.values()]
        known = [limit for limit in limits if limit is not None]
        return sum(known) if len(known) == len(limits) else None

    def caps(self) -> tuple[tuple[str, int, int | None], ...]:
        """Return each device's name, the bytes held there, and the cap."""
        return tuple(
            (str(part.device), part.backend.nbytes + part.reserved, part.limit)
            for part in self._parts.values()
        )

    def part(self, device: torch.device | None) -> Part:
        """Return the part that values on a device belong to."""
        if isinstance(self.backend, PerDeviceBackend) and device is not None:
            self.backend.part(device)  # made if need be
            return self._parts[device]
        return self.parts[0]

    # Entries

    def put(self, key: Hashable, entry: Entry, adapter: Adapters) -> bool:
        """Store an entry under the cap of its device; say whether it was kept."""
        part = self.part(entry.tensors[0].device)
        if isinstance(self.backend, PerDeviceBackend):
            self.backend.place(key, entry)
        return part.put(key, entry, pinned=self.pins_hold(adapter))

    def settle(self) -> None:
        """Hold the caps after a backend may have copied something to its device."""
        for part in self._parts.values():
            if part.reserved:
                part.room(0)

    def forgotten(self, key: Hashable) -> None:
        """Take note that an entry goes: a pin is the adapter's, and its next entry gets it."""
        for part in self._parts.values():
            if part.pinned.pop(key, None) is not None:
                part.backend.unpin(key)  # type: ignore[attr-defined]

    def is_pinned(self, key: Hashable) -> bool:
        """Whether the entry under a key is held and pinned."""
        return any(key in part.pinned for part in self._parts.values())

    # Buffers

    def reserve(self, buffer: Buffer, nbytes: int, device: torch.device) -> bool:
        """Set bytes of a device's cap aside for a buffer that has none; False if it is too full."""
        part = self.part(device)
        if not part.reserve(nbytes):
            return False
        self._buffers[buffer] = part, device
        return True

    def release(self, buffer: Buffer) -> None:
        """Give back what was set aside for a buffer; its ``nbytes`` still says how much."""
        part, _ = self._buffers.pop(buffer, (None, None))
        if part is not None:
            part.release(buffer.nbytes)

    def buffers_on(self, devices: Container[torch.device]) -> list[Buffer]:
        """Return the buffers whose bytes are on some devices."""
        return [buffer for buffer, (_, device) in self._buffers.items() if device in devices]

    # Caps

    def resize(
        self,
        max_bytes: int | str,
        buffers: Iterable[Buffer],
        drop: Callable[[Buffer], None],
        cells: Iterable[Cell],
    ) -> None:
        """Change the caps, as ``AdapterCache.resize``.

        Args:
            max_bytes: a size, or a share of each device's free memory.
            buffers: every buffer.
            drop: called with those that the cap has no room for.
            cells: of all values seen that hold.
        """
        try:
            size = parse_size(max_bytes)
        except ValueError as error:
            raise ConfigError(f"max_bytes: {error}") from None
        needs = self._needs(self.pins, cells)
        wanted: list[tuple[Part, int]] = []
        for part in self._parts.values():
            cap = resolve_size(size, part.device)
            assert cap is not None  # noqa: S101 - for the type checker
            if not isinstance(part.backend, Resizable):
                msg = (
                    f"backend {self._config.backend!r} has no cap that can be changed: attach with "
                    f'one that has, as backend="budget", max_bytes="{format_bytes(cap)}"'
                )
                raise ConfigError(msg)
            if self.pins and not isinstance(part.backend, Pinning):
                raise ConfigError(self._cannot_pin())
            if needs.get(part, 0) > cap:
                raise PinError(_too_many(self.pins, needs[part], cap))
            wanted.append((part, cap))
        self._size = size
        by_pin = sorted(buffers, key=lambda buffer: not self.pins.isdisjoint(buffer.adapters))
        for part, cap in wanted:
            for buffer in by_pin:
                if part.reserved + needs.get(part, 0) <= cap:
                    break
                if self._buffers.get(buffer, (None, None))[0] is part:
                    drop(buffer)
            part.resize(cap)

    # Pins

    def pins_hold(self, adapter: Adapters) -> bool:
        """Whether values of an adapter are to be kept."""
        return bool(self.pins) and any(concerns(name, adapter) for name in self.pins)

    def pin(self, adapter: str, cells: Sequence[Cell]) -> int:
        """Pin an adapter, as ``AdapterCache.pin``.

        Args:
            adapter: its name.
            cells: of all values seen that hold.
        """
        names = {*self.pins, adapter}
        needs = self._needs(names, cells)
        for part in self.parts:
            limit = part.limit
            if limit is None:
                continue  # then nothing is ever evicted
            if not isinstance(part.backend, Pinning):
                raise ConfigError(self._cannot_pin())
            left = limit - part.reserved
            if needs.get(part, 0) > left:
                raise PinError(_too_many(names, needs[part], left))
        self.pins.add(adapter)
        found = 0
        for cell in cells:
            if cell.facts is not None and concerns(adapter, cell.adapter):
                found += 1
                part = self.part(cell.device)
                if isinstance(part.backend, Pinning):
                    part.backend.pin(cell.key)
                    part.pinned[cell.key] = cell.nbytes
        return found

    def _cannot_pin(self) -> str:
        return (
            f"backend {self._config.backend!r} cannot be told what to keep under a cap: attach "
            'with backend="budget" or "lru", which can'
        )

    def _needs(self, names: Collection[str], cells: Iterable[Cell]) -> dict[Part, int]:
        """Return how many bytes the values seen of some adapters take in each part."""
        needs: dict[Part, int] = {}
        if names:
            for cell in cells:
                if any(concerns(name, cell.adapter) for name in names):
                    part = self.part(cell.device)
                    needs[part] = needs.get(part, 0) + cell.nbytes
        return needs

    def unpin(self, adapter: str, adapter_of: Callable[[Hashable], Adapters]) -> None:
        """Take a pin away.

        Args:
            adapter: the name; one that is not pinned is fine.
            adapter_of: says whose value is under a key.
        """
        self.pins.discard(adapter)
        for part in self._parts.values():
            for key in [key for key in part.pinned if not self.pins_hold(adapter_of(key))]:
                del part.pinned[key]
                part.backend.unpin(key)  # type: ignore[attr-defined]


def _too_many(names: Iterable[str], needed: int, cap: int) -> str:
    listed = ", ".join(map(repr, sorted(names)))
    return (
        f"the values of the pinned adapters {listed} take {needed} bytes "
        f"({format_bytes(needed)}), and {cap} ({format_bytes(cap)}) may be held: unpin() one of "
        "them first, or resize() to a larger cap"
    )
