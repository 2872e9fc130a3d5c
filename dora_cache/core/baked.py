"""Records of the constants in an exported program."""

from __future__ import annotations

from dataclasses import dataclass

from dora_cache.units import format_bytes

__all__ = ["Baked", "BakedLayer"]


@dataclass(frozen=True, slots=True)
class BakedLayer:
    """A layer whose values are constants in a program.

    Attributes:
        name: in the model.
        adapters: those that are active in it.
        holds: names of the values; ``"weight"`` if the adapter is part of the base layer's.
        nbytes: bytes of these constants. A weight takes the place of the base layer's.
    """

    name: str
    adapters: tuple[str, ...]
    holds: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Baked:
    """What programs that are exported meanwhile have as constants.

    Attributes:
        layers: those with constants.
        derived: layers that derive their values in the program, by name, and why.
        weights: whether adapters are part of the base layers' weights.
    """

    layers: tuple[BakedLayer, ...]
    derived: dict[str, str]
    weights: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all constants."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters, sorted."""
        return tuple(sorted({name for layer in self.layers for name in layer.adapters}))

    def __str__(self) -> str:
        """Say how much is constant, what programs are spared, and what they derive."""
        names = ", ".join(map(repr, self.adapters))
        size = f"{format_bytes(self.nbytes)} of constants in {len(self.layers)} layers"
        gain = (
            "the adapters are part of the weights, whose place the constants take: programs run "
            "the base model's operations alone"
            if self.weights
            else "programs derive none of these values; the adapters' factors stay"
        )
        text = f"adapters {names}: {size}; {gain}"
        if self.derived:
            name, why = next(iter(self.derived.items()))
            text += f". {len(self.derived)} other layers derive in the program: {name}: {why}"
        return text
