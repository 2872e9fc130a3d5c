"""A Hypothesis state machine that checks all that the ``Backend`` protocol says."""

from __future__ import annotations

import gc
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dora_cache.backends import Backend, Declining, Entry, Pinning, Resizable

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence
    from typing import NoReturn

    from dora_cache.backends import Value

__all__ = ["BackendConformance", "Spec"]

_UNBOUNDED_SCALE = 4096
"""Bytes that values are drawn up to where there is no cap."""

_MANY = 6
"""Keys in use: few enough that entries meet, enough that several are evicted at once."""

_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
_LAYOUTS = (
    "whole",
    "matrix",
    "transposed",
    "channels_last",
    "slice",
    "stepped",
    "expanded",
    "scalar",
    "empty",
)


class Spec(NamedTuple):
    """A tensor to be made: a storage of some size, and how the tensor looks at it.

    Attributes:
        layout: ``whole`` and ``matrix`` show the storage as it is, ``transposed`` and
            ``channels_last`` in another order, the others a part of it: ``slice``, ``stepped``
            (every second element), ``expanded`` (the first element many times), ``scalar``,
            ``empty`` (nothing).
        dtype: the tensor's.
        permille: size of the storage, in thousandths of the backend's cap.
    """

    layout: str
    dtype: torch.dtype
    permille: int


