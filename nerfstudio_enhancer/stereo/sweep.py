"""First depth of one view: plane sweep, matching by ZNCC, semi-global aggregation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nerfstudio_enhancer.projection import pixel_centres
from nerfstudio_enhancer.stereo.config import SweepConfig
from nerfstudio_enhancer.stereo.views import LUMA, StereoView


@dataclass(frozen=True)
class Relative:
    """From pixels of a view at an inverse depth w to a place in a source: infinite @ (u, v, 1) + w * epipole.

    The places are homogeneous, with -1 and 1 at the sides of the source's picture, as `grid_sample` wants them.
    """

    infinite: Float[Tensor, "3 3"]
    epipole: Float[Tensor, "3"]

    @classmethod
    def between(cls, view: StereoView, source: StereoView) -> Relative:
        """Hartley and Zisserman, eq. 9.7 (K' R K^-1 and K' t), float32 on the device of the view's pictures."""
        relative = source.world_to_camera @ torch.linalg.inv(view.world_to_camera)
        height, width = source.size
        to_sides = torch.tensor([[2 / width, 0, -1], [0, 2 / height, -1], [0, 0, 1]], dtype=torch.float64)
        infinite = to_sides @ source.intrinsics @ relative[:3, :3] @ torch.linalg.inv(view.intrinsics)
        epipole = to_sides @ source.intrinsics @ relative[:3, 3]
        return cls(infinite.to(view.grey), epipole.to(view.grey))


def pixel_grid(view: StereoView) -> Float[Tensor, "3 h w"]:
    """Homogeneous pixel centres (u, v, 1)."""
    return pixel_centres(*view.size, like=view.grey)


def inverse_depth_planes(
    view: StereoView, sources: Sequence[StereoView], depth_range: tuple[float, float], config: SweepConfig
) -> Float[Tensor, " d"]:
    """Inverse depths from far to near, about half a pixel apart in the source that moves most."""
    near, far = depth_range
    moved = [_largest_move_px(view, source, 1 / far, 1 / near) for source in sources]
    count = int(min(max(2 * max(moved), config.min_planes), config.max_planes))
    return torch.linspace(1 / far, 1 / near, count, dtype=view.grey.dtype, device=view.grey.device)


def _largest_move_px(view: StereoView, source: StereoView, far: float, near: float) -> float:
    """How far a pixel's image moves in the source over the range: the median over the view."""
    relative = Relative.between(view, source)
    base = torch.einsum("ij,jhw->ihw", relative.infinite, pixel_grid(view)[:, ::8, ::8])
    a = base + relative.epipole[:, None, None] * far
    b = base + relative.epipole[:, None, None] * near
    ok = (a[2] > 0) & (b[2] > 0)
    if not ok.any():
        return 0.0
    height, width = source.size
    move = (a[:2] / a[2:].clamp(min=1e-9) - b[:2] / b[2:].clamp(min=1e-9)).permute(1, 2, 0)[ok]
    return float((move * move.new_tensor([width / 2, height / 2])).norm(dim=-1).median())


def matching_cost(
    view: StereoView, sources: Sequence[StereoView], planes: Float[Tensor, " d"], config: SweepConfig
) -> Float[Tensor, "h w d"]:
    """Cost in [0, 1] of every plane: correlation of grey and difference of colour, in the sources that match best.

    (1 - ZNCC) / 2 averaged over the windows, mixed with the truncated absolute difference of the colours; then the mean
    over the better half of the sources that see the pixel (an occluded source must not spoil the others). 0.5 where no
    source sees it.
    """
    grid = pixel_grid(view)
    moments = [_moments(view.grey[None], window) for window in config.windows_px]
    best = BetterHalf((len(planes), *view.size), view.grey)
    for source in sources:
        relative = Relative.between(view, source)
        base = torch.einsum("ij,jhw->ihw", relative.infinite, grid)
        cost = view.grey.new_empty(len(planes), *view.size)
        for start in range(0, len(planes), PLANES_AT_ONCE):
            chosen = slice(start, start + PLANES_AT_ONCE)
            warped, seen = _warp(source, base, relative.epipole, planes[chosen])
            cost[chosen] = torch.where(seen, _cost_of(view, warped, moments, config), UNSEEN)
        best.add(cost)
    return best.mean().permute(1, 2, 0).contiguous()


PLANES_AT_ONCE = 16
"""Planes warped at once: bounds the memory, not the result."""

UNSEEN = 2.0
"""Marks costs of pixels that a source does not see; larger than any cost."""


class BetterHalf:
    """Mean over the better half of the sources' costs, up to two of them, without holding them all."""

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        self.first = like.new_full(shape, UNSEEN)
        self.second = like.new_full(shape, UNSEEN)
        self.seen = like.new_zeros(shape)

    def add(self, cost: Tensor) -> None:
        """Take one source's costs (UNSEEN where it does not see the pixel)."""
        self.second = torch.minimum(self.second, torch.maximum(self.first, cost))
        self.first = torch.minimum(self.first, cost)
        self.seen += cost < UNSEEN

    def mean(self) -> Tensor:
        """The mean of the best two where three sources or more see the pixel, else the best one; 0.5 where none does."""
        value = torch.where(self.seen >= 3, (self.first + self.second) / 2, self.first)
        return torch.where(self.seen > 0, value, value.new_tensor(0.5))


