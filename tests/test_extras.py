"""What is installed: the library runs without what extras install, and the rest names the extra."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dora_cache.extras import CLI, RAY, SERVE, require

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ABOVE = ("cli", "lab", "testing")  # parts of the package that need an extra
SERVER = "serving/server/"  # needs the extra "serve"
REPLICAS = "serving/ray.py"  # needs the extra "ray"
LOADED = "lab/serving/"  # needs "serving-tests"
# Packages that peft needs, and torch on a GPU.
INDIRECT = {"safetensors", "transformers", "triton"}
SETUPS = "lab/field/of_"
INSTALL = 'pip install "dora-cache[cli]"'
OPTIONAL = {
    ("report/data.py", "matplotlib"),
    ("recipes/lycoris_modules.py", "lycoris"),
    ("serving/metrics.py", "prometheus_client"),
    ("core/tracing.py", "opentelemetry"),
}
METERED = {("cli/top.py", "prometheus_client")}  # of the command line, what "metrics" installs


def names(requirements):
    return {re.match(r"[\w-]+", one)[0].replace("-", "_") for one in requirements}


def imports(path):
    """Yield the names of the packages that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def imported(*, below):
    """Return pairs of file and foreign package, of the library or of what stands above it."""
    package = ROOT / "dora_cache"
    files = [*package.rglob("*.py"), *(ROOT / "backends").glob("*.py")]
    found = set()
    for path in files:
        inside = path.is_relative_to(package)
        place = path.relative_to(package if inside else ROOT)
        if (place.parts[0] in ABOVE) != below:
            found |= {(place.as_posix(), name) for name in imports(path)}
    ours = {"dora_cache", *sys.stdlib_module_names}
    return {(place, name) for place, name in found if name not in ours}


def test_the_library_imports_its_dependencies_alone():
    """No module outside the command line, the lab and the test kit imports anything else."""
    allowed = names(PROJECT["dependencies"]) | INDIRECT
    library = {pair for pair in imported(below=True) if not pair[0].startswith((SERVER, REPLICAS))}
    assert {pair for pair in library if pair[1] not in allowed} == OPTIONAL


def test_every_dependency_is_used():
    """What users install is what the library imports."""
    used = {name for _, name in imported(below=True)}
    assert names(PROJECT["dependencies"]) <= used


def test_the_extras_bring_what_the_rest_imports():
    """The command line, the lab and the test kit import what their extras install, all of it."""
    extras = PROJECT["optional-dependencies"]
    brought = names(extras["cli"]) | names(extras["testing"])
    # A set-up is of a library that whoever tries it has installed.
    foreign = imported(below=False)
    assert foreign >= METERED
    used = {name for place, name in foreign - METERED if not place.startswith((SETUPS, LOADED))}
    assert used - names(PROJECT["dependencies"]) - INDIRECT == brought
    assert names(extras["cli"]) == set(CLI)
    metered = {name for _, name in OPTIONAL | METERED} - {"lycoris", "matplotlib"}
    assert {name.removesuffix("_api") for name in names(extras["metrics"])} == metered


def test_the_servers_extras_bring_what_it_imports():
    """The server, and what measures it, import what their extras install, all of it."""
    extras = PROJECT["optional-dependencies"]
    allowed = names(PROJECT["dependencies"]) | INDIRECT
    server = {name for place, name in imported(below=True) if place.startswith(SERVER)}
    brought = names(extras["serve"]) - {"dora_cache"}
    # FastAPI is made of Starlette.
    assert server - allowed == brought - INDIRECT | {"prometheus_client", "starlette"}
    assert set(SERVE) == brought - INDIRECT | {"prometheus_client"}
    replicas = {name for place, name in imported(below=True) if place == REPLICAS}
    assert names(extras["ray"]) - {"dora_cache"} == set(RAY) - set(SERVE) == {"ray"}
    assert replicas - allowed - server == {"ray"}
    loaded = {name for place, name in imported(below=False) if place.startswith(LOADED)}
    others = allowed | names(extras["cli"]) | set(SERVE)
    assert loaded - others == {"httpx", "openai"} <= names(extras["serving-tests"])


def test_the_quickstart_lists_the_extras():
    """The table of the quickstart has a row for each extra that is for users."""
    text = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)
    extras = PROJECT["optional-dependencies"].keys()
    assert sorted(rows) == sorted(extras - {"dev", "serving-tests"})