class _Stamp:
    """A stamp that equals only itself, and says which entry it belongs to."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"stamp {self.number}"


class _Held(NamedTuple):
    """What the model knows of an entry: the entry, and its contents when it was put."""

    entry: Entry
    contents: tuple[Tensor, ...]
    nbytes: int


_permille = st.integers(0, 250) | st.integers(0, 1000)
_keys = st.integers(0, _MANY - 1)
_specs = st.builds(Spec, st.sampled_from(_LAYOUTS), st.sampled_from(_DTYPES), _permille)
_pick = st.integers(0, _MANY - 1)


class BackendConformance(RuleBasedStateMachine):
    """Checks a backend against a plain model: subclass it, and run its ``TestCase``.

    Hypothesis puts, replaces, reads and deletes entries of all kinds (several dtypes, views of
    larger storages, strides of every order, storages that entries share, tuples, tensors without
    elements, values above the cap), and compares the backend with the model after each step. In
    half of the examples every entry is read after every step; in the others only at the end, since
    reading is a use and would hide a wrong order of eviction. Each eviction must be reported once,
    before the call that evicts returns, and nothing else may be. A backend that is
    :class:`~dora_cache.backends.Resizable` is resized on the way, and one that is
    :class:`~dora_cache.backends.Pinning` has keys pinned.

    Example::

        from dora_cache.testing import BackendConformance

        class MyMachine(BackendConformance):
            def make_backend(self):
                return MyBackend(max_bytes=4096)

        TestMyBackend = MyMachine.TestCase  # collected by pytest and by unittest

    Give a small cap, some kilobytes: the values are as large as the cap allows. How many examples
    are tried is for Hypothesis settings to say: ``TestMyBackend.settings = settings(...)``.

    Attributes:
        exact_lru: the backend promises to evict the least recently used entries first, and no more
            of them than it must, where every entry counts with all its own storages (two entries
            that share one count it twice towards the cap). What is resident must then match
            exactly.
        device: where the values are made.
        backend: the backend under test.
    """

    exact_lru: bool = False
    device: str = "cpu"

    def __init__(self) -> None:
        super().__init__()
        self._last = "make_backend()"
        self.backend = self.make_backend()
        self._name = type(self.backend).__name__
        if not isinstance(self.backend, Backend):
            self._fail("it lacks methods of dora_cache.backends.Backend")
        self._reports: list[Hashable] = []  # since they were checked last
        self.backend.on_evict(self._reports.append)
        self._cap = self._first_cap = self.backend.max_bytes
        # From the least to the most recently used.
        self._model: dict[Hashable, _Held] = {}
        self._gone: list[tuple[int, list[StorageWeakRef]]] = []
        self._pins: set[Hashable] = set()
        self._puts = 0
        self._reading = False
        self._sound = False

    # What a subclass gives

    def make_backend(self) -> Backend:
        """Return a new, empty backend. To be overridden."""
        msg = f"{type(self).__name__} must define make_backend(self), which returns a new backend"
        raise NotImplementedError(msg)

    def expected_nbytes(self, entries: Sequence[Entry]) -> int:
        """Return the bytes that the backend should report while it holds ``entries``.

        By default each distinct storage under them counts once, and whole. Override it for a
        backend that does not hold the tensors it is given, but copies of them.
        """
        return _distinct_bytes(tensor for entry in entries for tensor in entry.tensors)

    def expected_max_bytes(self, max_bytes: int) -> int:
        """Return what the backend's ``max_bytes`` should be after ``resize(max_bytes)``.

        By default the same. Override it for a backend whose ``max_bytes`` counts other tiers too.
        """
        return max_bytes

    # Steps

    @initialize(reading=st.booleans())
    def begin(self, reading: bool) -> None:  # noqa: FBT001 - Hypothesis passes it by keyword
        """Choose whether all entries are read after each step, or only at the end."""
        self._reading = reading

    @rule(number=_keys)
    def get(self, number: int) -> None:
        """Look up a key, held or not."""
        self._step("get")
        key = _key(number)
        if key in self._model:
            self._read(key)
        else:
            self._read_absent(key)

    @precondition(lambda self: self._model)
    @rule(pick=_pick)
    def get_held(self, pick: int) -> None:
        """Look up a key that is held."""
        self._step("get")
        self._read(self._resident(pick))

    @rule(number=_keys, spec=_specs)
    def put(self, number: int, spec: Spec) -> None:
        """Put one tensor, new or in place of another."""
        self._step("put")
        self._put(_key(number), self._tensor(spec))

    @rule(number=_keys, specs=st.lists(_specs, min_size=1, max_size=3))
    def put_tuple(self, number: int, specs: list[Spec]) -> None:
        """Put a tuple of tensors, each with a storage of its own."""
        self._step("put of a tuple")
        parts = [spec._replace(permille=spec.permille // len(specs)) for spec in specs]
        self._put(_key(number), tuple(self._tensor(part) for part in parts))

    @rule(number=_keys, spec=_specs, other=st.sampled_from(_LAYOUTS))
    def put_two_views(self, number: int, spec: Spec, other: str) -> None:
        """Put a tuple of two views of one storage."""
        self._step("put of two views of one storage")
        whole = self._tensor(spec._replace(layout="whole"))
        self._put(_key(number), (_view(whole, spec.layout), _view(whole, other)))

    @precondition(lambda self: self._model)
    @rule(number=_keys, pick=_pick, layout=st.sampled_from(_LAYOUTS))
    def put_sharing(self, number: int, pick: int, layout: str) -> None:
        """Put a view of what an entry holds, under another key or its own."""
        self._step("put of a view of what another entry holds")
        source = self._model[self._resident(pick)].entry.tensors[0]
        self._put(_key(number), _view(_whole(source), layout))

    @precondition(lambda self: self._model)
    @rule(number=_keys, pick=_pick)
    def put_same_entry(self, number: int, pick: int) -> None:
        """Put the very entry that is held, under another key or its own."""
        self._step("put of an entry that is held")
        held = self._model[self._resident(pick)]
        self._put_entry(_key(number), held.entry, held.contents)

    @precondition(lambda self: self._model)
    @rule(pick=_pick, spec=_specs, growth=st.integers(1, 500))
    def replace_by_larger(self, pick: int, spec: Spec, growth: int) -> None:
        """Replace an entry by a larger value, which may be above the cap."""
        self._step("put in place of a smaller entry")
        key = self._resident(pick)
        nbytes = self._model[key].nbytes + self._scaled(growth) + spec.dtype.itemsize
        self._put(key, self._tensor(spec, nbytes))

    @precondition(lambda self: self._model)
    @rule(pick=_pick, spec=_specs, part=st.integers(0, 999))
    def replace_by_smaller(self, pick: int, spec: Spec, part: int) -> None:
        """Replace an entry by a smaller value."""
        self._step("put in place of a larger entry")
        key = self._resident(pick)
        self._put(key, self._tensor(spec, self._model[key].nbytes * part // 1000))

    @precondition(lambda self: self._cap is not None)
    @rule(number=_keys, excess=st.integers(1, 64), layout=st.sampled_from(_LAYOUTS))
    def put_oversize(self, number: int, excess: int, layout: str) -> None:
        """Put a value above the cap, by a byte or by more."""
        self._step("put of a value above the cap")
        nbytes = (self._cap or 0) + excess
        self._put(_key(number), self._tensor(Spec(layout, torch.uint8, 0), nbytes))

    @rule(number=_keys)
    def delete(self, number: int) -> None:
        """Delete a key, held or not."""
        self._step("delete")
        key = _key(number)
        answer: object = self.backend.delete(key)
        held = self._forget(key)
        if answer is not held:
            state = "held" if held else "not held"
            self._fail(f"delete({key!r}) returned {answer!r}, but the key was {state}")

    @rule()
    def clear(self) -> None:
        """Drop everything."""
        self._step("clear")
        self.backend.clear()
        for key in list(self._model):
            self._forget(key)

    @precondition(lambda self: self._first_cap is not None and isinstance(self.backend, Resizable))
    @rule(permille=st.integers(0, 1200))
    def resize(self, permille: int) -> None:
        """Change the cap, downwards mostly."""
        self._step("resize")
        assert isinstance(self.backend, Resizable)  # noqa: S101 - for the type checker
        max_bytes = self._scaled(permille)
        before = list(self._model)
        self.backend.resize(max_bytes)
        self._check_reports(f"resize({max_bytes})", before)
        self._cap = self.expected_max_bytes(max_bytes)
        pinned = self._pinned_bytes()
        if pinned <= self._cap:
            self._settle(f"resize({max_bytes})")
            return
        for key in [key for key in self._model if key not in set(self.backend.keys())]:
            self._forget(key)  # which of the pinned ones goes is the backend's choice
        unpinned = [key for key in self._model if key not in self._pins]
        if self.exact_lru and unpinned:
            self._fail(f"it keeps {unpinned}, though the pinned entries have {pinned} bytes alone")

    @precondition(lambda self: isinstance(self.backend, Declining))
    @rule(number=_keys)
    def declines(self, number: int) -> None:
        """Ask whether it would keep the value of a key that it does not hold."""
        self._step("declines")
        assert isinstance(self.backend, Declining)  # noqa: S101 - for the type checker
        key = _key(number)
        if key in self._model:
            return
        self._read_absent(key)
        answer: object = self.backend.declines(key)
        if answer is not True and answer is not False:
            self._fail(f"declines({key!r}) returned {answer!r}, not True or False")
        if answer and key in self._pins:
            self._fail(f"declines({key!r}) returned True, but the key is pinned")
        self._check_keys()

    @precondition(lambda self: isinstance(self.backend, Pinning))
    @rule(number=_keys)
    def pin(self, number: int) -> None:
        """Pin a key, held or not."""
        self._step("pin")
        assert isinstance(self.backend, Pinning)  # noqa: S101 - for the type checker
        self.backend.pin(_key(number))
        self._pins.add(_key(number))

    @precondition(lambda self: isinstance(self.backend, Pinning))
    @rule(number=_keys)
    def unpin(self, number: int) -> None:
        """Unpin a key, pinned or not."""
        self._step("unpin")
        self._unpin(_key(number))

    # What must hold after each step

    @invariant()
    def conforms(self) -> None:
        """Compare the backend with the model."""
        self._check_keys()
        self._check_bytes()
        self._check_no_reports()
        for number in range(_MANY):
            key = _key(number)
            if key not in self._model:
                self._read_absent(key)
        if self._reading:
            self._read_all()
        # Reading may have changed something, and the next put() may evict: no telling then.
        self._check_keys()
        self._check_bytes()
        self._check_freed()
        self._check_no_reports()
        self._sound = True

    def teardown(self) -> None:
        """Check what is left, then that ``close()`` frees it."""
        if not self._sound:  # a check has failed: others would too, and hide which was first
            with suppress(Exception):
                self.backend.close()
            return
        for key in list(self._pins):
            self._unpin(key)
        if self.exact_lru and self._cap is not None and not self._reading:
            self._drain(self._cap)
        else:
            self._read_all()
            self._check_keys()
        self._step("close")
        self.backend.close()
        for key in list(self._model):
            self._forget(key)
        self._check_keys()
        self._check_bytes()
        self._check_freed()
        self._check_no_reports()

    def _check_keys(self) -> None:
        keys = list(self.backend.keys())
        if len(set(keys)) != len(keys):
            self._fail(f"keys() has duplicates: {keys}")
        length = len(self.backend)
        if length != len(keys):
            self._fail(f"len() is {length}, but keys() has {len(keys)}: {keys}")
        lost = [key for key in self._model if key not in keys]
        if lost:
            self._fail(
                f"it lost {lost}: entries may go through delete() and clear() only, and from a "
                "bounded backend during put() and resize()"
            )
        extra = [key for key in keys if key not in self._model]
        if extra:
            self._fail(f"keys() has {extra}, which should not be held")

    def _check_reports(self, what: str, before: Iterable[Hashable]) -> None:
        """Check that a call has reported those of some keys that it has evicted, each once."""
        held = set(self.backend.keys())
        evicted = [key for key in before if key not in held]
        reports = list(self._reports)
        self._reports.clear()
        missing = [key for key in evicted if key not in reports]
        if missing:
            self._fail(f"{what} evicted {missing} and did not report it: call what on_evict() gave")
        for key in reports:
            if key in held:
                self._fail(f"{what} reported {key!r} as evicted, but the key is held")
            if key not in evicted:
                self._fail(f"{what} reported {key!r} as evicted, but that was no eviction")
        if len(reports) > len(evicted):
            self._fail(f"{what} reported an eviction more than once: {reports}")

    def _check_no_reports(self) -> None:
        if self._reports:
            self._fail(f"it reported {self._reports} as evicted: only put() and resize() evict")

    def _check_bytes(self) -> None:
        nbytes, cap = self.backend.nbytes, self.backend.max_bytes
        if cap != self._cap:
            self._fail(f"max_bytes changed from {self._cap} to {cap}")
        expected = self.expected_nbytes([held.entry for held in self._model.values()])
        if nbytes != expected:
            sizes = {key: held.nbytes for key, held in self._model.items()}
            self._fail(
                f"nbytes is {nbytes}, but what it holds has {expected} bytes: every distinct "
                f"storage counts once, and whole (bytes by entry: {sizes})"
            )
        if cap is not None and nbytes > cap:
            self._fail(f"nbytes is {nbytes}, above max_bytes {cap}")

    def _check_freed(self) -> None:
        """Check that no storage is kept alive that only entries gone have."""
        held = {
            tensor.untyped_storage()._cdata
            for held in self._model.values()
            for tensor in held.entry.tensors
        }
        waiting = []
        for number, storages in self._gone:
            left = [storage for storage in storages if not storage.expired()]  # type: ignore[no-untyped-call]
            if left and not all(storage.cdata in held for storage in left):
                gc.collect()
                left = [storage for storage in left if not storage.expired()]  # type: ignore[no-untyped-call]
                if not all(storage.cdata in held for storage in left):
                    self._fail(f"the value of {_Stamp(number)} is gone, but still kept in memory")
            if left:
                waiting.append((number, left))
        self._gone = waiting

    # Operations, on backend and model alike

    def _put(self, key: Hashable, value: Value) -> None:
        self._puts += 1
        entry = Entry(value=value, stamp=_Stamp(self._puts), cost=self._puts / 8)
        self._put_entry(key, entry, tuple(tensor.clone() for tensor in entry.tensors))

    def _put_entry(self, key: Hashable, entry: Entry, contents: tuple[Tensor, ...]) -> None:
        nbytes = self.expected_nbytes([entry])
        before = [other for other in self._model if other != key]
        answer: object = self.backend.put(key, entry)
        keys = list(self.backend.keys())
        what = f"put({key!r}, {_show(entry)} of {nbytes} bytes)"
        if answer is not True and answer is not False:
            self._fail(f"{what} returned {answer!r}, not True or False")
        if answer and key not in keys:
            self._fail(f"{what} returned True, but the key is not held")
        if not answer and key in keys:
            self._fail(f"{what} returned False, but the key is held: the older entry must go too")
        if answer and self._cap is not None and nbytes > self._cap:
            self._fail(f"{what} returned True, but max_bytes is {self._cap}")
        self._forget(key)
        if not answer and self._cap is not None:
            self._check_refusal(key, what, nbytes)
        if answer:
            self._model[key] = _Held(entry, contents, nbytes)
        if self._cap is not None:
            self._check_reports(what, before)
            self._settle(what)

    def _check_refusal(self, key: Hashable, what: str, nbytes: int) -> None:
        """Check that a value was refused rightly."""
        pinned = self._pinned_bytes()
        beside = f" and others pinned have {pinned} bytes" if pinned else ""
        if pinned + nbytes > (self._cap or 0):
            return
        if self.exact_lru:
            self._fail(
                f"{what} returned False, but max_bytes is {self._cap}{beside}: "
                "an exact LRU keeps it"
            )
        if key in self._pins:
            self._fail(
                f"{what} returned False, but the key is pinned, max_bytes is {self._cap}{beside}"
            )

    def _settle(self, what: str) -> None:
        """Take note of evictions, whose order an exact LRU does not choose, and never of pins."""
        if self.exact_lru:
            self._evict(what)
            return
        keys = set(self.backend.keys())
        for other in [other for other in self._model if other not in keys]:
            if other in self._pins:
                self._fail(f"{what} evicted {other!r}, which is pinned")
            self._forget(other)

    def _evict(self, what: str) -> None:
        """Do in the model what an exact LRU does, and compare."""
        cap = self._cap or 0
        order = {key: held.nbytes for key, held in self._model.items()}
        while sum(held.nbytes for held in self._model.values()) > cap:
            oldest = next((key for key in self._model if key not in self._pins), None)
            if oldest is None:
                break
            self._forget(oldest)
        resident = set(self.backend.keys())
        if resident != set(self._model):
            went = [key for key in order if key not in resident]
            due = [key for key in order if key not in self._model]
            self._fail(
                f"{what} evicted {went}; an exact LRU of {cap} bytes evicts {due} (bytes by entry, "
                f"from the least to the most recently used, the new one included: {order})"
            )

    def _read(self, key: Hashable) -> None:
        """Get what is held, and compare it with what was put."""
        held = self._model.pop(key)
        self._model[key] = held  # now the most recently used
        found = self.backend.get(key)
        if found is None:
            self._fail(f"get({key!r}) returned None, but the key is held")
        if not isinstance(found, Entry):
            self._fail(f"get({key!r}) returned a {type(found).__name__}, not an Entry")
        if found.stamp is not held.entry.stamp:
            self._fail(f"get({key!r}) has {found.stamp!r}, but {held.entry.stamp!r} was put")
        if found.cost != held.entry.cost:
            self._fail(f"get({key!r}) has cost {found.cost}, but {held.entry.cost} was put")
        if isinstance(found.value, tuple) is not isinstance(held.entry.value, tuple):
            self._fail(f"get({key!r}) has {_show(found)}, but {_show(held.entry)} was put")
        if len(found.tensors) != len(held.entry.tensors):
            self._fail(f"get({key!r}) has {_show(found)}, but {_show(held.entry)} was put")
        if not found.intact:
            self._fail(f"get({key!r}) has an entry whose tensors were written into")
        if found.ready is not None:
            found.ready.join(found.tensors)
        for got, original, contents in zip(
            found.tensors, held.entry.tensors, held.contents, strict=True
        ):
            difference = _difference(got, original, contents)
            if difference:
                self._fail(f"get({key!r}) has another {difference}")

    def _read_absent(self, key: Hashable) -> None:
        found = self.backend.get(key)
        if found is not None:
            self._fail(f"get({key!r}) returned {_show(found)}, but the key is not held")

    def _read_all(self) -> None:
        """Read every entry, from the least recently used on, so that the order stays."""
        for key in list(self._model):
            self._read(key)

    def _drain(self, cap: int) -> None:
        """Push the entries out one by one, to see their order."""
        sizes = [held.nbytes for held in self._model.values()]
        for index in range(len(sizes)):
            room = cap - sum(sizes[index + 1 :])
            self._step("put of a filler")
            self._put("filler", self._tensor(Spec("whole", torch.uint8, 0), room))
            self._check_keys()

    def _unpin(self, key: Hashable) -> None:
        assert isinstance(self.backend, Pinning)  # noqa: S101 - for the type checker
        self.backend.unpin(key)
        if key in self._pins and key in self._model:
            self._model[key] = self._model.pop(key)  # now the latest used
        self._pins.discard(key)

    def _pinned_bytes(self) -> int:
        return sum(held.nbytes for key, held in self._model.items() if key in self._pins)

    def _forget(self, key: Hashable) -> bool:
        held = self._model.pop(key, None)
        if held is None:
            return False
        storages = [
            StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            for tensor in held.entry.tensors
        ]
        number = held.entry.stamp.number if isinstance(held.entry.stamp, _Stamp) else 0
        self._gone.append((number, storages))
        return True

    # Values

    def _resident(self, pick: int) -> Hashable:
        keys = list(self._model)
        return keys[pick % len(keys)]

    def _scaled(self, permille: int) -> int:
        scale = _UNBOUNDED_SCALE if self._first_cap is None else self._first_cap
        return scale * permille // 1000

    def _tensor(self, spec: Spec, nbytes: int | None = None) -> Tensor:
        """Make a tensor whose contents are unlike those of others."""
        if nbytes is None:
            nbytes = self._scaled(spec.permille)
        numbers = torch.arange(nbytes // spec.dtype.itemsize, device=self.device)
        whole = ((numbers * 7 + self._puts * 13) % 101).to(spec.dtype)
        return _view(whole, spec.layout)

    # Reports

    def _step(self, name: str) -> None:
        self._last = name
        self._sound = False

    def _fail(self, message: str) -> NoReturn:
        raise AssertionError(f"{self._name}, after {self._last}: {message}")


def _key(number: int) -> Hashable:
    """Return a key that equals, but is not, the one of an earlier call."""
    return ("layer", number) if number % 2 else f"layer.{number}"


def _whole(tensor: Tensor) -> Tensor:
    """Return a one-dimensional view of all of the storage under a tensor."""
    storage = tensor.untyped_storage()
    view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return view.set_(storage, 0, (storage.size() // tensor.itemsize,), (1,))


def _view(whole: Tensor, layout: str) -> Tensor:
    """Look at a one-dimensional tensor in some way."""
    count = whole.numel()
    if layout in {"matrix", "transposed"}:
        matrix = whole[: count // 2 * 2].view(2, count // 2)
        return matrix.t() if layout == "transposed" else matrix
    if layout == "channels_last":
        return whole[: count // 8 * 8].view(2, 2, count // 8, 2).permute(0, 3, 1, 2)
    if layout == "slice":
        return whole[count // 4 : count // 2]
    if layout == "stepped":
        return whole[::2]
    if layout == "expanded":
        return whole[:1].expand(3, min(count, 1) * 4)
    if layout == "scalar" and count:
        return whole[count // 2]
    if layout == "empty":
        return whole[:0]
    return whole


def _distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of distinct storages; on purpose not with ``dora_cache.backends.storage``."""
    sizes: dict[tuple[int, int], int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        # Storages without bytes may all have the same address, and do not matter.
        sizes[storage.data_ptr(), storage.size()] = storage.size()
    return sum(sizes.values())


def _strides(tensor: Tensor) -> list[tuple[int, int]]:
    """Return stride and size of every dimension in which there is somewhere to go."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return [(stride, size) for stride, size in pairs if size != 1]


def _dense(tensor: Tensor) -> bool:
    """Whether the elements lie side by side in memory, the dimensions in whatever order."""
    expected = 1
    for stride, size in sorted(_strides(tensor)):
        if stride != expected:
            return False
        expected *= size
    return tensor.numel() > 0


def _difference(got: Tensor, original: Tensor, contents: Tensor) -> str:
    """Say how a tensor differs from the one that was put; empty if it does not."""
    if got.dtype != original.dtype:
        return f"dtype: {got.dtype} instead of {original.dtype}"
    if got.device != original.device:
        return f"device: {got.device} instead of {original.device}"
    if got.shape != original.shape:
        return f"shape: {tuple(got.shape)} instead of {tuple(original.shape)}"
    if _dense(original) and _strides(got) != _strides(original):
        return f"strides: {got.stride()} instead of {original.stride()}"
    if not torch.equal(got, contents):
        return "content than was put"
    return ""


def _show(entry: object) -> str:
    if not isinstance(entry, Entry):
        return repr(entry)
    shown = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in entry.tensors]
    return f"({', '.join(shown)})" if isinstance(entry.value, tuple) else shown[0]
