"""Whether a recipe keeps its promises: equal outputs, fresh ones, no trace, nothing leaked.

Everything is done to two models made alike. One of them has a cache; the other says what is right.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import statistics
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dora_cache.attachment import attach
from dora_cache.backends.storage import storage_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dora_cache.cache import AdapterCache

__all__ = ["check_recipe"]

MakeModel = "Callable[[], tuple[Any, Any]]"


def check_recipe(
    make_model: Callable[[], tuple[Any, Any]],
    *,
    numerics: str = "peft",
    hits: bool = True,
    skip: Sequence[str] = (),
) -> None:
    """Check a recipe on a model that it is for.

    With ``numerics="peft"`` outputs are equal to the bit. With ``"fast"`` they are compared with
    the same model in float64: the error (root mean square) is at most PEFT's and half as much
    again, up to one more rounding of the outputs. That is so of the median of all comparisons; none
    is more than twice as far off. (Two ways to add up the same numbers differ by that much by
    chance, on so few of them, and on each processor otherwise.)

    Args:
        make_model: returns a PEFT model in eval mode and an input for it; equal ones at each call.
            Give it two adapters, so that switching is checked as well.
        numerics: the setting to check.
        hits: whether the recipe caches this model. If not, everything must hold all the same.
        skip: names of checks to leave out: those of the functions below, without ``check_``.

    Raises:
        AssertionError: a promise is broken; the message says which, and after what.
    """
    errors: list[float] = []
    for check in _CHECKS:
        if check.__name__.removeprefix("check_") not in skip:
            with _quiet():
                check(_Pair(make_model, numerics, hits=hits, errors=errors))
    typical = statistics.median(errors) if errors else 0.0
    assert typical <= 1, f"errors are {typical:.2f} times what they may be, in the median"


class _Pair:
    """A model with a cache and its twin without one; what is done is done to both."""

    def __init__(self, make_model: Any, numerics: str, *, hits: bool, errors: list[float]) -> None:
        self.make_model = make_model
        self.numerics = numerics
        self.hits = hits
        self.errors = errors  # each in relation to what it may be
        self.plain, self.x = self._made()
        self.model, self.same_x = self._made()
        self.adapters = list(self.plain.peft_config)
        self.cache: AdapterCache

    def _made(self) -> tuple[Any, Any]:
        torch.manual_seed(0)
        return self.make_model()

    @contextlib.contextmanager
    def attached(self, **settings: Any) -> Iterator[AdapterCache]:
        with attach(self.model, numerics=self.numerics, **settings) as self.cache:
            yield self.cache

    def do(self, what: str, act: Callable[[Any], object]) -> bool:
        """Do something to both models, and expect the same errors.

        Returns:
            Whether it could be done.
        """
        errors: list[Exception | None] = []
        for model in (self.plain, self.model):
            torch.manual_seed(0)
            try:
                act(model)
            except Exception as error:  # noqa: BLE001 - PEFT's own, compared below
                errors.append(error)
            else:
                errors.append(None)
        assert type(errors[0]) is type(errors[1]), (
            f"{what}: {errors[1]!r}, without cache {errors[0]!r}"
        )
        return errors[0] is None

    def compare(self, after: str, times: int = 2) -> None:
        """Run both models and expect the same, the second time from the cache.

        As often the one as the other: PEFT's forward may itself change weights a little.
        """
        last: tuple[Any, Any] | None = None
        for index in range(times):
            expected, found = _outcome(self.plain, self.x), _outcome(self.model, self.same_x)
            if last is not None and all(map(_equal, last, (found, expected))):
                continue  # compared already
            self.alike(found, expected, f"after {after}, forward {index + 1}")
            last = found, expected

    def alike(
        self,
        found: Tensor | Exception,
        expected: Tensor | Exception,
        where: str,
        precision: torch.dtype | None = None,
    ) -> None:
        """Compare two outcomes of a forward."""
        if isinstance(expected, Exception) or isinstance(found, Exception):
            assert type(found) is type(expected), f"{where}: {found!r}, not {expected!r}"
        else:
            self.same(found, expected, where, precision)

    def run(self) -> None:
        """Run both models, whatever comes out."""
        for model, x in ((self.plain, self.x), (self.model, self.same_x)):
            _run(model, x)

    def same(
        self,
        found: Tensor,
        expected: Tensor,
        where: str,
        precision: torch.dtype | None = None,
    ) -> None:
        assert found.dtype is expected.dtype, f"{where}: {found.dtype}, not {expected.dtype}"
        assert found.shape == expected.shape, f"{where}: {found.shape}, not {expected.shape}"
        if self.numerics == "peft":
            difference = (found.double() - expected.double()).abs().max().item()
            message = f"{where}: outputs differ by up to {difference:.3g}"
            assert torch.equal(found.nan_to_num(), expected.nan_to_num()), message
            return
        exact = self.exact()
        if exact is None or not exact.isfinite().all():
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05, equal_nan=True)
            return
        eps = torch.finfo(precision or found.dtype).eps
        rounding = eps * exact.square().mean().sqrt().item() / 2
        ours, pefts = _error(found, exact), _error(expected, exact)
        message = f"{where}: error {ours:.3g}, PEFT's {pefts:.3g}, a rounding {rounding:.3g}"
        allowed = 1.5 * pefts + rounding
        assert ours <= 2 * allowed, message
        self.errors.append(ours / allowed if allowed else 0.0)

    def exact(self) -> Tensor | None:
        """Run the twin in float64; None if PEFT cannot."""
        try:
            model = copy.deepcopy(self.plain).double()
            x = self.x.double() if self.x.is_floating_point() else self.x
            return _run(model, x)
        except Exception:  # noqa: BLE001 - some adapters do not run in float64
            return None

    def activate(self, *names: str) -> bool:
        return self.do(f"activating {names}", lambda model: _activate(model, names))


def _run(model: Any, x: Any) -> Tensor:
    with torch.no_grad():
        return _output(model, x)


def _output(model: Any, x: Any) -> Tensor:
    """Return what a model puts out; the first of several tensors, as language models' logits."""
    found: Any = model(x)
    output: Tensor = found if isinstance(found, Tensor) else found[0]
    return output


