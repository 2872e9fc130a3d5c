"""Where settings come from, how sizes are read, and what mistakes are told."""

import copy
import pickle

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dora_cache import CacheConfig, ConfigError, UnknownBackendError
from dora_cache.config import parse_size

CPU = torch.device("cpu")
UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "cache.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_defaults():
    """Without any settings: everything is kept, exactly as PEFT computes it."""
    config = CacheConfig()
    assert (config.backend, config.max_bytes, config.device_bytes) == ("dict", None, None)
    assert (config.numerics, config.guard, config.options) == ("peft", "version", {})


def test_arguments_win_over_environment_over_file_over_defaults(toml, monkeypatch):
    """Each source covers the ones below it, setting by setting."""
    path = toml('backend = "cpu"\nmax_bytes = 1\ndevice_bytes = 1\nnumerics = "fast"')
    monkeypatch.setenv("DORA_CACHE_MAX_BYTES", "2")
    monkeypatch.setenv("DORA_CACHE_DEVICE_BYTES", "2")
    config = CacheConfig.from_file(path, device_bytes=3)
    assert (config.device_bytes, config.max_bytes) == (3, 2)
    assert (config.numerics, config.guard) == ("fast", "version")


def test_environment_alone(monkeypatch):
    """CacheConfig() reads DORA_CACHE_*, sizes and JSON options included."""
    monkeypatch.setenv("DORA_CACHE_BACKEND", "lru")
    monkeypatch.setenv("DORA_CACHE_MAX_BYTES", "256MiB")
    monkeypatch.setenv("DORA_CACHE_OPTIONS", "{}")
    config = CacheConfig()
    assert (config.backend, config.max_bytes, config.options) == ("lru", 256 * 2**20, {})


@pytest.mark.parametrize("table", ["", "[dora-cache]\n", "[tool.dora-cache]\n"])
def test_file_with_and_without_a_table(toml, table):
    """Settings stand at the top of the file or in a table of either name."""
    config = CacheConfig.from_file(toml(f'{table}backend = "lru"\nmax_bytes = "1KiB"'))
    assert (config.backend, config.max_bytes) == ("lru", 1024)


def test_table_beside_those_of_other_tools(toml):
    """A pyproject.toml serves: only the table of dora-cache is read."""
    path = toml('[project]\nname = "x"\n[tool.other]\na = 1\n[tool.dora-cache]\nbackend = "null"')
    assert CacheConfig.from_file(path).backend == "null"


def test_file_does_not_outlive_its_reading(toml):
    """A file counts for the config read from it, and for no later one."""
    CacheConfig.from_file(toml('backend = "null"'))
    assert CacheConfig().backend == "dict"
    with pytest.raises(ConfigError):
        CacheConfig.from_file(toml('backend = "lru"'))
    assert CacheConfig().backend == "dict"


def test_config_from_a_file_is_as_good_as_any(toml):
    """It equals one made from arguments, and can be copied and pickled."""
    config = CacheConfig.from_file(toml('backend = "lru"\nmax_bytes = 5'))
    assert config == CacheConfig(backend="lru", max_bytes=5)
    assert type(config) is CacheConfig
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("256MiB", 256 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("0.5KiB", 512),
        (" 12 kb ", 12_000),
        ("7", 7),
        (0, 0),
        (2**40, 2**40),
        ("10%", "10%"),
        ("12.5 %", "12.5%"),
        ("100%", "100%"),
    ],
)
def test_sizes(size, expected):
    """Bytes, bytes with a unit, and shares of memory are read as they are meant."""
    assert parse_size(size) == expected
    assert CacheConfig(backend="lru", max_bytes=size).max_bytes == expected


@pytest.mark.parametrize(
    "size",
    [
        "-1", -1, "-10%", "abc", "", "0%", "150%", "10%%", "1,5GB", "1.5", "nan", "inf", "1e3",
        "5 parsecs", True, 1.5, b"5", [1],
    ],
)  # fmt: skip
@pytest.mark.parametrize("setting", ["max_bytes", "device_bytes"])
def test_what_is_no_size(setting, size):
    """Anything else is refused, with the setting's name and examples of what to write."""
    with pytest.raises(ConfigError, match=rf'^{setting}: .*write bytes like .* "256MiB"') as caught:
        CacheConfig(backend="cpu", **{setting: size})
    assert repr(size).strip("'") in str(caught.value)


