"""Weights that accelerate and diffusers bring anew for each forward, and the hooks that do it.

Neither library is imported here: their hooks are known by name, and their functions are wrapped
once they have been imported (see ``writers.py``).

Where a library exchanges a tensor's data, :mod:`dora_cache.core.moved` follows the content. Where
the content comes from a master copy, what is compared is the master's:

- accelerate's ``AlignDevicesHook`` keeps tensors by name in ``weights_map``, or reads them from a
  file at each forward;
- diffusers' groups keep tensors in ``cpu_param_dict`` if they use streams, or read a file.

Of a file its path, identity, size and times are compared. Every write through the file system
changes these, unless it comes within the same tick of the clock as the last write before the file
was looked at; so a file is not trusted until it has been left alone for longer than that. Writes
through a shared mapping of the file are as those through another tensor over a weight's memory:
PyTorch does not count these, nor the file system each of those. ``guard="content"`` sees both.
"""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
from collections import OrderedDict
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dora_cache import ambient
from dora_cache.core import moved
from dora_cache.core.facts import Elsewhere, UncheckableError
from dora_cache.core.keys import UnkeyableError, freeze
from dora_cache.core.moved import NOTHING, let_go, moving, new_content, put
from dora_cache.core.weak import Held
from dora_cache.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator

__all__ = [
    "MOVERS",
    "Mover",
    "bring",
    "is_bare",
    "is_offloaded",
    "only_moves",
    "rebind",
    "stays_in_place",
    "weights_in_place",
]

_ACCELERATE = "accelerate.hooks"
_GROUPS = "diffusers.hooks.group_offloading"
_CASTING = "diffusers.hooks.layerwise_casting"
_FORWARDS = {
    (_ACCELERATE, "add_hook_to_module.<locals>.new_forward"): "accelerate",
    (
        "diffusers.hooks.hooks",
        "HookRegistry.register_hook.<locals>.create_new_forward.<locals>.new_forward",
    ): "diffusers",
}
_MOVING = {
    (_ACCELERATE, "ModelHook"),
    (_ACCELERATE, "AlignDevicesHook"),
    (_ACCELERATE, "CpuOffload"),
    (_ACCELERATE, "LayerwiseCastingHook"),
    (_GROUPS, "GroupOffloadingHook"),
    (_GROUPS, "LazyPrefetchGroupOffloadingHook"),
    (_GROUPS, "LayerExecutionTrackerHook"),
    (_CASTING, "LayerwiseCastingHook"),
    (_CASTING, "PeftInputAutocastDisableHook"),
}
"""Hooks that move or cast weights, inputs and outputs, and do nothing else."""

_OF_HOOKS = {"pre_forward", "post_forward", "new_forward"}


def _name(kind: Any) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


# Hooks


def _hooks_on(module: nn.Module) -> list[Any] | None:
    """Return the hooks in a module's ``forward``, outermost first; None if there is more to it."""
    state: Any = module.__dict__
    forward = state.get("forward")
    found: list[Any] = []
    while forward is not None:
        if type(forward) is MethodType:
            own: Any = type(module).forward
            return found if forward.__self__ is module and forward.__func__ is own else None
        way = _way(forward, module)
        if way == "accelerate":
            found += _flat(state.get("_hf_hook"))
            forward = state.get("_old_forward")
        elif way == "diffusers":
            reference = _reference(forward)
            hooks = state["_diffusers_hook"].hooks.values() if "_diffusers_hook" in state else ()
            hook = next((one for one in hooks if one.fn_ref is reference), None)
            if hook is None or getattr(reference.pre_forward, "__self__", None) is not hook:
                return None
            found.append(hook)
            forward = reference.original_forward or reference.forward
        else:
            return None
    return found


def _way(forward: Any, module: nn.Module) -> str | None:
    """Name the library that has made a ``forward``; None if it is another one's."""
    if (
        type(forward) is not functools.partial
        or type(forward.func) is not FunctionType
        or len(forward.args) != 1
        or forward.args[0] is not module
        or forward.keywords
    ):
        return None
    return _FORWARDS.get(_name(forward.func))


def _reference(forward: Any) -> Any:
    """Return what diffusers keeps of the functions that one of its forwards calls."""
    cells = zip(forward.func.__code__.co_freevars, forward.func.__closure__ or (), strict=True)
    return next(cell.cell_contents for name, cell in cells if name == "function_reference")


