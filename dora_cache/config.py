"""Settings: from arguments, the environment, a TOML file, and defaults, in that order."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, ByteSize, Field, TypeAdapter, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from dora_cache import backends
from dora_cache.errors import ConfigError

__all__ = ["CacheConfig", "Size", "parse_size"]

_PREFIX = "DORA_CACHE_"
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")
# Pydantic reads as far as it understands: without this, "1,5GB" would be one byte.
_AMOUNT = re.compile(r"[0-9]+|[0-9]+(?:\.[0-9]+)?\s*[A-Za-z]+")
_BYTES = TypeAdapter(ByteSize)

_file_values: ContextVar[dict[str, Any] | None] = ContextVar("dora_cache_file", default=None)
"""The settings of the file that is being read, for :meth:`CacheConfig.from_file`."""


def parse_size(value: int | str) -> int | str:
    """Read a size in bytes: ``1048576``, ``"256MiB"``, ``"1.5GB"``, or a share like ``"10%"``.

    Returns:
        The number of bytes, or the share in the form ``"10%"``.

    Raises:
        ValueError: not a size, or negative, or a share outside 0% to 100%.
    """
    examples = 'write bytes like 268435456, or "256MiB", "1.5GB", "10%"'
    if isinstance(value, str):
        text = value.strip()
        share = _PERCENT.fullmatch(text)
        if share:
            if not 0 < float(share[1]) <= 100:  # noqa: PLR2004 - percent
                msg = f"{value!r} is not a share of memory between 0% and 100%: {examples}"
                raise ValueError(msg)
            return f"{share[1]}%"
        if text.startswith("-"):
            msg = f"{value!r} is negative: {examples}"
            raise ValueError(msg)
        try:
            if _AMOUNT.fullmatch(text):
                return int(_BYTES.validate_python(text))
        except ValidationError:  # an unknown unit
            pass
        msg = f"{value!r} is not a size: {examples}"
        raise ValueError(msg)
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"{value!r} is not a size: {examples}"
        raise ValueError(msg)  # noqa: TRY004 - pydantic collects ValueError
    if value < 0:
        msg = f"{value} is negative: {examples}"
        raise ValueError(msg)
    return value


def resolve_size(size: int | str | None, device: torch.device) -> int | None:
    """Turn a size into bytes; a share is of the memory that is free on ``device`` now."""
    if not isinstance(size, str):
        return size
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    return int(free * float(size.removesuffix("%")) / 100)


Size = Annotated[int | str, BeforeValidator(parse_size)]
"""Bytes as an int, or text such as ``"256MiB"``, ``"1.5GB"`` or ``"10%"``."""


class CacheConfig(BaseSettings):
    """How a cache stores and checks its values.

    Explicit arguments win over ``DORA_CACHE_*`` environment variables (``DORA_CACHE_BACKEND``,
    ``DORA_CACHE_MAX_BYTES``, ...; ``DORA_CACHE_OPTIONS`` is JSON), these over a file
    (:meth:`from_file`), and that over the defaults.

    Raises:
        ConfigError: a name is unknown, a value cannot be read, or two settings contradict.
    """

    model_config = SettingsConfigDict(env_prefix=_PREFIX, extra="forbid", frozen=True)

    backend: str = "dict"
    """``dict``, ``lru``, ``budget``, ``cpu``, ``null``, or a registered or installed backend."""
    max_bytes: Size | None = None
    """Cap on the bytes held over the whole model; a share is of the free memory at attach."""
    device_bytes: Size | None = None
    """For ``cpu``: cap on what is kept on the device, copies on their way there included."""
    numerics: Literal["peft", "fast"] = "peft"
    """``peft``: bit for bit PEFT's eager output. ``fast``: fewer operations, no less accurate."""
    guard: Literal["version", "content"] = "version"
    """``content`` also compares what the values depend on, element by element, at each use."""
    audit: bool = True
    """Compare contents that values were derived from, in turn: some at each 32nd use, or 64th."""
    compiled_check: bool = True
    """Notice what raises no event where compiled code is entered, such as a write to a weight."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further settings, for third-party backends."""

    def __init__(self, **settings: Any) -> None:
        _check_environment()
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None
        except SettingsError as error:
            msg = f"{error}: write {_PREFIX}OPTIONS as JSON, for example '{{\"name\": 1}}'"
            raise ConfigError(msg) from None
        for name in self.options.keys() & {"max_bytes", "device_bytes"}:
            msg = f"options has {name}: give {name} itself, beside options"
            raise ConfigError(msg)
        backends.check_options(self.backend, self.backend_options())

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **settings: Any) -> CacheConfig:
        """Read a TOML file; the environment and ``settings`` win over it.

        The settings are top-level keys, or stand in a table ``[dora-cache]`` or
        ``[tool.dora-cache]``.

        Raises:
            ConfigError: the file is missing, is not TOML, or holds a wrong setting.
        """
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            msg = f"cannot read the configuration file {path}: {error.strerror or error}"
            raise ConfigError(msg) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            msg = f"{path} is not valid TOML: {error}"
            raise ConfigError(msg) from None
        reset = _file_values.set(_table(data, path))
        try:
            return cls(**settings)
        except ConfigError as error:
            msg = f"{path}: {error}"
            raise type(error)(msg) from None
        finally:
            _file_values.reset(reset)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Say where settings come from, first the ones that win; for pydantic."""
        file_settings = InitSettingsSource(settings_cls, _file_values.get() or {})
        return init_settings, env_settings, file_settings

    def backend_options(self) -> dict[str, Any]:
        """Return the settings to make the backend with, sizes as they were given."""
        sizes = {"max_bytes": self.max_bytes, "device_bytes": self.device_bytes}
        return {key: size for key, size in sizes.items() if size is not None} | self.options

    @property
    def caps_devices(self) -> bool:
        """Whether ``max_bytes`` is given and means memory of the model's device."""
        return self.max_bytes is not None and "max_bytes" not in backends.host_sizes(self.backend)

    def memory(self, device: torch.device) -> torch.device:
        """Return the device whose memory ``max_bytes`` is of, for a model on ``device``."""
        return torch.device("cpu") if "max_bytes" in backends.host_sizes(self.backend) else device

    def make_cap(self, memory: torch.device) -> int | None:
        """Return ``max_bytes`` in bytes; a share is of what is free on a device now."""
        return resolve_size(self.max_bytes, memory)

    def make_backend(
        self, device: torch.device, *, max_bytes: int | None = None
    ) -> backends.Backend:
        """Make the backend; shares of memory are of what is free on ``device`` now.

        Args:
            device: the model's.
            max_bytes: instead of the setting.

        Raises:
            UnknownBackendError: there is no such backend.
            ConfigError: the backend refuses a setting.
            BackendError: the backend cannot be made.
        """
        options = self.backend_options()
        if max_bytes is not None:
            options["max_bytes"] = max_bytes
        on_host = backends.host_sizes(self.backend)
        for key in options.keys() & {"max_bytes", "device_bytes"}:
            memory = torch.device("cpu") if key in on_host else device
            options[key] = resolve_size(options[key], memory)
        return backends.create(self.backend, **options)


