"""Traces for the simulator: which values forwards ask for, in which order, and what each costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dora_cache.lab.shapes import SHAPES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

__all__ = [
    "TUNERS",
    "Layer",
    "Trace",
    "Tuner",
    "layers_of",
    "make_trace",
    "requests",
    "standard_traces",
    "together",
    "zipf",
]


class Layer(NamedTuple):
    """The shape of a linear layer.

    Attributes:
        inputs: how many numbers go in.
        outputs: how many come out.
    """

    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Tuner:
    """What an adapter derives for a layer.

    Attributes:
        name: as users know it.
        nbytes: bytes of a layer's value, float32.
        milliseconds: what deriving it takes: a linear model through two measured shapes
            (4096 to 4096 and 4096 to 14336; one H100, bfloat16 weights, a forward of one token less
            that of plain LoRA, or of the base where that is nearer).
    """

    name: str
    nbytes: Callable[[Layer], int]
    milliseconds: Callable[[Layer], float]


def _dense(layer: Layer) -> int:
    return 4 * layer.inputs * layer.outputs


def _time(launch: float, per_million: float) -> Callable[[Layer], float]:
    return lambda layer: launch + per_million * layer.inputs * layer.outputs / 1e6


_OFT_BLOCK = 32

TUNERS = {
    tuner.name: tuner
    for tuner in (
        Tuner("DoRA", lambda layer: 4 * layer.outputs, _time(0.43, 0.0048)),
        Tuner("OFT", lambda layer: 4 * layer.inputs * _OFT_BLOCK, _time(0.6, 0.0)),
        Tuner("LoHa", _dense, _time(0.28, 0.0014)),
        Tuner("FourierFT", _dense, _time(0.16, 0.036)),
        Tuner("HRA", _dense, _time(1.1, 0.015)),
    )
}
"""Kinds of adapters, from a vector for each layer to a matrix as large as its weight."""


def layers_of(shape: str, count: int | None = None) -> list[Layer]:
    """Return the linear layers that a forward of a named shape visits, in order.

    Args:
        shape: one of :data:`dora_cache.lab.shapes.SHAPES`.
        count: how many decoder layers; by default all.
    """
    size = SHAPES[shape]
    hidden, inner = size["hidden_size"], size["intermediate_size"]
    kv = hidden // size["num_attention_heads"] * size["num_key_value_heads"]
    one = [
        Layer(hidden, hidden),
        Layer(hidden, kv),
        Layer(hidden, kv),
        Layer(hidden, hidden),
        Layer(hidden, inner),
        Layer(hidden, inner),
        Layer(inner, hidden),
    ]
    return one * (count or size["num_hidden_layers"])


@dataclass(frozen=True, eq=False)
class Trace:
    """Lookups in the order in which they come.

    Attributes:
        name: short, to choose it by.
        title: one line that says what happens.
        sizes: bytes of every key's value.
        costs: seconds that deriving it takes.
        lookups: keys, as indices into the two.
    """

    name: str
    title: str
    sizes: NDArray[np.int64]
    costs: NDArray[np.float64]
    lookups: NDArray[np.int64]

    @property
    def working_set(self) -> int:
        """Bytes of all values that are looked up at all."""
        return int(self.sizes[np.unique(self.lookups)].sum())

    @property
    def uniform(self) -> bool:
        """Whether all values are equal in size and cost."""
        return len(np.unique(self.sizes)) == len(np.unique(self.costs)) == 1


def make_trace(
    name: str,
    title: str,
    adapters: Sequence[tuple[Tuner, Sequence[Layer]]],
    forwards: Sequence[int] | NDArray[np.int64],
) -> Trace:
    """Return the trace of some forwards.

    Args:
        name: short, to choose it by.
        title: one line that says what happens.
        adapters: the kind and the layers of every adapter.
        forwards: the adapter that each forward runs, one after the other.
    """
    sizes: list[int] = []
    costs: list[float] = []
    keys: list[NDArray[np.int64]] = []
    for tuner, layers in adapters:
        keys.append(np.arange(len(sizes), len(sizes) + len(layers)))
        sizes += [tuner.nbytes(layer) for layer in layers]
        costs += [tuner.milliseconds(layer) / 1e3 for layer in layers]
    lookups = np.concatenate([keys[adapter] for adapter in forwards])
    return Trace(name, title, np.array(sizes), np.array(costs), lookups)


def zipf(count: int, exponent: float = 1.0) -> NDArray[np.float64]:
    """Return the shares of ``count`` adapters, the most popular one first."""
    weights = 1.0 / np.arange(1, count + 1) ** exponent
    return weights / weights.sum()


def requests(
    rng: np.random.Generator, adapters: Sequence[int] | NDArray[np.int64], low: int, high: int
) -> NDArray[np.int64]:
    """Return the forwards of requests that come one after the other.

    Each is for one adapter, and of so many tokens as chance says, from ``low`` to ``high``; every
    token is a forward.
    """
    tokens = rng.integers(low, high, len(adapters), endpoint=True)
    return np.repeat(np.asarray(adapters), tokens)


def together(
    rng: np.random.Generator,
    adapters: Sequence[int] | NDArray[np.int64],
    low: int,
    high: int,
    slots: int,
) -> NDArray[np.int64]:
    """Return the forwards of requests of which several run at once, a token of each in turn."""
    tokens = rng.integers(low, high, len(adapters), endpoint=True)
    waiting = iter(zip(adapters, tokens, strict=True))
    active: list[list[int]] = []
    forwards: list[int] = []
    while True:
        while len(active) < slots and (new := next(waiting, None)) is not None:
            active.append([int(new[0]), int(new[1])])
        if not active:
            return np.array(forwards)
        for request in active:
            forwards.append(request[0])
            request[1] -= 1
        active = [request for request in active if request[1]]


def standard_traces(seed: int = 0, *, scale: float = 1.0) -> list[Trace]:
    """Return the traces that policies are judged by; the same for the same arguments.

    Args:
        seed: of all chance.
        scale: how long they are, as a share of their full length.
    """
    rng = np.random.default_rng(seed)

    def much(count: int) -> int:
        return max(3, round(count * scale))

    def popular(adapters: int, count: int) -> NDArray[np.int64]:
        """Choose adapters by Zipf's law; which of them are popular is dealt anew."""
        return rng.permutation(adapters)[rng.choice(adapters, much(count), p=zipf(adapters))]

    llama = layers_of("llama-3.1-8b")
    decoder = layers_of("llama-3.1-8b", 1)
    square = [layer for layer in layers_of("llama-3.1-8b", 4) if layer.inputs == layer.outputs]
    tuners = list(TUNERS.values())
    return [
        make_trace(
            "cyclic",
            "one FourierFT adapter on Llama-3.1-8B, one forward after the other",
            [(TUNERS["FourierFT"], llama)],
            [0] * much(200),
        ),
        make_trace(
            "turns",
            "three such adapters in turn, in requests of 16 to 64 tokens",
            [(TUNERS["FourierFT"], llama)] * 3,
            requests(rng, [0, 1, 2] * much(8), 16, 64),
        ),
        make_trace(
            "zipf",
            "1 000 DoRA adapters by Zipf's law, in requests of 2 to 8 tokens; all values alike",
            [(TUNERS["DoRA"], square)] * 1000,
            requests(rng, popular(1000, 4000), 2, 8),
        ),
        make_trace(
            "shifting",
            "1 000 DoRA adapters, whose popularity is dealt anew three times",
            [(TUNERS["DoRA"], decoder)] * 1000,
            requests(rng, np.concatenate([popular(1000, 1000) for _ in range(4)]), 2, 8),
        ),
        make_trace(
            "mixed",
            "50 adapters of five kinds, whose time per byte spans four orders of magnitude",
            [(tuners[index % len(tuners)], decoder * 4) for index in range(50)],
            requests(rng, popular(50, 700), 2, 8),
        ),
        make_trace(
            "together",
            "200 LoHa adapters by Zipf's law, eight requests at once, a token of each in turn",
            [(TUNERS["LoHa"], decoder * 2)] * 200,
            together(rng, popular(200, 1000), 4, 16, 8),
        ),
    ]
