"""Which adapter each row of a batch has, in this thread or task."""

from __future__ import annotations

import itertools
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dora_cache.errors import ConfigError

if TYPE_CHECKING:
    from dora_cache.serving.residents import Resident

__all__ = ["Batch", "Plan", "Route", "batch", "current", "expanded", "find", "pools"]


class Batch(NamedTuple):
    """What a model was called with.

    Attributes:
        rows: the batch size.
        tokens: rows times positions; None where the input has no positions.
    """

    rows: int
    tokens: int | None


current: ContextVar[Route | None] = ContextVar("dora_cache_route", default=None)
"""The innermost ``use`` of any pool, here."""

batch: ContextVar[Batch | None] = ContextVar("dora_cache_batch", default=None)
"""What the model was called with whose forward runs here."""

expanded: ContextVar[bool] = ContextVar("dora_cache_expanded", default=False)
"""Whether rows may have been repeated, one after another: beams and returned sequences."""


pools: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""Pools by number, for compiled code."""


class Plan(NamedTuple):
    """How rows are sorted by adapter.

    Attributes:
        order: the rows in this order, int64; None if they are sorted.
        sizes: how many each adapter has then.
        residents: the adapters; None for the base model.
    """

    order: Tensor | None
    sizes: list[int]
    residents: list[Resident | None]


class Route:
    """The adapters of a batch's rows.

    Args:
        pool: whose adapters they are.
        residents: one a row, or one for all; None for the base model.
        outer: the route that is in force around it.

    Attributes:
        touched: bit i is set if a row's adapter is on layer i.
        derived: bit i is set if a row's adapter has something on layer i that is derived from the
            base layer.
        replaced: bit i is set if a row's adapter has parameters for the whole of layer i.
        checked: by layer, what the derived values of the adapters here were last seen to rest on.
        max_rank: the largest rank.
        spaces: workspaces for CUDA kernels, by device, thread and stream.
    """

    __slots__ = (
        "_plans",
        "_rows",
        "checked",
        "derived",
        "distinct",
        "max_rank",
        "outer",
        "pool",
        "replaced",
        "residents",
        "spaces",
        "touched",
    )

    def __init__(
        self, pool: object, residents: tuple[Resident | None, ...], outer: Route | None
    ) -> None:
        self.pool = pool
        self.residents = residents
        self.outer = outer
        self.distinct = tuple(dict.fromkeys(one for one in residents if one is not None))
        self.touched = self.derived = self.replaced = self.max_rank = 0
        for one in self.distinct:
            self.touched |= one.touched
            self.derived |= one.derived
            self.replaced |= one.replaced
            self.max_rank = max(self.max_rank, one.max_rank)
        self.checked: dict[int, Tensor] = {}
        self.spaces: dict[tuple[int, int, int], Tensor] = {}
        self._rows: dict[torch.device, Tensor] = {}
        self._plans: dict[tuple[int, torch.device], Plan] = {}

    def addresses(self, device: torch.device) -> list[int]:
        """Return the number of names, and of each the address of its adapter's table, or 0."""
        found = [0 if one is None else one.table_on(device) for one in self.residents]
        return [len(found), *found]

    def rows(self, device: torch.device) -> Tensor:
        """Return the :meth:`addresses` on a CUDA device: int64, shape (1 + names,)."""
        rows = self._rows.get(device)
        if rows is None:
            pinned = torch.tensor(self.addresses(device), pin_memory=True)
            rows = self._rows[device] = pinned.to(device, non_blocking=True)
        return rows

    def plan(self, rows: int, device: torch.device) -> Plan:
        """Return how rows are sorted by adapter.

        Args:
            rows: of a layer's input; a multiple of the number of names.
            device: where they are.
        """
        plan = self._plans.get((rows, device))
        if plan is None:
            plan = self._plans[rows, device] = self._plan(rows, device)
        return plan

    def _plan(self, rows: int, device: torch.device) -> Plan:
        each = rows // len(self.residents)
        runs = [(one, len(list(same))) for one, same in itertools.groupby(self.residents)]
        order = None
        if len(runs) > len(set(self.residents)):
            first = {one: place for place, one in reversed(list(enumerate(self.residents)))}
            places = sorted(range(len(self.residents)), key=lambda i: (first[self.residents[i]], i))
            starts = torch.tensor(places, device=device)[:, None] * each
            order = (starts + torch.arange(each, device=device)).reshape(-1)
            runs = [(one, self.residents.count(one)) for one in dict.fromkeys(self.residents)]
        return Plan(order, [count * each for _, count in runs], [one for one, _ in runs])

    def check(self, name: str, shape: torch.Size, *, nested: bool, positions: bool) -> None:
        """Check that the rows of a layer's input are the batch's, in its order.

        Args:
            name: the layer's.
            shape: of the input, without the features of each row.
            nested: whether it is in a list of modules within another, as experts are.
            positions: whether dimensions after the first one are positions, each a row.

        Raises:
            ConfigError: they are not, or nobody knows.
        """
        count = len(self.residents)
        if count == 1:
            return
        rows = shape[0] if shape else 0
        tokens = shape.numel() if positions else rows
        called = batch.get()
        # The tokens that some experts get, for instance, may happen to be as many as the rows.
        unknown = nested and len(shape) == 1 and called is not None and tokens != called.tokens
        if not unknown:
            if tokens == count or (rows == count and tokens % count == 0):
                return
            if expanded.get() and rows and rows % count == 0:
                return
            windows = called is not None and len(shape) > 1 and rows % called.rows == 0
            known = windows or (called is not None and tokens == called.tokens)
            if known and tokens and tokens % count == 0:
                return
        msg = (
            f"{name} got an input of {tuple(shape)} rows, and {count} names are in use: which row "
            "has which adapter is known only where rows are in the order of the batch, not sorted "
            "by expert or otherwise. Use one adapter for the whole batch"
        )
        raise ConfigError(msg)


def find(pool: object) -> Route | None:
    """Return the innermost route of a pool here, or None."""
    route = current.get()
    while route is not None and route.pool is not pool:
        route = route.outer
    return route
