"""What is asked of TorchDynamo: guards that call a function, and what traced code writes to.

All that is private to PyTorch is tried on what it must notice, once, before it is relied on. If it
fails, compiled code derives all values itself.
"""

from __future__ import annotations

import functools
from collections import Counter
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = [
    "EntryGuard",
    "entry_guards_work",
    "is_freezing",
    "traced_constant",
    "traced_region",
    "traced_writes",
    "traced_writes_show",
]


def traced_region() -> Any:
    """Return what stands for the code that torch.compile traces in this thread now, or None."""
    return torch._guards.TracingContext.try_get()


def is_freezing() -> bool:
    """Whether the compiler makes constants of the weights in what it traces now."""
    try:
        dynamo: Any = torch._dynamo
        config = dynamo.config
        return bool(
            config.prepare_freezing
            or config.install_free_tensors
            or dynamo.utils.is_parameter_freezing()
        )
    except AttributeError:  # it cannot be told
        return True


def traced_writes(objects: Iterable[object], tensors: Iterable[Tensor]) -> bool:
    """Whether the code that torch.compile traces in this thread has written to something so far.

    Such writes take place when the compiled code has run; until then only the compiler knows of
    them. See :func:`traced_writes_show`.

    Args:
        objects: dictionaries and modules, as they were before tracing.
        tensors: likewise.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    effects: Any = InstructionTranslator.current_tx().output.side_effects
    known = effects.id_to_variable
    if not known:
        return False
    for one in objects:
        variable = known.get(id(one))
        if variable is not None and effects.is_modified(variable):
            return True
    for tensor in tensors:
        variable = known.get(id(tensor))
        if variable is None:
            continue
        node = variable.as_proxy().node
        if node.meta["example_value"]._version or any(map(_may_write, node.users)):
            return True
    return False


def _may_write(node: Any) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    return name == "_get_data_attr" or (name.endswith("_") and not name.endswith("__"))


@functools.cache
def traced_writes_show() -> bool:
    """Try :func:`traced_writes` on what it must notice, once."""
    try:
        limits = {"recompile_limit": 64, "accumulated_recompile_limit": 1024}
        with _trying(), torch._dynamo.config.patch(limits):
            return [_shows(act) for act in _WRITES] == [act is not _nothing for act in _WRITES]
    except Exception:  # noqa: BLE001 - the compiler has no such names, or something else
        return False


def _nothing(_: Any, __: dict[str, float], ___: Tensor) -> None:
    pass


def _exchange(module: Any, _: dict[str, float], x: Tensor) -> None:
    module._parameters["weight"] = x  # as functional_call does


def _set_item(_: Any, table: dict[str, float], __: Tensor) -> None:
    table["one"] = 2.0


def _in_place(module: Any, _: dict[str, float], __: Tensor) -> None:
    module.weight.mul_(2)


def _set_data(module: Any, _: dict[str, float], __: Tensor) -> None:
    module.weight.data = module.weight * 2


_WRITES = (_nothing, _exchange, _set_item, _in_place, _set_data)


def _shows(act: Callable[[Any, dict[str, float], Tensor], None]) -> bool:
    with torch.device("cpu"):
        module, table, x = nn.Linear(1, 1, bias=False), {"one": 1.0}, torch.zeros(1, 1)
    module.requires_grad_(requires_grad=False)
    parameters, weight = module._parameters, module.weight
    found: list[bool] = []

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def look() -> bool:
        found.append(traced_writes((parameters, table), (weight,)))
        return True

    def run(x: Tensor) -> Tensor:
        table.get("one")
        act(module, table, x)
        look()
        output: Tensor = module(x)
        return output

    torch.compile(run, backend="eager", fullgraph=True)(x)
    return found[0]


def traced_constant(kind: type) -> type:
    """Have torch.compile take objects of a class for constants, which equal ones may stand for.

    Compiled code calls the ``__eq__`` of the object that it finds with the one that was traced, at
    each call, unless it is the very same one. A class decorator.
    """
    with suppress(Exception):
        torch.utils._pytree.register_constant(kind)
    return kind


class EntryGuard:
    """Has compiled code call a function each time that it is entered, before it runs.

    Last of all guards, so only if the code is otherwise the right one. Filters of guards take it
    for one of global state. See :func:`entry_guards_work`.

    Args:
        check: called without arguments; returns whether the code may run. If not, other code is
            compiled. It must not raise.
    """

    def __init__(self, check: Callable[[], bool]) -> None:
        from torch._dynamo.source import GlobalStateSource

        def create(builder: Any, _: object) -> None:
            root = builder.guard_manager.root
            root.add_epilogue_lambda_guard(lambda _: check(), ["dora_cache"], None)

        create.__name__ = "GLOBAL_STATE"
        source: Any = GlobalStateSource()
        self._guard = torch._guards.Guard(source, create)

    def install(self) -> None:
        """Guard the code that is traced now; once, however often it is called."""
        context: Any = traced_region()
        context.guards_context.dynamo_guards.add(self._guard)


@functools.cache
def entry_guards_work() -> bool:
    """Try :class:`EntryGuard` and :func:`traced_constant` on compiled code, once.

    It compiles a small function, within the tracing of another one if need be.
    """
    try:
        with _trying():
            return _holds_back() and _notices_entries()
    except Exception:  # noqa: BLE001 - they are missing, or something else
        return False


def _holds_back() -> bool:
    """Whether code is not run that a guard of the kind speaks against."""
    from torch._C._dynamo.guards import RootGuardManager

    root: Any = RootGuardManager()
    answers = [True]
    root.add_epilogue_lambda_guard(lambda _: answers[0], ["dora_cache"], None)
    held = root.check({})
    answers[0] = False
    return bool(held) and not root.check({})


@traced_constant
class _Probe:
    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def __eq__(self, other: object) -> bool:
        self.seen.append("constant")
        return isinstance(other, _Probe)

    def __hash__(self) -> int:
        return 0


class _Carrier:
    def __init__(self, seen: list[str]) -> None:
        self.probes = (_Probe(seen),)


def _notices_entries() -> bool:
    """Whether guards see both the code's own constant and others that stand for it."""
    seen: list[str] = []
    traced: list[object] = []

    def enter() -> bool:
        seen.append("entry")
        return True

    guard = EntryGuard(enter)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def look(probes: tuple[_Probe]) -> bool:
        traced.append(probes)
        guard.install()
        guard.install()
        return True

    def run(carrier: _Carrier, x: Tensor) -> Tensor:
        look(carrier.probes)
        return x + 1

    def backend(module: Any, _: object) -> Callable[..., Any]:
        forward: Callable[..., Any] = module.forward
        return forward

    compiled: Any = torch.compile(run, backend=backend, fullgraph=True)
    one, other, x = _Carrier(seen), _Carrier(seen), torch.zeros(1, device="cpu")
    compiled(one, x)
    noticed = []
    for carrier in (one, other):
        seen.clear()
        compiled(carrier, x)
        noticed.append(list(seen))
    return traced == [one.probes] and noticed == [["entry"], ["constant", "entry"]]


@contextmanager
def _trying() -> Iterator[None]:
    """Compile for inference, whatever the surroundings are, and leave the compiler's counters."""
    from torch._dynamo.utils import counters

    before = {name: Counter(counts) for name, counts in counters.items()}
    try:
        with (
            torch.compiler.set_stance("default"),
            torch.inference_mode(mode=False),
            torch.no_grad(),
        ):
            yield
    finally:
        counters.clear()
        counters.update(before)
