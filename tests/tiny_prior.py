"""The smallest prior that diffusers' group norms (32 groups) allow, and clips for it."""

from __future__ import annotations

import torch

from diffusion_prior.prior import PriorConfig, VideoPrior, build_compact_prior
from diffusion_prior.types import ConditionClip

TINY_CONFIG = {
    "patch_size": 2,
    "extra_condition_channels": 2,
    "num_frames": 5,
    "window_overlap": 1,
    "num_inference_steps": 2,
    "sigma_min": 0.02,
    "sigma_max": 80.0,
    "max_guidance": 1.0,
    "noise_augmentation": 0.0,
    "colour_correction": False,
}


def tiny_prior(seed: int = 0, vae: dict | None = None, unet: dict | None = None, **config: object) -> VideoPrior:
    """Latent factor 4, about 0.7 M parameters; random, untrained."""
    return build_compact_prior(
        seed,
        PriorConfig(**{**TINY_CONFIG, **config}),
        vae={"block_out_channels": (32, 32), "latent_channels": 4, **(vae or {})},
        unet={
            "block_out_channels": (32, 32),
            "num_attention_heads": (1, 2),
            "cross_attention_dim": 16,
            "addition_time_embed_dim": 8,
            **(unet or {}),
        },
        image_encoder={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "image_size": 16,
            "patch_size": 8,
            "projection_dim": 16,
        },
        condition_widths=(16, 16),
    )


def random_clip(frames: int = 3, height: int = 16, width: int = 24, seed: int = 0) -> ConditionClip:
    """Noise in [0, 1] in the shape of a clip, opaque at its ends."""
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.rand(frames, 1, height, width, generator=generator)
    alpha[[0, -1]] = 1
    return ConditionClip(
        rgb=torch.rand(frames, 3, height, width, generator=generator),
        alpha=alpha,
        disparity=torch.rand(frames, 1, height, width, generator=generator),
    )


def randomise(module: torch.nn.Module, seed: int = 0, std: float = 0.1) -> None:
    """Fill every parameter with noise, so that nothing which starts as zero hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
