"""Spatio-temporal UNet: diffusers' SVD UNet that takes one image embedding per frame, and optionally one pose per frame."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from jaxtyping import Float
from torch import Tensor


class SpatioTemporalUNet(UNetSpatioTemporalConditionModel):
    """SVD's UNet with an embedding per frame; the same class for every size and for both known layouts.

    Layout B is SVD's: three micro-conditions per clip through `add_embedding`. Layout A, `pose_conditions` given,
    has a vector per frame (three micro-conditions, relative pose, field of view) through `pose_embedding` instead;
    `add_embedding` stays in its weights, unused. Parameter names are diffusers'.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 8,
        out_channels: int = 4,
        down_block_types: Sequence[str] = (
            "CrossAttnDownBlockSpatioTemporal",
            "CrossAttnDownBlockSpatioTemporal",
            "CrossAttnDownBlockSpatioTemporal",
            "DownBlockSpatioTemporal",
        ),
        up_block_types: Sequence[str] = (
            "UpBlockSpatioTemporal",
            "CrossAttnUpBlockSpatioTemporal",
            "CrossAttnUpBlockSpatioTemporal",
            "CrossAttnUpBlockSpatioTemporal",
        ),
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        addition_time_embed_dim: int = 256,
        projection_class_embeddings_input_dim: int = 768,
        layers_per_block: int | Sequence[int] = 2,
        cross_attention_dim: int | Sequence[int] = 1024,
        transformer_layers_per_block: int | Sequence[int] = 1,
        num_attention_heads: int | Sequence[int] = (5, 10, 20, 20),
        num_frames: int = 25,
        pose_conditions: int | None = None,
        pose_frequency_channels: int = 48,
    ) -> None:
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=tuple(down_block_types),
            up_block_types=tuple(up_block_types),
            block_out_channels=tuple(block_out_channels),
            addition_time_embed_dim=addition_time_embed_dim,
            projection_class_embeddings_input_dim=projection_class_embeddings_input_dim,
            # diffusers declares tuples of length one
            layers_per_block=_tupled(layers_per_block),  # pyright: ignore[reportArgumentType]
            cross_attention_dim=_tupled(cross_attention_dim),  # pyright: ignore[reportArgumentType]
            transformer_layers_per_block=_tupled(transformer_layers_per_block),  # pyright: ignore[reportArgumentType]
            num_attention_heads=_tupled(num_attention_heads),
            num_frames=num_frames,
        )
        if pose_conditions is not None:
            self.pose_proj = Timesteps(pose_frequency_channels, True, downscale_freq_shift=0)
            self.pose_embedding = TimestepEmbedding(
                pose_conditions * pose_frequency_channels, block_out_channels[0] * 4
            )

    @property
    def layout(self) -> str:
        """`A` where frames are conditioned on their poses, `B` for SVD's own."""
        return "B" if self.config["pose_conditions"] is None else "A"

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # narrower: per-frame embeddings, a tensor out
        self,
        sample: Float[Tensor, "b f c h w"],
        noise_condition: Float[Tensor, " b"],
        image_embeddings: Float[Tensor, "b f n d"],
        micro_conditions: Float[Tensor, "b *f m"],
    ) -> Float[Tensor, "b f c_out h w"]:
        """The raw network output F of EDM eq. 7.

        Args:
            sample: noisy latents times c_in, then condition channels; any latent size.
            noise_condition: c_noise = ln(sigma) / 4 of each clip.
            image_embeddings: CLIP embedding of every frame.
            micro_conditions: layout B: [b 3] fps, motion bucket, noise augmentation; layout A: [b f 22], see
                `conditioning.pose_conditions`.
        """
        batch, frames = sample.shape[:2]
        embedding = self._condition_embedding(noise_condition, micro_conditions, frames, sample.dtype)
        context = {"encoder_hidden_states": image_embeddings.flatten(0, 1)}
        shared = {
            "temb": embedding,
            "image_only_indicator": torch.zeros(batch, frames, dtype=sample.dtype, device=sample.device),
        }

        hidden = self.conv_in(sample.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        skips = (hidden,)
        for block in self.down_blocks:
            hidden, block_skips = block(hidden_states=hidden, **shared, **(context if _attends(block) else {}))
            skips += block_skips
        hidden = self.mid_block(hidden_states=hidden, **shared, **context)
        for block in self.up_blocks:
            count = len(block.resnets)  # pyright: ignore[reportArgumentType]
            skips, block_skips = skips[:-count], skips[-count:]
            hidden = block(
                hidden_states=hidden,
                res_hidden_states_tuple=block_skips,
                # latents need not divide by the UNet's own factor: upsample to the size of the next skip
                upsample_size=skips[-1].shape[2:] if skips else None,
                **shared,
                **(context if _attends(block) else {}),
            )
        out = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        return out.unflatten(0, (batch, frames))

    def _condition_embedding(
        self, noise_condition: Tensor, micro_conditions: Tensor, frames: int, dtype: torch.dtype
    ) -> Float[Tensor, "bf d"]:
        """Embedding of the noise level plus that of the micro-conditions, one row per frame."""
        embedding = self.time_embedding(self.time_proj(noise_condition).to(dtype))
        if self.layout == "B":
            projected = self.add_time_proj(micro_conditions.flatten()).reshape(len(micro_conditions), -1)
            return (embedding + self.add_embedding(projected.to(dtype))).repeat_interleave(frames, dim=0)
        projected = self.pose_proj(micro_conditions.flatten()).reshape(*micro_conditions.shape[:2], -1)
        return (embedding[:, None] + self.pose_embedding(projected.to(dtype))).flatten(0, 1)


def _attends(block: torch.nn.Module) -> bool:
    """Whether a diffusers block takes image embeddings."""
    return bool(getattr(block, "has_cross_attention", False))


def _tupled(value: int | Sequence[int]) -> int | tuple[int, ...]:
    """Lists, as they come from JSON, as tuples."""
    return value if isinstance(value, int) else tuple(value)