def _table(data: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the table of a TOML file that holds the settings."""
    tool = data.get("tool")
    nested = tool.get("dora-cache") if isinstance(tool, dict) else None
    table = data.get("dora-cache", data if nested is None else nested)
    if not isinstance(table, dict):
        msg = f'{path}: dora-cache is no table: write [dora-cache], then lines like backend = "lru"'
        raise ConfigError(msg)
    return table


def _fields() -> list[str]:
    return list(CacheConfig.model_fields)


def _suggest(name: str) -> str:
    close = difflib.get_close_matches(name, _fields(), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def _check_environment() -> None:
    for variable in os.environ:
        name = variable.upper().removeprefix(_PREFIX).lower()
        if variable.upper().startswith(_PREFIX) and name not in _fields():
            known = ", ".join(_PREFIX + field.upper() for field in _fields())
            msg = f"unknown environment variable {variable}: {_suggest(name)}known are {known}"
            raise ConfigError(msg)


def _explain(error: ValidationError) -> str:
    """Say in one line per mistake what to write instead."""
    lines = []
    for mistake in error.errors():
        name = str(mistake["loc"][0]) if mistake["loc"] else "settings"
        if mistake["type"] == "extra_forbidden":
            known = ", ".join(_fields())
            lines.append(f"unknown setting {name!r}: {_suggest(name)}known are {known}")
        elif mistake["type"] == "literal_error":
            expected = mistake["ctx"]["expected"]
            lines.append(f"{name} is {mistake['input']!r}: choose {expected}")
        else:
            text = mistake["msg"].removeprefix("Value error, ")
            lines.append(f"{name}: {text}")
    return "; ".join(dict.fromkeys(lines))
