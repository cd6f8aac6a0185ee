"""Coarse repair: large shapes and their colours, by direct regression on small pictures, before the video is sampled.

Most of the error of splats of few views lies in what no reference sees, and there in large, wrong, opaque shapes. Neither
latents of eight pixels nor a decoder with a short reach mend those. Here several small networks look at whole frames at a
fraction of their size and say what colours are missing; a gate decides how much of it is believed.

The gate makes it safe: each network is trained without the scenes of one fold, and the gate learns from what a network
says of scenes that it has never seen (stacking: Wolpert, Neural Networks 5(2), 1992). It so learns how far such networks can
be trusted on new scenes, which their own training error does not tell.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_prior.std import ResidualBlock
from diffusion_prior.types import WARP_CHANNELS, ConditionClip

COARSE_CHANNELS = 17
"""Render 3, opacity 1, disparity 1, first reference 3, last reference 3, the mean colour of both 3, the mean colour of both in
the same row 3; `WARP_CHANNELS` follow for each warped reference."""
STEP = 0.5
"""What an output of 1 of a network adds to colours: a small change of its weights is a small change of colours."""


class CoarseRepair(ModelMixin, ConfigMixin):
    """Small networks, one for each fold of the training scenes, and the gate over what they say."""

    @register_to_config
    def __init__(
        self,
        side: int = 40,
        folds: int = 4,
        warped_references: int = 2,
        widths: Sequence[int] = (16, 32, 64, 128),
        gate_widths: Sequence[int] = (16, 32, 48),
        dropout: float = 0.1,
    ) -> None:
        """Build it untrained: it then changes nothing.

        Args:
            side: longer side of the small pictures, in pixels.
            folds: number of networks; at least 2.
            warped_references: how many warped references it looks at.
            widths: channels of each network from fine to coarse, each half the size of the one before.
            gate_widths: the same for the gate.
            dropout: share of the coarsest channels that training leaves out.

        Raises:
            ValueError: for fewer than 2 folds, or a side below 8 pixels.
        """
        super().__init__()
        if folds < 2:
            raise ValueError(f"`folds` must be at least 2, so that every scene is new to some network, got {folds}.")
        if side < 8:
            raise ValueError(f"`side` must be at least 8 pixels, got {side}.")
        channels = COARSE_CHANNELS + WARP_CHANNELS * warped_references
        self.members = nn.ModuleList(SmallUNet(channels, 3, tuple(widths), dropout) for _ in range(folds))
        self.gate = SmallUNet(channels + 3, 1, tuple(gate_widths), 0.0)

    @property
    def folds(self) -> int:
        """Number of networks."""
        return len(self.members)

    def condition(self, clip: ConditionClip) -> Float[Tensor, "t c h2 w2"]:
        """What the networks see of a clip: small pictures of every frame; values in [0, 1]."""
        warped = clip.warps(self.config["warped_references"])
        told = coarse_condition(
            clip.rgb[None], clip.alpha[None], clip.disparity[None], warped[None], self.config["side"]
        )[0]
        return told.to(next(self.parameters()))

    def missing(self, told: Float[Tensor, "n c h w"], member: int | None = None) -> Float[Tensor, "n 3 h w"]:
        """What has to be added to the renders, as one network says, or all of them in the mean."""
        chosen = self.members if member is None else [self.members[member]]
        said = [network(told) for network in chosen]
        return STEP * torch.stack(said).mean(dim=0)

    def believed(self, told: Float[Tensor, "n c h w"], missing: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1 h w"]:
        """How much of it is added, in [0, 1]: what the gate says, which is told where a reference sees what is shown."""
        return torch.sigmoid(self.gate(torch.cat([told, missing], dim=1)))

    @torch.no_grad()
    def repaired(self, clip: ConditionClip) -> ConditionClip:
        """The clip with its renders mended; the references at its ends stay as they are, bit for bit."""
        told = self.condition(clip)
        missing = self.missing(told)
        rgb = (clip.rgb + _enlarged(self.believed(told, missing) * missing, clip.rgb)).clamp(0, 1)
        rgb[0], rgb[-1] = clip.rgb[0], clip.rgb[-1]
        return replace(clip, rgb=rgb)

    @torch.no_grad()
    def anchored(self, frames: Float[Tensor, "t 3 h w"], repaired: ConditionClip) -> Float[Tensor, "t 3 h w"]:
        """Frames that were made of a repaired clip, with its large shapes where no reference sees what is shown.

        A decoder adds detail, and draws colours back to what it would have made of the clip unmended.

        Args:
            frames: in [0, 1].
            repaired: what `repaired` gave.
        """
        side = self.config["side"]
        told = self.condition(repaired)
        astray = told[:, :3] - shrunk(frames[None].to(told), side)[0]
        return (frames + _enlarged(unseen(told) * astray, frames)).clamp(0, 1)


def _enlarged(small: Float[Tensor, "t 3 h w"], like: Float[Tensor, "t 3 h2 w2"]) -> Float[Tensor, "t 3 h2 w2"]:
    """Small pictures at the size, in the type and on the device of others."""
    return F.interpolate(small, size=like.shape[-2:], mode="bicubic", align_corners=False).to(like)


def unseen(told: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 1 h w"]:
    """Of a coarse condition: 1 where no warped reference sees what the render shows, 0 where one does."""
    seen = told[:, COARSE_CHANNELS + WARP_CHANNELS - 1 :: WARP_CHANNELS]
    return 1 - seen.amax(dim=1, keepdim=True) if seen.shape[1] else torch.ones_like(told[:, :1])


def coarse_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width of the small pictures: the longer one is `side`, the picture is not stretched, none is enlarged."""
    scale = min(1.0, side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def coarse_condition(
    rgb: Float[Tensor, "b t 3 h w"],
    alpha: Float[Tensor, "b t 1 h w"],
    disparity: Float[Tensor, "b t 1 h w"],
    warped: Float[Tensor, "b t warps h w"],
    side: int,
) -> Float[Tensor, "b t c h2 w2"]:
    """Small pictures of clips, and what the references at their ends have for colours.

    Args:
        rgb: renders in [0, 1]; the first and the last frame are reference photographs.
        alpha: opacity in [0, 1].
        disparity: `conditioning.normalised_disparity`.
        warped: see `ConditionClip.warped`.
        side: longer side of the small pictures.
    """
    own = shrunk(torch.cat([rgb, alpha, disparity, warped], dim=2), side)
    frames, height, width = own.shape[1], *own.shape[-2:]
    ends = own[:, [0, -1], :3]
    first, last = (repeat(ends[:, at], "b c h w -> b t c h w", t=frames) for at in (0, 1))
    mean = repeat(ends.mean(dim=(1, 3, 4)), "b c -> b t c h w", t=frames, h=height, w=width)
    rows = repeat(ends.mean(dim=(1, 4)), "b c h -> b t c h w", t=frames, w=width)
    return torch.cat([own[:, :, :5], first, last, mean, rows, own[:, :, 5:]], dim=2)


def shrunk(pictures: Float[Tensor, "b t c h w"], side: int) -> Float[Tensor, "b t c h2 w2"]:
    """Pictures whose longer side is `side`, each pixel the mean of those that it stands for."""
    height, width = pictures.shape[-2:]
    flat = F.adaptive_avg_pool2d(pictures.flatten(0, 1), coarse_size(height, width, side))
    return flat.unflatten(0, pictures.shape[:2])


class SmallUNet(nn.Module):
    """Residual blocks at several scales, and what the whole picture says added at the coarsest; its output begins at 0."""

    def __init__(self, in_channels: int, out_channels: int, widths: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(_two_blocks(width) for width in widths)
        self.downsamplers = nn.ModuleList(
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in itertools.pairwise(widths)
        )
        self.whole = nn.Linear(widths[-1], widths[-1])
        self.dropout = nn.Dropout2d(dropout)
        self.upsamplers = nn.ModuleList(
            nn.Conv2d(coarse, fine, 3, padding=1) for fine, coarse in itertools.pairwise(widths)
        )
        self.up_blocks = nn.ModuleList(_two_blocks(width) for width in widths[:-1])
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(cast(Tensor, self.conv_out.bias))

    def forward(self, told: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o h w"]:
        """Of values in [0, 1]."""
        hidden = self.conv_in((told * 2 - 1).contiguous(memory_format=torch.channels_last))
        finer = []
        for block, downsample in zip(self.down_blocks, self.downsamplers):
            hidden = block(hidden)
            finer.append(hidden)
            hidden = downsample(hidden)
        hidden = self.down_blocks[-1](hidden)
        hidden = self.dropout(hidden + self.whole(hidden.mean(dim=(2, 3)))[:, :, None, None])
        levels = list(zip(finer, self.upsamplers, self.up_blocks))
        for skipped, upsample, block in reversed(levels):
            hidden = F.interpolate(hidden, size=skipped.shape[-2:], mode="nearest")
            hidden = block(upsample(hidden) + skipped)
        return self.conv_out(hidden)


def _two_blocks(width: int) -> nn.Sequential:
    """Begins as the identity: networks without norms otherwise grow with their depth."""
    blocks = [ResidualBlock(width) for _ in range(2)]
    for block in blocks:
        nn.init.zeros_(block.conv2.weight)
        nn.init.zeros_(cast(Tensor, block.conv2.bias))
    return nn.Sequential(*blocks)
