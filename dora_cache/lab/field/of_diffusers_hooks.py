"""Set-ups of diffusers that offload or cast a model's weights by hooks."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model
from peft.tuners.lora.dora import DoraLinearLayer

from dora_cache.lab.field.of_accelerate import no_cuda
from dora_cache.lab.field.of_transformers import config, llama
from dora_cache.lab.field.of_transformers import running as running_text
from dora_cache.lab.field.setup import Built, SetUp, moved_magnitudes

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

__all__ = ["SETUPS", "flux", "running"]

_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp"]


def flux(dora: bool, width: int) -> Any:  # noqa: FBT001
    """Return a small random transformer of Flux's, with an adapter, in eval mode."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=width // 2,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(width // 8, width // 8, width // 4),
    )
    model.add_adapter(config(dora, target_modules=_TARGETS))
    return moved_magnitudes(model.eval())


def running(model: Any, device: str = "cpu") -> Built:
    """Return what runs the transformer on four patches and three tokens."""
    torch.manual_seed(2)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, 4, 4),
        "encoder_hidden_states": torch.randn(1, 3, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.arange(12.0).view(4, 3),
        "txt_ids": torch.zeros(3, 3),
        "guidance": None,
        "return_dict": False,
    }
    given = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    return Built(model, lambda: model(**given)[0])


def _prepared(
    prepare: Callable[[Any, ExitStack], object], *, alone: bool, device: str = "cpu"
) -> Callable[[bool, int], Built]:
    """Return a builder.

    Args:
        prepare: called with the model, and what undoes it.
        alone: whether PEFT's own DoRA cannot run so.
        device: where the inputs are.
    """

    def build(dora: bool, width: int) -> Built:  # noqa: FBT001
        model = flux(dora, width)
        built = running(model, device)
        prepare(model, built.undo)
        if alone and dora:
            other = flux(dora, width)
            built.reference = running(other, device).run
            prepare(other, built.undo)
            _assist(other)
        return built

    return build


def _assist(model: Any) -> None:
    """Have PEFT's DoRA, which reads a base layer's weights, find them in place.

    The model that is not offloaded is no reference: weights that are read from a file begin at
    other addresses, for which a CPU's matrix products round differently.
    """

    def onload(_: object, __: object, kwargs: dict[str, Any]) -> None:
        for name in ("base_layer", "lora_A", "lora_B"):
            kwargs[name]._diffusers_hook.get_hook("group_offloading").group.onload_()

    for module in model.modules():
        if isinstance(module, DoraLinearLayer):
            module.register_forward_pre_hook(onload, with_kwargs=True)


def _grouped(level: str, device: str, *, disk: bool = False, **settings: Any) -> Any:
    def prepare(model: Any, undo: ExitStack) -> None:
        if disk:
            folder = undo.enter_context(tempfile.TemporaryDirectory())
            settings["offload_to_disk_path"] = folder
        if level == "block_level":
            settings["num_blocks_per_group"] = 1
        model.enable_group_offload(torch.device(device), offload_type=level, **settings)

    return prepare


def _cast(model: Any, _: object) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def _cast_narrow(dora: bool, width: int) -> Built:  # noqa: FBT001
    from diffusers.hooks import apply_layerwise_casting

    # Without biases: PEFT's DoRA subtracts them as they are stored, which float8 does not allow.
    model = moved_magnitudes(get_peft_model(llama(width), config(dora)).eval())
    apply_layerwise_casting(
        model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=("norm", "lora_")
    )
    return running_text(model)


def _streamed(model: Any, undo: ExitStack) -> None:
    _grouped("block_level", "cuda", use_stream=True)(model, undo)


def _pipeline(how: str, device: str) -> Callable[[bool, int], Built]:
    """Return a builder of a pipeline of two steps, whose method ``how`` is called."""

    def build(dora: bool, width: int) -> Built:  # noqa: FBT001
        pipeline = _flux_pipeline(flux(dora, width))
        getattr(pipeline, how)(device=device)
        reference = None
        if how == "enable_sequential_cpu_offload" and dora:
            whole = _flux_pipeline(flux(dora, width).to(device))
            reference = _steps(whole, device)
        return Built(pipeline, _steps(pipeline, device), reference)

    return build


def _flux_pipeline(transformer: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _steps(pipeline: Any, device: str) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        images: torch.Tensor = pipeline(
            prompt_embeds=torch.ones(1, 3, 32, device=device),
            pooled_prompt_embeds=torch.ones(1, 32, device=device),
            height=32,
            width=32,
            num_inference_steps=2,
            guidance_scale=0.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images
        return images

    return run


SETUPS = [
    SetUp(
        "group offload, blocks",
        "diffusers",
        _prepared(_grouped("block_level", "cpu"), alone=False),
    ),
    SetUp(
        "group offload, leaves", "diffusers", _prepared(_grouped("leaf_level", "cpu"), alone=False)
    ),
    SetUp(
        "group offload to disk, blocks",
        "diffusers",
        _prepared(_grouped("block_level", "cpu", disk=True), alone=False),
    ),
    SetUp(
        "group offload to disk, leaves",
        "diffusers",
        _prepared(_grouped("leaf_level", "cpu", disk=True), alone=True),
        note="PEFT's own DoRA reads memory that nothing was written to",
    ),
    SetUp("layerwise casting (bfloat16)", "diffusers", _prepared(_cast, alone=False)),
    SetUp("layerwise casting (float8)", "diffusers", _cast_narrow),
    SetUp(
        "enable_model_cpu_offload",
        "diffusers",
        # Its device is cpu:0, to which weights on the CPU are copied before each step.
        _pipeline("enable_model_cpu_offload", "cpu"),
    ),
    SetUp(
        "enable_model_cpu_offload from a GPU",
        "diffusers",
        _pipeline("enable_model_cpu_offload", "cuda"),
        cannot=no_cuda,
    ),
    SetUp(
        "enable_sequential_cpu_offload",
        "diffusers",
        _pipeline("enable_sequential_cpu_offload", "cuda"),
        cannot=no_cuda,
        note="PEFT's own DoRA cannot run on it",
    ),
    SetUp(
        "group offload from a GPU, blocks",
        "diffusers",
        _prepared(_grouped("block_level", "cuda"), alone=False, device="cuda"),
        cannot=no_cuda,
    ),
    SetUp(
        "group offload from a GPU, leaves",
        "diffusers",
        _prepared(_grouped("leaf_level", "cuda"), alone=True, device="cuda"),
        cannot=no_cuda,
        note="PEFT's own DoRA cannot run on it",
    ),
    SetUp(
        "group offload from a GPU, streams",
        "diffusers",
        _prepared(_streamed, alone=False, device="cuda"),
        cannot=no_cuda,
    ),
]
