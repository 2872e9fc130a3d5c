"""Keep what saves the most time per byte under a hard cap in bytes."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from typing import TYPE_CHECKING

from dora_cache.backends.storage import Ledger, UncopyableBackend, checked_cap

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable

    from dora_cache.backends.protocol import Entry
    from dora_cache.backends.storage import Ready

__all__ = ["BudgetBackend"]

_MARGIN = 1.15
"""How many times more a new value must be worth than what it displaces: estimates are noisy, and an
exchange of equals gains nothing."""

_SMOOTHING = 0.25
"""Weight of the latest gap; with the spread below, as TCP estimates its round trips (RFC 6298)."""

_SPREADS = 4
"""Spreads beyond the usual gap after which a key is overdue, as in RFC 6298."""

_SLACK = 0.05
"""Share of the usual gap that is allowed in addition, however regular a key has been."""

_ABSENCE = 4
"""Times the usual gap beyond which a gap is an absence and says nothing about the usual one."""

_ABSENCES = 5
"""Absences that are averaged, about: those before have less and less weight."""

_MEASUREMENTS = 8
"""Measurements of a cost that are averaged, about: those before have less and less weight."""

_KNOWN = 3
"""Measurements of its cost before a value is declined."""

_REMEASURED = 16
"""Times that a value is declined before it is offered, and measured, once more."""

_OTHERS = 2
"""Measurements of its own that the costs of other values of the same size weigh as much as."""

_SIZES = 1024
"""Sizes whose costs are remembered, at most."""

_LEAST_COST = 1e-6
"""Seconds that a value is worth at least; time is not measured more finely than that."""

_REMEMBERED = 8
"""Keys remembered without their values, for each value held."""

_REMEMBERED_AT_LEAST = 4096

_SETTLED = 256
"""Entries whose worth is noted anew in one ``put``, at most."""

_TIMINGS = 4096
"""Derivations whose time on a GPU is waited for, at most."""

_DRIFT = 1.25
"""Growth of an overdue key's age at which its worth, which falls all the time, is noted again."""


class _Known:
    """What is remembered of a key, whether its value is held or not.

    Times are counted in lookups of the whole backend.

    Attributes:
        entry: the entry, if it is held.
        nbytes: its bytes, or those of the latest one.
        cost: seconds that deriving the value took, the mean of recent measurements.
        measured: how many measurements count in that.
        last: when the key was used last.
        gap: the usual time between two uses; 0 while that is unknown.
        spread: mean deviation from it.
        absence: the usual time between two bursts of uses.
        absences: how many of them were seen; while there are none, ``absence`` is a guess.
        ticket: marks the key's present records in the heaps.
        declined: how often the value was declined since it was offered last.
    """

    __slots__ = (
        "absence", "absences", "cost", "declined", "entry", "gap", "key", "last", "measured",
        "nbytes", "spread", "ticket",
    )  # fmt: skip

    def __init__(self, key: Hashable, now: int) -> None:
        self.key = key
        self.entry: Entry | None = None
        self.nbytes = 0
        self.cost = 0.0
        self.measured = 0
        self.last = now
        self.gap = 0.0
        self.spread = 0.0
        # It has not been asked for in all this time.
        self.absence = float(now)
        self.absences = 0
        self.ticket = -1
        self.declined = 0


