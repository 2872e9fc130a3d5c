"""Adapters that come, go, are switched and swapped; merging."""

from __future__ import annotations

import contextlib
import tempfile
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap

from dora_cache.lab.freshness.operations.registry import operation
from dora_cache.lab.freshness.scene import Pick, quiet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from dora_cache.lab.freshness.scene import Scene


# Adapters


@operation("adapters", "set_adapter")
def _(scene: Scene, pick: Pick) -> None:
    if pick.adapter in scene.adapters:
        scene.activate(pick.adapter)


@operation("adapters", "set_adapter, several, in either order")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    if not {pick.adapter, pick.other} <= set(scene.adapters) or pick.adapter == pick.other:
        return []
    scene.activate(pick.adapter, pick.other)
    found = [scene.run(), scene.run()]
    scene.activate(pick.other, pick.adapter)
    return [*found, scene.run()]


@operation("adapters", "set_adapter on one layer only")
def _(scene: Scene, pick: Pick) -> None:
    for layer in scene.layers(pick):
        if pick.adapter in layer.scaling:
            layer.set_adapter([pick.adapter])


def _fill(scene: Scene, pick: Pick) -> None:
    """Give a new adapter weights that depend on the seed alone."""
    generator = torch.Generator().manual_seed(pick.seed)
    with torch.no_grad():
        for weight in scene.weights(Pick(pick.adapter)):
            weight.copy_(torch.rand(weight.shape, generator=generator) + 0.1)


@operation("adapters", "add_adapter")
def _(scene: Scene, pick: Pick) -> None:
    name = f"new{pick.seed % 3}"
    if name not in scene.adapters:
        with quiet():
            scene.model.add_adapter(name, scene.config(1 + pick.seed % 3))
        scene.model.eval()
        _fill(scene, Pick(name, seed=pick.seed))


@operation("adapters", "add_adapter, plain LoRA")
def _(scene: Scene, pick: Pick) -> None:
    _add_lora(scene, pick)


def _add_lora(scene: Scene, pick: Pick) -> None:
    if "lora" not in scene.adapters:
        with quiet():
            scene.model.add_adapter("lora", scene.config(2, use_dora=False))
        scene.model.eval()
        _fill(scene, Pick("lora", seed=pick.seed))


@operation("adapters", "add_adapter, which takes its part out of the base weight (OLoRA)")
def _(scene: Scene, pick: Pick) -> None:
    name = f"new{pick.seed % 3}"
    if name not in scene.adapters:
        config = scene.config(2)
        config.target_modules, config.init_lora_weights = {"linear"}, "olora"
        with quiet():
            scene.model.add_adapter(name, config)
        scene.model.eval()


@operation("adapters", "delete_adapter")
def _(scene: Scene, pick: Pick) -> None:
    if pick.adapter in scene.adapters and len(scene.adapters) > 1:
        with quiet():
            scene.model.delete_adapter(pick.adapter)
        # PeftModel goes on naming the adapter it was made with, even if it is gone.
        scene.model.active_adapter = scene.adapters[0]
        if not scene.tuner.active_adapters:
            scene.activate(scene.adapters[0])


@operation("adapters", "delete_adapter, and another one of its name")
def _(scene: Scene, pick: Pick) -> None:
    if pick.adapter not in scene.adapters or len(scene.adapters) < 2:  # noqa: PLR2004
        return
    with quiet():
        scene.model.delete_adapter(pick.adapter)
        scene.model.add_adapter(pick.adapter, scene.config(2))
    scene.model.eval()
    _fill(scene, pick)
    scene.activate(pick.adapter)


@operation("adapters", "load_adapter under a new name", repeatable=False)
def _(scene: Scene, pick: Pick) -> None:
    _load(scene, pick, "loaded")


@operation("adapters", "load_adapter onto a name in use", repeatable=False)
def _(scene: Scene, pick: Pick) -> None:
    _load(scene, pick, pick.adapter)


