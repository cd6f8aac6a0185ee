"""Clips of any camera brought to the picture size of a prior and back: scaled alike in both directions, padded, never stretched."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffusion_prior.conditioning import fov_of_columns
from diffusion_prior.sampling_config import Fit
from diffusion_prior.types import ConditionClip


@dataclass(frozen=True)
class FittedClip:
    """A clip at the size that is sampled, and the way back."""

    clip: ConditionClip
    height: int
    """Of the camera's pictures, in pixels."""
    width: int
    scaled_height: int
    """Of the pictures inside the padding."""
    scaled_width: int
    top: int
    """Rows of padding above the pictures."""
    left: int

    def restore(self, rgb: Float[Tensor, "t 3 h w"]) -> Float[Tensor, "t 3 h2 w2"]:
        """Sampled frames at the camera's size: padding cut off, scaled back."""
        rows = slice(self.top, self.top + self.scaled_height)
        columns = slice(self.left, self.left + self.scaled_width)
        return _resized(rgb[..., rows, columns], self.height, self.width).clamp(0, 1)


def fit_clip(clip: ConditionClip, fit: Fit, frame_size: tuple[int, int] | None) -> FittedClip:
    """Bring a clip to the size that is sampled.

    Args:
        clip: pictures of any size.
        fit: see `SamplingConfig.fit`; auto must have been decided.
        frame_size: height and width in pixels of the prior's frames; None with as-is only.

    Raises:
        ValueError: no frame size where one is needed.
    """
    height, width = clip.rgb.shape[-2:]
    if fit == "as-is":
        return FittedClip(clip, height, width, height, width, 0, 0)
    if frame_size is None:
        raise ValueError(f"fit={fit!r} needs a `frame_size`, for example 512 512: this prior has none of its own.")
    scale = _scale(height, width, frame_size, fit)
    scaled = max(1, round(height * scale)), max(1, round(width * scale))
    padded = frame_size if fit == "pad" else scaled
    top, left = (padded[0] - scaled[0]) // 2, (padded[1] - scaled[1]) // 2
    pictures = {
        name: _padded(_resized(value, *scaled), padded, top, left) for name, value in _pictures(clip, height, width)
    }
    fov = clip.fov_x_rad
    if fov is not None and padded[1] != scaled[1]:
        fov = float(fov_of_columns(torch.tensor(fov, dtype=torch.float64), padded[1], scaled[1]))
    return FittedClip(replace(clip, **pictures, fov_x_rad=fov), height, width, *scaled, top, left)


ONE_TILE = 0.9
"""Pictures whose sides are nearly those of the prior's frames are reduced by so much at most, to be sampled as one tile."""


def _scale(height: int, width: int, frame_size: tuple[int, int], fit: Fit) -> float:
    """Factor of both sides; never above 1, since enlarged pictures only cost."""
    sides = frame_size[0] / height, frame_size[1] / width
    within, covering = min(1.0, *sides), min(1.0, max(sides))
    return within if fit == "pad" or within >= ONE_TILE * covering else covering


def _pictures(clip: ConditionClip, height: int, width: int) -> list[tuple[str, Tensor]]:
    """Everything in a clip that is a picture per frame, whatever fields it has."""
    named = ((entry.name, getattr(clip, entry.name)) for entry in fields(clip))
    return [
        (name, value)
        for name, value in named
        if isinstance(value, Tensor) and value.ndim == 4 and tuple(value.shape[-2:]) == (height, width)
    ]


def _resized(frames: Float[Tensor, "t c h w"], height: int, width: int) -> Float[Tensor, "t c h2 w2"]:
    if tuple(frames.shape[-2:]) == (height, width):
        return frames
    return F.interpolate(frames, (height, width), mode="bilinear", antialias=True, align_corners=False)


def _padded(frames: Float[Tensor, "t c h w"], size: tuple[int, int], top: int, left: int) -> Float[Tensor, "t c h2 w2"]:
    """Repeat the border outwards."""
    rows = (torch.arange(size[0], device=frames.device) - top).clamp(0, frames.shape[-2] - 1)
    columns = (torch.arange(size[1], device=frames.device) - left).clamp(0, frames.shape[-1] - 1)
    return frames[..., rows[:, None], columns]