def _flat(hook: Any) -> list[Any]:
    if hook is None:
        return []
    if _name(type(hook)) == (_ACCELERATE, "SequentialHook"):
        return [one for part in hook.hooks for one in _flat(part)]
    return [hook]


def only_moves(module: nn.Module) -> bool:
    """Whether calling a module is its class's forward, but for moves and casts around it."""
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    hooks = _hooks_on(module)
    return hooks is not None and all(
        _name(type(hook)) in _MOVING and vars(hook).keys().isdisjoint(_OF_HOOKS) for hook in hooks
    )


def stays_in_place(module: nn.Module) -> bool:
    """Whether a module's hooks move nothing but inputs and outputs, if there are any."""
    hooks = _hooks_on(module)
    return hooks is not None and all(
        _name(type(hook)) in {(_ACCELERATE, "ModelHook"), (_ACCELERATE, "AlignDevicesHook")}
        and not getattr(hook, "offload", False)
        for hook in hooks
    )


def is_bare(module: nn.Module) -> bool:
    """Whether a module's ``forward`` is its class's, if need be set on it once more.

    accelerate leaves it so when it removes a hook.
    """
    return "forward" not in module.__dict__ or _hooks_on(module) == []


def rebind(module: nn.Module, old: object, new: Callable[..., Any]) -> None:
    """Have what hooks call as the forward of a module's class call another function.

    Args:
        module: the module.
        old: the function that is called.
        new: what to call instead.
    """
    state: Any = module.__dict__

    def is_old(forward: object) -> bool:
        return (
            type(forward) is MethodType and forward.__self__ is module and forward.__func__ is old
        )

    for name in ("forward", "_old_forward"):
        if is_old(state.get(name)):
            state[name] = MethodType(new, module)
    for reference in getattr(state.get("_diffusers_hook"), "_fn_refs", ()):
        for name in ("forward", "original_forward"):
            if is_old(getattr(reference, name)):
                setattr(reference, name, MethodType(new, module))


# Weights that are in place for a forward alone


def _group_of(module: nn.Module) -> Any:
    """Return the group that a module's own hook brings the weights of, or None."""
    registry = module.__dict__.get("_diffusers_hook")
    hook = None if registry is None else registry.get_hook("group_offloading")
    if hook is None or _name(type(hook)) != (_GROUPS, "GroupOffloadingHook"):
        return None
    group = hook.group
    own = module in group.modules or any(
        one is other for one in module._parameters.values() for other in group.parameters
    )
    return group if own else None


def _aligning(module: nn.Module) -> Any:
    """Return the hook of accelerate's that brings a module's weights, or None."""
    for hook in _flat(module.__dict__.get("_hf_hook")):
        if _name(type(hook)) == (_ACCELERATE, "AlignDevicesHook") and hook.offload:
            return hook
    return None


def is_offloaded(module: nn.Module) -> bool:
    """Whether hooks of the module itself bring its weights, so that these need not be there."""
    return _aligning(module) is not None or _group_of(module) is not None


@contextmanager
def bring(*modules: nn.Module) -> Iterator[None]:
    """Have offloaded weights of modules in place within the block; others are left as they are."""
    with ExitStack() as undo:
        for module in modules:
            parameters = [one for one in module._parameters.values() if one is not None]
            group = _group_of(module)
            if group is not None:
                if not _is_onloaded(group):
                    undo.callback(group.offload_)
                    group.onload_()
                    if group.stream is not None:
                        group.stream.synchronize()
            elif any(one.is_meta for one in parameters) and _aligning(module) is not None:
                hook: Any = module._hf_hook
                undo.callback(hook.post_forward, module, None)
                hook.pre_forward(module)
        yield


