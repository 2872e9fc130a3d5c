"""Backends by name: registered in the process, or installed with another package."""

import json
import os
import subprocess
import sys
import textwrap
import types
import warnings
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import dora_cache
from dora_cache import BackendError, ConfigError, UnknownBackendError, backends, errors, recipes
from dora_cache.backends import registry
from dora_cache.cli.app import app


class Mine(backends.DictBackend):
    """Keeps everything, and says so."""


def test_a_registered_backend_is_made_by_name():
    """register() makes a factory selectable, again and again."""
    backends.register("mine", Mine)
    backends.register("mine", Mine)
    assert type(backends.create("mine")) is Mine
    info = backends.available()["mine"]
    assert (info.origin, info.options, info.summary) == (
        "registered", (), "Keeps everything, and says so.",
    )  # fmt: skip


def test_names_are_taken_once():
    """Neither a built-in name nor another factory's can be registered."""
    backends.register("taken", Mine)
    for name, factory in (("lru", Mine), ("taken", backends.DictBackend)):
        with pytest.raises(ConfigError, match="another name"):
            backends.register(name, factory)


def test_built_in_backends_say_what_they_take():
    """available() lists settings, and which of them must be given."""
    found = backends.available()
    assert {"dict", "lru", "cpu", "null"} <= found.keys()
    assert found["lru"].required == ("max_bytes",)
    assert found["cpu"].options == ("max_bytes", "device_bytes")
    assert found["cpu"].required == ()


def test_what_is_no_backend_is_refused():
    """A factory's result must have the methods of the protocol; the error names those it lacks."""
    backends.register("nothing", dict)
    with pytest.raises(BackendError, match="dict lacks max_bytes, nbytes, on_evict, put"):
        backends.create("nothing")


def test_unknown_names_and_settings():
    """Each mistake names what could be meant."""
    with pytest.raises(UnknownBackendError, match="did you mean 'dict'"):
        backends.create("dcit")
    with pytest.raises(ConfigError, match="needs max_bytes"):
        backends.create("lru")
    with pytest.raises(ConfigError, match="takes no size"):
        backends.create("dict", size=3)


class Refusing(backends.LRUBackend):
    """Its constructor takes anything, and refuses it."""

    error = ValueError("no such flavour")

    def __init__(self, max_bytes, flavour="plain", **others):
        super().__init__(max_bytes)
        if others:
            raise TypeError(f"unexpected keyword argument {next(iter(others))!r}")
        if flavour != "plain":
            raise self.error


@pytest.fixture
def refusing(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {"refusing": Refusing})
    return Refusing


@pytest.mark.usefixtures("refusing")
def test_a_constructor_that_refuses_a_setting_is_named():
    """The error has backend, settings, and the original error; values may be secrets."""
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError) as raised:
        dora_cache.attach(
            model, backend="refusing", max_bytes=64, options={"flavour": "the password"}
        )
    text = str(raised.value)
    assert "backend 'refusing' cannot be made with max_bytes=64, flavour=...: ValueError" in text
    assert "no such flavour" in text
    assert "it takes max_bytes, flavour, and others" in text
    assert "password" not in text
    assert raised.value.__cause__ is Refusing.error
    with pytest.raises(ConfigError, match=r"TypeError: unexpected keyword argument 'size'.* takes"):
        backends.create("refusing", max_bytes=64, size=3)


@pytest.mark.parametrize("error", [OSError("no connection"), RuntimeError("no"), KeyError("x")])
def test_a_constructor_that_fails_is_the_backends_fault(refusing, monkeypatch, error):
    """Whatever it raises, the backend is named."""
    monkeypatch.setattr(refusing, "error", error)
    with pytest.raises(BackendError, match=type(error).__name__) as raised:
        backends.create("refusing", max_bytes=64, flavour="mint")
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [ConfigError("mine"), BackendError("mine"), torch.OutOfMemoryError("mine")]
)
def test_errors_that_say_it_themselves_come_through(refusing, monkeypatch, error):
    """A backend that speaks the library's language is not talked over."""
    monkeypatch.setattr(refusing, "error", error)
    with pytest.raises(type(error), match=r"^mine$"):
        backends.create("refusing", max_bytes=64, flavour="mint")


# Installed backends whose name is taken


class Distribution:
    def __init__(self, name):
        self.name = name


def offer(monkeypatch, module, group, *points):
    """Have distributions offer things under names, as if they were installed."""
    found = EntryPoints(
        EntryPoint(name, value, group)._for(Distribution(dist)) for dist, name, value in points
    )
    monkeypatch.setattr(module, "entry_points", lambda **wanted: found.select(**wanted))
    monkeypatch.setattr(errors, "_warned", set())
    monkeypatch.setattr(registry, "_looked_up", set())


def told(action):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        action()
    return [str(one.message) for one in seen if one.category is dora_cache.CacheWarning]


@pytest.fixture
def installed_module(monkeypatch):
    module = types.ModuleType("acme")
    module.Theirs = type("Theirs", (backends.DictBackend,), {})
    module.Mine = Mine
    monkeypatch.setitem(sys.modules, "acme", module)
    monkeypatch.setattr(registry, "_registered", {})
    return module


