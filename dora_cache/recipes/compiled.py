"""What compiled code runs and reads: derived values at fixed addresses, filled ahead of its use.

Compiled code cannot look anything up. It reads tensors, and its guards are checked before each
call. Guards on names and numbers would have each adapter compiled anew. So recipes' forwards are
traced with a view in a layer's place (:mod:`dora_cache.recipes.views`), which has the layer's
active adapters under names that are the same for all, and scalings as tensors. The view, and the
values that were derived for its adapters, are attributes of a :class:`Face`, which a
:class:`dora_cache.recipes.holder.Holder` sets. Compiled code guards on their types, shapes and
dtypes; events change what they are.

- ``torch.compile`` runs :func:`_prepare` and :func:`_slot` as ordinary code while a layer is
  traced, and takes what they return for constants. The first brings views up to date. The second
  derives the value that a forward asks for, for all layers of the same form: blocks that are
  compiled one by one share their code, so no guard may tell one layer from another.
- Events that void stored values take the tensors out and fill them again at the same addresses,
  without a recompilation. Another active adapter's values are at other addresses.
- What raises no event is noticed where compiled code is entered: see
  :mod:`dora_cache.recipes.entry`.
- Where that cannot be done at once, there is None in their place. Then a guard fails, the layer is
  traced again, and tracing fills it: at worst compiled code costs a recompilation, never a wrong
  number.
- A value that cannot be kept (for lack of room, or since nothing tells when it changes) is derived
  in the graph: by an operator of its own, which runs the very function at each call.
- Compiled code uses a view only while the parameters in it are those that it was made of, the very
  objects. So it notices by itself if others are put in their place, for the duration of a
  ``functional_call`` for example; also if that is part of what is traced.
"""

from __future__ import annotations

import functools
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dora_cache.ambient import untraceable
from dora_cache.attributes import FACE
from dora_cache.core.facts import UncheckableError
from dora_cache.reasons import Reason
from dora_cache.recipes.dynamo import entry_guards_work, is_freezing, traced_writes_show
from dora_cache.recipes.entry import LayerKey, enter
from dora_cache.recipes.numbered import TracedCall, numbered

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    from dora_cache.core.decorator import Derivation
    from dora_cache.core.engine import Engine

__all__ = ["Face", "face_of", "noted", "opaque", "view_of", "viewed"]

_NO_GUARDS = (
    "this version of PyTorch has no guards that call a function. It derives the values itself. "
    "With compiled_check=False it reads stored ones, and you call refresh() after writes to weights"
)
_NO_EFFECTS = "this version of PyTorch does not tell what compiled code writes while it is traced"
_CHECKED, _UNCHECKED = 1, 2
_prepared: weakref.WeakKeyDictionary[Engine, weakref.ref[Any]] = weakref.WeakKeyDictionary()
_traced: weakref.WeakKeyDictionary[Engine, weakref.ref[Any]] = weakref.WeakKeyDictionary()
"""By cache, the holder of the layer that has been looked at last, and is traced."""


