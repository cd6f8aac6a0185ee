"""Binocular consistency: a camera a little to the side shows what a photograph shows, moved by what the depth says.

Binocular-Guided 3D Gaussian Splatting (Han et al., NeurIPS 2024, section 3.2): few photographs far apart hardly tell depth, but
each makes a stereo pair with what the splats show beside it. Where their depth is wrong, the pair disagrees.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

LARGEST_SHIFT = 0.1
"""Cameras move sideways by at most this share of the picture's median depth."""
LEAST_DEPTH = 1e-6
"""Smallest depth that is told from others, world units."""


def moved_sideways(viewmat: Float[Tensor, "1 4 4"], shift: Float[Tensor, ""]) -> Float[Tensor, "1 4 4"]:
    """World-to-camera matrix of a camera that stands so much farther to the right, world units."""
    moved = viewmat.clone()
    moved[0, 0, 3] = moved[0, 0, 3] - shift
    return moved


def brought_back(
    beside: Float[Tensor, "h w 3"],
    depth: Float[Tensor, "h w 1"],
    focal_px: Float[Tensor, ""],
    shift: Float[Tensor, ""],
) -> Float[Tensor, "h w 4"]:
    """What the camera beside shows, as this camera would see it if its depth were right: r, g, b and whether it was in view.

    Args:
        beside: what a camera sees that stands `shift` farther to the right.
        depth: what this camera sees, world units; gradients flow into it.
        focal_px: horizontal focal length of both.
        shift: world units, negative to the left.
    """
    height, width = beside.shape[:2]
    disparity = focal_px * shift / depth[..., 0].clamp(min=LEAST_DEPTH)
    x = torch.arange(width, device=beside.device) + 0.5 - disparity
    y = (torch.arange(height, device=beside.device) + 0.5)[:, None].expand_as(x)
    grid = torch.stack([2 * x / width - 1, 2 * y / height - 1], dim=-1)[None]
    shown = torch.nn.functional.grid_sample(
        beside.permute(2, 0, 1)[None], grid, align_corners=False, padding_mode="border"
    )
    inside = ((x > 0) & (x < width)).to(beside)[..., None]
    return torch.cat([shown[0].permute(1, 2, 0), inside], dim=-1)


def binocular_loss(back: Float[Tensor, "h w 4"], photograph: Float[Tensor, "h w 3"]) -> Float[Tensor, ""]:
    """Mean absolute difference where the camera beside had it in view."""
    shown, inside = back.split([3, 1], dim=-1)
    return ((shown - photograph).abs() * inside).sum() / (3 * inside.sum().clamp(min=1))
