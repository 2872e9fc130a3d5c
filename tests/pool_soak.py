"""Many threads serve from one pool while others add, remove and resize: `pool_soak.py SECONDS`."""

import contextlib
import random
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field

import torch
from pool_oracle import NET_KINDS, Folders, Oracle, error, net, tokens

from dora_cache import AdapterNotFoundError, AdapterPool
from dora_cache.errors import CapError

NAMES = [f"user{number}" for number in range(12)]
CONTENTS = [(kind, seed) for kind in NET_KINDS for seed in range(2)]
LENGTH = 4


class History:
    """What a name has stood for: one adds or removes at a time, others may serve meanwhile."""

    def __init__(self):
        self.lock = threading.Lock()
        self.contents = [None]
        self.settled = 0  # the latest that is there for sure

    def change(self, content, act):
        with self.lock:
            self.contents.append(content)
            act()
            self.settled = len(self.contents) - 1


@dataclass
class Found:
    """What happened."""

    counts: Counter = field(default_factory=Counter)
    wrong: list = field(default_factory=list)
    failed: list = field(default_factory=list)
    stuck: list = field(default_factory=list)

    @property
    def good(self):
        return not (self.wrong or self.failed or self.stuck)


class Soak:
    """One pool, and what plain PEFT makes of the same rows, computed ahead."""

    def __init__(self, root, *, seed=0):
        self.folders = Folders(net(), NET_KINDS, root)
        self.model = net()
        self.inputs = [tokens(1, LENGTH, seed=number) for number in range(4)]
        oracle = Oracle(net())
        self.expected = {
            (content, number): oracle.rows([content and self.folders.get(*content)], ids)[0]
            for content in [None, *CONTENTS]
            for number, ids in enumerate(self.inputs)
        }
        self.sizes = self.measured()
        self.pool = AdapterPool(
            self.model, device_bytes=self.sizes["most"], max_bytes=self.sizes["most"]
        )
        self.histories = {name: History() for name in NAMES}
        self.found = Found()
        self.seed = seed
        self.until = 0.0

    def measured(self):
        costs = []
        with AdapterPool(self.model) as pool:
            for kind in NET_KINDS:
                pool.add(kind, self.folders[kind])
                before = pool.stats().device_bytes
                with pool.use(kind):
                    costs.append(pool.stats().device_bytes - before)
        costs.sort()
        # The least cap serves one thread's three names, but not always all threads at once.
        return {"least": 3 * costs[-1], "most": 2 * sum(costs)}

    # What threads do

    def serve(self, choose):
        mix = [choose.choice([None, *NAMES]) for _ in range(choose.randint(1, 3))]
        rows = [choose.randrange(len(self.inputs)) for _ in mix]
        ids = torch.cat([self.inputs[row] for row in rows])
        histories = [name and self.histories[name] for name in mix]
        first = [history and history.settled for history in histories]
        try:
            with self.pool.use(mix), torch.no_grad():
                last = [history and len(history.contents) for history in histories]
                outputs = [self.model(ids) for _ in range(choose.randint(1, 3))]
        except AdapterNotFoundError:
            assert any(
                None in history.contents[start:]
                for history, start in zip(histories, first, strict=True)
                if history
            )
            self.found.counts["unknown"] += 1
            return
        self.found.counts["served"] += 1
        for place, (history, row) in enumerate(zip(histories, rows, strict=True)):
            if history is None:
                allowed = [None]
            else:
                allowed = [one for one in history.contents[first[place] : last[place]] if one]
            if not any(
                all(error(found[place], self.expected[one, row]) <= 1e-9 for found in outputs)
                for one in allowed
            ):
                self.found.wrong.append((mix, place, allowed))

    def add(self, choose):
        name, content = choose.choice(NAMES), choose.choice(CONTENTS)
        path = self.folders.get(*content)
        self.histories[name].change(content, lambda: self.pool.add(name, path))
        self.found.counts["added"] += 1

    def remove(self, choose):
        name = choose.choice(NAMES)
        with contextlib.suppress(AdapterNotFoundError):
            self.histories[name].change(None, lambda: self.pool.remove(name))
            self.found.counts["removed"] += 1

    def resize(self, choose):
        least, most = self.sizes["least"], self.sizes["most"]
        try:
            self.pool.resize(
                device_bytes=choose.randint(least, most), max_bytes=choose.randint(0, most)
            )
        except CapError:  # more is in use
            self.found.counts["not resized"] += 1
        else:
            self.found.counts["resized"] += 1

    def prefetch(self, choose):
        with contextlib.suppress(AdapterNotFoundError, CapError):
            self.pool.prefetch([choose.choice(NAMES)])
            self.found.counts["prefetched"] += 1

    def look(self, choose):
        stats = self.pool.stats()
        assert stats.device_bytes <= stats.max_device_bytes, stats
        assert stats.host_bytes <= stats.max_host_bytes, stats
        self.found.counts["looked"] += 1

    def work(self, number):
        choose = random.Random(self.seed * 1000 + number)
        acts = [self.serve] * 12 + [self.add] * 2
        acts += [self.remove, self.resize, self.prefetch, self.look]
        try:
            while time.monotonic() < self.until and self.found.good:
                choose.choice(acts)(choose)
        except Exception:  # noqa: BLE001 - reported
            self.found.failed.append(traceback.format_exc())

    def run(self, seconds, *, threads=8, patience=60):
        """Let threads work for some time; whoever has not ended long after it is stuck."""
        self.until = time.monotonic() + seconds
        workers = [
            threading.Thread(target=self.work, args=(number,), daemon=True)
            for number in range(threads)
        ]
        for worker in workers:
            worker.start()
        end = self.until + patience
        for worker in workers:
            worker.join(max(0.0, end - time.monotonic()))
        frames = sys._current_frames()
        for worker in workers:
            if worker.is_alive():
                self.found.stuck.append("".join(traceback.format_stack(frames[worker.ident])))
        if not self.found.stuck:
            for name in list(self.pool.names):
                self.pool.remove(name)
            stats = self.pool.stats()
            if stats.device_bytes or stats.host_bytes:
                self.found.failed.append(f"left behind: {stats}")
            self.pool.close()
        return self.found


def soak(seconds, **settings):
    """Run it in a folder of its own."""
    with tempfile.TemporaryDirectory() as root:
        return Soak(root, **settings).run(seconds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = soak(float(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(dict(result.counts))
    print(f"wrong: {len(result.wrong)}, failed: {len(result.failed)}, stuck: {len(result.stuck)}")
    for text in (*map(str, result.wrong[:3]), *result.failed[:3], *result.stuck):
        print(text)
    sys.exit(not result.good)
