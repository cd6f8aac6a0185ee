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
from nerfstudio_enhancer.stereo.depth import StereoConfig, StereoDepth, estimate_depth
from nerfstudio_enhancer.stereo.views import stereo_view


def stereo_depths(
    views: Sequence[ReferenceView],
    depth_ranges: Sequence[tuple[float, float]],
    config: StereoConfig,
    generator: torch.Generator,
) -> list[StereoDepth]:
    """Stereo depth of every reference view, at the resolution of the configuration.

    Args:
        views: reference views.
        depth_ranges: near and far depth of each view, world units.
        config: settings.
        generator: of the refinement's random changes.
    """
    longest = max(config.refine_px, config.sweep_px)
    return estimate_depth([stereo_view(view, longest) for view in views], depth_ranges, config, generator)


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


def trusted_depth(depth: StereoDepth, camera: Cameras) -> Float[Tensor, "H W 1"]:
    """Depth at the pixels of a camera at the same place with the same axes; 0 where it is not trusted.

    Args:
        depth: of the reference view.
        camera: the reference's training camera (shape [1]), whose pinhole matrix and size may be others.
    """
    width, height = int(camera.width.item()), int(camera.height.item())
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    x = (columns - camera.cx.cpu().item()) / camera.fx.cpu().item()
    y = (rows - camera.cy.cpu().item()) / camera.fy.cpu().item()
    (fx, _, cx), (_, fy, cy), _ = depth.view.intrinsics.tolist()
    column, row = (fx * x + cx).floor().long(), (fy * y + cy).floor().long()
    stereo_height, stereo_width = depth.view.size
    inside = (column >= 0) & (row >= 0) & (column < stereo_width) & (row < stereo_height)
    known = torch.where(depth.consistent, depth.depth, torch.zeros_like(depth.depth)).cpu()
    found = known[row.clamp(0, stereo_height - 1), column.clamp(0, stereo_width - 1)]
    return torch.where(inside, found, torch.zeros_like(found))[..., None]


def unexplained_pixels(depth: StereoDepth, view: ReferenceView) -> np.ndarray:
    """Pixels [h, w] of the photograph where stereo has no depth, as if the lens did not distort; bool."""
    import cv2

    holes = (~depth.consistent).cpu().numpy().astype(np.uint8)
    return cv2.resize(holes, (view.width, view.height), interpolation=cv2.INTER_NEAREST).astype(bool)
