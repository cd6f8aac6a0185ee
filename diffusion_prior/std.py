"""Spatial-temporal decoder (STD): latents and rendered frames in, frames out.

It wraps the video VAE's own temporal decoder and adds what 3DGS-Enhancer's section 4.2 adds: the rendered frames enter
through controllable feature warping (CFW, from StableSR) and temporal convolutions tie the frames together. Every
addition is zero-initialised, so that an untrained STD is the stock decoder, bit for bit.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLTemporalDecoder
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_prior.types import WARP_CHANNELS

CONDITION_CHANNELS = 11
"""Render 3, alpha 1, disparity 1, first reference 3, last reference 3: `conditioning.decoder_condition`, which appends
`WARP_CHANNELS` for each warped reference."""


CONTEXT_NORM_GROUPS = 4
"""Groups of the norms in the condition encoder's context, which divide its widths."""


class SpatialTemporalDecoder(ModelMixin, ConfigMixin):
    """Temporal decoder with CFW and temporal convolutions at every scale, and a learned blend with render and warps.

    The output is decoded + sum_i b_i (candidate_i - decoded) over the render and the warped references, where the
    shares b_i are learned for every pixel: what is right in a candidate passes through untouched.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        patch_size: int = 1,
        warped_references: int = 0,
        condition_widths: Sequence[int] = (64, 128, 256, 256),
        context_widths: Sequence[int] = (),
    ) -> None:
        super().__init__()
        condition_channels = self.condition_channels
        if len(condition_widths) != len(block_out_channels):
            raise ValueError(
                f"`condition_widths` needs one width per decoder block: {tuple(condition_widths)} against "
                f"{tuple(block_out_channels)}."
            )
        self.decoder = TemporalDecoder(
            in_channels=latent_channels,
            out_channels=3 * patch_size**2,
            block_out_channels=tuple(block_out_channels),  # pyright: ignore[reportArgumentType]  # diffusers: tuple[int]
            layers_per_block=layers_per_block,
        )
        self.condition_encoder = ConditionEncoder(
            condition_channels * patch_size**2, tuple(condition_widths), tuple(context_widths)
        )
        coarse_to_fine = list(zip(reversed(block_out_channels), reversed(condition_widths)))
        self.warps = nn.ModuleList(FeatureWarp(width, condition) for width, condition in coarse_to_fine)
        self.temporal = nn.ModuleList(TemporalConvolution(width) for width in reversed(block_out_channels))
        shares = (1 + warped_references) * patch_size**2
        self.blend = _zeroed(nn.Conv2d(block_out_channels[0] + condition_widths[0], shares, 3, padding=1))

    @property
    def condition_channels(self) -> int:
        """Channels of the condition at full resolution."""
        return CONDITION_CHANNELS + WARP_CHANNELS * self.config["warped_references"]

    @classmethod
    def from_vae(
        cls,
        vae: AutoencoderKLTemporalDecoder,
        patch_size: int = 1,
        condition_widths: Sequence[int] | None = None,
        warped_references: int = 0,
    ) -> SpatialTemporalDecoder:
        """An untrained STD around a copy of a VAE's decoder.

        Args:
            vae: video VAE whose `out_channels` is 3 * patch_size^2.
            patch_size: side of the pixel blocks that the VAE takes as channels.
            condition_widths: channels of the condition encoder from fine to coarse; half of the decoder's by default.
            warped_references: how many warped references it takes.

        Raises:
            ValueError: where the VAE's channels and `patch_size` do not agree.
        """
        if vae.config["out_channels"] != 3 * patch_size**2:
            raise ValueError(
                f"a VAE for patch_size {patch_size} has {3 * patch_size**2} output channels, "
                f"this one has {vae.config['out_channels']}."
            )
        widths = tuple(vae.config["block_out_channels"])
        std = cls(
            latent_channels=vae.config["latent_channels"],
            block_out_channels=widths,
            layers_per_block=vae.config["layers_per_block"],
            patch_size=patch_size,
            warped_references=warped_references,
            condition_widths=condition_widths or tuple(width // 2 for width in widths),
        )
        std.decoder = copy.deepcopy(vae.decoder)
        nn.Module.to(std, dtype=vae.dtype)  # diffusers' own `to` warns of layers that it has not
        return std

    def forward(
        self, latents: Float[Tensor, "b f c h w"], condition: Float[Tensor, "b f k h2 w2"]
    ) -> Float[Tensor, "b f 3 h2 w2"]:
        """Frames in [-1, 1], not clamped.

        Args:
            latents: unscaled latents (those the VAE's encoder gives).
            condition: `conditioning.decoder_condition` at full resolution; its first three channels are the render.
        """
        frames = latents.shape[1]
        patch = self.config["patch_size"]
        features = self.condition_encoder(_flat(F.pixel_unshuffle(condition, patch)))
        decoded, shares = self._decode(_flat(latents), features, frames)
        decoded = F.pixel_shuffle(decoded, patch).unflatten(0, (-1, frames))
        shares = F.pixel_shuffle(shares, patch).unflatten(0, (-1, frames))
        blended = decoded + shares[:, :, :1] * (condition[:, :, :3] - decoded)
        for number in range(self.config["warped_references"]):
            start = CONDITION_CHANNELS + WARP_CHANNELS * number
            colour, seen = condition[:, :, start : start + WARP_CHANNELS].split([3, 1], dim=2)
            blended = blended + shares[:, :, number + 1 : number + 2] * (colour - seen * decoded)
        return blended

    def _decode(
        self, latents: Float[Tensor, "bf c h w"], features: list[Tensor], frames: int
    ) -> tuple[Float[Tensor, "bf p h2 w2"], Float[Tensor, "bf q h2 w2"]]:
        """`TemporalDecoder.forward` with our layers after the first residual block of every scale."""
        decoder = self.decoder
        image_only = torch.zeros(len(latents) // frames, frames, dtype=latents.dtype, device=latents.device)
        hidden = decoder.mid_block(decoder.conv_in(latents), image_only_indicator=image_only)
        for block, warp, temporal, feature in zip(decoder.up_blocks, self.warps, self.temporal, reversed(features)):
            for index, resnet in enumerate(block.resnets):  # pyright: ignore[reportArgumentType]
                hidden = resnet(hidden, image_only_indicator=image_only)
                if index == 0:
                    hidden = temporal(warp(hidden, feature), frames)
            if block.upsamplers is not None:
                for upsampler in block.upsamplers:  # pyright: ignore[reportGeneralTypeIssues]
                    hidden = upsampler(hidden)
        hidden = decoder.conv_act(decoder.conv_norm_out(hidden))
        blend = self.blend(torch.cat([hidden, features[0]], dim=1))
        return _temporal(decoder.time_conv_out, decoder.conv_out(hidden), frames), blend


def widened(
    std: SpatialTemporalDecoder, warped_references: int, context_widths: Sequence[int] = ()
) -> SpatialTemporalDecoder:
    """The same decoder for more warped references, with context, neither of which it uses yet: its output stays what it was.

    Args:
        std: trained or not; left as it is.
        warped_references: how many warped references the new one takes.
        context_widths: of the new one's condition encoder; only for a decoder that has none.

    Raises:
        ValueError: where it takes more warped references already, or has another context.
    """
    taken, context = std.config["warped_references"], tuple(std.config["context_widths"])
    if warped_references < taken:
        raise ValueError(f"the decoder takes {taken} warped references, more than {warped_references}.")
    if context and context != tuple(context_widths):
        raise ValueError(f"the decoder's context has the widths {context}, not {tuple(context_widths)}.")
    names = ("latent_channels", "block_out_channels", "layers_per_block", "patch_size", "condition_widths")
    kept = {name: std.config[name] for name in names}
    wider = SpatialTemporalDecoder(**kept, warped_references=warped_references, context_widths=context_widths)
    nn.Module.to(wider, dtype=std.dtype, device=std.device)
    state = wider.state_dict()
    for name, tensor in std.state_dict().items():
        target = torch.zeros_like(state[name])
        target[tuple(slice(size) for size in tensor.shape)] = tensor
        state[name] = target
    wider.load_state_dict(state)
    return wider


class ConditionEncoder(nn.Module):
    """Features of the condition at every scale of the decoder, from fine to coarse. No norms: levels carry meaning.

    Context reaches further: below the decoder's coarsest scale the picture is halved once for each of its widths and comes
    back up, so that what fills a hole may follow from the whole picture. It is added to the coarsest features.
    """

    def __init__(self, in_channels: int, widths: tuple[int, ...], context_widths: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width) for width in widths)
        self.downsamplers = nn.ModuleList(_halving(fine, coarse) for fine, coarse in itertools.pairwise(widths))
        self.context = Context(widths[-1], context_widths) if context_widths else None

    def forward(self, condition: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """One feature map per scale, from fine to coarse."""
        hidden = self.blocks[0](self.conv_in(condition))
        features = [hidden]
        for downsample, block in zip(self.downsamplers, self.blocks[1:]):
            hidden = block(downsample(hidden))
            features.append(hidden)
        if self.context is not None:
            features[-1] = self.context(hidden)
        return features


class Context(nn.Module):
    """x + what pictures halved again and again say of it; zero-initialised. Wide layers need norms; levels go past them."""

    def __init__(self, width: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.down, self.up = _halving(width, widths[0]), _zeroed(nn.Conv2d(widths[0], width, 3, padding=1))
        self.before, self.after = ResidualBlock(widths[0]), ResidualBlock(widths[0])
        self.norm_before, self.norm_after = (nn.GroupNorm(CONTEXT_NORM_GROUPS, widths[0]) for _ in range(2))
        self.coarser = Context(widths[0], widths[1:]) if len(widths) > 1 else None

    def forward(self, hidden: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        coarse = self.before(self.norm_before(self.down(hidden)))
        if self.coarser is not None:
            coarse = self.coarser(coarse)
        back = F.interpolate(
            self.up(self.after(self.norm_after(coarse))), hidden.shape[-2:], mode="bilinear", align_corners=False
        )
        return hidden + back


def _halving(fine: int, coarse: int) -> nn.Conv2d:
    return nn.Conv2d(fine, coarse, 3, stride=2, padding=1)


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return hidden + self.conv2(F.silu(self.conv1(F.silu(hidden))))


class FeatureWarp(nn.Module):
    """Controllable feature warping (StableSR, eq. 3): decoder features scaled and shifted by condition features."""

    def __init__(self, width: int, condition_width: int) -> None:
        super().__init__()
        self.fuse = nn.Conv2d(width + condition_width, width, 1)  # 1x1: the blocks before and after look around
        self.scale_shift = _zeroed(nn.Conv2d(width, 2 * width, 1))

    def forward(self, hidden: Float[Tensor, "b c h w"], feature: Float[Tensor, "b k h w"]) -> Float[Tensor, "b c h w"]:
        fused = F.silu(self.fuse(torch.cat([hidden, feature], dim=1)))
        scale, shift = self.scale_shift(fused).chunk(2, dim=1)
        return hidden + (hidden * scale + shift)


class TemporalConvolution(nn.Module):
    """Residual convolution over three neighbouring frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _zeroed(nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0)))

    def forward(self, hidden: Float[Tensor, "bf c h w"], frames: int) -> Float[Tensor, "bf c h w"]:
        """Frames of one clip lie next to each other along the batch axis."""
        return hidden + _temporal(self.conv, F.silu(hidden), frames)


def _temporal(conv: nn.Module, hidden: Float[Tensor, "bf c h w"], frames: int) -> Float[Tensor, "bf d h w"]:
    """A Conv3d over the frames of a flat batch, as diffusers' decoder calls it."""
    clips = hidden.unflatten(0, (-1, frames)).transpose(1, 2)
    return conv(clips).transpose(1, 2).flatten(0, 1)


def _flat(clips: Float[Tensor, "b f c h w"]) -> Float[Tensor, "bf c h w"]:
    """All frames along the batch axis, in the memory order which CPUs convolve fastest."""
    return clips.flatten(0, 1).contiguous(memory_format=torch.channels_last)


def _zeroed(conv: nn.Conv2d | nn.Conv3d):
    """The same layer with zero weights and bias."""
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
