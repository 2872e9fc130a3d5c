"""Bugs to seed in the pool: each is a way that serving many adapters has gone wrong, or could."""

import torch
from mutants import MUTANTS, mutant
from pool_machine import PoolMachine

from dora_cache.serving import pool, routing
from dora_cache.serving.files import AdapterFiles
from dora_cache.serving.layers import Base
from dora_cache.serving.residents import Placed
from dora_cache.serving.routing import Route
from dora_cache.serving.tiers import Tiers

__all__ = ["MUTANTS"]

# Which row has what


@mutant("rows by where the adapters lay before an eviction", PoolMachine)
def _(patch):
    places = {}  # of a name, the memory that it was last seen in
    create = Route.__init__

    def by_place(self, pool, chosen, outer):
        found = []
        for one in chosen:
            if one is not None:
                adapter = next(a for a in pool._names.values() if a.resident is one)
                place = places.setdefault((pool.number, adapter.name), one)
                found.append(place if place.memory else one)
            else:
                found.append(None)
        create(self, pool, tuple(found), outer)

    patch.setattr(Route, "__init__", by_place)


@mutant("rows sorted as those of another mix were", PoolMachine, rare=True)
def _(patch):
    plans, plan = {}, Route._plan

    def once(self, rows, device):
        order, sizes, there = plan(self, rows, device)
        shape = (rows, tuple(sizes))
        return routing.Plan(plans.setdefault(shape, order), sizes, there)

    patch.setattr(Route, "_plan", once)


@mutant("what is in use is seen by all threads", PoolMachine, rare=True)
def _(patch):
    class Shared:
        def __init__(self):
            self.value = None

        def get(self):
            return self.value

        def set(self, value):
            before, self.value = self.value, value
            return before

        def reset(self, token):
            self.value = token

    patch.setattr(routing, "current", Shared())


@mutant("an inner block has the outer one's adapters", PoolMachine, rare=True)
def _(patch):
    def outermost(pool):
        found, route = None, routing.current.get()
        while route is not None:
            found, route = (route if route.pool is pool else found), route.outer
        return found

    patch.setattr(routing, "find", outermost)


# Memory


@mutant("memory reused while a batch runs", PoolMachine)
def _(patch):
    left = Tiers._left

    def overwritten(self, number):
        adapter = self._present.get(number)
        if adapter is not None and adapter.resident is not None:
            for memory in adapter.resident.memory:
                memory.zero_()
        left(self, number)

    def settle(self, adapter):
        if adapter.retired and not adapter.users and not adapter.loading:
            self._forget(adapter)
        elif adapter.pinned:
            self._device.pin(adapter.number)
        else:
            self._device.unpin(adapter.number)

    patch.setattr(Tiers, "_left", overwritten)
    patch.setattr(Tiers, "_settle", settle)
    patch.setattr(Tiers, "_kept", lambda self: 0)


@mutant("a removed adapter's memory reused while a batch runs", PoolMachine, rare=True)
def _(patch):
    retire = Tiers.retire

    def at_once(self, adapter):
        if adapter.resident is not None:
            for memory in adapter.resident.memory:
                memory.zero_()
        retire(self, adapter)

    patch.setattr(Tiers, "retire", at_once)


@mutant("what is removed stays", PoolMachine, rare=True)
def _(patch):
    patch.setattr(Tiers, "retire", lambda self, adapter: None)


@mutant("pinned ones are evicted", PoolMachine, rare=True)
def _(patch):
    patch.setattr(Tiers, "pin", lambda self, adapter, *, pinned: None)


# What an adapter is


@mutant("what is removed stays on the host", PoolMachine, rare=True)
def _(patch):
    forget = Tiers._forget

    def without_host(self, adapter):
        host, self.host = self.host, None
        try:
            forget(self, adapter)
        finally:
            self.host = host

    patch.setattr(Tiers, "_forget", without_host)


@mutant("the older of two adapters of a name", PoolMachine)
def _(patch):
    class First(dict):
        def __setitem__(self, name, adapter):
            self.setdefault(name, adapter)

    create = pool.AdapterPool.__init__

    def made(self, *args, **kwargs):
        create(self, *args, **kwargs)
        self._names = First()

    patch.setattr(pool.AdapterPool, "__init__", made)
    patch.setattr(Tiers, "retire", lambda self, adapter: None)


@mutant("files are not looked at again", PoolMachine, rare=True)
def _(patch):
    patch.setattr(AdapterFiles, "_require_unchanged", lambda self: None)


@mutant("a row's rank read too long, where memory had another's", PoolMachine)
def _(patch):
    create, longest = Placed.__init__, {}

    def padded(self, weights, *more):
        create(self, weights, *more)
        if self.a is None or self.b is None:
            return
        shape = (self.a.shape[1:], self.b.shape[0])
        before = longest.get(shape)
        if before is not None and len(before[0]) > len(self.a):
            rank = len(self.a)
            self.a = torch.cat([self.a, before[0][rank:]])
            self.b = torch.cat([self.b, before[1][:, rank:]], 1)
            self.a_transposed, self.b_transposed = self.a.flatten(1).T, self.b.T
        else:
            longest[shape] = self.a.clone(), self.b.clone()

    patch.setattr(Placed, "__init__", padded)


# What is derived from the base layer


@mutant("a stale scale after a write to the base weight", PoolMachine)
def _(patch):
    def refresh(self, mark):
        if self.derives is not None and self.rests_on is None:
            self.derives(self)
            self.rests_on = mark

    patch.setattr(Placed, "refresh", refresh)


@mutant("base weights looked at once for a block", PoolMachine, rare=True)
def _(patch):
    mark, seen = Base.mark, {}

    def once(self):
        route = routing.current.get()
        return mark(self) if route is None else seen.setdefault((route, id(self)), mark(self))

    patch.setattr(Base, "mark", once)


@mutant("scales rest on the weight and not on the bias", PoolMachine, rare=True)
def _(patch):
    derivation = Base.mark.__dora_cache_derivation__
    depends_on = derivation.depends_on
    patch.setattr(derivation, "depends_on", lambda base: depends_on(base)[:-1])
