"""A pool under everything that may happen to it: each row is as plain PEFT makes it alone.

Everything is done to two models alike; one has a pool, the other serves each row alone, with its
adapter alone. A failure that is expected leaves the pool as it was.
"""

import contextlib
import functools
import itertools
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pool_oracle import (
    MORE_NET_KINDS,
    NET_KINDS,
    WEIGHTS,
    Folders,
    Oracle,
    assert_rows,
    net,
    state_of,
    tokens,
)
from torch import nn
from zoo import quiet

from dora_cache import AdapterNotFoundError, AdapterPool
from dora_cache.errors import AdapterFileError, CapError, PinError

NAMES = ("ada", "bob", "cleo", "dan")
KINDS = NET_KINDS | {
    kind: MORE_NET_KINDS[kind] for kind in ("lora_bias", "all biases", "a whole layer")
}
KIND_OF_FOLDER = {kind.replace(" ", "_"): kind for kind in KINDS}
TIMEOUT = 60  # of what another thread does, in seconds

names = st.sampled_from(NAMES)
mixes = st.lists(names | st.none(), min_size=1, max_size=5)
contents = st.tuples(st.sampled_from(list(KINDS)), st.integers(0, 2))


@functools.cache
def folders():
    """Return the adapters' folders, made once in a process."""
    root = tempfile.TemporaryDirectory(prefix="pool-machine-")
    found = Folders(net(), KINDS, root.name)
    found.holder = root
    return found


@functools.cache
def cost(kind):
    """Return the bytes that an adapter of a kind takes on the device."""
    with AdapterPool(net()) as pool:
        pool.add("one", folders()[kind])
        with pool.use("one"):
            return pool.stats().device_bytes


@functools.cache
def sizes():
    """Return caps: what a few adapters take, and a little less."""
    costs = sorted(cost(kind) for kind in KINDS)
    return [costs[-1], sum(costs[-2:]), sum(costs[-3:]), costs[0], costs[-1] - 1, 0]


def _in_place(parameter, model, name):
    with torch.no_grad():
        parameter.mul_(1.25)


def _copied(parameter, model, name):
    with torch.no_grad():
        parameter.copy_(parameter.flip(0) + 0.1)


def _loaded(parameter, model, name):
    model.load_state_dict({name: parameter * 0.75}, strict=False)


def _assigned(parameter, model, name):
    model.load_state_dict({name: parameter * 0.75}, strict=False, assign=True)


def _stepped(parameter, model, name):
    parameter.requires_grad_()
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=0.1, fused=True).step()
    parameter.grad = None
    parameter.requires_grad_(requires_grad=False)


def _data_replaced(parameter, model, name):
    parameter.data = parameter.data * 1.5 - 0.1


def _replaced(parameter, model, name):
    owner, _, leaf = name.rpartition(".")
    new = nn.Parameter(parameter.detach() * 1.5 - 0.1, requires_grad=False)
    setattr(model.get_submodule(owner), leaf, new)


WRITES = [_in_place, _copied, _loaded, _assigned, _stepped, _data_replaced, _replaced]
PARAMETERS = [name for name, _ in net().named_parameters()]


