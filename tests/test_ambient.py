"""PyTorch's private names are in one module, tried on what they must notice, with public ways."""

import ast
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import dora_cache
from dora_cache import AdapterCache, ambient

ROOT = Path(dora_cache.__file__).parent
CORE = sorted(set(ROOT.glob("*.py")) - {ROOT / "__main__.py"})


def test_the_core_has_private_names_of_pytorch_in_one_module():
    """A new release of PyTorch is a matter of that module."""
    found = {}
    for path in CORE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                name = ast.unparse(node)
                parts = name.split(".")
                if parts[0] in {"torch", "parametrize", "forward_ad"} and any(
                    part.startswith("_") for part in parts[1:]
                ):
                    found.setdefault(path.name, set()).add(name)
    assert set(found) == {"ambient.py"}, found


def test_the_handle_has_few_names():
    """Users read all of them."""
    names = [name for name in vars(AdapterCache) if not name.startswith("_")]
    assert len(names) <= 14, names


@pytest.fixture
def without_private_names():
    """The module as it would be if PyTorch had none of them."""
    source = (ROOT / "ambient.py").read_text(encoding="utf-8")
    changed = source.replace("_C: Any = torch._C\n", "_C: Any = object()\n")
    assert changed != source
    changed = changed.replace("from torch._C._dynamo.guards import", "from torch.nowhere import")
    module = types.ModuleType("dora_cache.ambient_of_a_test")
    exec(compile(changed, "ambient", "exec"), vars(module))
    return module


def test_without_private_names_calls_go_past(without_private_names):
    """What cannot be told is taken for an unusual state, so nothing stored is used."""
    assert without_private_names.untraceable()
    assert without_private_names.tensor_guards([torch.ones(1)]) is None
    assert without_private_names.storage_of(torch.ones(1)) != 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert without_private_names.any_autocast()
        inside = without_private_names.environment()
    assert inside != without_private_names.environment()


def test_a_function_that_notices_nothing_is_not_used():
    """It is there under its old name, and does something else."""
    assert ambient._tried(lambda: lambda: 0, ambient._notices_function_modes, "public") == "public"
    assert ambient._tried(lambda: lambda: 0, ambient._notices_dispatch_modes, "public") == "public"
    assert ambient._tried(lambda: lambda: None, ambient._notices_functorch, "public") == "public"
    assert ambient._tried(lambda: lambda: False, ambient._notices_autocast, "public") == "public"
    assert ambient._tried(lambda: lambda _: 3, ambient._notices_storages, "public") == "public"

    def gone():
        raise AttributeError("of this test")

    assert ambient._tried(gone, lambda _: True, "public") == "public"


def test_the_private_names_of_this_version_are_used():
    """Otherwise everything is right and slow, and nobody would know."""
    assert ambient.any_autocast is torch._C._is_any_autocast_enabled
    assert ambient.function_modes is torch._C._len_torch_function_stack
    assert ambient.dispatch_modes is torch._C._len_torch_dispatch_stack
    assert ambient.tensor_guards([torch.ones(1)]) is not None
    assert not ambient.untraceable()


def test_hits_without_tensor_guards(monkeypatch):
    """Calls are answered the long way."""

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3), requires_grad=False)

        @dora_cache.cached("double", depends_on=lambda self: [self.weight])
        def double(self):
            return self.weight * 2

    monkeypatch.setattr(ambient, "_guards_work", lambda: False)
    owner = Owner().eval()
    with dora_cache.attach(owner) as cache:
        for _ in range(3):
            assert owner.double().tolist() == [2.0] * 3
        owner.weight.add_(1)
        assert owner.double().tolist() == [4.0] * 3
        assert (cache.stats().hits, cache.stats().misses) == (2, 2)
        (binding,) = cache._engine.bindings.values()
        assert not binding.shortcuts
