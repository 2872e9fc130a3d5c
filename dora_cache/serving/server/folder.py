"""The adapters of one folder: which there are, which are refused, and what changes meanwhile."""

from __future__ import annotations

import difflib
import itertools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from dora_cache.errors import DoraCacheError
from dora_cache.serving.server.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dora_cache import AdapterPool

__all__ = ["AdapterFolder", "Version"]

_log = logging.getLogger(__name__)
_Stamp: TypeAlias = tuple[tuple[int, ...], ...]

_CONFIG = "adapter_config.json"
_FILES = (_CONFIG, "adapter_model.safetensors")
_NEAR = 3


@dataclass(eq=False)
class Version:
    """What an adapter's folder held when it was read.

    Attributes:
        name: what requests call it.
        key: what the pool calls it; no other version has it.
        created: when its weights were written, in seconds since 1970.
        users: how many requests are to run or run with it.
        retired: whether its folder is gone or holds something else.
    """

    name: str
    key: str
    stamp: _Stamp
    created: int
    users: int = 0
    retired: bool = field(default=False)


class AdapterFolder:
    """Every adapter in a folder, by the name of its own folder.

    A request holds the version that it was accepted with, and the pool keeps a version for as long
    as a request holds it. Nothing outside the folder is read, whatever its links say.

    Args:
        pool: where the adapters go.
        path: the folder; None to serve the base model alone.
        reserved: names that adapters cannot have.

    Attributes:
        refused: why an adapter is not served, by name.
    """

    def __init__(
        self, pool: AdapterPool, path: Path | None, *, reserved: frozenset[str] = frozenset()
    ) -> None:
        self.pool = pool
        self.path = path
        self.refused: dict[str, str] = {}
        self._reserved = reserved
        self._versions: dict[str, Version] = {}
        self._refused_stamps: dict[str, _Stamp] = {}
        self._numbers = itertools.count(1)

    @property
    def versions(self) -> list[Version]:
        """The current version of each adapter, sorted by name."""
        return sorted(self._versions.values(), key=lambda one: one.name)

    def find(self, name: str) -> Version:
        """Return the current version of an adapter.

        Raises:
            RequestError: there is none of that name, or it is refused.
        """
        found = self._versions.get(name)
        if found is not None:
            return found
        shown = repr(name[:100])
        if name in self.refused:
            msg = f"the adapter {shown} is not served: {self.refused[name]}"
            raise RequestError(404, msg, code="adapter_refused", param="model")
        known = [*self._reserved, *self._versions]
        near = difflib.get_close_matches(name[:100], known, n=_NEAR)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see /v1/models"
        msg = f"there is no model {shown}: {hint}"
        raise RequestError(404, msg, code="model_not_found", param="model")

    def hold(self, version: Version) -> None:
        """Keep a version in the pool until :meth:`release`."""
        version.users += 1

    def release(self, version: Version) -> None:
        """Let go of a version that :meth:`hold` has kept."""
        version.users -= 1
        self._drop(version)

    def _drop(self, version: Version) -> None:
        if version.retired and not version.users:
            self.pool.remove(version.key)

    def look(self) -> Changes:
        """Look at the folder, and add what is new there to the pool.

        It may run in any thread, one call at a time; the result goes to :meth:`apply`.

        Raises:
            OSError: the folder cannot be read.
        """
        found: dict[str, _Stamp] = {}
        changes = Changes()
        current = {name: one.stamp for name, one in self._versions.items()}
        seen = current | self._refused_stamps
        root = None if self.path is None else self.path.resolve()
        # Iterating raises where the folder itself cannot be read: then nothing has changed.
        folders = [] if self.path is None else sorted(self.path.iterdir())
        for folder in folders:
            name = folder.name
            if name.startswith("."):
                continue  # one that is being prepared
            try:
                stamp = found[name] = _stamp(folder)
            except (FileNotFoundError, NotADirectoryError):
                continue  # there is none
            except OSError:
                if name not in seen:
                    continue
                stamp = found[name] = seen[name]
            if seen.get(name) == stamp:
                continue
            key = f"{name}@{next(self._numbers)}"
            try:
                if name in self._reserved:
                    raise DoraCacheError("the base model has this name: rename the folder")
                _check_inside(folder, root)
                self.pool.add(key, folder)
            except (DoraCacheError, OSError) as error:
                text = str(error).replace(str(folder), name).replace(key, name)
                changes.refused[name] = (text, stamp)
            else:
                changes.added.append(Version(name, key, stamp, stamp[-1][0] // 10**9))
        changes.gone = [name for name in seen if name not in found]
        return changes

    def apply(self, changes: Changes, replaced: Callable[[Version, bool], None]) -> None:
        """Let changes take effect.

        Args:
            changes: what :meth:`look` has found.
            replaced: called with each version that is retired, and whether there is another one.
        """
        for name in changes.gone:
            self.refused.pop(name, None)
            self._refused_stamps.pop(name, None)
            self._retire(name, replaced, again=False)
        for name, (reason, stamp) in changes.refused.items():
            _log.warning("adapter refused", extra={"adapter": name, "reason": reason})
            self.refused[name] = reason
            self._refused_stamps[name] = stamp
            self._retire(name, replaced, again=False)
        for version in changes.added:
            self.refused.pop(version.name, None)
            self._refused_stamps.pop(version.name, None)
            self._retire(version.name, replaced, again=True)
            self._versions[version.name] = version

    def refresh(
        self, replaced: Callable[[Version, bool], None] = lambda _one, _again: None
    ) -> None:
        """Look at the folder and let changes take effect at once, before there are requests.

        Raises:
            OSError: the folder cannot be read.
        """
        self.apply(self.look(), replaced)

    def _retire(self, name: str, replaced: Callable[[Version, bool], None], *, again: bool) -> None:
        version = self._versions.pop(name, None)
        if version is not None:
            version.retired = True
            version.users += 1  # until everybody knows
            replaced(version, again)
            self.release(version)


@dataclass
class Changes:
    """What has changed in a folder.

    Attributes:
        added: versions that are in the pool and not yet served.
        refused: why, and what was there, by name.
        gone: names.
    """

    added: list[Version] = field(default_factory=list)
    refused: dict[str, tuple[str, _Stamp]] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)


def _stamp(folder: Path) -> _Stamp:
    """Return what tells whether a folder's files are others than before."""
    found = []
    for name in _FILES:
        path = folder / name
        if name == _CONFIG or path.exists():
            state = path.stat()
            found.append((state.st_mtime_ns, state.st_size, state.st_ino))
    return tuple(found)


def _check_inside(folder: Path, root: Path | None) -> None:
    for path in (folder, *(folder / name for name in _FILES)):
        if root is None or not path.resolve().is_relative_to(root):
            msg = f"{path.name} is a link that leaves the adapters' folder: copy it there"
            raise DoraCacheError(msg)