class BudgetBackend(UncopyableBackend):
    """Keep what saves the most time per byte in ``max_bytes``, and turn away what saves less.

    A byte should be held by the value that saves the most time by it. A value that costs ``cost``
    seconds to derive, has ``nbytes`` bytes, and will be needed again after a time ``wait`` is worth

        cost / (nbytes * wait)

    which is what the offline optimum, a knapsack of such intervals, goes by. The wait is not known,
    but expected. Adapters are used in bursts: every forward of a request needs each of the values
    once, then they are needed no more until the next request for the adapter. So two times are
    learned of every key, the gap between uses and the absence between bursts:

    - Until it is overdue, a key is expected again after its usual gap. All keys of a forward have
      the same, so in a forward that visits more than fits, none displaces another but for its cost
      and size: a part of the values, the one most worth holding, stays.
    - A key is overdue when its gap is exceeded by more than it has varied. Then its burst has
      ended, and it is expected after its usual absence, a mean in which the present one counts
      with its length by now. So whatever is not used any more loses its worth by itself, and what
      comes in its place is let in during its first or second forward.
    - A new key is expected again after the gap of those used just before; after its burst, after as
      long as it had never been asked for.

    A new value displaces those that are worth less, by a margin, and only as many as it must; if
    that does not make enough room, it is not kept (``put`` returns False). Costs are averaged over
    measurements, first of all values of the same size, then of the value itself. Keys are
    remembered without their values, the recently used ones, so that a value turned away today may
    be let in tomorrow.

    An entry counts with all its storages. Two entries that share a storage count it twice towards
    the cap, so what is really held (``nbytes``) can only be less.

    Args:
        max_bytes: the cap, in bytes; an entry above it is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = checked_cap(max_bytes)
        self._ledger = Ledger()
        self._known: dict[Hashable, _Known] = {}
        self._held: dict[Hashable, _Known] = {}
        self._used = 0  # bytes, those of each entry counted by itself
        self._pins: set[Hashable] = set()
        self._pinned = 0  # bytes of pinned entries
        self._costs: dict[int, tuple[float, int]] = {}  # mean cost and count by bytes
        # What a GPU was still deriving when it was put, and how long that took the host.
        self._timings: deque[tuple[_Known, Ready, float]] = deque(maxlen=_TIMINGS)
        self._now = 0
        self._gap = 0.0  # the usual gap of the key used last
        # Unpinned entries by worth, least first, and by when their worth will have fallen. Records
        # whose ticket is not the key's are out of date. Worth that has risen is found out at the
        # top of the first heap; worth that falls does so at times known before.
        self._ranks: list[tuple[float, int, _Known]] = []
        self._dues: list[tuple[float, int, _Known]] = []
        self._tickets = itertools.count()

    @property
    def max_bytes(self) -> int:
        """The cap, in bytes."""
        return self._max_bytes

    @property
    def nbytes(self) -> int:
        """Bytes held, each distinct storage once."""
        return self._ledger.nbytes

    def get(self, key: Hashable) -> Entry | None:
        """Return the entry under ``key``, or None; a use of the key in both cases."""
        self._now = now = self._now + 1
        known = self._known.get(key)
        if known is None:
            return None
        elapsed = now - known.last
        known.last = now
        gap = known.gap
        usual = gap or self._gap
        if elapsed > _ABSENCE * usual > 0:
            known.absences = count = known.absences + 1
            known.absence += (elapsed - known.absence) / min(count, _ABSENCES)
            if gap:
                self._gap = gap
            return known.entry
        if gap:
            error = elapsed - gap
            known.gap = self._gap = gap + _SMOOTHING * error
            known.spread += _SMOOTHING * (abs(error) - known.spread)
        else:
            known.gap = self._gap = elapsed
            known.spread = elapsed / 2
        return known.entry

    def put(self, key: Hashable, entry: Entry) -> bool:
        """Store ``entry`` if it is worth more than what it displaces, or if its key is pinned."""
        return self._put(key, entry, derived=True)

    def _put(self, key: Hashable, entry: Entry, *, derived: bool) -> bool:
        """Do what ``put`` does; the cost of a value that was not derived just now tells nothing."""
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _Known(key, self._now)
            self._trim()
        elif known.entry is not None:
            self._release(known)
        known.nbytes = entry.nbytes
        known.declined = 0
        self._read_timings()
        cost = max(entry.cost, _LEAST_COST)
        if not known.measured:  # until the GPU has come to it
            known.cost = cost
        if derived and entry.ready is not None and entry.ready.began is not None:
            self._timings.append((known, entry.ready, cost))
        elif derived or not known.measured:
            self._measure(known, cost)
        if not self._make_room(known):
            return False
        known.entry = entry
        self._held[key] = known
        self._used += known.nbytes
        self._ledger.add(entry.tensors)
        if key in self._pins:
            self._pinned += known.nbytes
        else:
            self._enter(known)
        return True

    def declines(self, key: Hashable) -> bool:
        """Whether ``put`` would refuse a value of ``key`` like those before it.

        Not before its cost is known well, and not every time, so that it stays known.
        """
        known = self._known.get(key)
        if (
            known is None
            or known.entry is not None
            or key in self._pins
            or known.measured < _KNOWN
            or known.declined >= _REMEASURED
            or self._used + known.nbytes <= self._max_bytes
        ):
            return False
        if known.nbytes <= self._max_bytes - self._pinned:
            self._settle()
            lowest = self._pop()
            if lowest is None:
                return False
            self._enter(lowest)
            if self._worth(lowest) < self._worth(known) / _MARGIN:
                return False
        known.declined += 1
        return True

    def delete(self, key: Hashable) -> bool:
        """Drop the entry under ``key``; return whether there was one. What is known of it stays."""
        known = self._held.get(key)
        if known is None:
            return False
        self._release(known)
        return True

    def clear(self) -> None:
        """Drop every entry, and forget what was learned; pins stay."""
        for known in list(self._held.values()):
            self._release(known)
        self._known.clear()
        self._timings.clear()
        self._ranks.clear()
        self._dues.clear()
        self._costs.clear()
        self._gap = 0.0

    def keys(self) -> Collection[Hashable]:
        """Return the keys held now."""
        return self._held.keys()

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._held)

    def close(self) -> None:
        """Drop everything."""
        self.clear()
        self._pins.clear()

    def resize(self, max_bytes: int) -> None:
        """Change the cap; what is worth least goes at once, pinned entries last."""
        self._max_bytes = checked_cap(max_bytes)
        self._settle()
        while self._used > max_bytes and (lowest := self._pop()) is not None:
            self._evict(lowest)
        if self._used > max_bytes:
            for known in sorted(self._held.values(), key=self._worth):
                self._evict(known)
                if self._used <= max_bytes:
                    break

    def pin(self, key: Hashable) -> None:
        """Keep the entry under ``key``, the present one or any to come, until it is unpinned."""
        if key in self._pins:
            return
        self._pins.add(key)
        known = self._held.get(key)
        if known is not None:
            self._pinned += known.nbytes
            known.ticket = -1

    def unpin(self, key: Hashable) -> None:
        """Let the entry under ``key`` be evicted again."""
        if key not in self._pins:
            return
        self._pins.discard(key)
        known = self._held.get(key)
        if known is not None:
            self._pinned -= known.nbytes
            self._enter(known)

    # Worth

    def _measure(self, known: _Known, cost: float) -> None:
        """Take a measured cost into account, for the key and for values of its size."""
        known.measured = min(known.measured + 1, _MEASUREMENTS)
        known.cost += (cost - known.cost) / known.measured
        if known.nbytes not in self._costs and len(self._costs) >= _SIZES:
            self._costs.clear()
        mean, count = self._costs.get(known.nbytes, (0.0, 0))
        count = min(count + 1, _MEASUREMENTS**2)
        self._costs[known.nbytes] = (mean + (cost - mean) / count, count)

    def _read_timings(self) -> None:
        """Take into account what the GPU took for values put before, where it has come to them."""
        while self._timings:
            known, ready, cost = self._timings[0]
            try:
                seconds = ready.seconds()
            except RuntimeError:  # the function left another stream behind
                seconds = cost
            if seconds is None:
                return
            self._timings.popleft()
            self._measure(known, max(cost, seconds))
            if known.entry is not None and known.key not in self._pins:
                self._enter(known)

    def expected(self, key: Hashable) -> float | None:
        """Return the seconds that deriving the value of ``key`` takes, as measured; or None."""
        known = self._known.get(key)
        return known.cost if known is not None and known.measured else None

    def _cost(self, known: _Known) -> float:
        """Return the seconds that deriving a key's value is expected to take.

        A value that is held is not measured again. By its own measurement alone, one that happened
        to be slow the first time would be held for good; so those of its size count as well.
        """
        mean, _ = self._costs.get(known.nbytes, (known.cost, 0))
        return (known.measured * known.cost + _OTHERS * mean) / (known.measured + _OTHERS)

    def _worth(self, known: _Known) -> float:
        """Return the seconds that a byte of a key's value is expected to save, per lookup."""
        age = self._now - known.last
        gap = known.gap or self._gap
        if not gap:  # nothing has been used twice yet
            return 0.0
        wait = gap if age <= self._patience(known) else _wait(known, age)
        return self._cost(known) / (max(known.nbytes, 1) * wait)

    def _patience(self, known: _Known) -> float:
        """Return the time after a use until which the key is not overdue."""
        if known.gap:
            return (1 + _SLACK) * known.gap + _SPREADS * known.spread
        return 1.5 * self._gap

    def _due(self, known: _Known) -> float:
        """Return the time at which the key's worth will have fallen if it is not used before."""
        age = self._now - known.last
        patience = self._patience(known)
        if age <= patience:
            return known.last + patience
        # When the wait will have grown by a part.
        more = _DRIFT * _wait(known, age) - known.absence
        return known.last + more * min(max(known.absences, 1), _ABSENCES)

    # Records

    def _enter(self, known: _Known) -> None:
        """Note the worth of an entry held; records that it has are out of date then."""
        known.ticket = ticket = next(self._tickets)
        heapq.heappush(self._ranks, (self._worth(known), ticket, known))
        heapq.heappush(self._dues, (self._due(known), ticket, known))
        if len(self._ranks) + len(self._dues) > 4 * len(self._held) + 128:
            self._ranks = _current(self._ranks)
            self._dues = _current(self._dues)

    def _settle(self) -> None:
        """Note the worth anew of entries for which it has fallen by now.

        Not of all at once, where many have come due since the last ``put``: that could take long.
        """
        for _ in range(_SETTLED):
            if not self._dues or self._dues[0][0] >= self._now:
                break
            _, ticket, known = heapq.heappop(self._dues)
            if known.ticket == ticket:
                self._enter(known)

    def _pop(self) -> _Known | None:
        """Take the entry that is worth least out of the records; it has to be entered again."""
        while self._ranks:
            noted, ticket, known = heapq.heappop(self._ranks)
            if known.ticket != ticket:
                continue
            if self._worth(known) <= noted:
                known.ticket = -1
                return known
            self._enter(known)
        return None

    # Room

    def _make_room(self, new: _Known) -> bool:
        """Evict what is worth less than a new value, if that makes enough room for it."""
        missing = self._used + new.nbytes - self._max_bytes
        if missing <= 0:
            return True
        if new.nbytes > self._max_bytes - self._pinned:
            return False
        pinned = new.key in self._pins
        least = 0.0 if pinned else self._worth(new) / _MARGIN
        victims: list[_Known] = []
        self._settle()
        while missing > 0:
            lowest = self._pop()
            if lowest is None:  # cannot be: without the unpinned entries there is room
                return False
            victims.append(lowest)
            if not pinned and self._worth(lowest) >= least:
                self._enter_all(victims)
                return False
            missing -= lowest.nbytes
        needless, gone = [], []
        for known in reversed(victims):
            if missing + known.nbytes <= 0:  # the others make enough room
                missing += known.nbytes
                needless.append(known)
            else:
                gone.append(known)
        self._enter_all(needless)
        self._evict(*gone)
        return True

    def dropped(self, key: Hashable, entry: Entry) -> None:  # noqa: ARG002
        """Report that an entry has gone to make room; a subclass may do something else with it."""
        self._evicted(key)

    def _evict(self, *several: _Known) -> None:
        # First all of them go: what a subclass then does may fail.
        entries = [(known.key, known.entry) for known in several]
        for known in several:
            self._release(known)
        for key, entry in entries:
            if entry is not None:
                self.dropped(key, entry)

    def _enter_all(self, several: Iterable[_Known]) -> None:
        for known in several:
            self._enter(known)

    def _release(self, known: _Known) -> None:
        """Let go of the entry of a key."""
        entry = known.entry
        assert entry is not None  # noqa: S101 - for the type checker
        known.entry = None
        known.ticket = -1
        del self._held[known.key]
        self._used -= known.nbytes
        if known.key in self._pins:
            self._pinned -= known.nbytes
        self._ledger.remove(entry.tensors)

    def _trim(self) -> None:
        """Forget the keys unused for longest, half of those without a value, if they are many."""
        held = len(self._held)
        most = max(_REMEMBERED * held, _REMEMBERED_AT_LEAST)
        if len(self._known) - held <= most:
            return
        others = [known for known in self._known.values() if known.entry is None]
        others.sort(key=lambda known: known.last)
        for known in others[: len(others) - most // 2]:
            del self._known[known.key]


def _wait(known: _Known, age: int) -> float:
    """Return how long an overdue key is expected to be away: for uses at random, time over count.

    The present absence counts as if it ended now, with the time of those before.
    """
    return known.absence + age / min(max(known.absences, 1), _ABSENCES)


def _current(
    records: list[tuple[float, int, _Known]],
) -> list[tuple[float, int, _Known]]:
    """Return a heap of those records that are up to date."""
    left = [record for record in records if record[2].ticket == record[1]]
    heapq.heapify(left)
    return left