def weights_in_place(module: nn.Module, names: Iterable[str] | None = None) -> list[Any]:
    """Return what to compare in the place of a module's own parameters, which may be offloaded.

    Args:
        module: the module.
        names: of the parameters; None for all.

    Raises:
        UncheckableError: it cannot be told what a parameter will contain.
    """
    found: list[Any] = []
    for name in module._parameters if names is None else names:
        parameter = module._parameters[name]
        if parameter is None or not parameter.is_meta:
            if parameter is not None and _group_of(module) is not None:
                found += _of_group(_group_of(module), parameter)
            else:
                found.append(parameter)
            continue
        hook = _aligning(module)
        if hook is None:  # a model that is planned on the meta device
            found.append(parameter)
            continue
        # It will be cast to the dtype that it has here.
        found += [_master(hook.weights_map, name), parameter.dtype, str(hook.execution_device)]
    return found


def _master(mapping: Any, name: str) -> Tensor | Elsewhere:
    """Return the tensor that a weights_map has by a name, or what stands for a file."""
    kind = type(mapping)
    if kind is dict or kind is OrderedDict:
        if isinstance(mapping.get(name), Tensor):
            return mapping[name]
    elif _name(kind) == ("accelerate.utils.offload", "PrefixedDataset"):
        return _master(mapping.dataset, f"{mapping.prefix}{name}")
    elif _name(kind) == ("accelerate.utils.offload", "OffloadedWeightsLoader"):
        if name in mapping.state_dict:
            return _master(dict(mapping.state_dict), name)
        info = mapping.index.get(name)
        if isinstance(info, dict):
            path = info.get("safetensors_file") or os.path.join(  # noqa: PTH118 - as given
                mapping.save_folder, f"{name}.dat"
            )
            facts = (path, _file(path), _frozen(sorted(info.items())), str(mapping.device))
            return Elsewhere(facts, lambda: mapping[name])
    msg = f"{name!r} comes from a {kind.__name__}"
    raise UncheckableError(msg, Reason.OFFLOADED)


def _frozen(value: object) -> Hashable:
    try:
        return freeze(value, [])
    except (TypeError, UnkeyableError) as error:
        raise UncheckableError(str(error), Reason.OFFLOADED) from None


_TICK = 50_000_000  # nanoseconds: clocks of file systems tick at least a hundred times a second
_COARSE = 2_500_000_000  # where times are kept in whole or even seconds


def _file(path: str) -> tuple[int, ...]:
    """Return what tells whether a file has been written.

    Raises:
        UncheckableError: it is not there, or was written a moment ago.
    """
    try:
        found = os.stat(path)  # noqa: PTH116 - at each forward
    except OSError as error:
        raise UncheckableError(str(error), Reason.OFFLOADED) from None
    written = max(found.st_mtime_ns, found.st_ctime_ns)
    tick = _COARSE if written % 1_000_000_000 == 0 else _TICK
    if time.time_ns() - written < tick:
        msg = f"{path} was written a moment ago"
        raise UncheckableError(msg, Reason.OFFLOADED)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


# What comes from a master copy


class _Origin(NamedTuple):
    """What a content was last brought from.

    Attributes:
        facts: of the master.
        held: keeps the number of the master's storage from being used again.
        number: of the content.
    """

    facts: Hashable
    held: Held | None
    number: int


class _Origins:
    """The contents that a hook, or a group of diffusers', brings: one for each name or tensor."""

    def __init__(self) -> None:
        self.known: dict[Hashable, _Origin] = {}
        self.onloaded: bool | None = None
        self.aliases: dict[int, tuple[int, int]] = {}

    def number_of(self, name: Hashable, master: Tensor | Elsewhere) -> int:
        """Return the number of what a master copy contains."""
        held = None
        facts: Hashable
        if isinstance(master, Tensor):
            try:
                storage = ambient.storage_of(master)
                facts = (id(master), master._version, storage, master.data_ptr(), master.dtype)
                held = Held(master.untyped_storage())  # type: ignore[no-untyped-call]
            except (RuntimeError, NotImplementedError):
                return new_content()
        else:
            facts = master.facts
        known = self.known.get(name)
        if known is None or known.facts != facts:
            known = self.known[name] = _Origin(facts, held, new_content())
        return known.number

    def number_or_new(self, name: Hashable, master: Callable[[], Tensor | Elsewhere]) -> int:
        """Return the number of what a master copy contains; a new one if it cannot be compared."""
        try:
            return self.number_of(name, master())
        except UncheckableError:
            self.known.pop(name, None)
            return new_content()