def _activate(model: Any, names: Sequence[str]) -> None:
    from peft.tuners.tuners_utils import BaseTuner

    # A model that has prompts only is its own tuner, and takes one name.
    tuner = model.base_model if isinstance(model.base_model, BaseTuner) else model
    tuner.set_adapter(list(names) if len(names) > 1 else names[0])


def _error(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact).square().mean().sqrt().item()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# The checks


def check_equality(pair: _Pair) -> None:
    """Cold, warm, warmed ahead, without gradients in every way, under autocast: equal."""
    with pair.attached() as cache:
        pair.compare("attaching", times=3)
        cache.invalidate()
        cache.warm()
        pair.compare("warm()")
        with torch.inference_mode():
            found, expected = _output(pair.model, pair.same_x), _output(pair.plain, pair.x)
        pair.same(found, expected, "under inference_mode")
        with torch.autocast("cpu", torch.bfloat16):
            for where in ("under autocast", "under autocast, again"):
                ours, pefts = _outcome(pair.model, pair.same_x), _outcome(pair.plain, pair.x)
                pair.alike(ours, pefts, where, precision=torch.bfloat16)
        pair.compare("autocast")
        with cache.bypass():
            found = _run(pair.model, pair.same_x)
        assert torch.equal(found, _run(pair.plain, pair.x)), "bypass() is not plain PEFT"
    pair.compare("detaching", times=1)


def check_hits(pair: _Pair) -> None:
    """The second forward derives nothing, and neither does the first after warm()."""
    with pair.attached() as cache:
        _run(pair.model, pair.same_x)
        first = cache.stats()
        _run(pair.model, pair.same_x)
        second = cache.stats()
        if not pair.hits:
            return
        assert first.stores > 0, f"nothing was stored: {first}, declined: {cache.declined}"
        assert second.hits > first.hits, f"the second forward has no hits: {second}"
        assert second.misses == first.misses, f"the second forward derives again: {second}"
        assert second.bypasses == first.bypasses, f"the second forward goes past: {second}"
        cache.invalidate()
        assert cache.warm() > 0, "warm() derives nothing"
        before = cache.stats().misses
        _activate(pair.model, pair.adapters[:1])
        _run(pair.model, pair.same_x)
        assert cache.stats().misses == before, "warm() derives something else than the forward"


def check_freshness(pair: _Pair) -> None:
    """After a change of each tensor and number that a layer has, outputs follow."""
    with pair.attached():
        pair.compare("attaching")
        for name, _ in _tensors(pair.plain):
            for way, change in _WAYS.items():
                if pair.do(f"{way} {name}", lambda m, n=name, c=change: c(*_place(m, n))):
                    pair.compare(f"{way}: {name}")
        for path in _numbers(pair.plain):
            before = _number(pair.plain, path)
            pair.do(f"changing {path}", lambda m, p=path: _change_number(m, p))
            pair.compare(f"changing {path}")
            pair.do(f"restoring {path}", lambda m, p=path, v=before: _set_number(m, p, v))
            pair.compare(f"restoring {path}")


