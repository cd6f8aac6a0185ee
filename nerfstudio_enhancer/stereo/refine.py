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
from nerfstudio_enhancer.stereo.sweep import UNSEEN, BetterHalf, Relative, pixel_grid
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
    patches = _Patches(view, sources, config)
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


class _Patches:
    """Cost of planes: 1 - weighted ZNCC of patches warped by them, halved."""

    def __init__(self, view: StereoView, sources: Sequence[StereoView], config: RefineConfig) -> None:
        self.sources = sources
        self.floor = config.texture_floor**2
        grid = pixel_grid(view)
        radius = config.patch_radius
        steps = torch.arange(-radius, radius + 1, config.patch_step)
        rows, columns = torch.meshgrid(steps, steps, indexing="ij")
        self.offsets = torch.stack([columns.flatten(), rows.flatten()]).to(view.grey)
        padded = F.pad(view.grey[None, None], (radius,) * 4, mode="replicate")[0, 0]
        height, width = view.size
        self.samples = torch.stack(
            [
                padded[radius + row : radius + row + height, radius + column : radius + column + width]
                for column, row in zip(columns.flatten().tolist(), rows.flatten().tolist())
            ]
        )
        near = torch.exp(-((self.offsets / radius) ** 2).sum(0) / 2)
        alike = torch.exp(-((self.samples - view.grey) ** 2) / (2 * config.colour_sigma**2))
        self.weights = near[:, None, None] * alike
        self.weights = self.weights / self.weights.sum(0)
        self.mean = (self.weights * self.samples).sum(0)
        self.variance = (self.weights * self.samples**2).sum(0) - self.mean**2
        # infinite @ (u + du, v + dv, 1) for all samples is an affine function of the offset.
        self.warps = []
        for source in sources:
            relative = Relative.between(view, source)
            base = torch.einsum("ij,jhw->ihw", relative.infinite, grid)
            self.warps.append((relative, base))

    def cost(self, planes: Float[Tensor, "3 h w"]) -> Float[Tensor, "h w"]:
        """Mean over the better half of the sources that see the whole patch; 0.5 where none does."""
        inverse = planes[0] + planes[1] * self.offsets[0, :, None, None] + planes[2] * self.offsets[1, :, None, None]
        best = BetterHalf(tuple(planes[0].shape), planes)
        for source, (relative, base) in zip(self.sources, self.warps):
            best.add(self._cost_in(source, relative, base, inverse))
        return best.mean()

    def _cost_in(self, source: StereoView, relative: Relative, base: Tensor, inverse: Float[Tensor, "p h w"]) -> Tensor:
        moved = relative.infinite[:, :2] @ self.offsets
        samples, rows, columns = inverse.shape
        z = base[2] + moved[2, :, None, None] + relative.epipole[2] * inverse
        positive = z.clamp(min=1e-6)
        grid = inverse.new_empty(samples, rows, columns, 2)
        for axis in range(2):
            place = torch.addcmul(base[axis] + moved[axis, :, None, None], inverse, relative.epipole[axis])
            torch.div(place, positive, out=grid[..., axis])
        centre = samples // 2
        seen = (grid[centre].abs().amax(-1) <= 1) & (z.amin(0) > 1e-6)
        grid = grid.reshape(1, samples * rows, columns, 2)
        warped = F.grid_sample(source.grey[None, None], grid, padding_mode="border", align_corners=False)
        warped = warped.reshape(samples, rows, columns)
        weighted = self.weights * warped
        mean = weighted.sum(0)
        variance = (weighted * warped).sum(0) - mean**2
        covariance = (weighted * self.samples).sum(0) - mean * self.mean
        correlation = covariance / torch.sqrt(
            (self.variance.clamp(min=0) + self.floor) * (variance.clamp(min=0) + self.floor)
        )
        return torch.where(seen, (1 - correlation) / 2, torch.full_like(mean, UNSEEN))