_origins: weakref.WeakKeyDictionary[Any, _Origins] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _origins_of(bringer: Any) -> _Origins:
    with _lock:
        found = _origins.get(bringer)
        if found is None:
            found = _origins[bringer] = _Origins()
        return found


# Wrappers


def _bringing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``AlignDevicesHook.pre_forward``."""

    @functools.wraps(original)
    def pre_forward(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.offload:
            return original(self, module, *args, **kwargs)
        before = _numbers(self, module)
        result = original(self, module, *args, **kwargs)
        after = _numbers(self, module)
        for name, tensor in _tensors_in(self, module):
            if not tensor.is_meta:
                same = name in before and before[name] == after[name]
                put(tensor, after[name] if same else new_content())
        return result

    return pre_forward


def _taking(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``AlignDevicesHook.post_forward``."""

    @functools.wraps(original)
    def post_forward(self: Any, module: nn.Module, output: Any) -> Any:
        if self.offload:
            let_go(tensor for _, tensor in _tensors_in(self, module))
        return original(self, module, output)

    return post_forward


def _tensors_in(hook: Any, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=hook.place_submodules)
    if hook.offload_buffers:
        yield from module.named_buffers(recurse=hook.place_submodules)


def _numbers(hook: Any, module: nn.Module) -> dict[str, int]:
    """Return the numbers of the contents that a hook brings."""
    origins, weights = _origins_of(hook), hook.weights_map
    return {
        name: origins.number_or_new((name, tensor.dtype), functools.partial(_master, weights, name))
        for name, tensor in _tensors_in(hook, module)
    }