class Face(nn.Module):
    """What compiled code looks at of a layer, beside the model's own modules.

    It has little, and all of it in one dictionary: TorchDynamo skips the guards of tensors and
    plain values in a dictionary that has not changed. Tensors are parameters: those are not
    compared with all others at each call. It copies and pickles as None.

    The values of cached calls are attributes: of call 5 it is ``v5``, or ``v5_0``, ``v5_1``, ... if
    there are several. ``v5`` is None while there are none. Others are what recipes remark.

    A layer has one, and its view another in place of a binding: an object that is reached in two
    ways is compared with itself at each call, at some cost.

    Attributes:
        key: what is traced passes it to :func:`_prepare`: in a tuple, since TorchDynamo guards a
            bare argument by its identity.
        form: a number that stands for all of the view but contents, names and scalings; 0 while
            there is no view.
        own: without the check at entry, tables with parameters and buffers, names in them, and what
            the view has been made of.
        view: stands for the layer; None while it cannot.
        handle: a number that stands for the holder, as a tensor: no guard is on its value.
        tensors: the parameters and buffers in the view that have a place.
    """

    def __init__(self, key: LayerKey, number: int) -> None:
        super().__init__()
        self.training = False
        self.key = (key,)
        self.form = 0
        self.own: tuple[tuple[Mapping[Any, Any], Hashable, object], ...] = ()
        self.__dict__["view"] = None  # no submodule
        self.handle = torch.tensor(number, device="cpu")
        self.tensors: tuple[Tensor, ...] = ()

    def __reduce_ex__(self, protocol: object) -> tuple[Callable[[], None], tuple[()]]:
        return type(None), ()

    @property
    def reader(self) -> Face:
        """Itself: cached functions find it in a view, in place of a layer's binding."""
        return self

    def read(self, derivation: Derivation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the value of a call whose owner is the view; ``torch.compile`` traces this."""
        return self.value(derivation, *args[1:], **kwargs)

    def value(self, derivation: Derivation, *args: Any, **kwargs: Any) -> Any:
        """Return the value of a call; ``torch.compile`` traces this.

        Args:
            derivation: of the function.
            args: its arguments without the view.
            kwargs: keyword arguments.
        """
        form = self.form
        reason = None
        if torch.is_autocast_enabled(_device_of(form)):
            reason = Reason.AUTOCAST
        elif torch.is_grad_enabled() and not derivation.detach and self.wants_gradients():
            reason = Reason.GRADIENTS
        if reason is not None:
            self.passed_by(reason)
            return derivation.derive((self.__dict__["view"], *args), kwargs)
        slot, count = _slot(form, derivation.number, args, tuple(kwargs.items()))
        if not slot:
            raise UncheckableError("the value cannot be derived")
        values = getattr(self, f"v{slot}")
        if values is None:
            found = torch.ops.dora_cache.derive(self.handle, form, slot)
            return tuple(found) if count else found[0]
        if not count:
            return values
        return tuple([getattr(self, f"v{slot}_{number}") for number in range(count)])

    def passed_by(self, reason: Reason) -> None:
        """Count a value that the code derives itself; ``torch.compile`` traces this."""
        _passed_by(self.form, reason)

    def wants_gradients(self) -> bool:
        """Whether a tensor of the view requires a gradient."""
        return any([tensor.requires_grad for tensor in self.tensors])  # noqa: C419 - it is traced


def face_of(layer: Any) -> Face | None:
    """Return what compiled code is to read of a layer; None if it has to run the layer's own code.

    ``torch.compile`` traces this, and guards what is looked at, for each layer and at each call: so
    it is little.
    """
    face: Face | None = getattr(layer, FACE, None)  # None in a copy
    if face is None or torch.compiler._is_exporting_flag:
        return None
    prepared = _prepare(face.key)
    if not prepared or not _is_form(face.form):
        return None
    if prepared == _UNCHECKED:
        for table, name, tensor in face.own:
            if table.get(name) is not tensor:
                return None
    return face


def view_of(layer: Any) -> Any:
    """Return what a recipe's forward is to be traced with in a layer's place, or None.

    See :func:`face_of`.
    """
    face = face_of(layer)
    return None if face is None else face.__dict__["view"]


@functools.cache
def viewed(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that is traced with a layer's view in its place.

    Args:
        plain: the forward of the layer's class.
    """

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            view = view_of(self)
            if view is not None:
                with suppress(UncheckableError):
                    return plain(view, *args, **kwargs)
        return plain(self, *args, **kwargs)

    return forward


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_form(form: int) -> bool:
    """Have compiled code be for this form alone; runs while a layer is traced."""
    return form in numbered.notes


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def noted(form: int) -> Any:
    """Return what :attr:`Holder.remark` said of views of a form; runs while a layer is traced."""
    return numbered.notes[form][-1]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _device_of(form: int) -> str:
    """Return the type of the device of layers of a form; runs while a layer is traced."""
    return numbered.notes[form][1]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _passed_by(form: int, reason: Reason) -> bool:
    """Count a call that goes past the cache; runs while a layer is traced.

    Args:
        form: of the layer's view.
        reason: why.
    """
    living = numbered.notes[form][0]()
    holder = None if living is None else _traced.get(living, lambda: None)()
    if living is not None and holder is not None:
        living.passed_by(reason, holder.binding)
    return True


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _prepare(keys: tuple[LayerKey]) -> int:
    """Bring all of a model's views up to date; runs while a layer is traced.

    Args:
        keys: the layer's key.

    Returns:
        0 if the layer's own code has to be traced; else whether the code checks the layer.
    """
    (key,) = keys
    holder = key.holder
    living = None if holder is None else holder.engine
    if living is None or holder is None or untraceable():
        return 0
    _traced[living] = weakref.ref(holder)
    why = None if traced_writes_show() else _NO_EFFECTS
    if key.checks and not entry_guards_work():
        why = _NO_GUARDS
    if why is not None:
        living.decline("compiled code", "every layer", why)
        with living.mutex.held():
            for one in living.buffers.holders():
                one.close()
        return 0
    if is_freezing():
        living.passed_by(Reason.FROZEN, holder.binding)
        return 0
    context = torch._guards.CompileContext.try_get()
    done = _prepared.get(living, lambda: None)()
    if context is None or done is not context:
        if context is not None:
            _prepared[living] = weakref.ref(context)
        for one in living.buffers.holders():
            one.used = True
            one.update(traced=True)
    if holder.written():
        living.passed_by(Reason.WRITTEN, holder.binding)
        return 0
    if not key.checks:
        return _UNCHECKED
    enter(living, holder)
    return _CHECKED


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _slot(
    form: int, number: int, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]
) -> tuple[int, int]:
    """Fill the value of a call for all layers of a form; runs while a layer is traced.

    Returns:
        The call's number, 0 if the value cannot be derived; and how many tensors the value has, 0
        if it is a tensor and no tuple.
    """
    living = numbered.notes[form][0]()
    if living is None:
        return 0, 0
    call = numbered.number(numbered.calls, TracedCall(number, args, kwargs))
    wanted = living.buffers.wanted.setdefault(form, {})
    holders = [one for one in living.buffers.holders() if one.form == form]
    if call not in wanted:
        wanted[call] = None
        for holder in holders:
            holder.want(call)
            holder.watched()
    outputs = numbered.outputs.get((form, call))
    if outputs is None:
        outputs = next((found for one in holders if (found := one.describe(call))), None)
        if outputs is None:
            return 0, 0
        numbered.outputs[form, call] = outputs
    return call, 0 if outputs[-1][0] else len(outputs) - 1