def check_adapters(pair: _Pair) -> None:
    """Switching, several at once in either order, disabling, deleting, adding."""
    with pair.attached() as cache:
        pair.compare("attaching")
        for names in (
            pair.adapters[::-1][:1],
            pair.adapters[:1],
            pair.adapters,
            pair.adapters[::-1],
        ):
            if pair.activate(*names):
                pair.compare(f"activating {names}")
                for name, value in _tensors(pair.plain):  # one of theirs, while they are active
                    if value.is_floating_point() and f".{names[-1]}" in name:
                        pair.do("writing", lambda m, n=name: _in_place(*_place(m, n)))
                        pair.compare(f"writing {name} with {names} active")
                        break
        pair.activate(pair.adapters[0])
        pair.compare("going back")
        if hasattr(pair.plain, "disable_adapter"):
            with pair.plain.disable_adapter(), pair.model.disable_adapter():
                pair.compare("disabling")
            pair.compare("enabling")
        cache.invalidate(adapter=pair.adapters[-1])
        if len(pair.adapters) > 1:
            pair.activate(*pair.adapters)
            pair.compare("invalidating one of them")
            pair.activate(pair.adapters[0])
            pair.compare("going back again")
            if pair.do("deleting", lambda model: model.delete_adapter(pair.adapters[-1])):
                pair.compare("deleting the other adapter")
                config = pair.plain.peft_config[pair.adapters[0]]
                added = pair.do("adding", lambda m: m.add_adapter("new", copy.deepcopy(config)))
                if added and pair.activate("new"):
                    if not _random(pair.plain, pair.x):  # parts of it are in training as yet
                        pair.compare("adding an adapter")
                    pair.do("eval", lambda model: model.eval())
                    pair.compare("adding an adapter, eval()")


def check_training(pair: _Pair) -> None:
    """Training steps, plain and fused, with and without a change of mode."""
    with pair.attached():
        pair.compare("attaching")
        for fused in (False, True):
            for mode in (True, False):

                def train(model: Any, fused: bool = fused, mode: bool = mode) -> None:  # noqa: FBT001
                    model.train(mode)
                    torch.manual_seed(1)
                    weights = [p for p in model.parameters() if p.requires_grad]
                    _output(model, pair.x).float().square().sum().backward()  # type: ignore[no-untyped-call]
                    nn.utils.clip_grad_norm_(weights, 10)  # weights stay finite
                    torch.optim.SGD(weights, lr=0.01, fused=fused).step()
                    model.zero_grad()
                    model.eval()

                pair.do(f"a step, fused={fused}, train={mode}", train)
                pair.compare(f"a step, fused={fused}, train={mode}")
        pair.do("part of it in training", lambda model: next(_layers(model))[1].train())
        if not _random(pair.plain, pair.x):
            pair.compare("train() on one layer")
        pair.do("eval", lambda model: model.eval())
        pair.compare("eval()")


def check_merging(pair: _Pair) -> None:
    """Merging and unmerging; PEFT's refusals stay."""
    with pair.attached():
        pair.compare("attaching")
        if pair.do("merging", lambda model: model.merge_adapter()):
            pair.compare("merging")
            pair.do("unmerging", lambda model: model.unmerge_adapter())
            pair.compare("unmerging")
        if len(pair.adapters) > 1 and pair.do(
            "merging the other", lambda model: model.merge_adapter([pair.adapters[-1]])
        ):
            pair.compare("merging the other adapter")
            pair.do("unmerging", lambda model: model.unmerge_adapter())
            pair.compare("unmerging it")


def check_moves(pair: _Pair) -> None:
    """Another dtype, and the weights loaded again."""
    with pair.attached():
        pair.compare("attaching")
        state = {key: value.clone() for key, value in pair.plain.state_dict().items()}
        if pair.do("double()", lambda model: model.double()):
            x, same_x = pair.x, pair.same_x
            if x.is_floating_point():
                pair.x, pair.same_x = x.double(), same_x.double()
            numerics, pair.numerics = pair.numerics, "peft"
            found, expected = (_outcome(m, pair.x) for m in (pair.model, pair.plain))
            if isinstance(expected, Tensor):
                assert isinstance(found, Tensor), found
                torch.testing.assert_close(found, expected)
            pair.numerics, pair.x, pair.same_x = numerics, x, same_x
            pair.do("and back", lambda model: model.to(next(iter(state.values())).dtype))
            pair.compare("double() and back")
        pair.do("load_state_dict", lambda model: model.load_state_dict(state))
        pair.compare("load_state_dict")
        pair.do("assign", lambda model: model.load_state_dict(copy.deepcopy(state), assign=True))
        pair.compare("load_state_dict(assign=True)")


