"""Base class of objects that must not be copied or pickled."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NoReturn

if TYPE_CHECKING:
    from typing import SupportsIndex

__all__ = ["Uncopyable"]


class Uncopyable:
    """Refuses to be copied and pickled.

    Attributes:
        INSTEAD: what to do instead, for the message.
    """

    __slots__ = ()

    INSTEAD: ClassVar[str] = "it belongs to one cache; copy the model, and attach to the copy"

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> NoReturn:
        """Raise a ``TypeError``; ``copy``, ``deepcopy`` and ``pickle`` come here."""
        msg = f"{type(self).__name__} cannot be copied or pickled: {self.INSTEAD}"
        raise TypeError(msg)
