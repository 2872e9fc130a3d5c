"""A wheel, an editable install and the bare checkout all import dora_cache.backends."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHOW = (
    "import dora_cache, dora_cache.backends, dora_cache.backends.lru as lru, pathlib;"
    "print(pathlib.Path(lru.__file__).resolve())"
)


def python(*arguments, cwd, path=None, executable=sys.executable):
    command = [str(executable), *(["-I"] if path is None else []), *arguments]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd)}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    found = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of the repository as it is checked out, without what was built in it."""
    copy = tmp_path_factory.mktemp("sources") / "dora-cache"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "out", "_build", "tests")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def wheel(sources):
    """The wheel that those sources make."""
    python(
        "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
        "--disable-pip-version-check", "--wheel-dir", "dist", ".", cwd=sources,
    )  # fmt: skip
    (built,) = (sources / "dist").glob("*.whl")
    return built


def test_a_wheel_holds_everything(wheel):
    """The wheel has the backends as a part of the package, the type marker, and the demo's data."""
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "backends").glob("*.py"):
        assert f"dora_cache/backends/{path.name}" in names
    assert "dora_cache/py.typed" in names
    assert "dora_cache/report_page.html" in names
    for adapter in ("sonnets", "kitchen"):
        assert f"dora_cache/lab/demo/adapters/{adapter}/adapter_model.safetensors" in names
        assert f"dora_cache/lab/demo/texts/{adapter}.txt" in names
    assert not [name for name in names if name.startswith(("backends/", "tests/", "docs/"))]


def test_a_wheel_can_be_imported(wheel, tmp_path):
    """Unpacked anywhere, the wheel imports its own backends."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    where = python("-c", SHOW, cwd=tmp_path, path=site)
    assert where == str((site / "dora_cache/backends/lru.py").resolve())


def test_an_editable_install_imports_the_checkout(sources, tmp_path):
    """An editable install makes the checkout's own files the package."""
    environment = tmp_path / "env"
    python("-m", "venv", "--without-pip", str(environment), cwd=tmp_path)
    executable = environment / "bin/python"
    site = Path(python("-c", "import site; print(site.getsitepackages()[0])",
                       cwd=tmp_path, executable=executable))  # fmt: skip
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python(
        "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
        "--disable-pip-version-check", "--ignore-installed", "--editable", str(sources),
        cwd=tmp_path, executable=executable,
    )  # fmt: skip
    where = python("-c", SHOW, cwd=tmp_path, executable=executable)
    assert where == str((sources / "backends/lru.py").resolve())


def test_the_checkout_can_be_imported_from_its_root(sources):
    """Without any installation, Python started in the checkout finds the backends."""
    where = python("-c", "import sys; sys.path.insert(0, '.');" + SHOW, cwd=sources)
    assert where == str((sources / "backends/lru.py").resolve())


def test_the_type_checker_sees_the_backends(tmp_path):
    """The type checker finds dora_cache.backends with its types."""
    probe = tmp_path / "probe.py"
    probe.write_text(
        "from dora_cache.backends import LRUBackend\nreveal_type(LRUBackend(1).max_bytes)\n"
    )
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(probe)]
    found = subprocess.run(
        command, cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "MYPYPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert 'Revealed type is "int"' in found.stdout, found.stdout + found.stderr