def check_gradients(pair: _Pair) -> None:
    """In eval mode, outputs and gradients are PEFT's to the bit; nothing with a graph is stored."""
    with pair.attached():
        for frozen in (False, True):
            for model in (pair.plain, pair.model):
                for parameter in model.parameters():
                    if frozen:
                        parameter.requires_grad_(requires_grad=False)
            for index in range(2):
                results = []
                for model, source in ((pair.plain, pair.x), (pair.model, pair.same_x)):
                    x = source.detach().clone()
                    if x.is_floating_point():
                        x.requires_grad_()
                    results.append(_gradients(model, x))
                where = f"with gradients, frozen={frozen}, forward {index + 1}"
                expected, found = results
                if isinstance(expected, Exception) or isinstance(found, Exception):
                    assert type(found) is type(expected), f"{where}: {found!r}, not {expected!r}"
                    continue
                assert found.keys() == expected.keys(), f"{where}: {found.keys() ^ expected.keys()}"
                for name, gradient in expected.items():
                    if pair.numerics == "peft" or not frozen:
                        message = f"{where}: {name} has another gradient"
                        assert torch.equal(found[name], gradient), message
                    else:
                        difference = (found[name].double() - gradient.double()).norm()
                        near = min(0.05, 256 * torch.finfo(gradient.dtype).eps)
                        message = f"{where}: {name} has a gradient that is off by {difference:.3g}"
                        assert difference <= near * gradient.double().norm(), message
                pair.compare(where)