def _load(scene: Scene, pick: Pick, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder, quiet():
        changed = scene.copied()
        with torch.no_grad():
            for weight in changed.weights(pick):
                weight.mul_(pick.factor)
        changed.model.save_pretrained(folder, selected_adapters=[pick.adapter])
        scene.model.load_adapter(f"{folder}/{pick.adapter}", adapter_name=name)
    scene.model.eval()


def _swapped(scene: Scene, pick: Pick) -> dict[str, Tensor]:
    # PEFT does not swap embeddings.
    state = scene.state(Pick(pick.adapter, factor=pick.factor))
    return {name: value for name, value in state.items() if "embedding" not in name}


@operation("adapters", "hotswap")
def _(scene: Scene, pick: Pick) -> None:
    if pick.adapter in scene.adapters:
        with quiet(), contextlib.suppress(RuntimeError, ValueError):
            hotswap_adapter_from_state_dict(
                scene.model,
                _swapped(scene, pick),
                pick.adapter,
                scene.model.peft_config[pick.adapter],
            )


@operation("adapters", "hotswap, prepared for compilation", repeatable=False)
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    state = _swapped(scene, pick)
    with quiet():
        # It refuses conv layers unless ranks are equal, and swaps each adapter by itself.
        prepare_model_for_compiled_hotswap(
            scene.model, config=scene.model.peft_config, target_rank=4
        )
    found = [scene.run()]
    with quiet():
        hotswap_adapter_from_state_dict(
            scene.model, state, pick.adapter, scene.model.peft_config[pick.adapter]
        )
    return found


@operation("adapters", "add_weighted_adapter", repeatable=False)
def _(scene: Scene, pick: Pick) -> None:
    with quiet():
        scene.model.add_weighted_adapter(
            [pick.adapter, pick.other], [0.7, 0.5], "blend", combination_type="cat"
        )
    scene.model.eval()
    scene.activate("blend")


@operation("adapters", "disable_adapter")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    with quiet(), scene.model.disable_adapter():
        return [scene.run()]


@operation("adapters", "disable_adapter_layers, enable_adapter_layers")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    with quiet():
        scene.tuner.disable_adapter_layers()
        found = [scene.run()]
        scene.tuner.enable_adapter_layers()
    return found


@operation("adapters", "adapter_names, a mixed batch", ends=True)
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    scene.activate(pick.adapter)
    alone = scene.run()
    with torch.no_grad(), contextlib.suppress(ValueError):  # PEFT refuses DoRA
        return [scene.model(scene.ids, adapter_names=[pick.adapter] * len(scene.ids))]
    return [alone]


# Merging


@contextlib.contextmanager
def _enlarged(layers: list[Any], names: list[str] | None) -> Iterator[None]:
    """Make what will be merged so large that the base weight loses half of its digits.

    Then unmerging never gives its bits back. At the usual scale it may or may not, by rounding,
    and processors round differently.
    """
    before = []
    if not any(layer.merged_adapters for layer in layers):  # those have to be unmerged as they were
        before = [
            (layer, name, layer.scaling[name])
            for layer in layers
            for name in names or layer.active_adapters
            if name in layer.scaling
        ]
    for layer, name, value in before:
        layer.scaling[name] = value * torch.finfo(layer.get_base_layer().weight.dtype).eps ** -0.5
    try:
        yield
    finally:
        for layer, name, value in before:
            layer.scaling[name] = value


@operation("merging", "merge_adapter, and unmerge_adapter")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    return _merged(scene, None)


@operation("merging", "merge of another adapter, and unmerge")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    return _merged(scene, [pick.other] if pick.other in scene.adapters else None)


@operation("merging", "merge of a plain LoRA adapter, and unmerge")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    # PEFT adds to the base weight where it is and takes away again, through .data both times.
    _add_lora(scene, pick)
    return _merged(scene, ["lora"])


@operation("merging", "merge_adapter(safe_merge=True), and unmerge_adapter")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    return _merged(scene, None, safe=True)


def _merged(scene: Scene, names: list[str] | None, *, safe: bool = False) -> list[Tensor]:
    with quiet(), _enlarged(scene.layers(Pick()), names):
        scene.model.merge_adapter(names, safe_merge=safe)
        found = [scene.run(), scene.run()]
        scene.model.unmerge_adapter()
    return found


@operation("merging", "merge of one layer, and unmerge")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    layers = scene.layers(Pick(layer=pick.layer or "linear"))
    with quiet(), _enlarged(layers, None):
        for layer in layers:
            layer.merge()
        found = [scene.run()]
        for layer in layers:
            layer.unmerge()
    return found


@operation("merging", "merge_and_unload", ends=True)
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    with quiet():
        plain = scene.model.merge_and_unload()
    with torch.no_grad():
        return [plain(scene.ids)]


@operation("merging", "unload", ends=True)
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    with torch.no_grad():
        return [scene.model.unload()(scene.ids)]
