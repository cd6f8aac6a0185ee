"""The prior at the paper's size, Stable Video Diffusion's networks, without weights or with random ones: for counting, planning and timing."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from diffusers import AutoencoderKLTemporalDecoder
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from diffusion_prior.prior import PriorConfig, VideoPrior
from diffusion_prior.published import LAYOUT_A_FRAMES
from diffusion_prior.std import SpatialTemporalDecoder
from diffusion_prior.unet import SpatioTemporalUNet


def full_size_prior(
    layout: Literal["A", "B"] = "B", dtype: torch.dtype = torch.float16, device: torch.device | str = "meta"
) -> VideoPrior:
    """A prior whose networks are those of stable-video-diffusion-img2vid-xt.

    Args:
        layout: of the UNet: B is Stable Video Diffusion's, A the authors' pose-conditioned one.
        dtype: of the weights; the VAE's stay in float32 where these are in float16.
        device: where it is built, in float32 at first (9.3 GB); on the meta device it has no weights, elsewhere random ones.
    """
    with torch.device(device):
        vae = AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]  # diffusers: tuple[str]
            block_out_channels=(128, 256, 512, 512),  # pyright: ignore[reportArgumentType]  # diffusers: tuple[int]
            layers_per_block=2,
        )
        unet = SpatioTemporalUNet(pose_conditions=22 if layout == "A" else None)
        image_encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(  # ViT-H/14
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=16,
                patch_size=14,
                projection_dim=1024,
                hidden_act="gelu",
            )
        )
        std = SpatialTemporalDecoder.from_vae(vae)
    config = PriorConfig()
    if layout == "A":
        config = dataclasses.replace(config, num_frames=LAYOUT_A_FRAMES)
    return VideoPrior(vae, unet, image_encoder, std, config).to(device, dtype)
