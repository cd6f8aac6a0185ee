"""The compiled rasteriser as autograd functions: projection (with colours) and rasterisation.

Two functions instead of one, because densification reads the gradient of the projected means between them.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nerfstudio_enhancer.rasterize.native_library import ProjectArgs, RasterArgs, check_status, load_library

TILE_SIZE = 16


@dataclass(frozen=True)
class ProjectSettings:
    """Everything about the projection that is not a tensor."""

    width: int
    height: int
    near_plane: float
    far_plane: float
    radius_clip: float
    eps2d: float
    sh_degree: int | None
    with_color: bool
    with_depth: bool
    antialiased: bool
    colors_per_camera: bool


class Frame:
    """Memory of the library that carries one image's sorted intersections from the forward to the backward pass."""

    def __init__(self) -> None:
        self._library = native()
        self.pointer: int | None = self._library.nse_frame_acquire()
        if self.pointer is None:
            raise MemoryError("Not enough memory to rasterise.")

    def __del__(self) -> None:
        if getattr(self, "pointer", None) is not None:
            self._library.nse_frame_release(self.pointer)
            self.pointer = None

    def intersections(self) -> int:
        """Number of (tile, Gaussian) pairs."""
        return self._library.nse_frame_intersections(self.pointer)

    def bytes(self) -> int:
        """Memory that this frame holds."""
        return self._library.nse_frame_bytes(self.pointer)

    def blended_pairs(self, cameras: int) -> tuple[int, int]:
        """After a forward pass: pairs (pixel, Gaussian) that were blended, and the vector lanes of the blocks they are in."""
        out = (ctypes.c_int64 * 2)()
        self._library.nse_frame_blended(self.pointer, cameras, out)
        return out[0], out[1]

    def seconds(self) -> dict[str, float]:
        """Wall time of the stages of the last forward and backward pass."""
        out = (ctypes.c_double * 4)()
        self._library.nse_frame_seconds(self.pointer, out)
        return dict(zip(("binning", "raster_forward", "raster_backward", "reduction"), out))

    def lists(self, radii: Tensor, depths: Tensor, tile_width: int, tile_height: int) -> dict[str, Tensor]:
        """The sorted intersections under gsplat's names; tiles in which a Gaussian stays below 1/255 are left out."""
        cameras, gaussians = radii.shape
        count = self.intersections()
        tiles_per_gauss = torch.empty_like(radii)
        isect_ids = torch.empty(count, dtype=torch.int64)
        flatten_ids = torch.empty(count, dtype=torch.int32)
        isect_offsets = torch.empty(cameras, tile_height, tile_width, dtype=torch.int32)
        pointers = [t.data_ptr() for t in (depths, tiles_per_gauss, isect_ids, flatten_ids, isect_offsets)]
        self._library.nse_frame_lists(self.pointer, cameras, gaussians, torch.get_num_threads(), *pointers)
        return {
            "tiles_per_gauss": tiles_per_gauss,
            "isect_ids": isect_ids,
            "flatten_ids": flatten_ids,
            "isect_offsets": isect_offsets,
        }


def native() -> ctypes.CDLL:
    """The library, which the caller knows to exist."""
    library = load_library()
    if library is None:
        raise RuntimeError("The native rasteriser was not built.")
    return library


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _project_args(
    settings: ProjectSettings, gaussians: Sequence[Tensor | None], cameras: Sequence[Tensor]
) -> ProjectArgs:
    """Arguments shared by both directions.

    `gaussians`: means, quats, scales, opacities, colors, extra; `cameras`: viewmats, centres, intrinsics.
    """
    means, quats, scales, opacities, colors, extra = gaussians
    viewmats, camera_centres, intrinsics = cameras
    assert means is not None
    if not settings.with_color or colors is None:
        colors, color_channels, color_stride = None, 0, 0
    elif settings.sh_degree is None:
        color_channels = color_stride = colors.shape[-1]
    else:
        color_channels, color_stride = 3, 3 * colors.shape[-2]
    return ProjectArgs(
        cameras=viewmats.shape[0],
        gaussians=means.shape[0],
        width=settings.width,
        height=settings.height,
        sh_degree=-1 if settings.sh_degree is None else settings.sh_degree,
        color_stride=color_stride,
        color_channels=color_channels,
        extra_channels=0 if extra is None else extra.shape[-1],
        with_depth=settings.with_depth,
        antialiased=settings.antialiased,
        colors_per_camera=settings.colors_per_camera,
        threads=torch.get_num_threads(),
        near_plane=settings.near_plane,
        far_plane=settings.far_plane,
        radius_clip=settings.radius_clip,
        eps2d=settings.eps2d,
        means=_pointer(means),
        quats=_pointer(quats),
        scales=_pointer(scales),
        opacities=_pointer(opacities),
        colors=_pointer(colors),
        extra=_pointer(extra),
        viewmats=_pointer(viewmats),
        camera_centres=_pointer(camera_centres),
        intrinsics=_pointer(intrinsics),
    )


