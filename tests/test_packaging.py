"""A wheel, an editable install and the bare checkout all import dora_cache.backends."""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
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


@pytest.fixture(scope="module", params=["links", "no links"])
def sources(request, tmp_path_factory):
    """A copy of the repository as git checks it out with and without symbolic links."""
    copy = tmp_path_factory.mktemp("sources") / "dora-cache"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "out", "_build", "tests")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    link = copy / "dora_cache/backends"
    if request.param == "no links" and link.is_symlink():
        target = link.readlink()
        link.unlink()
        link.write_text(str(target), encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def sdist(sources, tmp_path_factory):
    """The unpacked source distribution that those sources make."""
    python("-m", "build", "--sdist", "--no-isolation", cwd=sources)
    (built,) = (sources / "dist").glob("*.tar.gz")
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(built) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    return unpacked


def make_wheel(sources):
    python(
        "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
        "--disable-pip-version-check", "--wheel-dir", "dist", ".", cwd=sources,
    )  # fmt: skip
    (built,) = (sources / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(sources):
    """The wheel that those sources make."""
    return make_wheel(sources)


def contents(wheel):
    """Return the paths of the files in a wheel with what is in them, its metadata aside."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        return {name: archive.read(name) for name in names}


def test_a_wheel_holds_everything(wheel):
    """The wheel has the backends as a part of the package, the type marker, and the demo's data."""
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "backends").glob("*.py"):
        assert f"dora_cache/backends/{path.name}" in names
    assert "dora_cache/py.typed" in names
    assert "dora_cache/report/page.html" in names
    for adapter in ("sonnets", "kitchen"):
        assert f"dora_cache/lab/demo/adapters/{adapter}/adapter_model.safetensors" in names
        assert f"dora_cache/lab/demo/texts/{adapter}.txt" in names
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"dora_cache"}


def test_a_wheel_holds_nothing_else(wheel):
    """Every file of the wheel is one of the repository's, where it belongs."""
    for name, content in contents(wheel).items():
        place = ROOT / name.replace("dora_cache/backends/", "backends/")
        assert place.read_bytes() == content, name


def test_the_wheel_of_the_sdist_is_the_same(sdist, wheel):
    """A wheel that is built from the source distribution is that of the checkout."""
    assert contents(make_wheel(sdist)) == contents(wheel)


def test_an_unpacked_sdist_can_be_imported_from_its_root(sdist):
    """Python started in an unpacked source distribution finds the backends."""
    where = python("-c", "import sys; sys.path.insert(0, '.');" + SHOW, cwd=sdist)
    assert where == str((sdist / "backends/lru.py").resolve())


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


def git(*arguments, cwd):
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True)


def test_the_version_is_the_tag(sources):
    """A tagged commit has its tag's version; without tags it is a development version."""

    def version():
        return python("-m", "setuptools_scm", cwd=sources)

    assert version() == "0.0"  # no git
    git("init", "--quiet", cwd=sources)
    try:
        git("add", "pyproject.toml", cwd=sources)
        git("commit", "--quiet", "--message", "first", cwd=sources)
        assert version().startswith("0.1.dev1+g")
        git("tag", "v1.2.3", cwd=sources)
        assert version() == "1.2.3"
    finally:
        shutil.rmtree(sources / ".git")


@pytest.mark.skipif(
    not (ROOT / "dora_cache/backends").is_dir(), reason="mypy needs the link dora_cache/backends"
)
def test_the_type_checker_sees_the_backends(tmp_path):
    """The type checker finds dora_cache.backends with its types."""
    probe = tmp_path / "probe.py"
    probe.write_text(
        "from dora_cache.backends import LRUBackend\nreveal_type(LRUBackend(1).max_bytes)\n"
    )
    alone = ["--no-site-packages", "--ignore-missing-imports"]  # PyTorch's types take a minute
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), *alone]
    found = subprocess.run(
        [*command, str(probe)], cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "MYPYPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert 'Revealed type is "int"' in found.stdout, found.stdout + found.stderr
