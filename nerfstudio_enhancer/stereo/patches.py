"""Matching cost of slanted planes: patches of a view, warped by them into its sources. Native on CPUs, else PyTorch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor

from nerfstudio_enhancer.rasterize.native_library import PatchArgs, PatchSource, check_status, load_library
from nerfstudio_enhancer.stereo.config import RefineConfig
from nerfstudio_enhancer.stereo.sweep import UNSEEN, BetterHalf, Relative, pixel_grid
from nerfstudio_enhancer.stereo.views import StereoView

NATIVE_PIXELS = 16
"""Fewest pixels of a picture that the native kernel takes: one of its vectors."""


class Patches:
    """Cost of planes: 1 - weighted ZNCC of patches warped by them, halved."""

    def __init__(self, view: StereoView, sources: Sequence[StereoView], config: RefineConfig) -> None:
        self.floor = config.texture_floor**2
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
        self.native = load_library() if view.grey.device.type == "cpu" and height * width >= NATIVE_PIXELS else None
        self.sources = [_Source(view, source, self.offsets) for source in sources]

    def cost(self, planes: Float[Tensor, "3 h w"]) -> Float[Tensor, "h w"]:
        """Mean over the better half of the sources that see the whole patch; 0.5 where none does."""
        return self._by_torch(planes) if self.native is None else self._by_kernel(planes.contiguous())

    def _by_kernel(self, planes: Float[Tensor, "3 h w"]) -> Float[Tensor, "h w"]:
        assert self.native is not None
        cost = torch.empty_like(planes[0])
        args = PatchArgs(
            pixels=cost.numel(),
            sources=len(self.sources),
            samples=len(self.samples),
            threads=torch.get_num_threads(),
            floor=self.floor,
            source=(PatchSource * len(self.sources))(*(source.arguments() for source in self.sources)),
            weights=self.weights.data_ptr(),
            view=self.samples.data_ptr(),
            mean=self.mean.data_ptr(),
            variance=self.variance.data_ptr(),
            offsets=self.offsets.data_ptr(),
            planes=planes.data_ptr(),
            cost=cost.data_ptr(),
        )
        check_status(self.native.nse_patch_cost(ctypes.byref(args)))
        return cost

    def _by_torch(self, planes: Float[Tensor, "3 h w"]) -> Float[Tensor, "h w"]:
        inverse = planes[0] + planes[1] * self.offsets[0, :, None, None] + planes[2] * self.offsets[1, :, None, None]
        best = BetterHalf(tuple(planes[0].shape), planes)
        for source in self.sources:
            best.add(self._cost_in(source, inverse))
        return best.mean()

    def _cost_in(self, source: _Source, inverse: Float[Tensor, "p h w"]) -> Float[Tensor, "h w"]:
        samples, rows, columns = inverse.shape
        z = source.base[2] + source.moves[2, :, None, None] + source.epipole[2] * inverse
        positive = z.clamp(min=1e-6)
        grid = inverse.new_empty(samples, rows, columns, 2)
        for axis in range(2):
            place = torch.addcmul(source.base[axis] + source.moves[axis, :, None, None], inverse, source.epipole[axis])
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


class _Source:
    """A source's picture, and where the pixels of the view and of their patches lie in it."""

    def __init__(self, view: StereoView, source: StereoView, offsets: Float[Tensor, "2 p"]) -> None:
        relative = Relative.between(view, source)
        self.grey = source.grey
        self.epipole = relative.epipole
        # infinite @ (u + du, v + dv, 1) for all samples is an affine function of the offset.
        self.base = torch.einsum("ij,jhw->ihw", relative.infinite, pixel_grid(view)).contiguous()
        self.moves = (relative.infinite[:, :2] @ offsets).contiguous()

    @cached_property
    def _pairs(self) -> Int32[Tensor, "h w1"]:
        """Grey in 16 bits of each pixel and of the one below it, the last column and row repeated: the kernel looks once."""
        grey = F.pad(self.grey[None, None], (0, 1, 0, 1), mode="replicate")[0, 0]
        grey = (grey.clamp(0, 1) * 65535).round().to(torch.int32)
        return grey[:-1] | (grey[1:] << 16)

    def arguments(self) -> PatchSource:
        """For the native kernel, which reads the tensors of this object."""
        return PatchSource(
            pairs=self._pairs.data_ptr(),
            base=self.base.data_ptr(),
            moves=self.moves.data_ptr(),
            height=self.grey.shape[0],
            width=self.grey.shape[1],
            epipole=(ctypes.c_float * 3)(*self.epipole.tolist()),
        )