# Derived in the graph

_library = torch.library.Library("dora_cache", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("derive(Tensor handle, int form, int call) -> Tensor[]")  # type: ignore[no-untyped-call]


def _derive(handle: Tensor, _: int, call: int) -> list[Tensor]:
    holder = numbered.holders.get(int(handle))
    if holder is None:
        msg = "compiled code runs a layer that is gone"
        raise RuntimeError(msg)
    return holder.derive(call)


def _derive_fake(handle: Tensor, form: int, call: int) -> list[Tensor]:
    del handle
    return [
        torch.empty_strided(size, stride, dtype=dtype, device=device)
        for size, stride, dtype, device in numbered.outputs[form, call][:-1]
    ]


_library.impl("derive", _derive, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("dora_cache::derive", _derive_fake, lib=_library)


def opaque(
    signature: str, function: Callable[..., Tensor], like: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Return a function whose operations compiled code calls, and does not look into.

    Args:
        signature: the operator's name, arguments and result, as
            :meth:`torch.library.Library.define` takes them.
        function: what it does, for inference; the result is contiguous.
        like: called likewise; returns an empty tensor like the result.
    """
    name = signature.partition("(")[0]
    _library.define(signature)  # type: ignore[no-untyped-call]
    _library.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"dora_cache::{name}", like, lib=_library)
    operator: Any = getattr(torch.ops.dora_cache, name)

    def call(*args: Any) -> Tensor:
        found: Tensor = (operator if torch.compiler.is_dynamo_compiling() else function)(*args)
        return found

    return call
