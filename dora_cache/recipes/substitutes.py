"""Have a module read a stored tensor in a weight's place: in one thread, for one forward.

Some layers of PEFT's apply an adapter by changing the base module's weight for the time of a
forward, and changing it back. The base module is shared by all threads, so no two such forwards may
overlap. Here the weight itself stays as it is. The module's class gets a property by the weight's
name, which returns the substitute to the thread that has one, and the weight to everybody else.

A :class:`Gate` keeps PEFT's own way, wherever it has to be used, apart from all that.
"""

from __future__ import annotations

import functools
import threading
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from dora_cache.attributes import SLOT
from dora_cache.copying import Uncopyable
from dora_cache.core.facts import UncheckableError
from dora_cache.lifecycle import Observer, observe, only_moves, plain_class, stays_in_place
from dora_cache.reasons import Reason
from dora_cache.recipes.compiled import view_of
from dora_cache.recipes.hooks import UnusualError, derives
from dora_cache.recipes.peft_layers import (
    base_layer,
    derive_ahead,
    wants_gradients,
    why_uncached,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from dora_cache.core.engine import Engine
    from dora_cache.recipes.holder import Holder

__all__ = [
    "Gate",
    "Plan",
    "Substitute",
    "check_cached",
    "gate_for",
    "is_plain",
    "stand_in",
    "substituted",
    "substituting",
    "warmers",
]


class Plan:
    """What a forward is to use.

    Attributes:
        weights: substitutes, by the module's id and the weight's name.
        layers: ids of the tuner layers whose work the substitutes do.
    """

    __slots__ = ("layers", "weights")

    def __init__(self) -> None:
        self.weights: dict[tuple[int, str], Tensor] = {}
        self.layers: set[int] = set()


class _Here(threading.local):
    """What the present thread is in the middle of."""

    def __init__(self) -> None:
        self.weights: dict[tuple[int, str], Tensor] = {}
        self.gates: dict[Gate, Plan | None] = {}


_here = _Here()
_gates: weakref.WeakKeyDictionary[nn.Module, Gate] = weakref.WeakKeyDictionary()


class Gate(Uncopyable):
    """Lets forwards that leave a base module alone run side by side, and any other one by itself.

    Also keeps the classes of the modules whose weights have substitutes.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._together = 0
        self._alone = False
        self._waiting = 0  # to be alone; whoever comes after them waits as well
        self._closed = False
        self._swapped: dict[int, tuple[tuple[str, ...], Callable[[], None]]] = {}

    def substitute(
        self, module: nn.Module, name: str, changed: Callable[[Any], object] = lambda _: None
    ) -> None:
        """Make a parameter of a module one that may be substituted.

        Args:
            module: the module.
            name: the parameter's.
            changed: called once an attribute of the module has been set.
        """
        names, restore = self._swapped.get(id(module), ((), None))
        if name in names:
            return
        if restore is not None:
            restore()
        names = (*names, name)
        overrides: Any = {name: _reader(name) for name in names}
        observer = Observer(changed=changed, mode_switched=changed)
        self._swapped[id(module)] = names, observe(module, observer, overrides)

    def enter(self, *, alone: bool) -> bool:
        """Begin a forward; wait until that may be.

        Returns:
            Whether the gate still stands; if not, there is nothing to leave.
        """
        with self._changed:
            if alone:
                self._waiting += 1
                try:
                    while self._together or self._alone:
                        self._changed.wait()
                finally:
                    self._waiting -= 1
            else:
                while self._alone or self._waiting:
                    self._changed.wait()
            if self._closed:
                self._changed.notify_all()
                return False
            if alone:
                self._alone = True
            else:
                self._together += 1
            return True

    def leave(self, *, alone: bool) -> None:
        """End a forward."""
        with self._changed:
            if alone:
                self._alone = False
            else:
                self._together -= 1
            if self._closed:
                self._restore()
            if self._waiting or alone or self._closed:
                self._changed.notify_all()

    def close(self) -> None:
        """Give the modules their classes back, once no forward uses the gate any more."""
        with self._changed:
            self._closed = True
            if self not in _here.gates:  # else the forward that this is called in does it
                while self._together or self._alone:
                    self._changed.wait()
            self._restore()

    def _restore(self) -> None:
        if not (self._together or self._alone):
            while self._swapped:
                self._swapped.popitem()[1][1]()


def gate_for(cache: Engine, base: nn.Module) -> Gate:
    """Return the gate of a base module, for as long as the cache is attached."""
    gate = _gates.get(base)
    if gate is None or gate._closed:
        gate = _gates[base] = Gate()
        cache.on_detach(gate.close)
    return gate


_SUBSTITUTES = "_dora_cache_substitutes"
"""Where a stand-in for a base module has what is read in place of its weights, by name."""


class Substitute(NamedTuple):
    """What compiled code reads in a weight's place.

    Attributes:
        holder: of the tuner layer that changes the weight.
        derive: a cached function of the layer and its active adapters.
        which: of several tensors, the one that this returns; None if it returns one.
    """

    holder: Holder
    derive: Callable[..., Any]
    which: int | None = None


_STAND_IN = "_dora_cache_stand_in"
"""Where a tuner layer's view has what compiled code runs in the base module's place."""


def stand_in(
    view: Any,
    base: Any,
    substitutes: dict[str, Substitute],
    parts: dict[str, Any] | None = None,
) -> None:
    """Have compiled code run :func:`substituted` in the place of a view's base module."""
    view.__dict__[_STAND_IN] = substituted(base, substitutes, parts)


def substituted(
    base: Any, substitutes: dict[str, Substitute], parts: dict[str, Any] | None = None
) -> Any:
    """Return a module that reads substitutes; it shares all else with another one.

    Args:
        base: the module.
        substitutes: by the names of parameters.
        parts: submodules of the stand-in that are not the module's.
    """
    found = object.__new__(type(base))
    found.__dict__.update(base.__dict__)
    found.__dict__[_SUBSTITUTES] = substitutes
    found.__dict__["_modules"] = {**base._modules, **(parts or {})}
    return found


def _in_place(layer: Any) -> Any:
    """Return what compiled code runs in place of a layer's base module."""
    while isinstance(layer, BaseTunerLayer):
        view = layer.__dict__[SLOT].holder.view
        if view is not None:
            return view.__dict__[_STAND_IN]
        layer = layer._modules["base_layer"]
    return layer


def views_hold(layer: Any) -> bool:
    """Whether compiled code may use the views of a layer and of those that it wraps."""
    while isinstance(layer, BaseTunerLayer):
        view = view_of(layer)
        if view is None:
            binding = layer.__dict__.get(SLOT)
            if binding is None or not binding.holder.idle:
                return False
        elif wants_gradients(view):
            return False
        layer = layer._modules["base_layer"]
    return True


@functools.cache
def _reader(name: str) -> property:
    """Return a property for the class of a module; without a substitute it is as if not there."""

    def read(module: Any) -> Any:
        state = module.__dict__
        if not torch.compiler.is_dynamo_compiling():
            weight = _here.weights.get((id(module), name))
            if weight is not None:
                return weight
        elif name in state.get(_SUBSTITUTES, ()):
            holder, derive, index = state[_SUBSTITUTES][name]
            view = holder.view
            if view is not None:
                active = view.__dict__["_active_adapter"]
                found = derive(view, *((active,) if isinstance(active, str) else active))
                return found if index is None else found[index]
        if name in state:  # a plain tensor, set in a deleted parameter's place
            return state[name]
        if name in state["_parameters"]:
            return state["_parameters"][name]
        raise AttributeError(name)  # then nn.Module.__getattr__ is asked

    def write(module: Any, value: object) -> None:
        module.__dict__[name] = value

    def delete(module: Any) -> None:
        try:
            del module.__dict__[name]
        except KeyError:
            raise AttributeError(name) from None

    return property(read, write, delete)


class _Passage:
    """A forward by itself, or beside others that use substitutes; a no-op inside another one."""

    __slots__ = ("alone", "entered", "gate", "plan")

    def __init__(self, gate: Gate, *, alone: bool) -> None:
        self.gate = gate
        self.alone = alone
        self.entered = False
        self.plan: Plan | None = None

    def __enter__(self) -> Self:
        if self.gate not in _here.gates and self.gate.enter(alone=self.alone):
            _here.gates[self.gate] = None
            self.entered = True
        return self

    def use(self, plan: Plan) -> None:
        """Have the modules read substitutes from now on, in this thread."""
        self.plan = _here.gates[self.gate] = plan
        _here.weights.update(plan.weights)

    def __exit__(self, *_: object) -> None:
        if self.plan is not None:
            for place in self.plan.weights:
                del _here.weights[place]
        if self.entered:
            del _here.gates[self.gate]
            self.gate.leave(alone=self.alone)


def substituting(
    plan: Callable[[Any, dict[str, Any]], Plan | None],
    covered: Callable[..., Any],
    otherwise: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Return a forward that puts substitutes in place of weights where PEFT would change them.

    Args:
        plan: called with the outermost layer of a base module and the keyword arguments; returns
            what to use, or None where PEFT's own forward derives nothing and has to run by itself.
            It raises an :class:`UnusualError` where that derives what it changes the weights by.
        covered: called with a layer that the plan covers and its arguments, in place of its
            forward.
        otherwise: called in place of the layer's own forward where there is no plan.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:  # PEFT's name for the input varies
        original = plain_class(type(self)).forward  # type: ignore[attr-defined]
        if torch.compiler.is_dynamo_compiling():
            if "adapter_names" not in kwargs and views_hold(self):
                with suppress(UncheckableError):
                    return _in_place(self)(*args, **kwargs)
            return original(self, *args, **kwargs)
        gate = _gates.get(base_layer(self))
        if gate is None or SLOT not in self.__dict__:
            return original(self, *args, **kwargs)
        if gate in _here.gates:
            outer = _here.gates[gate]
            if outer is not None and id(self) in outer.layers:
                return covered(self, *args, **kwargs)
            return original(self, *args, **kwargs)
        with _Passage(gate, alone=False) as passage:
            try:
                _check_in_place(base_layer(self))
                found = plan(self, kwargs) if passage.entered else None
                reason = Reason.UNUSUAL_PART if passage.entered else Reason.DETACHED
            except UnusualError as error:
                reason, found = error.reason, None
            if found is not None:
                passage.use(found)
                run = covered if id(self) in found.layers else original
                return run(self, *args, **kwargs)
        if any(map(derives, _stack(self))):
            self.__dict__[SLOT].passed_by(reason)
        with _Passage(gate, alone=True):
            return (otherwise or original)(self, *args, **kwargs)

    return forward


def _check_in_place(base: nn.Module) -> None:
    """Raise an UnusualError if a module's weights are brought or cast within its forward."""
    if "forward" in base.__dict__ and only_moves(base) and not stays_in_place(base):
        msg = "the base module's weights are in place for its forward alone"
        raise UnusualError(msg, Reason.OFFLOADED)


def check_cached(layer: Any) -> None:
    """Raise an UnusualError if a layer's forward has to be PEFT's at present."""
    binding = layer.__dict__.get(SLOT)
    reason = Reason.DETACHED if binding is None else why_uncached(layer, binding)
    if reason is not None:
        raise UnusualError(reason.value, reason)


def _stack(layer: Any) -> Iterator[Any]:
    """Yield a tuner layer and those that it wraps."""
    while isinstance(layer, BaseTunerLayer):
        yield layer
        layer = layer._modules["base_layer"]


def is_plain(layer: Any) -> bool:
    """Whether a tuner layer's forward is its base layer's: its adapters disabled, or merged."""
    state = layer.__dict__
    return bool(state["_disable_adapters"]) is not bool(state["merged_adapters"])


def warmers(
    weight: Callable[..., object], layer: Any, _: object
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Derive what each adapter needs ahead of its use; see ``Binding.warmers``."""
    for adapter in layer.lora_A:
        yield (
            adapter,
            functools.partial(derive_ahead, functools.partial(_derive, weight), layer, adapter),
        )


def _derive(weight: Callable[..., object], layer: Any, adapter: str) -> None:
    gate = _gates.get(base_layer(layer))
    if gate is not None:
        with _Passage(gate, alone=False):
            weight(layer, adapter)