def _onloading(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``ModuleGroup.onload_``."""
    return _exchanging(original, onload=True)


def _offloading(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``ModuleGroup.offload_``."""
    return _exchanging(original, onload=False)


def _exchanging(original: Callable[..., Any], *, onload: bool) -> Callable[..., Any]:
    @functools.wraps(original)
    def exchange(self: Any) -> Any:
        tensors = list(dict.fromkeys(_tensors_of(self)))
        origins = _origins_of(self)
        if self.offload_to_disk_path is not None:
            exchanged: Any = _from_file(self, tensors, origins, onload=onload)
        elif self.stream is not None:
            exchanged = _from_copies(self, tensors, origins)
        else:
            exchanged = moving(lambda: tensors)
        origins.onloaded = None
        with exchanged:
            result = original(self)
        origins.onloaded = onload
        return result

    return exchange


def _tensors_of(group: Any) -> Iterator[Tensor]:
    if group.offload_to_disk_path is not None:
        yield from group.tensor_to_key
        return
    for module in group.modules:
        yield from module.parameters()
        yield from module.buffers()
    yield from group.parameters
    yield from group.buffers


@contextmanager
def _from_file(
    group: Any, tensors: list[Tensor], origins: _Origins, *, onload: bool
) -> Iterator[None]:
    let_go(tensors)
    before = _file_or_none(group) if onload else None
    yield
    if not onload:
        for tensor in tensors:  # memory that nothing has been written to
            put(tensor, NOTHING)
        return
    same = before is not None and _file_or_none(group) == before
    for tensor in tensors:
        key = group.tensor_to_key[tensor]
        if same:
            put(tensor, origins.number_of(key, _of_file(before, tensor)))
        else:
            origins.known.pop(key, None)


def _file_or_none(group: Any) -> Hashable:
    try:
        return (group.safetensors_file_path, _file(group.safetensors_file_path))
    except UncheckableError:
        return None


def _of_file(facts: Hashable, tensor: Tensor) -> Elsewhere:
    return Elsewhere((facts, tensor.dtype), lambda: tensor)


@contextmanager
def _from_copies(group: Any, tensors: list[Tensor], origins: _Origins) -> Iterator[None]:
    """Follow data that is fetched from copies in host memory, and left there for them."""
    masters = group.cpu_param_dict
    for tensor in tensors:
        # Written while it lay over the copy: then the copy was written, which has not counted it.
        if _over(tensor, masters.get(tensor)) and origins.aliases.get(id(tensor)) != _mark(tensor):
            origins.known.pop(id(tensor), None)
    let_go(tensors)
    yield
    origins.aliases = {}
    for tensor in tensors:
        master = masters.get(tensor)
        if master is not None:
            put(tensor, origins.number_or_new(id(tensor), functools.partial(_same, master)))
            if _over(tensor, master):
                origins.aliases[id(tensor)] = _mark(tensor)


def _same(master: Tensor) -> Tensor:
    return master


def _mark(tensor: Tensor) -> tuple[int, int]:
    return tensor._version, tensor.data_ptr()


def _over(tensor: Tensor, master: Tensor | None) -> bool:
    try:
        return master is not None and tensor.data_ptr() == master.data_ptr()
    except (RuntimeError, NotImplementedError):
        return False


def _is_onloaded(group: Any) -> bool:
    """Whether a group's weights are in place."""
    known = _origins_of(group).onloaded
    if known is not None:
        return known
    if group.offload_to_disk_path is not None:
        return False
    return all(tensor.device == group.onload_device for tensor in _tensors_of(group))


def _of_group(group: Any, parameter: Tensor) -> list[Any]:
    """Return what to compare in the place of a parameter that a group's hook brings."""
    if group.offload_to_disk_path is None:
        _follow(group, parameter)
    if group.offload_to_disk_path is None or _is_onloaded(group):
        return [parameter]
    path, key = group.safetensors_file_path, group.tensor_to_key.get(parameter)
    if key is None:
        msg = "the parameter is not the one that was written to the file"
        raise UncheckableError(msg, Reason.OFFLOADED)
    facts = (path, _file(path), key, parameter.dtype)
    return [Elsewhere(facts, functools.partial(_load, path, key)), str(group.onload_device)]


def _follow(group: Any, parameter: Tensor) -> None:
    """Follow a parameter that no move has been seen of, so that the first one keeps its number."""
    if moved.is_known(parameter):
        return
    number, master = new_content(), group.cpu_param_dict.get(parameter)
    if _over(parameter, master):
        origins = _origins_of(group)
        if origins.aliases.get(id(parameter)) != _mark(parameter):
            origins.known.pop(id(parameter), None)
        number = origins.number_or_new(id(parameter), functools.partial(_same, master))
        origins.aliases[id(parameter)] = _mark(parameter)
    put(parameter, number)


def _load(path: str, key: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
        return tensor


def _moving_or_casting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``nn.Module.to``, which other hooks call; once for both libraries."""
    if original in _wrappers:
        return original

    @functools.wraps(original)
    def to(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # What has been followed is followed on: pipelines move their models without the hooks too.
        if not (moved.contents or _calls_to(self)) or torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        with moving(functools.partial(_weights_of, self)):
            return original(self, *args, **kwargs)

    _wrappers.add(to)
    return to


def _weights_of(module: nn.Module) -> Iterator[Tensor]:
    """Yield parameters and buffers, which ``to`` replaces; each in all of its places."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            yield from [tensor for tensor in tensors.values() if tensor is not None]


_wrappers: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()


def _calls_to(module: nn.Module) -> bool:
    """Whether a module has a hook that calls its ``to``."""
    registry = module.__dict__.get("_diffusers_hook")
    if registry is not None and registry.get_hook("layerwise_casting") is not None:
        return True
    return any(
        _name(type(hook)) in {(_ACCELERATE, "CpuOffload"), (_ACCELERATE, "LayerwiseCastingHook")}
        for hook in _flat(module.__dict__.get("_hf_hook"))
    )


class Mover(NamedTuple):
    """Methods that exchange weights' data, and how they are wrapped.

    Attributes:
        module: the name of the module after whose import they are wrapped.
        owner: the class, as a path from there.
        methods: their names.
        wrapped: called with a method; returns what takes its place.
    """

    module: str
    owner: str
    methods: tuple[str, ...]
    wrapped: Callable[[Callable[..., Any]], Callable[..., Any]]


MOVERS = (
    Mover(_ACCELERATE, "AlignDevicesHook", ("pre_forward",), _bringing),
    Mover(_ACCELERATE, "AlignDevicesHook", ("post_forward",), _taking),
    Mover(_ACCELERATE, "nn.Module", ("to",), _moving_or_casting),
    Mover(_GROUPS, "ModuleGroup", ("onload_",), _onloading),
    Mover(_GROUPS, "ModuleGroup", ("offload_",), _offloading),
    Mover(_CASTING, "torch.nn.Module", ("to",), _moving_or_casting),
)
