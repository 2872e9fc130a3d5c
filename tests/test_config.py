"""Settings: where they come from, how sizes are read, and what mistakes say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dora_cache import CacheConfig, ConfigError, UnknownBackendError
from dora_cache.config import parse_size


def write(tmp_path, text):
    path = tmp_path / "cache.toml"
    path.write_text(text)
    return path


def test_defaults():
    """Without any setting it is the unbounded dictionary with PEFT's numerics."""
    config = CacheConfig()
    assert (config.backend, config.max_bytes, config.device_bytes) == ("dict", None, None)
    assert (config.numerics, config.guard, config.options) == ("peft", "version", {})


def test_arguments_win_over_environment_over_file_over_defaults(tmp_path, monkeypatch):
    """Each setting comes from the strongest source that has it."""
    path = write(
        tmp_path, 'backend = "lru"\nmax_bytes = "1KiB"\nnumerics = "fast"\nguard = "content"\n'
    )
    monkeypatch.setenv("DORA_CACHE_MAX_BYTES", "2KiB")
    monkeypatch.setenv("DORA_CACHE_NUMERICS", "peft")
    config = CacheConfig.from_file(path, max_bytes="3KiB")
    assert config.backend == "lru"  # the file
    assert config.numerics == "peft"  # the environment
    assert config.max_bytes == 3 * 1024  # the argument
    assert CacheConfig.from_file(path).max_bytes == 2 * 1024
    assert CacheConfig(backend="lru").guard == "version"  # the default


@pytest.mark.parametrize("heading", ["", "[dora-cache]\n", "[tool.dora-cache]\n"])
def test_files_have_the_settings_at_the_top_or_in_a_table(tmp_path, heading):
    """Settings may be top-level keys, or stand in one of two tables."""
    path = write(tmp_path, f'{heading}backend = "lru"\nmax_bytes = 4096\n')
    assert CacheConfig.from_file(path).max_bytes == 4096


def test_options_from_the_environment_are_json(monkeypatch):
    """DORA_CACHE_OPTIONS holds a JSON object, for backends with settings of their own."""
    from dora_cache import backends

    class Optioned(backends.DictBackend):
        def __init__(self, level=0):
            super().__init__()
            self.level = level

    backends.register("optioned", Optioned)
    monkeypatch.setenv("DORA_CACHE_BACKEND", "optioned")
    monkeypatch.setenv("DORA_CACHE_OPTIONS", '{"level": 3}')
    assert CacheConfig().make_backend(torch.device("cpu")).level == 3


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256MiB", 256 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("8 kb", 8_000),
        ("10%", "10%"),
        (" 2.5 % ", "2.5%"),
        (0, 0),
        (4096, 4096),
        ("123", 123),
    ],
)
def test_sizes_that_can_be_read(text, size):
    """Bytes may be numbers, or text with a decimal or binary unit, or a share."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["-1", -1, "-5MiB", "abc", "", "MiB", "0%", "150%", "-3%", True, 1.5, "1 XB"],
)
def test_sizes_that_cannot_be_read(text):
    """Anything else is an error that shows how to write a size."""
    with pytest.raises(ConfigError, match="256MiB"):
        CacheConfig(backend="lru", max_bytes=text)


@given(
    st.integers(0, 2**20),
    st.sampled_from([("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30), ("kB", 10**3), ("GB", 10**9)]),
)
def test_whole_units_are_read_exactly(number, unit):
    """A number of units is that many times the unit's bytes."""
    name, scale = unit
    assert parse_size(f"{number}{name}") == parse_size(f" {number} {name} ") == number * scale


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "lur", "max_bytes": 1}, "did you mean 'lru'"),
        ({"backend": "redis"}, "choose one of"),
        ({"max_byte": 1}, "did you mean 'max_bytes'"),
        ({"colour": "red"}, "known are backend, max_bytes"),
        ({"numerics": "exact"}, "'peft' or 'fast'"),
        ({"guard": "none"}, "'version' or 'content'"),
        ({"backend": "lru"}, "needs max_bytes"),
        ({"backend": "dict", "max_bytes": 1}, "max_bytes goes with 'lru'"),
        ({"device_bytes": 1}, "device_bytes goes with 'cpu'"),
        ({"backend": "lru", "max_bytes": 1, "options": {"x": 1}}, "takes no x"),
    ],
)
def test_mistakes_say_what_to_write_instead(settings, message):
    """Unknown names, wrong values and contradictions are one clear line each."""
    with pytest.raises(ConfigError, match=message) as caught:
        CacheConfig(**settings)
    assert "\n" not in str(caught.value)


def test_an_unknown_backend_has_an_error_of_its_own():
    """UnknownBackendError is a ConfigError and a ValueError."""
    with pytest.raises(UnknownBackendError):
        CacheConfig(backend="nope")
    assert issubclass(UnknownBackendError, ConfigError)
    assert issubclass(ConfigError, ValueError)


def test_an_unknown_environment_variable_is_a_mistake(monkeypatch):
    """A misspelt DORA_CACHE_ variable is reported instead of ignored."""
    monkeypatch.setenv("DORA_CACHE_MAXBYTES", "1")
    with pytest.raises(ConfigError, match="DORA_CACHE_MAXBYTES: did you mean 'max_bytes'"):
        CacheConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backend = ", "not valid TOML"),
        ('backend = "lru"', "needs max_bytes"),
        ("[dora-cache]\nspeed = 11", "unknown setting 'speed'"),
    ],
)
def test_mistakes_in_a_file_name_the_file(tmp_path, text, message):
    """What is wrong with a file is said together with its path."""
    with pytest.raises(ConfigError, match=message) as caught:
        CacheConfig.from_file(write(tmp_path, text))
    assert "cache.toml" in str(caught.value)


def test_a_missing_file_is_a_mistake(tmp_path):
    """The error names the file that is not there."""
    with pytest.raises(ConfigError, match=r"cannot read the configuration file .*nowhere\.toml"):
        CacheConfig.from_file(tmp_path / "nowhere.toml")


def test_a_config_cannot_be_changed():
    """Settings are frozen once made."""
    with pytest.raises(ValueError, match="frozen"):
        CacheConfig().backend = "lru"


def test_a_share_becomes_bytes_when_the_backend_is_made():
    """A share stays a share in the settings and is resolved for a device."""
    config = CacheConfig(backend="lru", max_bytes="1%")
    assert config.max_bytes == "1%"
    backend = config.make_backend(torch.device("cpu"))
    assert isinstance(backend.max_bytes, int)
    assert 0 < backend.max_bytes < 2**50