@pytest.mark.usefixtures("installed_module")
def test_a_built_in_backend_hides_an_installed_one_and_says_so(monkeypatch):
    """Once, with the package's name, wherever the name is used or listed."""
    point = ("acme-tools", "lru", "acme:Theirs")
    offer(monkeypatch, registry, registry.ENTRY_POINT_GROUP, point)
    (text,) = told(lambda: [backends.create("lru", max_bytes=8) for _ in range(2)])
    assert "'lru' of acme-tools (acme:Theirs) is not used" in text
    assert "built-in" in text
    assert "dora_cache.backends.register('another-name', ...)" in text
    assert told(lambda: backends.create("dict")) == []
    offer(monkeypatch, registry, registry.ENTRY_POINT_GROUP, point)
    assert told(backends.available) == [text]
    offer(monkeypatch, registry, registry.ENTRY_POINT_GROUP, point)
    result = CliRunner().invoke(app, ["backends"])
    assert result.exit_code == 0
    assert result.stderr == f"warning: {text}\n"


def test_a_registered_backend_hides_an_installed_one_and_says_so(monkeypatch, installed_module):
    """Not where both are the same, as in a package that does both."""
    point = ("acme-tools", "mine", "acme:Theirs")
    backends.register("mine", Mine)
    offer(monkeypatch, registry, registry.ENTRY_POINT_GROUP, point)
    (text,) = told(lambda: backends.create("mine"))
    assert "registered under that name" in text
    assert backends.available()["mine"].origin == "registered"
    for value in ("acme:Mine", "no_such_module:Mine"):
        offer(monkeypatch, registry, registry.ENTRY_POINT_GROUP, ("acme-tools", "mine", value))
        assert len(told(lambda: backends.create("mine"))) == (value != "acme:Mine")


@pytest.mark.usefixtures("installed_module")
def test_of_two_installed_backends_one_is_used_and_the_other_told(monkeypatch):
    """The first that is found."""
    points = [("one", "ours", "acme:Theirs"), ("other", "ours", "acme:Mine")]
    offer(monkeypatch, registry, registry.ENTRY_POINT_GROUP, *points)
    made = []
    (text,) = told(lambda: made.append(backends.create("ours")))
    assert type(made[0]).__name__ == "Theirs"
    assert "'ours' of other (acme:Mine) is not used, since one has one of that name" in text


def test_of_two_installed_recipes_one_is_used_and_the_other_told(monkeypatch, installed_module):
    """As with backends."""
    installed_module.RECIPE = next(one for one in recipes.load_recipes() if one.name == "LoHa")
    points = [("one", "ours", "acme:RECIPE"), ("other", "ours", "acme:OTHER")]
    offer(monkeypatch, recipes, recipes.ENTRY_POINT_GROUP, *points)
    (text,) = told(recipes.load_recipes)
    assert "the recipe 'ours' of other (acme:OTHER) is not used" in text


PACKAGE = {
    "pyproject.toml": """
        [build-system]
        requires = ["setuptools"]
        build-backend = "setuptools.build_meta"
        [project]
        name = "acme-backend"
        version = "1.0"
        [project.entry-points."dora_cache.backends"]
        acme = "acme_backend:AcmeBackend"
        acme-broken = "acme_backend:Missing"
        [tool.setuptools]
        py-modules = ["acme_backend"]
        """,
    "acme_backend.py": """
        from dora_cache.backends import LRUBackend

        class AcmeBackend(LRUBackend):
            \"\"\"The backend of another company.\"\"\"

            def __init__(self, max_bytes: int, flavour: str = "plain") -> None:
                super().__init__(max_bytes)
                self.flavour = flavour
        """,
}

USE = """
    import json, sys, torch, dora_cache
    from dora_cache import CacheConfig, backends, cached

    class Owner(torch.nn.Module):
        @cached("value", depends_on=lambda self: [])
        def value(self):
            return torch.ones(4)

    owner = Owner().eval()
    config = CacheConfig.from_file(sys.argv[1]) if len(sys.argv) > 1 else CacheConfig()
    with dora_cache.attach(owner, config) as cache:
        owner.value(), owner.value()
        stats = cache.stats()
        kind = type(cache._engine.memory.backend).__name__, cache._engine.memory.backend.flavour
    try:
        CacheConfig(backend="acme-broken")
    except dora_cache.BackendError as error:
        broken = str(error)
    print(json.dumps({
        "kind": kind, "hits": stats.hits, "nbytes": stats.nbytes, "max_bytes": stats.max_bytes,
        "origin": backends.available()["acme"].origin,
        "broken": broken, "listed": backends.available()["acme-broken"].summary,
        "others": len(backends.available()),
    }))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which a third party's package was really installed."""
    root = tmp_path_factory.mktemp("acme")
    for name, text in PACKAGE.items():
        (root / name).write_text(textwrap.dedent(text))
    target = root / "site"
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
        "--disable-pip-version-check", "--target", str(target), str(root),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return target


@pytest.mark.parametrize("source", ["file", "environment"])
def test_an_installed_package_brings_a_backend(installed, tmp_path, source):
    """An entry point makes a third party's backend selectable from a file or the environment."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    arguments = []
    if source == "file":
        config = tmp_path / "cache.toml"
        config.write_text('backend = "acme"\nmax_bytes = "1KiB"\n[options]\nflavour = "mint"\n')
        arguments = [str(config)]
    else:
        environment |= {
            "DORA_CACHE_BACKEND": "acme",
            "DORA_CACHE_MAX_BYTES": "1KiB",
            "DORA_CACHE_OPTIONS": '{"flavour": "mint"}',
        }
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(USE), *arguments],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    said = json.loads(found.stdout)
    assert said["kind"] == ["AcmeBackend", "mint"]
    assert (said["hits"], said["nbytes"], said["max_bytes"]) == (1, 16, 1024)
    assert said["origin"] == "acme-backend"
    assert "fails to load" in said["broken"]
    assert "fails to load" in said["listed"]
    assert said["others"] >= 6
