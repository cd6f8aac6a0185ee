"""Depth of all reference views: sweep, refine, and keep what the views say alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nerfstudio_enhancer.projection import NEAREST, back_project, project
from nerfstudio_enhancer.stereo.config import StereoConfig, SweepConfig
from nerfstudio_enhancer.stereo.predict import DepthDistribution
from nerfstudio_enhancer.stereo.refine import Planes, refine
from nerfstudio_enhancer.stereo.sweep import (
    aggregate,
    inverse_depth_planes,
    matching_cost,
    pixel_grid,
    winner,
)
from nerfstudio_enhancer.stereo.views import StereoView, choose_sources
from nerfstudio_enhancer.threads import map_on_threads

ALL_AGREE_UP_TO = 32
"""Views among which each is held against every other; among more, most do not overlap."""


@dataclass(frozen=True)
class StereoDepth:
    """What stereo says of one reference view."""

    view: StereoView
    """The picture at the depth map's resolution, and its camera."""
    depth: Float[Tensor, "h w"]
    """Along the optical axis, world units."""
    consistent: Bool[Tensor, "h w"]
    """Pixels whose depth is trusted."""
    likely: DepthDistribution | None = None
    """What the depth network says of every pixel, trusted or not; None without it."""


def estimate_depth(
    views: Sequence[StereoView],
    depth_ranges: Sequence[tuple[float, float]],
    config: StereoConfig,
    generator: torch.Generator,
) -> list[StereoDepth]:
    """Depth of every view; nothing is consistent where no other view overlaps.

    Args:
        views: undistorted reference views; those smaller than `refine_px` keep their size.
        depth_ranges: near and far depth of each view, world units.
        config: settings.
        generator: of the refinement's random changes.
    """
    fine = [view.resized(min(config.refine_px, max(view.size))) for view in views]
    coarse = [view.resized(min(config.sweep_px, max(view.size))) for view in views]
    sources = choose_sources(fine, depth_ranges, config.max_sources)
    # Of each view's own: what is drawn must not depend on which thread comes first.
    seeds = torch.randint(1 << 62, (len(views),), generator=generator).tolist()

    def planes_of(index: int) -> Planes | None:
        others = sources[index]
        if not others:
            return None
        seen, beside = fine[index], [fine[i] for i in others]
        inverse, planes = _swept(coarse[index], [coarse[i] for i in others], depth_ranges[index], config.sweep)
        inverse = F.interpolate(inverse[None, None], seen.size, mode="nearest")[0, 0]
        bounds, step = (float(planes[0]), float(planes[-1])), float(planes[1] - planes[0])
        own = torch.Generator().manual_seed(seeds[index])
        return refine(seen, beside, inverse, step, bounds, config.refine, own)

    found = map_on_threads(planes_of, range(len(views)))
    others = [_that_may_agree(index, sources) for index in range(len(fine))]
    return map_on_threads(lambda index: _checked(index, others[index], fine, found, config), range(len(fine)))


def _that_may_agree(index: int, sources: Sequence[Sequence[int]]) -> list[int]:
    """Views that may confirm a view's depth: all of few; of many, its sources and those whose source it is."""
    if len(sources) <= ALL_AGREE_UP_TO:
        return [other for other in range(len(sources)) if other != index]
    return sorted({*sources[index], *(other for other, theirs in enumerate(sources) if index in theirs)})


def _swept(
    view: StereoView, sources: Sequence[StereoView], depth_range: tuple[float, float], config: SweepConfig
) -> tuple[Float[Tensor, "h w"], Float[Tensor, " d"]]:
    """First inverse depth of a view, and the planes that were tried."""
    planes = inverse_depth_planes(view, sources, depth_range, config)
    cost = matching_cost(view, sources, planes, config)
    return winner(aggregate(cost, view.grey, config), planes), planes


def _checked(
    index: int,
    others: Sequence[int],
    views: Sequence[StereoView],
    planes: Sequence[Planes | None],
    config: StereoConfig,
) -> StereoDepth:
    """One view's depth and where others confirm it."""
    view, own = views[index], planes[index]
    agreeing = torch.zeros(view.size, dtype=torch.int64, device=view.grey.device)
    if own is None:
        return StereoDepth(view, torch.zeros_like(view.grey), agreeing.bool())
    depth = 1 / own.state[0]
    for other in others:
        theirs = planes[other]
        if theirs is not None:
            agreeing += _agrees(view, depth, views[other], 1 / theirs.state[0], config)
    consistent = (agreeing >= config.min_agreeing) & (own.cost <= config.max_cost) & view.usable
    return StereoDepth(view, depth, consistent)


def _agrees(
    view: StereoView,
    depth: Float[Tensor, "h w"],
    other: StereoView,
    other_depth: Float[Tensor, "other_h other_w"],
    config: StereoConfig,
) -> Bool[Tensor, "h w"]:
    """Pixels that come back to themselves through the other view's depth."""
    camera_to_world, other_to_world = (torch.linalg.inv(v.world_to_camera) for v in (view, other))
    # In one camera's axes, so that single precision suffices wherever the scene's origin is.
    to_other, back = other.world_to_camera @ camera_to_world, view.world_to_camera @ other_to_world
    own = torch.eye(4, dtype=torch.float64)
    pixel, distance = project(back_project(depth, view.intrinsics, own), other.intrinsics, to_other)
    height, width = other.size
    inside = (distance > NEAREST) & (pixel >= 0).all(-1) & (pixel[..., 0] < width) & (pixel[..., 1] < height)
    column, row = pixel[..., 0].long().clamp(0, width - 1), pixel[..., 1].long().clamp(0, height - 1)
    # The other view's depth at the centre of its pixel, looked at from here.
    in_other = back_project(other_depth, other.intrinsics, own)[row, column]
    returned, here = project(in_other, view.intrinsics, back)
    moved = (returned - pixel_grid(view)[:2].movedim(0, -1)).norm(dim=-1)
    relative = (here - depth).abs() / depth.clamp(min=NEAREST)
    its_depth = other_depth[row, column]
    return inside & (its_depth > 0) & (moved <= config.max_reprojection_px) & (relative <= config.max_relative_depth)
