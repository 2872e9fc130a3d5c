"""Libraries' own functions that write weights through ``.data``, which no version counter shows.

Each is named in :data:`WRITERS`, or in :data:`~dora_cache.lifecycle.offloading.MOVERS` if what the
weights contain stays; another is one row. Libraries are not imported for it: a function
is wrapped when its module is imported, and unwrapped when the last cache detaches.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.abc import MetaPathFinder
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from dora_cache.core.moved import contents
from dora_cache.lifecycle.followers import Followers, wrap
from dora_cache.lifecycle.offloading import MOVERS, Mover

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import ExitStack
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from dora_cache.core.engine import Engine

__all__ = ["WRITERS", "Writer", "follow_writers", "look_again"]


class Writer(NamedTuple):
    """Methods that write weights.

    Attributes:
        module: the name of the module that has the class.
        owner: the class.
        methods: their names.
        written: called with a method's arguments after it; returns what it may have written to:
            tensors, and modules for all their parameters and buffers; None counts as nothing.
    """

    module: str
    owner: str
    methods: tuple[str, ...]
    written: Callable[..., Iterable[Tensor | nn.Module | None]]

    def wrapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return what takes a method's place."""
        return _followed(self, original)


def _parameters(_: Any, parameters: Iterable[Tensor]) -> Iterable[Tensor]:
    return parameters


def _both(ema: Any, *_: object, **__: object) -> tuple[nn.Module, nn.Module]:
    return ema.ema_model, ema.model


def _average(callback: Any, _: object, current: Any) -> tuple[nn.Module, nn.Module]:
    return callback._average_model, current


def _merged(adapter: Any, *_: object, **__: object) -> tuple[nn.Module, nn.Module]:
    return adapter.org_module[0], adapter


_COPIES = ("copy_params_from_model_to_ema", "copy_params_from_ema_to_model")
_LIGHTNING = ("on_train_end", "on_validation_epoch_start", "on_validation_epoch_end")

WRITERS = (
    Writer("diffusers.training_utils", "EMAModel", ("copy_to", "restore"), _parameters),
    Writer(
        "torch_ema.ema",
        "ExponentialMovingAverage",
        ("copy_to", "restore"),
        lambda self, parameters=None: self._get_parameters(parameters),
    ),
    Writer("ema_pytorch.ema_pytorch", "EMA", (*_COPIES, "update_moving_average"), _both),
    Writer("ema_pytorch.post_hoc_ema", "KarrasEMA", (*_COPIES, "update_moving_average"), _both),
    Writer(  # by torch._foreach_lerp_, which is not counted on CUDA
        "timm.utils.model_ema", "ModelEmaV3", ("update",), lambda self, *_, **__: [self.module]
    ),
    Writer(
        "trl.trainer.callbacks",
        "SyncRefModelCallback",
        ("sync_target_model",),
        lambda model, target_model, alpha: [target_model],  # noqa: ARG005 - TRL's names
    ),
    Writer("lightning.pytorch.callbacks.weight_averaging", "WeightAveraging", _LIGHTNING, _average),
    Writer("pytorch_lightning.callbacks.weight_averaging", "WeightAveraging", _LIGHTNING, _average),
    Writer(
        "accelerate.local_sgd",
        "LocalSGD",
        ("step", "__exit__"),
        lambda self, *_: [self.model] if self.enabled else [],
    ),
    Writer(
        "mmengine.model.averaged_model",
        "BaseAveragedModel",
        ("update_parameters",),
        lambda self, model: [self.module],  # noqa: ARG005 - MMEngine's name
    ),
    Writer(  # into the local tensors of sharded ones, whose versions nothing shares
        "torch.distributed.checkpoint.default_planner",
        "DefaultLoadPlanner",
        ("commit_tensor",),
        lambda self, read_item, tensor: [tensor],  # noqa: ARG005 - PyTorch's names
    ),
    Writer(
        "mmengine.hooks.ema_hook",
        "EMAHook",
        (
            "after_train_iter",
            "before_val_epoch",
            "after_val_epoch",
            "before_test_epoch",
            "after_test_epoch",
        ),
        lambda self, *_, **__: [self.src_model, self.ema_model],
    ),
    Writer(  # of any network that is applied to the model, attached or not
        "lycoris.modules.base",
        "LycorisBaseModule",
        ("merge_to", "onfly_merge", "onfly_restore"),
        _merged,
    ),
)
"""The methods that are followed; of static ones, ``written`` takes no ``self``."""

_waiting: list[Writer | Mover] = [*WRITERS, *MOVERS]  # for their modules to be imported


def follow_writers(cache: Engine) -> None:
    """Void what is derived from weights that the functions in the table write, until detaching."""
    _followers.add(cache)


def look_again() -> None:
    """Wrap what has been imported since; for where a library's use may have begun."""
    for writer in _waiting:
        if writer.module in sys.modules:
            _followers.again()
            break


class _Imports(MetaPathFinder):
    """Has the functions of a library wrapped as soon as it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module as the other finders do; look again once it has run."""
        if not any(writer.module == fullname for writer in _waiting):
            return None
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(fullname, path, target)
            if spec is not None:
                with suppress(AttributeError):  # a loader of another kind: see look_again()
                    _run_and_look(spec.loader)
                return spec
        return None


def _run_and_look(loader: Any) -> None:
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        look_again()

    loader.exec_module = exec_module


def _stop(imports: _Imports) -> None:
    with suppress(ValueError):  # somebody else has removed it
        sys.meta_path.remove(imports)


def _begin(undo: ExitStack) -> None:
    undo.callback(contents.clear)  # nobody follows them then
    if not any(isinstance(finder, _Imports) for finder in sys.meta_path):
        imports = _Imports()
        sys.meta_path.insert(0, imports)
        undo.callback(_stop, imports)
    for writer in list(_waiting):
        try:
            owner = attrgetter(writer.owner)(sys.modules[writer.module])
        except (KeyError, AttributeError):  # not imported, or not as far as that yet
            continue
        _waiting.remove(writer)
        undo.callback(_waiting.append, writer)
        for name in writer.methods:
            wrap(undo, owner, name, writer.wrapped)


_followers = Followers(_begin)


def _followed(writer: Writer, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def write(*args: Any, **kwargs: Any) -> Any:
        # model.parameters() can be gone through once only.
        args = tuple(_kept(one) for one in args)
        kwargs = {name: _kept(one) for name, one in kwargs.items()}
        try:
            return original(*args, **kwargs)
        finally:
            _void(writer, args, kwargs)

    return write


def _kept(argument: Any) -> Any:
    return list(argument) if isinstance(argument, Iterator) else argument


def _void(writer: Writer, args: Any, kwargs: Any) -> None:
    try:
        written = list(writer.written(*args, **kwargs))
        tensors = [tensor for one in written if one is not None for tensor in _tensors(one)]
    except Exception:  # noqa: BLE001 - another version of the library: anything may be written
        for cache in _followers:
            cache.invalidate()
        return
    for cache in _followers:
        cache.touched(tensors)


def _tensors(written: Tensor | nn.Module) -> list[Tensor]:
    if isinstance(written, nn.Module):
        return [*written.parameters(), *written.buffers()]
    return [written]
