"""Backends by name: registered in the process, or installed with another package."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from dora_cache import BackendError, ConfigError, UnknownBackendError, backends


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
    with pytest.raises(BackendError, match="dict lacks max_bytes, nbytes, put, delete"):
        backends.create("nothing")


def test_unknown_names_and_settings():
    """Each mistake names what could be meant."""
    with pytest.raises(UnknownBackendError, match="did you mean 'dict'"):
        backends.create("dcit")
    with pytest.raises(ConfigError, match="needs max_bytes"):
        backends.create("lru")
    with pytest.raises(ConfigError, match="takes no size"):
        backends.create("dict", size=3)


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
        kind = type(cache._backend).__name__, cache._backend.flavour
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
