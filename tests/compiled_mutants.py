"""Bugs to seed in what compiled code reads: each is a way that it could get stale numbers."""

from compiled_machine import CompiledKindsMachine, UncheckedKindsMachine
from mutants import mutant
from pool_mutants import MUTANTS

from dora_cache.core.buffers import Buffers
from dora_cache.recipes import buffer as buffer_module
from dora_cache.recipes import holder as holder_module
from dora_cache.recipes.buffer import Buffer
from dora_cache.recipes.entry import Watch, _layout
from dora_cache.recipes.holder import Holder

__all__ = ["MUTANTS"]


def _checks_only(patch, *facts):
    """Have the check at entry look at some of the facts alone."""
    checks = {
        "versions": lambda one: [tensor._version for tensor in one.tensors] == one.versions,
        "addresses": lambda one: [tensor.data_ptr() for tensor in one.tensors] == one.addresses,
        "scalars": lambda one: all(
            found is item or (type(item) is list and found == item)
            for table, name, key, item in one.places
            for found in [(table if name is None else table[name])[key]]
        ),
        "layouts": lambda one: list(map(_layout, one.loose)) == one.layouts,
    }
    patch.setattr(Watch, "holds", lambda self: all(checks[fact](self) for fact in facts))


@mutant("a buffer is not refilled after an event", CompiledKindsMachine)
def _(patch):
    patch.setattr(Buffer, "void", lambda self: None)
    patch.setattr(Buffers, "refill_later", lambda self, bindings: None)


@mutant("a buffer is refilled at another address", CompiledKindsMachine, rare=True)
def _(patch):
    patch.setattr(buffer_module, "_alike", lambda ours, theirs: False)


@mutant("the wrong slot is shown after a switch", CompiledKindsMachine)
def _(patch):
    plain = Holder.show

    def show(self, buffer):
        if buffer.adapters != self.names:
            return
        alike = [one for one in self.binding.buffers.values() if one.number == buffer.number]
        first = next((one for one in alike if one.values is not None), buffer)
        adapters, first.adapters = first.adapters, self.names
        try:
            plain(self, first)
        finally:
            first.adapters = adapters

    patch.setattr(Holder, "show", show)


@mutant("the entry check ignores scalings", CompiledKindsMachine)
def _(patch):
    _checks_only(patch, "versions", "addresses", "layouts")


@mutant("the entry check ignores addresses", CompiledKindsMachine, rare=True)
def _(patch):
    _checks_only(patch, "versions", "scalars", "layouts")


@mutant("the entry check ignores versions", CompiledKindsMachine)
def _(patch):
    _checks_only(patch, "addresses", "scalars", "layouts")


@mutant("a replaced part is not noticed", CompiledKindsMachine, rare=True)
def _(patch):
    patch.setattr(Buffers, "comes", lambda self, parent, table, name, new: None)


@mutant("what changes behind the guards is ignored", CompiledKindsMachine, rare=True)
def _(patch):
    patch.setattr(holder_module, "looks_of", lambda view, *, shallow: None)


@mutant("values that were given up are shown again", UncheckedKindsMachine, rare=True)
def _(patch):
    plain = Holder.want

    def want(self, number):
        if self._surprises <= holder_module._SURPRISES:
            return plain(self, number)
        return False

    def refresh(self):
        buffers = list(self.binding.buffers.values())
        return self.update() + sum(buffer.fill() for buffer in buffers)

    patch.setattr(Holder, "want", want)
    patch.setattr(Holder, "refresh", refresh)


@mutant("parts that are yet to come are not awaited", UncheckedKindsMachine, rare=True)
def _(patch):
    patch.setattr(holder_module, "_is_pending", lambda table, name, new: False)
