"""Slanted refinement: PatchMatch over planes, vectorised.

Inverse depth of a plane in space is affine in the pixel: w(u + du, v + dv) = w + gu du + gv dv. So a pixel's plane is
three numbers, its patch is warped exactly, and a neighbour's plane is a candidate after one multiplication.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nerfstudio_enhancer.stereo.config import RefineConfig
from nerfstudio_enhancer.stereo.patches import Patches
from nerfstudio_enhancer.stereo.views import StereoView


@dataclass(frozen=True)
class Planes:
    """The plane of each pixel of one view, and how well it matches."""

    state: Float[Tensor, "3 h w"]
    """Inverse depth at the pixel and its change per pixel along u and v."""
    cost: Float[Tensor, "h w"]
    """Matching cost in [0, 1]."""


def refine(
    view: StereoView,
    sources: Sequence[StereoView],
    inverse_depth: Float[Tensor, "h w"],
    step: float,
    bounds: tuple[float, float],
    config: RefineConfig,
    generator: torch.Generator,
) -> Planes:
    """Slanted planes that match best, from a first inverse depth.

    A candidate is taken wherever it matches better and is no rougher.

    Args:
        view: the view.
        sources: its sources.
        inverse_depth: where to start.
        step: distance of the sweep's planes; random changes start at half of it and shrink.
        bounds: smallest and largest inverse depth.
        config: settings.
        generator: of the random changes, on the CPU.
    """
    patches = Patches(view, sources, config)
    slopes = torch.stack(_gradients(inverse_depth)).clamp(-step, step)
    state = torch.cat([inverse_depth[None], slopes])
    cost = patches.cost(state)
    for iteration in range(config.iterations):
        for tried in _candidates(state, step * 0.5 ** (iteration + 1), generator):
            candidate = torch.cat([tried[:1].clamp(*bounds), tried[1:]])
            candidate_cost = patches.cost(candidate)
            said = _said_by_neighbours(state)
            rougher = _roughness(candidate, said, step) - _roughness(state, said, step)
            better = candidate_cost + config.smoothness * rougher < cost
            state = torch.where(better, candidate, state)
            cost = torch.where(better, candidate_cost, cost)
    return Planes(state, cost)


def _candidates(state: Float[Tensor, "3 h w"], size: float, generator: torch.Generator) -> Iterator[Tensor]:
    """Planes of neighbours continued to here, then random changes (standard deviation `size`) of what was there."""
    for distance in NEIGHBOUR_DISTANCES_PX:
        for rows, columns in SIDES:
            yield _continued(state, rows * distance, columns * distance)
    noise = torch.randn(state.shape, generator=generator).to(state) * size
    noise[1:] *= TILT_SHARE
    yield state + noise
    tilt = torch.randn(state.shape, generator=generator).to(state) * size * TILT_SHARE
    tilt[0] = 0
    yield state + tilt


NEIGHBOUR_DISTANCES_PX = (1, 4)
"""How far away the neighbours are whose planes are tried."""

SIDES = ((0, 1), (0, -1), (1, 0), (-1, 0))

TILT_SHARE = 0.25
"""Size of a random change of slope per pixel, relative to that of the inverse depth."""


def _continued(state: Float[Tensor, "3 h w"], rows: int, columns: int) -> Float[Tensor, "3 h w"]:
    """The planes of the pixels so many rows above and columns to the left, continued to here."""
    moved = state.roll((rows, columns), (1, 2)).clone()
    moved[0] += moved[1] * columns + moved[2] * rows
    return moved


def _said_by_neighbours(state: Float[Tensor, "3 h w"]) -> Float[Tensor, "h w"]:
    """Median (of four: the mean of the middle two) inverse depth that neighbours two pixels away would have here."""
    ordered = torch.stack([_continued(state, 2 * row, 2 * column)[0] for row, column in SIDES]).sort(dim=0).values
    return (ordered[1] + ordered[2]) / 2


def _roughness(planes: Float[Tensor, "3 h w"], said: Float[Tensor, "h w"], step: float) -> Float[Tensor, "h w"]:
    """Distance in steps to what the neighbours say, at most 1."""
    return ((planes[0] - said).abs() / step).clamp(max=1)


def _gradients(image: Float[Tensor, "h w"]) -> tuple[Tensor, Tensor]:
    padded = F.pad(image[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    return (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2, (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
