"""What the depth network is shown: few photographs of a scene as reference views, with matching costs and true depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffusion_prior.files import whole_file
from nerfstudio_enhancer.conventions import world_to_camera_opencv
from nerfstudio_enhancer.initial_splats import SeedPointsConfig
from nerfstudio_enhancer.projection import back_project, project
from nerfstudio_enhancer.stereo.depth_network import DepthNetworkConfig
from nerfstudio_enhancer.stereo.predict import NETWORK_PX, costs_of, rays
from nerfstudio_enhancer.stereo.views import LUMA, StereoView, choose_sources

SETS = ((3, 5), (4, 3), (6, 2), (9, 2), (12, 1))
"""Numbers of reference views, and how many sets of each."""

CONFIRMED_BY = 6
"""Nearest other views that are asked whether they see the same depth."""

DEPTH_TOLERANCE = 0.05
"""Relative difference up to which they do."""

ENOUGH_PIXELS = 400
"""A view of which the others see fewer pixels takes the depth range of all, as in `initial_splats`."""

RANGE_JITTER = 0.08
"""Standard deviation of the logarithm of a factor on either end of the depth range."""


@dataclass(frozen=True)
class _View:
    stereo: StereoView
    depth: Float[Tensor, "h w"]
    trusted: Bool[Tensor, "h w"]


def make_samples(depth_path: Path, output: Path, seed: int) -> None:
    """Draw sets of references from a scene and store a sample for each of their views.

    The file holds the photographs (`rgb`: list of uint8 [h w 3]) and `samples`, a list of dictionaries: `view` (index of the
    photograph), `cost` uint8 [d h w], `inverse_depth` (0 at the farthest plane, 1 at the nearest; half), `trusted` bool
    [h w], `rays` half [3 h w].
    """
    stored = torch.load(depth_path, weights_only=True)
    views = _read_views(stored)
    generator = np.random.default_rng(seed)
    seen: dict[tuple[int, int], Tensor] = {}
    samples = []
    for num_views, count in SETS:
        if num_views >= len(views):
            continue
        for number in range(count):
            chosen = _drawn_set(len(views), num_views, whole=number == 0, generator=generator)
            samples += _samples_of_set(views, chosen, generator, seen)
    with whole_file(output) as partial:
        torch.save({"rgb": [view["rgb"] for view in stored], "samples": samples}, partial)


def _read_views(stored: Sequence[dict]) -> list[_View]:
    stereo = [_stereo_view(view) for view in stored]
    depths = [view["depth"] for view in stored]
    read = []
    for index, view in enumerate(stored):
        confirmed = torch.zeros(depths[index].shape, dtype=torch.bool)
        for other in _nearest(stereo, index)[:CONFIRMED_BY]:
            confirmed |= confirmed_by(stereo[index], depths[index], stereo[other], depths[other])
        read.append(_View(stereo[index], depths[index], confirmed & (view["alpha"] > 127)))
    return read


def _stereo_view(view: dict) -> StereoView:
    rgb = view["rgb"].float() / 255
    fx, fy, cx, cy = view["intrinsics"].double().tolist()
    matrix = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)
    grey = rgb @ rgb.new_tensor(LUMA)
    pose = world_to_camera_opencv(view["camera_to_world"][None].double())[0]
    return StereoView(rgb, grey, torch.ones_like(grey, dtype=torch.bool), matrix, pose)


def _nearest(views: Sequence[StereoView], index: int) -> list[int]:
    centres = torch.stack([view.centre for view in views])
    forward = torch.stack([view.world_to_camera[2, :3] for view in views])
    turn = torch.arccos((forward @ forward[index]).clamp(-1, 1))
    cost = (centres - centres[index]).norm(dim=1) + turn
    cost[index] = torch.inf
    return cost.argsort(stable=True).tolist()[:-1]


def confirmed_by(
    view: StereoView, depth: Float[Tensor, "h w"], other: StereoView, other_depth: Float[Tensor, "H W"]
) -> Bool[Tensor, "h w"]:
    """Pixels whose point another view sees at the depth it has there."""
    points = back_project(depth.double(), view.intrinsics, torch.linalg.inv(view.world_to_camera))
    pixel, distance = project(points, other.intrinsics, other.world_to_camera)
    height, width = other.size
    grid = pixel / pixel.new_tensor([width, height]) * 2 - 1
    shown = torch.nn.functional.grid_sample(
        other_depth.double()[None, None], grid[None], padding_mode="border", align_corners=False
    )[0, 0]
    inside = (grid.abs().amax(-1) <= 1) & (distance > 1e-6)
    return inside & ((shown / distance.clamp(min=1e-6) - 1).abs() < DEPTH_TOLERANCE)


def _drawn_set(count: int, num_views: int, whole: bool, generator: np.random.Generator) -> list[int]:
    """Views spread over the capture or, unless `whole`, unevenly over a part of it."""
    if whole:
        return sorted({int(i) for i in np.linspace(0, count - 1, num_views).round()})
    span = max(num_views + 1, int(count * generator.uniform(0.35, 1.0)))
    start = int(generator.integers(0, count - span + 1))
    moved = generator.uniform(-0.3, 0.3, num_views) * span / num_views
    places = np.linspace(start, start + span - 1, num_views) + moved
    return sorted({int(i) for i in places.round().clip(0, count - 1)})


def _samples_of_set(
    views: Sequence[_View], chosen: Sequence[int], generator: np.random.Generator, seen: dict[tuple[int, int], Tensor]
) -> list[dict]:
    visible = [_seen_by_others(views, index, chosen, seen) for index in chosen]
    everything = torch.cat(visible)
    if len(chosen) < 2 or len(everything) < ENOUGH_PIXELS // 2:
        return []
    ranges = [_depth_range(own if len(own) > ENOUGH_PIXELS else everything, generator) for own in visible]
    stereo = [views[index].stereo for index in chosen]
    small = [view.resized(min(NETWORK_PX, max(view.size))) for view in stereo]
    samples = []
    num_planes = DepthNetworkConfig().num_planes
    for number, others in enumerate(choose_sources(stereo, ranges, 4)):
        near, far = ranges[number]
        planes = torch.linspace(1 / far, 1 / near, num_planes)
        cost = costs_of(small[number], [small[i] for i in others], planes)
        view = views[chosen[number]]
        rows, columns = (
            ((torch.arange(to) + 0.5) / to * of).long() for to, of in zip(small[number].size, view.stereo.size)
        )
        inverse = (1 / view.depth[rows][:, columns] - 1 / far) / (1 / near - 1 / far)
        samples.append(
            {
                "view": chosen[number],
                "cost": (cost * 255).round().to(torch.uint8),
                "inverse_depth": inverse.clamp(-1, 2).half(),
                "trusted": view.trusted[rows][:, columns],
                "rays": rays(small[number], ranges[number]).half(),
            }
        )
    return samples


def _seen_by_others(views: Sequence[_View], index: int, chosen: Sequence[int], seen: dict) -> Float[Tensor, " n"]:
    """True depths of a view's pixels that another view of the set sees too."""
    visible = torch.zeros(views[index].stereo.size, dtype=torch.bool)
    for other in chosen:
        if other != index:
            if (index, other) not in seen:
                a, b = views[index], views[other]
                seen[index, other] = confirmed_by(a.stereo, a.depth, b.stereo, b.depth)
            visible |= seen[index, other]
    return views[index].depth[visible & views[index].trusted]


def _depth_range(depths: Float[Tensor, " n"], generator: np.random.Generator) -> tuple[float, float]:
    """As triangulated points give it in `initial_splats`, a little off."""
    seeds = SeedPointsConfig()
    near, far = np.quantile(depths[:: max(1, len(depths) // 2000)], [seeds.depth_quantile, 1 - seeds.depth_quantile])
    off = np.exp(generator.normal(0, RANGE_JITTER, 2))
    return float(near * seeds.stereo.nearer * off[0]), float(far * seeds.stereo.farther * off[1])