def check_memory(pair: _Pair) -> None:
    """Bytes are those of the storages held; caps hold; nothing keeps the model alive."""
    with pair.attached() as cache:
        pair.run()
        pair.run()
        keys = list(cache._engine.memory.backend.keys())
        tensors = [tensor for key in keys for tensor in _entry(cache, key).tensors]
        assert cache.stats().nbytes == storage_bytes(tensors)
        assert not any(tensor.requires_grad or tensor.is_inference() for tensor in tensors)
        owned = {
            p.untyped_storage()._cdata for p in [*pair.model.parameters(), *pair.model.buffers()]
        }
        aliases = [t for t in tensors if t.untyped_storage()._cdata in owned]
        assert not aliases, "a stored value is one of the model's own tensors"
        held = cache.stats().nbytes
    assert cache.stats().nbytes == 0
    assert cache.stats().entries == 0
    for cap in (0, held // 2):
        with pair.attached(backend="lru", max_bytes=cap) as cache:
            pair.compare(f"a cap of {cap} bytes")
            assert cache.stats().nbytes <= cap
    with pair.attached() as cache:
        _run(pair.model, pair.same_x)
        gone = [weakref.ref(module) for _, module in _layers(pair.model)]
        pair.model = pair.same_x = None
        gc.collect()
        assert all(reference() is None for reference in gone), "the cache keeps the model alive"
        assert cache.stats().entries == 0, "entries outlive their model"
        pair.model = pair.plain


def check_detach(pair: _Pair) -> None:
    """Detached, every module has its own class and attributes again."""
    before = _snapshot(pair.model)
    keys = list(pair.model.state_dict())
    with pair.attached():
        _run(pair.model, pair.same_x)
        _run(pair.model, pair.same_x)
        assert list(pair.model.state_dict()) == keys, "the state_dict has other keys"
    assert _snapshot(pair.model) == before, "detach() leaves something behind"


def check_copies(pair: _Pair) -> None:
    """A copy, and a pickle, belong to no cache and follow their own weights."""
    with pair.attached():
        pair.run()
        copies = [copy.deepcopy(pair.model)]
        try:
            torch.save(pair.plain, io.BytesIO())
            can_be_saved = True
        except Exception:  # noqa: BLE001 - PEFT's own layer cannot be pickled
            can_be_saved = False
        if can_be_saved:
            file = io.BytesIO()
            torch.save(pair.model, file)
            file.seek(0)
            copies.append(torch.load(file, weights_only=False))
        for one in copies:
            twin = copy.deepcopy(pair.plain)
            assert torch.equal(_run(one, pair.x), _run(twin, pair.x)), "a copy has another output"
            with torch.no_grad():
                for parameter in [*one.parameters(), *twin.parameters()]:
                    parameter.mul_(1.25)
            assert torch.equal(_run(one, pair.x), _run(twin, pair.x)), "a copy is stale"
        types = {type(module) for _, module in _layers(copies[0])}
        assert types == {type(module) for _, module in _layers(pair.plain)}


_CHECKS: tuple[Any, ...] = (
    check_equality,
    check_hits,
    check_freshness,
    check_adapters,
    check_training,
    check_merging,
    check_moves,
    check_gradients,
    check_memory,
    check_detach,
    check_copies,
)


# What there is to change


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    return iter(found or list(model.named_modules()))


def _tensors(model: Any) -> list[tuple[str, Tensor]]:
    """Name every parameter, buffer, and tensor in a plain dictionary of a layer, once each."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        found.setdefault(id(value), (name, value))
    for name, layer in _layers(model):
        for attribute, values in vars(layer).items():
            if isinstance(values, dict) and not attribute.startswith("_"):
                for key, value in values.items():
                    if isinstance(value, Tensor):
                        found.setdefault(id(value), (f"{name}|{attribute}|{key}", value))
    return list(found.values())


def _place(model: Any, name: str) -> tuple[Any, Any]:
    """Return where a tensor is kept: a dictionary or module, and its key or name there."""
    if "|" in name:
        path, attribute, key = name.split("|")
        return getattr(model.get_submodule(path), attribute), key
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def _get(owner: Any, name: str) -> Tensor:
    value: Tensor = owner[name] if isinstance(owner, dict) else getattr(owner, name)
    return value


def _changed(value: Tensor) -> Tensor:
    if value.is_floating_point():
        noise = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64).reshape(value.shape)
        return (value.detach() * noise.to(value.dtype) + 0.01).to(value.dtype)
    if value.dtype is torch.bool:
        return ~value
    return value.detach().flip(-1)


def _in_place(owner: Any, name: str) -> None:
    value = _get(owner, name)
    with torch.no_grad():
        value.copy_(_changed(value))


def _data(owner: Any, name: str) -> None:
    value = _get(owner, name)
    value.data = _changed(value)


def _anew(owner: Any, name: str) -> None:
    value = _get(owner, name)
    new: Any = _changed(value)
    if isinstance(value, nn.Parameter):
        new = nn.Parameter(new, requires_grad=value.requires_grad)
    if isinstance(owner, dict):
        owner[name] = new
    else:
        setattr(owner, name, new)


_WAYS = {"in place": _in_place, ".data = new": _data, "another tensor": _anew}


def _numbers(model: Any) -> list[tuple[str, str, Any]]:
    """Name every number that a layer keeps in a dictionary by the adapter's name."""
    found = []
    for name, layer in _layers(model):
        for attribute, values in vars(layer).items():
            if isinstance(values, dict) and not attribute.startswith("_"):
                found += [
                    (name, attribute, key)
                    for key, value in values.items()
                    if type(value) in {int, float, bool} and key in model.peft_config
                ]
    return found


def _number(model: Any, path: tuple[str, str, str]) -> Any:
    name, attribute, key = path
    return getattr(model.get_submodule(name), attribute)[key]


def _set_number(model: Any, path: tuple[str, str, str], value: Any) -> None:
    name, attribute, key = path
    getattr(model.get_submodule(name), attribute)[key] = value


def _change_number(model: Any, path: tuple[str, str, str]) -> None:
    value = _number(model, path)
    if type(value) is bool:
        _set_number(model, path, not value)
    elif type(value) is float:
        _set_number(model, path, value * 1.5)
    else:  # most often PEFT cannot run this, and then the errors are compared
        _set_number(model, path, value + 1)


def _outcome(model: Any, x: Any) -> Tensor | Exception:
    try:
        return _run(model, x)
    except Exception as error:  # noqa: BLE001 - compared by the caller
        return error


def _gradients(model: Any, x: Tensor) -> dict[str, Tensor] | Exception:
    model.zero_grad(set_to_none=True)
    try:
        output = _output(model, x)
        if output.requires_grad:
            output.float().square().sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # noqa: BLE001 - compared by the caller
        return error
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    found["the output"] = output.detach()
    if x.grad is not None:
        found["the input"] = x.grad
    return found


def _equal(one: Tensor | Exception, other: Tensor | Exception) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    return one.dtype is other.dtype and torch.equal(one, other)


def _random(model: Any, x: Any) -> bool:
    """Whether a model's output is random as it is."""
    model = copy.deepcopy(model)  # there are adapters that write to their weights in forward
    found = [_outcome(model, x) for _ in range(3)]
    return not all(isinstance(y, Tensor) and torch.equal(y, found[0]) for y in found)  # type: ignore[arg-type]


def _entry(cache: Any, key: Any) -> Any:
    return cache._engine.memory.backend.get(key)


def _snapshot(model: Any) -> dict[str, Any]:
    return {
        name: (type(module), {key: id(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    }