@given(st.integers(0, 9999), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
def test_sizes_with_units_mean_number_times_unit(number, unit, space):
    """Any number with any unit is that many, however it is spaced and capitalised."""
    text = f"{number}{space}{unit}" if unit else str(number)
    assert parse_size(text) == parse_size(text.upper()) == number * UNITS[unit]
    assert parse_size(parse_size(text)) == number * UNITS[unit]


@given(st.text(max_size=8) | st.from_regex(r"[0-9.,]{1,4} ?[KMG]?i?B?%?", fullmatch=True))
def test_any_text_is_a_size_or_an_error(text):
    """Whatever is written is read as a size that is not negative, or refused by ValueError."""
    try:
        size = parse_size(text)
    except ValueError as error:
        assert "write bytes like" in str(error)
    else:
        if isinstance(size, str):
            assert 0 < float(size.removesuffix("%")) <= 100
        else:
            assert size >= 0
        assert parse_size(size) == size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_byte": 1}, "unknown setting 'max_byte': did you mean 'max_bytes'"),
        ({"zzz": 1}, "unknown setting 'zzz': known are backend, max_bytes"),
        ({"backend": "lur"}, "no backend 'lur': did you mean 'lru'"),
        ({"backend": "zzz"}, "no backend 'zzz': choose one of .*'dict'"),
        ({"backend": 5}, "backend: .* string"),
        ({"numerics": "exact"}, "numerics is 'exact': choose 'peft' or 'fast'"),
        ({"guard": "none"}, "guard is 'none': choose 'version' or 'content'"),
        ({"backend": "lru"}, "backend 'lru' needs max_bytes: give .* max_bytes=\"256MiB\""),
        ({"max_bytes": 1}, "'dict' takes no max_bytes .* goes with 'lru' or 'budget' or 'cpu'"),
        ({"backend": "null", "max_bytes": 1}, "'null' takes no max_bytes"),
        ({"device_bytes": 1}, "'dict' takes no device_bytes .* goes with 'cpu'"),
        (
            {"backend": "lru", "max_bytes": 1, "device_bytes": 1},
            "'lru' takes no device_bytes .* goes with 'cpu'",
        ),
        ({"options": {"path": "x"}}, r"'dict' takes no path \(it takes no settings\)"),
        ({"options": []}, "options: .* dictionary"),
        (
            {"backend": "lru", "options": {"max_bytes": "1KiB"}},
            "options has max_bytes: give max_bytes itself",
        ),
        ({"max_byte": 1, "guard": "none"}, "(?s)max_byte.*; .*guard|guard.*; .*max_byte"),
    ],
    ids=str,
)
def test_mistakes_say_what_to_write_instead(settings, message):
    """Unknown names, wrong values and contradictions are errors that name the fix."""
    with pytest.raises(ConfigError, match=message):
        CacheConfig(**settings)


def test_mistakes_in_a_file_name_the_file(toml):
    """The same mistakes, read from a file, say which file, and are of the same kind."""
    path = toml('[dora-cache]\nbackend = "lru"\nmax_byte = 1')
    with pytest.raises(ConfigError, match=r"cache\.toml: unknown setting 'max_byte': did you mean"):
        CacheConfig.from_file(path)
    with pytest.raises(UnknownBackendError, match=r"cache\.toml: no backend 'lur'"):
        CacheConfig.from_file(toml('backend = "lur"'))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[dora-cache", r"cache\.toml is not valid TOML: "),
        ("dora-cache = 5", r"cache\.toml: dora-cache is no table: write \[dora-cache\]"),
        ("[tool]\ndora-cache = 5", "dora-cache is no table"),
        ("[[dora-cache]]\nguard = 'content'", "dora-cache is no table"),
        ("tool = 5", "unknown setting 'tool'"),
    ],
)
def test_files_that_make_no_sense(toml, text, message):
    """A file that is no TOML, or has no table where one belongs, is a ConfigError."""
    with pytest.raises(ConfigError, match=message):
        CacheConfig.from_file(toml(text))


def test_file_that_is_not_text(tmp_path):
    """Bytes that are no UTF-8 are a ConfigError like any other wrong file."""
    path = tmp_path / "cache.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        CacheConfig.from_file(path)


def test_file_that_is_not_there(tmp_path):
    """A missing file is named, with the reason."""
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere\.toml: No such file"):
        CacheConfig.from_file(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("DORA_CACHE_MAXBYTES", "1", "DORA_CACHE_MAXBYTES: did you mean 'max_bytes'"),
        ("DORA_CACHE_ZZZ", "1", "known are DORA_CACHE_BACKEND, DORA_CACHE_MAX_BYTES"),
        ("DORA_CACHE_MAX_BYTES", "lots", "max_bytes: 'lots' is not a size"),
        ("DORA_CACHE_MAX_BYTES", "", "max_bytes: '' is not a size"),
        ("DORA_CACHE_BACKEND", "lur", "did you mean 'lru'"),
        ("DORA_CACHE_OPTIONS", "{", "write DORA_CACHE_OPTIONS as JSON"),
        ("DORA_CACHE_OPTIONS", "[1]", "options: .* dictionary"),
    ],
)
def test_mistakes_in_the_environment(monkeypatch, variable, value, message):
    """Variables are held to the same: wrong names and values are errors that name the fix."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        CacheConfig()


def test_config_is_frozen():
    """A config says what a cache was made with, so it cannot be changed afterwards."""
    config = CacheConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.backend = "lru"
    assert config.backend == "dict"


def test_share_is_of_the_memory_free_when_the_backend_is_made(monkeypatch):
    """A percentage stays one until make_backend, which takes it of what is free then."""
    config = CacheConfig(backend="cpu", max_bytes="10%", device_bytes="2.5%")
    assert config.max_bytes == "10%"
    for free in (1000, 4000):
        memory = type("Memory", (), {"available": free})
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        assert config.make_backend(CPU).max_bytes == free // 10 + free // 40


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_share_is_of_the_device_the_model_is_on():
    """On CUDA, the share is of the device's free memory."""
    free = torch.cuda.mem_get_info()[0]
    backend = CacheConfig(backend="lru", max_bytes="50%").make_backend(torch.device("cuda"))
    assert backend.max_bytes == pytest.approx(free / 2, rel=0.05)


def test_backend_gets_the_settings():
    """make_backend makes a new backend at each call, with the sizes in bytes."""
    config = CacheConfig(backend="lru", max_bytes="1KiB")
    first, second = config.make_backend(CPU), config.make_backend(CPU)
    assert first is not second
    assert first.max_bytes == second.max_bytes == 1024