def _shorter(path, seed):
    data = (path / WEIGHTS).read_bytes() if (path / WEIGHTS).exists() else b""
    (path / WEIGHTS).write_bytes(data[: len(data) // 2])


def _gone(path, seed):
    (path / WEIGHTS).unlink(missing_ok=True)


def _noise(path, seed):
    (path / WEIGHTS).write_bytes(bytes(range(256)) * 20)


def _others(path, seed):
    source = folders().get(KIND_OF_FOLDER[path.name.partition("-")[2]], seed + 3)
    (path / WEIGHTS).unlink(missing_ok=True)
    (path / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes())


SPOILS = [_shorter, _gone, _noise, _others]


class Open:
    """A ``use`` that is open, and the adapters that it began with."""

    def __init__(self, context, mix, adapters):
        self.context = context
        self.mix = mix
        self.adapters = adapters  # (name, kind, seed, when it was added)

    def paths(self):
        contents = {name: (kind, seed) for name, kind, seed, _ in self.adapters}
        return [name and folders().get(*contents[name]) for name in self.mix]


class PoolMachine(RuleBasedStateMachine):
    """Every rule is something that a server does, or that happens to one."""

    steps = 0

    @initialize(
        cap=st.sampled_from([None, 0, 1, 2]),
        host=st.sampled_from([None, 0, 1]),
        backend=st.sampled_from(["lru", "budget"]),
        policy=st.sampled_from(["lru", "lru", "budget"]),
        first=st.lists(contents, min_size=2, max_size=len(NAMES)),
    )
    def start(self, cap, host, backend, policy, first):
        self.model, self.plain = net(), net()
        self.oracle = Oracle(self.plain)
        self.root = tempfile.TemporaryDirectory(prefix="pool-machine-")
        self.numbers = itertools.count()
        self.cap = cap if cap is None else sizes()[cap]
        self.host = host if host is None else sizes()[host]
        caps = {} if self.host is None else {"max_bytes": self.host, "backend": backend}
        self.policy = policy
        self.pool = AdapterPool(self.model, device_bytes=self.cap, policy=policy, **caps)
        self.contents = {}  # name -> (kind, seed)
        self.added = {}  # name -> a number of its own each time
        self.paths = {}  # name -> where its files are
        self.bad = set()  # names whose files went bad after they were added
        self.pinned = set()
        self.open = []
        self.seed = 0
        for name, content in zip(NAMES, first, strict=False):
            self.add(name, content)

    def teardown(self):
        if not hasattr(self, "pool"):
            return
        try:
            while self.open:
                self.leave()
            for name in NAMES:
                if name in self.contents:
                    self.remove(name)
            stats = self.pool.stats()
            assert (stats.device_bytes, stats.host_bytes) == (0, 0)
            self.pool.close()
            assert state_of(self.model) == state_of(self.plain)
            self.assert_base()
        finally:
            self.pool.close()
            self.root.cleanup()

    # What is expected

    def cost(self, distinct, others=()):
        """Return the bytes of adapters, each given as (name, kind, seed, when it was added)."""
        return sum(cost(kind) for _, kind, _, _ in set(distinct) | set(others))

    def wanted(self, mix):
        return {(name, *self.contents[name], self.added[name]) for name in mix if name is not None}

    def in_use(self):
        return set().union(*(one.adapters for one in self.open))

    def kept(self):
        """Adapters that are not evicted, if they are on the device."""
        return self.in_use() | self.wanted(self.pinned)

    def fits(self, *mixes_of_names, beside):
        if self.cap is None:
            return True
        wanted = set().union(*(self.wanted(mix) for mix in mixes_of_names))
        return self.cost(wanted, beside) <= self.cap

    def may_fail(self, error, mix):
        """Check that there is a reason for an error of a use."""
        if isinstance(error, AdapterNotFoundError):
            assert not self.known(mix)
        elif isinstance(error, AdapterFileError):
            assert set(mix) & self.bad
            assert any(name in str(error) for name in set(mix) & self.bad)
        elif isinstance(error, CapError):
            assert not self.fits(mix, beside=self.kept())
        else:
            raise error

    def known(self, mix):
        return all(name is None or name in self.contents for name in mix)

    def rows_of(self, mix):
        return [name and folders().get(*self.contents[name]) for name in mix]

    def assert_base(self):
        ids = tokens(2, seed=self.seed)
        with torch.no_grad():
            assert torch.equal(self.model(ids), self.plain(ids))

    @invariant()
    def right(self):
        type(self).steps += 1
        self.seed += 1
        if self.open:
            one = self.open[-1]
            ids = tokens(len(one.mix), 3, seed=self.seed)
            with torch.no_grad():
                found = self.model(ids)
            assert_rows(found, self.oracle.rows(one.paths(), ids))
        else:
            self.assert_base()

    @invariant()
    def caps_and_sums(self):
        stats = self.pool.stats()
        assert sorted(self.pool.names) == sorted(self.contents)
        assert stats.on_device + stats.on_host + stats.on_disk == len(self.contents)
        assert stats.nbytes == stats.device_bytes + stats.host_bytes
        assert stats.max_device_bytes == self.cap
        assert self.cap is None or stats.device_bytes <= self.cap
        assert self.host is None or stats.host_bytes <= self.host
        # Nothing is left of removed ones, and open uses have what they need.
        assert stats.device_bytes <= self.cost(self.wanted(self.contents), self.in_use())
        assert stats.device_bytes >= self.cost(self.in_use())

    # What servers do

    @rule(name=names, content=contents)
    def add(self, name, content):
        kind, seed = content
        number = next(self.numbers)
        path = Path(self.root.name) / f"{number}-{kind.replace(' ', '_')}"
        folders().copied(kind, path, seed)
        self.pool.add(name, path)
        self.contents[name] = content
        self.added[name] = number
        self.paths[name] = path
        self.bad.discard(name)
        self.pinned.discard(name)

    @rule(name=names, spoil=st.sampled_from(SPOILS[:3]))
    def add_what_is_bad(self, name, spoil):
        path = Path(self.root.name) / f"{next(self.numbers)}-dora"
        folders().copied("dora", path)
        spoil(path, 0)
        try:
            self.pool.add(name, path)
        except AdapterFileError as error:
            assert name in str(error)
            return
        raise AssertionError("bad files are accepted")

    @precondition(lambda self: self.contents)
    @rule(name=names)
    def remove(self, name):
        if name not in self.contents:
            try:
                self.pool.remove(name)
            except AdapterNotFoundError:
                return
            raise AssertionError("an unknown name is removed")
        self.pool.remove(name)
        for known in (self.contents, self.added, self.paths):
            del known[name]
        self.bad.discard(name)
        self.pinned.discard(name)

    def serve_once(self, mix, *, inference=False, length=3):
        ids = tokens(len(mix), length, seed=self.seed)
        with torch.inference_mode() if inference else torch.no_grad(), self.pool.use(mix):
            return ids, self.model(ids).clone()

    @rule(mix=mixes, inference=st.booleans())
    def serve(self, mix, inference):
        self.serve_and_check(mix, inference=inference)

    def serve_and_check(self, mix, *, inference=False):
        before = self.pool.stats()
        try:
            ids, found = self.serve_once(mix, inference=inference)
        except Exception as error:  # noqa: BLE001 - looked at
            self.may_fail(error, mix)
            return
        assert self.known(mix)
        assert self.fits(mix, beside=self.in_use())
        assert_rows(found, self.oracle.rows(self.rows_of(mix), ids))
        after = self.pool.stats()
        lookups = after.hits + after.misses - before.hits - before.misses
        assert lookups == len(set(mix) - {None})

    @rule(mix=mixes)
    def enter(self, mix):
        if len(self.open) > 2:
            return
        context = self.pool.use(mix)
        try:
            context.__enter__()
        except Exception as error:  # noqa: BLE001 - looked at
            self.may_fail(error, mix)
            return
        assert self.known(mix)
        self.open.append(Open(context, mix, self.wanted(mix)))

    @precondition(lambda self: self.open)
    @rule()
    def leave(self):
        self.open.pop().context.__exit__(None, None, None)

    @rule(mix=mixes)
    def prefetch(self, mix):
        wanted = [name for name in mix if name is not None]
        try:
            with quiet():  # it warns of bad files
                self.pool.prefetch(wanted).result(TIMEOUT)
        except AdapterNotFoundError:
            assert not self.known(mix)
            return
        assert self.known(mix)
        if not self.fits(wanted, beside=self.kept()) or self.policy != "lru":
            return
        before = self.pool.stats()
        self.serve_and_check([*wanted, None])
        after = self.pool.stats()
        if not set(wanted) & self.bad:
            assert after.misses == before.misses
            assert after.hits == before.hits + len(set(wanted))

    @rule(name=names)
    def pin(self, name):
        try:
            self.pool.pin(name)
        except AdapterNotFoundError:
            assert name not in self.contents
            return
        except PinError:
            assert self.cost(self.wanted({name, *self.pinned})) > self.cap
            return
        except (AdapterFileError, CapError) as error:
            self.may_fail(error, [name])
            return
        self.pinned.add(name)

    @precondition(lambda self: self.pinned)
    @rule(name=names)
    def unpin(self, name):
        with contextlib.suppress(AdapterNotFoundError):
            self.pool.unpin(name)
            assert name in self.contents
        self.pinned.discard(name)

    @rule(size=st.integers(0, 5))
    def resize(self, size):
        size = sizes()[size]
        try:
            self.pool.resize(device_bytes=size)
        except CapError:
            assert self.cost(self.kept()) > size
            return
        self.cap = size

    @rule(size=st.integers(0, 5))
    def resize_host(self, size):
        if self.host is not None:
            self.host = sizes()[size]
            self.pool.resize(max_bytes=self.host)

    # What happens to the model and the files

    @rule(
        name=st.sampled_from(PARAMETERS) | st.sampled_from(PARAMETERS[1:3]),
        write=st.sampled_from(WRITES),
    )
    def write(self, name, write):
        for model in (self.model, self.plain):
            write(model.get_parameter(name), model, name)
        self.oracle.models.clear()

    @rule()
    def switch_modes(self):
        for model in (self.model, self.plain):
            model.train()
            model.eval()

    @precondition(lambda self: self.contents)
    @rule(name=names, spoil=st.sampled_from(SPOILS), seed=st.integers(0, 2))
    def files_go_bad(self, name, spoil, seed):
        if name in self.contents:
            spoil(self.paths[name], seed)
            self.bad.add(name)

    @rule(first=mixes, second=mixes)
    def two_threads(self, first, second):
        """Two threads, each with a mix of its own; if there is room for both, at the same time."""
        mixes_of_both = (first, second)
        known = [mix for mix in mixes_of_both if self.known(mix)]
        if not all(self.fits(mix, beside=self.kept()) for mix in known):
            return  # one would wait for this thread, which waits for it
        together = len(known) == 2 and self.fits(*known, beside=self.kept())
        barrier = threading.Barrier(2 if together else 1)

        def work(mix):
            rows = []
            try:
                with torch.no_grad(), self.pool.use(mix):
                    for turn in range(2):
                        ids = tokens(len(mix), 3 + turn, seed=self.seed)
                        with contextlib.suppress(threading.BrokenBarrierError):
                            barrier.wait(TIMEOUT)
                        rows.append((ids, self.model(ids)))
            except BaseException:
                barrier.abort()
                raise
            return rows

        with ThreadPoolExecutor(2) as threads:
            tasks = [threads.submit(work, mix) for mix in mixes_of_both]
            for task, mix in zip(tasks, mixes_of_both, strict=True):
                try:
                    outputs = task.result(TIMEOUT)
                except Exception as error:  # noqa: BLE001 - looked at
                    self.may_fail(error, mix)
                    continue
                for ids, found in outputs:
                    assert_rows(found, self.oracle.rows(self.rows_of(mix), ids))