class Project(torch.autograd.Function):
    """3D Gaussians -> radii, means2d, depths, conics, opacities and blended channels, each [C, N, ...]."""

    @staticmethod
    def forward(
        ctx: Any,
        means: Tensor,
        quats: Tensor,
        scales: Tensor,
        opacities: Tensor,
        colors: Tensor | None,
        extra: Tensor | None,
        viewmats: Tensor,
        camera_centres: Tensor,
        intrinsics: Tensor,
        settings: ProjectSettings,
    ) -> tuple[Tensor, ...]:
        """Run the projection; raises ValueError where an input is not finite."""
        inputs = [t if t is None else t.detach().contiguous() for t in (means, quats, scales, opacities, colors, extra)]
        cameras = [t.detach().contiguous() for t in (viewmats, camera_centres, intrinsics)]
        args = _project_args(settings, inputs, cameras)
        shape = (args.cameras, args.gaussians)
        channels = args.color_channels + args.extra_channels + args.with_depth
        radii = torch.empty(shape, dtype=torch.int32)
        means2d = torch.empty(*shape, 2)
        depths = torch.empty(shape)
        conics = torch.empty(*shape, 3)
        opacities2d = torch.empty(shape)
        features = torch.empty(*shape, channels)
        args.radii, args.means2d, args.depths = radii.data_ptr(), means2d.data_ptr(), depths.data_ptr()
        args.conics, args.opacities2d, args.features = conics.data_ptr(), opacities2d.data_ptr(), features.data_ptr()
        start = time.perf_counter()
        check_status(native().nse_project_forward(ctypes.byref(args)))
        ctx.forward_seconds = time.perf_counter() - start
        ctx.save_for_backward(*inputs, *cameras, radii, features)
        ctx.settings = settings
        ctx.mark_non_differentiable(radii)
        ctx.set_materialize_grads(False)
        return radii, means2d, depths, conics, opacities2d, features

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *v_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of means, quats, scales, opacities, colors, extra, viewmats and camera centres."""
        *inputs, viewmats, camera_centres, intrinsics, radii, features = ctx.saved_tensors
        colors, extra = inputs[4], inputs[5]
        needs = ctx.needs_input_grad
        args = _project_args(ctx.settings, inputs, (viewmats, camera_centres, intrinsics))
        v_means2d, v_depths, v_conics, v_opacities2d, v_features = (
            v if v is None else v.contiguous() for v in v_outputs[1:]
        )
        args.radii, args.features = radii.data_ptr(), features.data_ptr()
        args.v_means2d, args.v_depths, args.v_conics = _pointer(v_means2d), _pointer(v_depths), _pointer(v_conics)
        args.v_opacities2d, args.v_features = _pointer(v_opacities2d), _pointer(v_features)
        v_means, v_quats, v_scales, v_opacities = (torch.empty_like(t) for t in inputs[:4])
        # Depth-only rendering does not read the colours: no gradient for them.
        v_colors = torch.empty_like(colors) if needs[4] and ctx.settings.with_color else None
        v_extra = torch.empty_like(extra) if needs[5] else None
        v_viewmats = torch.zeros_like(viewmats) if needs[6] else None
        v_centres = torch.zeros_like(camera_centres) if needs[7] else None
        args.v_means, args.v_quats = v_means.data_ptr(), v_quats.data_ptr()
        args.v_scales, args.v_opacities = v_scales.data_ptr(), v_opacities.data_ptr()
        args.v_colors, args.v_extra = _pointer(v_colors), _pointer(v_extra)
        args.v_viewmats, args.v_camera_centres = _pointer(v_viewmats), _pointer(v_centres)
        start = time.perf_counter()
        check_status(native().nse_project_backward(ctypes.byref(args)))
        ctx.backward_seconds = time.perf_counter() - start
        return v_means, v_quats, v_scales, v_opacities, v_colors, v_extra, v_viewmats, v_centres, None, None


def _raster_args(
    frame: Frame, tensors: Sequence[Tensor | None], size: tuple[int, int], normalise_last: bool
) -> RasterArgs:
    """Arguments shared by both directions.

    `tensors`: means2d, conics, opacities, features, backgrounds, depths, radii; `size`: width, height.
    """
    means2d, conics, opacities, features, backgrounds, depths, radii = tensors
    assert radii is not None
    assert features is not None
    return RasterArgs(
        cameras=radii.shape[0],
        gaussians=radii.shape[1],
        width=size[0],
        height=size[1],
        channels=features.shape[-1],
        normalise_last=normalise_last,
        threads=torch.get_num_threads(),
        frame=frame.pointer,
        means2d=_pointer(means2d),
        conics=_pointer(conics),
        opacities=_pointer(opacities),
        features=_pointer(features),
        backgrounds=_pointer(backgrounds),
        depths=_pointer(depths),
        radii=_pointer(radii),
    )


class Rasterize(torch.autograd.Function):
    """2D Gaussians -> render [C, H, W, F] and accumulated opacity [C, H, W, 1]."""

    @staticmethod
    def forward(
        ctx: Any,
        means2d: Tensor,
        conics: Tensor,
        opacities: Tensor,
        features: Tensor,
        backgrounds: Tensor | None,
        depths: Tensor,
        radii: Tensor,
        frame: Frame,
        width: int,
        height: int,
        normalise_last: bool,
        absgrad: bool,
    ) -> tuple[Tensor, Tensor]:
        """Bin, sort and blend."""
        if backgrounds is not None:
            backgrounds = backgrounds.detach().contiguous()
        tensors = (means2d, conics, opacities, features, backgrounds, depths, radii)
        args = _raster_args(frame, tensors, (width, height), normalise_last)
        render = torch.empty(args.cameras, height, width, args.channels)
        alpha = torch.empty(args.cameras, height, width, 1)
        args.render, args.alpha = render.data_ptr(), alpha.data_ptr()
        check_status(native().nse_raster_forward(ctypes.byref(args)))
        ctx.save_for_backward(*tensors, render)
        ctx.frame, ctx.size, ctx.normalise_last, ctx.absgrad = frame, (width, height), normalise_last, absgrad
        ctx.set_materialize_grads(False)
        return render, alpha

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *v_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of means2d, conics, opacities, features, backgrounds; sets `means2d.absgrad` when asked for."""
        *tensors, render = ctx.saved_tensors
        means2d, conics, opacities, features, backgrounds, *_ = tensors
        args = _raster_args(ctx.frame, tensors, ctx.size, ctx.normalise_last)
        v_render, v_alpha = (v if v is None else v.contiguous() for v in v_outputs)
        v_means2d, v_conics, v_opacities, v_features = (
            torch.empty_like(t) for t in (means2d, conics, opacities, features)
        )
        v_abs = torch.empty_like(means2d) if ctx.absgrad else None
        v_backgrounds = torch.empty_like(backgrounds) if ctx.needs_input_grad[4] else None
        args.render, args.v_render, args.v_alpha = render.data_ptr(), _pointer(v_render), _pointer(v_alpha)
        args.v_means2d, args.v_means2d_abs = v_means2d.data_ptr(), _pointer(v_abs)
        args.v_conics, args.v_opacities = v_conics.data_ptr(), v_opacities.data_ptr()
        args.v_features, args.v_backgrounds = v_features.data_ptr(), _pointer(v_backgrounds)
        check_status(native().nse_raster_backward(ctypes.byref(args)))
        if v_abs is not None:
            means2d.absgrad = v_abs  # pyright: ignore[reportAttributeAccessIssue]  # where gsplat's strategies look
        return v_means2d, v_conics, v_opacities, v_features, v_backgrounds, *[None] * 7