# Imports from dora_cache's own modules fail; those from torch's and peft's do not.
BLOCKED = """
import builtins

real = builtins.__import__

def blocking(name, globals=None, locals=None, fromlist=(), level=0):
    package = name.partition(".")[0]
    own = ((globals or {}).get("__name__") or "").partition(".")[0] == "dora_cache"
    if own and package in {
        "typer", "rich", "numpy", "matplotlib", "gguf", "hypothesis",
        "opentelemetry", "prometheus_client",
    }:
        raise ImportError(f"{package} is blocked")
    return real(name, globals, locals, fromlist, level)

builtins.__import__ = blocking
"""

USE = """
import torch
from peft import LoraConfig, get_peft_model
import dora_cache

torch.manual_seed(0)
config = LoraConfig(use_dora=True, r=2, target_modules=["0", "1"], init_lora_weights=False)
layers = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 8))
model = get_peft_model(layers, config).eval()
x = torch.randn(3, 8)
with torch.no_grad():
    plain = model(x)
for settings in (
    {},
    {"backend": "lru", "max_bytes": "10%"},
    {"backend": "budget", "max_bytes": "1MiB"},
    {"backend": "cpu"},
    {"guard": "content"},
):
    with dora_cache.attach(model, **settings) as cache, torch.no_grad():
        assert cache.warm(progress=True) == 2
        for _ in range(40):  # some of them audited
            assert torch.equal(model(x), plain)
        assert "DoRA scale" in str(cache.report())
        assert cache.stats().hits == 80
        cache.invalidate()
assert type(model.base_model.model[0]).__module__.startswith("peft.")
print("done")
"""


def python(code, *, cwd):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={"PYTHONPATH": str(ROOT), "HOME": str(cwd)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_library_runs_without_the_extras(tmp_path):
    """Attach, warm, run, report and detach while the extras' packages cannot be imported."""
    done = python(BLOCKED + USE, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_the_block_bites(tmp_path):
    """Under the same block, nothing that needs an extra can be imported."""
    code = """
for name in ("cli.app", "lab.bench", "lab.simulator", "lab.freshness.report", "testing.recipes"):
    try:
        __import__(f"dora_cache.{name}")
    except ImportError as error:
        print(error)
"""
    done = python(BLOCKED + code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.rpartition("is blocked")[1:] for line in done.stdout.splitlines()] == [
        ("is blocked", "")
    ] * 5


def without(*packages):
    """Return code after which the packages are not installed."""
    return f"import sys; sys.modules.update(dict.fromkeys({packages!r}));"


def test_the_command_says_what_to_install(tmp_path):
    """Without the extra, the command is one line and exit code 2."""
    code = without("typer", "rich", "matplotlib") + "from dora_cache.__main__ import main; main()"
    done = python(code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        f"error: the command dora-cache needs matplotlib, rich and typer: {INSTALL}\n",
    )


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [
        ("serving.server", SERVE, "serve"),
        ("serving.ray", RAY, "ray"),
        ("lab.serving", ("httpx", "openai"), "serving-tests"),
    ],
    ids=["serve", "ray", "serving-tests"],
)
def test_the_server_says_what_to_install(tmp_path, module, missing, extra):
    """Without its extra, the import of the server or of what measures it names the extra."""
    done = python(without(*missing) + f"import dora_cache.{module}", cwd=tmp_path)
    assert done.returncode == 1
    names = f"{', '.join(missing[:-1])} and {missing[-1]}"
    text = f'dora_cache.{module} needs {names}: pip install "dora-cache[{extra}]"'
    assert done.stderr.endswith(f"ImportError: {text}\n")


def test_the_lab_says_what_to_install(tmp_path):
    """Without the extra, the import of any part of the lab names it."""
    done = python(without("rich") + "import dora_cache.lab.planning", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith(f"ImportError: dora_cache.lab needs rich: {INSTALL}\n")


def test_what_is_missing_is_listed():
    """The message names every missing package, and nothing is said where none is."""
    require("cli", ("sys", "torch"), "this")
    with pytest.raises(ImportError, match=r"^this needs no_a, no_b and no_c: "):
        require("cli", ("no_a", "sys", "no_b", "no_c"), "this")
