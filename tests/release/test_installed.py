"""The wheel in dist/, installed in fresh environments outside of the repository: each extra alone.

``make test-release`` builds it first. Every environment sees the packages of one base environment,
which has the library's dependencies and nothing else, and installs the wheel and one extra.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

import pytest
from test_docs import ROOT, blocks

PAGES = ("README.md", "docs/quickstart.md")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]
FOR_USERS = sorted(EXTRAS.keys() - {"dev", "serving-tests"})
# Modules for a library that users have or have not: torch brings Triton on some systems.
OPTIONAL = {"triton": None, "lycoris": "field"}

IMPORT_ALL = """
import importlib, json, pkgutil, sys
import dora_cache
failed = {}
for module in pkgutil.walk_packages(dora_cache.__path__, "dora_cache.", onerror=lambda name: None):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        failed[module.name] = str(error)
print(json.dumps({"file": dora_cache.__file__, "failed": failed}))
"""

IMPORT_REQUIRED = """
import importlib, sys
from importlib.metadata import packages_distributions
from packaging.utils import canonicalize_name
for package, distributions in packages_distributions().items():
    if {canonicalize_name(name) for name in distributions} & set(sys.argv[1:]):
        if package.isidentifier() and not package.startswith("_"):
            importlib.import_module(package)
            print(package)
"""


def run(*command, cwd, code=0):
    """Run a command and return what it prints, after a check of how it ends."""
    environment = {key: text for key, text in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr if code else done.stdout


def requirements(extra):
    """Return the names of what an extra installs itself, and of the extras that it includes."""
    packages, extras = set(), {extra}
    for requirement in EXTRAS.get(extra, ()):
        if own := re.fullmatch(r"dora-cache\[([\w,-]+)\]", requirement):
            for other in own[1].split(","):
                more = requirements(other)
                packages |= more[0]
                extras |= more[1]
        else:
            packages.add(re.match(r"[\w-]+", requirement)[0])
    return packages, extras


@pytest.fixture(scope="module")
def folder():
    """A folder outside of the repository, deleted at the end: environments are large."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        yield Path(name).resolve()


@pytest.fixture(scope="module")
def wheel():
    (built,) = (ROOT / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def sources(folder):
    """The unpacked sdist."""
    (built,) = (ROOT / "dist").glob("*.tar.gz")
    with tarfile.open(built) as archive:
        archive.extractall(folder / "sources", filter="data")
    (unpacked,) = (folder / "sources").iterdir()
    return unpacked


def environment(folder, base=None):
    """Make an environment, which sees the packages of another one, and return its interpreter."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    (python,) = [*folder.glob("bin/python"), *folder.glob("Scripts/python.exe")]
    if base is not None:
        (site_packages(python) / "base.pth").write_text(str(base), encoding="utf-8")
    return python


def site_packages(python):
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(run(python, "-c", code, cwd=python.parent).strip())


def install(python, *what):
    constraints = ROOT / "constraints.txt"
    run(
        python, "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", constraints,
        *what, cwd=python.parent,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(folder, wheel):
    """Where the packages are that the wheel requires; torch by its pinned version, as in `make`."""
    python = environment(folder / "base")
    install(python, "torch")
    install(python, wheel)
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "dora-cache", cwd=folder)
    return site_packages(python)


@pytest.fixture(scope="module", params=["", *FOR_USERS], ids=lambda extra: extra or "no-extra")
def extra(request):
    return request.param


@pytest.fixture(scope="module")
def installed(folder, wheel, base, extra):
    """The interpreter of an environment with the wheel and one extra."""
    home = folder / (extra or "none")
    python = environment(home, base)
    install(python, wheel)
    if extra:
        install(python, f"dora-cache[{extra}]")  # as messages and pages say
    yield python
    shutil.rmtree(home, ignore_errors=True)


def script_of(page, folder):
    """Save the Python code that a page shows as one script, and return its path."""
    shown = [
        block.text
        for block in blocks(ROOT / page)
        if block.language == "python" and "<!-- no-run -->" not in block.comments
    ]
    script = folder / "page.py"
    script.write_text("\n".join(shown), encoding="utf-8")
    return script


def test_the_environment_is_consistent(installed, tmp_path):
    """No package lacks what it requires."""
    run(installed, "-m", "pip", "check", cwd=tmp_path)


def test_what_the_extra_installs_can_be_imported(installed, extra, tmp_path):
    """Every package that the extra names is there and works."""
    wanted = requirements(extra)[0]
    words = run(installed, "-I", "-c", IMPORT_REQUIRED, *wanted, cwd=tmp_path).split()
    assert len(set(words)) >= len(wanted)


def test_every_module_can_be_imported_or_says_what_to_install(installed, extra, tmp_path):
    """Modules that cannot be imported name an extra that is not installed, or are for a library."""
    found = json.loads(run(installed, "-I", "-c", IMPORT_ALL, cwd=tmp_path).splitlines()[-1])
    assert Path(found["file"]).is_relative_to(installed.parents[1])
    for name, message in found["failed"].items():
        if missing := re.search(r'pip install "dora-cache\[([\w-]+)\]"$', message):
            brings = missing[1]
        else:
            (library,) = re.findall(r"^No module named '(\w+)", message)
            assert library in OPTIONAL, f"{name}: {message}"
            brings = OPTIONAL[library]
        assert brings not in requirements(extra)[1], f"{name}: {message}"


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_the_page_runs(installed, page, tmp_path):
    """What the page shows runs word for word."""
    run(installed, "-I", script_of(page, tmp_path), cwd=tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_the_page_works_from_the_sources(page, folder, base, sources, tmp_path):
    """The page's own line, in the unpacked sdist, installs it; then its code runs word for word."""
    shown = [block.text for block in blocks(ROOT / page) if block.language == "console"]
    line = re.search(r"^\$ pip (install .*)$", "".join(shown), re.MULTILINE)[1]
    python = environment(folder / Path(page).stem, base)
    # A line that names the package finds what is about to be published.
    where = ["--constraint", ROOT / "constraints.txt", "--find-links", ROOT / "dist"]
    run(python, "-m", "pip", *shlex.split(line), *where, cwd=sources)
    run(python, "-I", script_of(page, tmp_path), cwd=tmp_path)


def test_the_command_runs_or_says_what_to_install(installed, extra, tmp_path):
    """With the extra cli the command lists the backends, without it one line names the extra."""
    (command,) = installed.parent.glob("dora-cache*")
    if "cli" in requirements(extra)[1]:
        assert "budget" in run(command, "backends", cwd=tmp_path)
    else:
        said = run(command, "backends", cwd=tmp_path, code=2)
        assert said.endswith('pip install "dora-cache[cli]"\n')
