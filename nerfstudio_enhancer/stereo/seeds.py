"""From reference views to trusted points: the stereo depth of every view, and points spread over what it shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nerfstudio_enhancer.initial_splats import ReferenceView, SeedPoints
from nerfstudio_enhancer.projection import back_project
from nerfstudio_enhancer.stereo.config import StereoConfig
from nerfstudio_enhancer.stereo.depth import StereoDepth
from nerfstudio_enhancer.stereo.predict import DepthDistribution
from nerfstudio_enhancer.stereo.views import StereoView, stereo_view


def stereo_views(views: Sequence[ReferenceView], config: StereoConfig) -> list[StereoView]:
    """The reference photographs without lens distortion, at the resolution of the configuration."""
    longest = max(config.refine_px, config.sweep_px)
    return [stereo_view(view, longest) for view in views]


def consistent_points(depths: Sequence[StereoDepth], most: int, generator: torch.Generator) -> SeedPoints:
    """World points and colours of pixels with consistent depth, at most so many, drawn evenly among all of them."""
    xyz, rgb = [], []
    for depth in depths:
        chosen = depth.consistent
        rgb.append((depth.view.rgb[chosen] * 255).round().to(torch.uint8))
        xyz.append(world_points(depth)[chosen])
    every_xyz, every_rgb = torch.cat(xyz), torch.cat(rgb)
    if len(every_xyz) > most:
        kept = torch.randperm(len(every_xyz), generator=generator)[:most].sort().values
        every_xyz, every_rgb = every_xyz[kept], every_rgb[kept]
    return SeedPoints(every_xyz.float().cpu(), every_rgb.cpu(), len(every_xyz))


def world_points(depth: StereoDepth) -> Float[Tensor, "h w 3"]:
    """Where each pixel's ray meets its depth; the camera's centre where there is none."""
    view = depth.view
    return back_project(depth.depth.double().cpu(), view.intrinsics, torch.linalg.inv(view.world_to_camera))


def known_depth(depth: StereoDepth, camera: Cameras) -> Float[Tensor, "H W 2"]:
    """Depth at the pixels of a camera at the same place with the same axes, and how certain it is, in [0, 1].

    Certainty is 1 where stereo is trusted. Elsewhere the depth is the median of the depth network, whose certainty falls
    with the spread of its distribution; without the network it is 0.

    Args:
        depth: of the reference view.
        camera: the reference's training camera (shape [1]), whose pinhole matrix and size may be others.
    """
    known = torch.where(depth.consistent, depth.depth, torch.zeros_like(depth.depth))
    values = torch.stack([known, depth.consistent.to(known)], dim=-1)
    found = _looked_up(values, depth.view, camera)
    if depth.likely is None:
        return found
    likely = depth.likely
    low, median, high = (likely.quantile(share) for share in (0.75, 0.5, 0.25))  # shares count from far to near
    certainty = 1 / (1 + (torch.log(high / low) / LIKELY_SPREAD) ** 2)
    guessed = _looked_up(torch.stack([median, certainty], dim=-1), likely.view, camera)
    return torch.where(found[..., 1:] > 0, found, guessed)


LIKELY_SPREAD = 0.1
"""Logarithm of the quartiles' ratio at which the network's depth counts half as certain."""


def _looked_up(values: Float[Tensor, "h w c"], view: StereoView, camera: Cameras) -> Float[Tensor, "H W c"]:
    """Nearest values of a view's picture at the pixels of a camera that stands where it does; 0 beyond its sides."""
    width, height = int(camera.width.item()), int(camera.height.item())
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    x = (columns - camera.cx.cpu().item()) / camera.fx.cpu().item()
    y = (rows - camera.cy.cpu().item()) / camera.fy.cpu().item()
    (fx, _, cx), (_, fy, cy), _ = view.intrinsics.tolist()
    column, row = (fx * x + cx).floor().long(), (fy * y + cy).floor().long()
    own_height, own_width = view.size
    inside = (column >= 0) & (row >= 0) & (column < own_width) & (row < own_height)
    found = values.cpu()[row.clamp(0, own_height - 1), column.clamp(0, own_width - 1)]
    return torch.where(inside[..., None], found, torch.zeros_like(found))


def unexplained_pixels(depth: StereoDepth, view: ReferenceView) -> np.ndarray:
    """Pixels [h, w] of the photograph where stereo has no depth, as if the lens did not distort; bool."""
    import cv2

    holes = (~depth.consistent).cpu().numpy().astype(np.uint8)
    return cv2.resize(holes, (view.width, view.height), interpolation=cv2.INTER_NEAREST).astype(bool)


def drawn_depth(
    distribution: DepthDistribution, straight: Float[np.ndarray, "m 2"], share: Float[np.ndarray, " m"]
) -> Float[np.ndarray, " m"]:
    """Depth on rays (x / z, y / z) drawn from a view's distribution by uniform numbers in [0, 1)."""
    view = distribution.view
    (fx, _, cx), (_, fy, cy), _ = view.intrinsics.tolist()
    height, width = view.size
    column = np.clip(straight[:, 0] * fx + cx, 0, width - 1).astype(np.int64)
    row = np.clip(straight[:, 1] * fy + cy, 0, height - 1).astype(np.int64)
    device = distribution.probability.device
    where = (torch.from_numpy(row).to(device), torch.from_numpy(column).to(device))
    return distribution.draw(*where, torch.from_numpy(share).to(device)).double().cpu().numpy()
