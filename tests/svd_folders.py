"""Tiny pipeline folders as diffusers, transformers and the paper's authors write them, without anything of ours."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from diffusers.models.embeddings import TimestepEmbedding
from tiny_prior import randomise
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

UNET = {
    "in_channels": 8,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "num_attention_heads": (2, 4),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
    "num_frames": 25,
}


class UNetSpatioTemporalFlowConditionModel(UNetSpatioTemporalConditionModel):
    """The tensors and the config.json of the authors' pose-conditioned class; it is never run."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.pose_embedding = TimestepEmbedding(22 * 48, 4 * settings["block_out_channels"][0])


def tiny_unet(layout: str = "B", seed: int = 0, **settings) -> UNetSpatioTemporalConditionModel:
    """Random weights of a layout."""
    kinds = {"A": UNetSpatioTemporalFlowConditionModel, "B": UNetSpatioTemporalConditionModel}
    unet = kinds[layout](**{**UNET, **settings}).eval()
    randomise(unet, seed)
    return unet


def tiny_vae() -> AutoencoderKLTemporalDecoder:
    """Latents half as high and wide as the pictures."""
    torch.manual_seed(0)
    return AutoencoderKLTemporalDecoder(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=0.18215,
    )


def write_svd_folder(folder: Path, layout: str = "B", variant: str | None = None, encoder_px: int = 16) -> Path:
    """A whole pipeline folder as `save_pretrained` writes it, whose image encoder takes squares of so many pixels."""
    tiny_unet(layout).save_pretrained(folder / "unet", variant=variant)
    tiny_vae().save_pretrained(folder / "vae", variant=variant)
    encoder = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=encoder_px,
        patch_size=encoder_px // 2,
        projection_dim=16,
    )
    CLIPVisionModelWithProjection(encoder).save_pretrained(folder / "image_encoder", variant=variant)
    EulerDiscreteScheduler(
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        timestep_type="continuous",
        sigma_min=0.01,
        sigma_max=44.0,
    ).save_pretrained(folder / "scheduler")
    # as published: with settings of the schedulers that it was made of
    path = folder / "scheduler" / "scheduler_config.json"
    published = {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | published))
    return folder
