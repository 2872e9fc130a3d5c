"""Set-ups of Diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dora_cache.lab.field.of_transformers import config
from dora_cache.lab.field.setup import Built, SetUp, moved_magnitudes

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SETUPS", "TARGETS", "flux", "pipeline", "running", "sd3", "unet"]

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def unet(width: int) -> Any:
    """Return a small random UNet with convolutions and cross attention, in eval mode."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(width // 2, width),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=8,
        norm_num_groups=4,
    ).eval()


def sd3(width: int) -> Any:
    """Return a small random transformer of Stable Diffusion 3, in eval mode."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=width // 4,
        num_attention_heads=4,
        joint_attention_dim=width,
        caption_projection_dim=width,
        pooled_projection_dim=width,
        out_channels=4,
    ).eval()


def flux(width: int) -> Any:
    """Return a small random transformer of Flux, in eval mode."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    half = width // 8  # of a head's size; in pairs
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=width // 2,
        num_attention_heads=2,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        axes_dims_rope=(half, half, width // 2 - 2 * half),
    ).eval()


def pipeline(width: int) -> Any:
    """Return a pipeline of Stable Diffusion with small random models."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    model = unet(width)
    autoencoder = AutoencoderKL(
        block_out_channels=[8],
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"],
        latent_channels=4,
        norm_num_groups=4,
    ).eval()
    made = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=None,
        tokenizer=None,
        unet=model,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def running(model: Any, width: int) -> Callable[[], torch.Tensor]:
    """Return what runs one of these models once."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    kind = type(model).__name__
    step = torch.tensor([10])
    if kind.startswith("Flux"):
        inputs = {
            "hidden_states": random(1, 16, 4),
            "encoder_hidden_states": random(1, 6, width),
            "pooled_projections": random(1, width),
            "img_ids": random(16, 3),
            "txt_ids": random(6, 3),
            "timestep": step,
        }
    elif kind.startswith("SD3"):
        inputs = {
            "hidden_states": random(1, 4, 8, 8),
            "encoder_hidden_states": random(1, 6, width),
            "pooled_projections": random(1, width),
            "timestep": step,
        }
    else:
        inputs = {
            "sample": random(1, 4, 8, 8),
            "encoder_hidden_states": random(1, 6, width),
            "timestep": step,
        }
    return lambda: model(**inputs, return_dict=False)[0]


def _model(make: Callable[[int], Any]) -> Callable[[bool, int], Built]:
    def build(dora: bool, width: int) -> Built:  # noqa: FBT001
        model = make(width)
        model.add_adapter(config(dora, target_modules=TARGETS), "a")
        return Built(moved_magnitudes(model), running(model, width))

    return build


def _with_convolutions(dora: bool, width: int) -> Built:  # noqa: FBT001
    model = unet(width)
    model.add_adapter(config(dora, target_modules=[*TARGETS, "conv1", "conv2"]), "a")
    return Built(moved_magnitudes(model), running(model, width))


def _pipeline(dora: bool, width: int) -> Built:  # noqa: FBT001
    """Load the weights of one pipeline into another, and run two steps of it."""
    from peft import get_peft_model_state_dict

    trained = unet(width)
    trained.add_adapter(config(dora, target_modules=TARGETS), "a")
    moved_magnitudes(trained)
    weights = {
        f"unet.{name}": tensor
        for name, tensor in get_peft_model_state_dict(trained, adapter_name="a").items()
    }
    made = pipeline(width)
    made.load_lora_weights(weights, adapter_name="a")
    prompts = torch.randn(1, 6, width, generator=torch.Generator().manual_seed(2))

    def run() -> torch.Tensor:
        found: torch.Tensor = made(
            prompt_embeds=prompts,
            negative_prompt_embeds=-prompts,
            num_inference_steps=2,
            height=8,
            width=8,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
        ).images
        return found

    return Built(made, run)


SETUPS = [
    SetUp("UNet", "diffusers", _model(unet)),
    SetUp("UNet with convolutions", "diffusers", _with_convolutions),
    SetUp("Stable Diffusion 3 transformer", "diffusers", _model(sd3)),
    SetUp("Flux transformer", "diffusers", _model(flux)),
    SetUp("pipeline with load_lora_weights", "diffusers", _pipeline),
]