def _warp(
    source: StereoView, base: Float[Tensor, "3 h w"], epipole: Float[Tensor, "3"], planes: Float[Tensor, " d"]
) -> tuple[Float[Tensor, "3 d h w"], Bool[Tensor, "d h w"]]:
    """The source's colours as seen from the view if everything lay on a plane, and where it is seen at all."""
    x, y, z = (base[i] + epipole[i] * planes[:, None, None] for i in range(3))
    positive = z.clamp(min=1e-6)
    grid = torch.stack([x / positive, y / positive], dim=-1)
    seen = (grid.abs().amax(-1) <= 1) & (z > 1e-6)
    count, height, width = z.shape
    image = source.rgb.permute(2, 0, 1)[None]
    grid = grid.reshape(1, count * height, width, 2)
    warped = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
    return warped.reshape(3, count, height, width), seen


def _moments(images: Float[Tensor, "n h w"], window: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of the window around each pixel."""
    mean = _box(images, window)
    return mean, (_box(images * images, window) - mean * mean).clamp(min=0)


def _box(images: Float[Tensor, "n h w"], window: int) -> Float[Tensor, "n h w"]:
    """Mean over a square window around each pixel; beyond the border the picture repeats its last pixel."""
    half = window // 2
    padded = F.pad(images[:, None], (half,) * 4, mode="replicate")[:, 0]
    return _window_sum(_window_sum(padded, window, 2), window, 1) / window**2


def _window_sum(values: Tensor, window: int, dim: int) -> Tensor:
    """Sums of `window` neighbours along a dimension, by doubling: pooling on a CPU costs several times more."""
    length = values.shape[dim] - window + 1
    total, done, block, size = None, 0, values, 1
    while True:
        if window & size:
            part = block.narrow(dim, done, length)
            total = part if total is None else total + part
            done += size
        if 2 * size > window:
            assert total is not None
            return total
        block = block.narrow(dim, 0, block.shape[dim] - size) + block.narrow(dim, size, block.shape[dim] - size)
        size *= 2


def _cost_of(view: StereoView, warped: Float[Tensor, "3 d h w"], moments: list, config: SweepConfig) -> Tensor:
    grey = torch.einsum("c,cdhw->dhw", warped.new_tensor(LUMA), warped)
    floor = config.texture_floor**2
    correlation = torch.zeros_like(grey)
    product, square = grey * view.grey, grey * grey
    for window, (mean, variance) in zip(config.windows_px, moments):
        warped_mean = _box(grey, window)
        warped_variance = (_box(square, window) - warped_mean * warped_mean).clamp(min=0)
        covariance = _box(product, window) - mean * warped_mean
        correlation += covariance / torch.sqrt((variance + floor) * (warped_variance + floor))
    correlation /= len(config.windows_px)
    difference = (warped - view.rgb.permute(2, 0, 1)[:, None]).abs_().mean(0)
    difference = (_box(difference, COLOUR_WINDOW_PX) / config.colour_limit).clamp_(max=1)
    return torch.lerp((1 - correlation) / 2, difference, config.colour_share)


COLOUR_WINDOW_PX = 3
"""Side of the window over which colour differences are averaged."""


def aggregate(cost: Float[Tensor, "h w d"], grey: Float[Tensor, "h w"], config: SweepConfig) -> Float[Tensor, "h w d"]:
    """Semi-global aggregation along 8 directions (Hirschmueller 2008, eq. 13), their mean."""
    total = torch.zeros_like(cost)
    for vertical in (True, False):
        values, picture = (cost, grey) if vertical else (cost.transpose(0, 1), grey.T)
        result = total if vertical else total.transpose(0, 1)
        for backward in (False, True):
            for shift in (-1, 0, 1):
                if shift != 0 and not vertical:
                    continue  # the diagonals are the same seen from either side
                _scan(values, picture, result, backward, shift, config)
    return total / 8


def _scan(cost: Tensor, grey: Tensor, total: Tensor, backward: bool, shift: int, config: SweepConfig) -> None:
    """Add the costs of the best path that comes from the row before (shifted sideways) to `total`, row by row."""
    rows = range(len(cost) - 1, -1, -1) if backward else range(len(cost))
    before, before_grey = None, grey[0]
    for row in rows:
        path = cost[row]
        if before is not None:
            come_from = before.roll(shift, 0) if shift else before
            step = (grey[row] - (before_grey.roll(shift, 0) if shift else before_grey)).abs()
            jump = config.large_step_penalty / (1 + step / config.edge)
            best = come_from.min(dim=1, keepdim=True).values
            reached = torch.minimum(come_from, best + jump[:, None].clamp(min=config.small_step_penalty))
            reached[:, 1:] = torch.minimum(reached[:, 1:], come_from[:, :-1] + config.small_step_penalty)
            reached[:, :-1] = torch.minimum(reached[:, :-1], come_from[:, 1:] + config.small_step_penalty)
            path = path + (reached - best)
            if shift:  # what rolled around the picture's side starts anew
                side = 0 if shift > 0 else -1
                path[side] = cost[row, side]
        total[row] += path
        before, before_grey = path, grey[row]


def winner(cost: Float[Tensor, "h w d"], planes: Float[Tensor, " d"]) -> Float[Tensor, "h w"]:
    """Inverse depth of the lowest cost, between planes by a parabola through it and its neighbours."""
    best = cost.argmin(dim=-1)
    inner = best.clamp(1, len(planes) - 2)
    left, middle, right = (cost.gather(-1, (inner + i)[..., None])[..., 0] for i in (-1, 0, 1))
    curvature = left - 2 * middle + right
    offset = torch.where(curvature > 1e-9, (left - right) / (2 * curvature.clamp(min=1e-9)), torch.zeros_like(left))
    offset = torch.where(inner == best, offset.clamp(-0.5, 0.5), torch.zeros_like(offset))
    return planes[best] + offset * (planes[1] - planes[0])
