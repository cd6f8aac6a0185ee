"""The one entry to rasterisation: gsplat on CUDA, the native library on a CPU, plain PyTorch where it was not built."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from nerfstudio_enhancer.rasterize import reference
from nerfstudio_enhancer.rasterize.gsplat_on_cpu import let_strategies_run
from nerfstudio_enhancer.rasterize.native_library import load_library
from nerfstudio_enhancer.rasterize.native_ops import TILE_SIZE, Frame, Project, ProjectSettings, Rasterize

RENDER_MODES = ("RGB", "D", "ED", "RGB+D", "RGB+ED")
RASTERIZE_MODES = ("classic", "antialiased")
MAX_SH_DEGREE = 3
MAX_SIDE = 1 << 18


def backend_name() -> str:
    """What rasterises CPU tensors here: `native (avx512)`, `native (avx2)`, `native (baseline)` or `torch reference`."""
    library = load_library()
    return "torch reference" if library is None else f"native ({library.nse_isa().decode()})"


def rasterization(
    means: Tensor,  # [N, 3]
    quats: Tensor,  # [N, 4]
    scales: Tensor,  # [N, 3]
    opacities: Tensor,  # [N]
    colors: Tensor,  # [(C,) N, D] or [(C,) N, K, 3]
    viewmats: Tensor,  # [C, 4, 4]
    Ks: Tensor,  # [C, 3, 3]
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    packed: bool = True,
    tile_size: int = 16,
    backgrounds: Tensor | None = None,  # [C, D]
    render_mode: Literal["RGB", "D", "ED", "RGB+D", "RGB+ED"] = "RGB",
    sparse_grad: bool = False,
    absgrad: bool = False,
    rasterize_mode: Literal["classic", "antialiased"] = "classic",
    channel_chunk: int = 32,
    distributed: bool = False,
    camera_model: Literal["pinhole", "ortho", "fisheye"] = "pinhole",
    covars: Tensor | None = None,  # [N, 3, 3]
    extra_features: Tensor | None = None,  # [N, E]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Rasterise 3D Gaussians into images: `gsplat.rendering.rasterization` of gsplat 1.4.0, on any device.

    gsplat's strategies (DefaultStrategy, MCMCStrategy) work with it on a CPU, also where gsplat has CUDA code only. CUDA
    tensors go to gsplat. CPU tensors (float32) go to the native library, or to the torch reference, with a warning,
    where the library could not be built. Gradients reach means, quats, scales, opacities, colors, extra_features,
    backgrounds and viewmats; not Ks, as in gsplat.

    What differs from gsplat on a CPU:

    * `packed` changes nothing: the results are always unpacked ([C, N, ...], `gaussian_ids` and `camera_ids` None).
      The default stays True only because it is gsplat's.
    * `channel_chunk` changes nothing: all channels are blended in one pass.
    * `tile_size` must be 16, `camera_model` "pinhole", `covars` None, `sparse_grad` and `distributed` False, and
      `sh_degree` at most 3: anything else raises ValueError.
    * The intersection lists in the info leave out tiles in which a Gaussian stays below 1/255 everywhere.

    Args:
        means: centres, world units. [N, 3]
        quats: rotations wxyz, need not be normalised. [N, 4]
        scales: standard deviations along the axes, world units. [N, 3]
        opacities: in [0, 1]. [N]
        colors: channels [(C,) N, D], or SH coefficients [(C,) N, K, 3] if `sh_degree` is given.
        viewmats: world to camera, OpenCV axes. [C, 4, 4]
        Ks: intrinsics in pixels. [C, 3, 3]
        width: image width in pixels.
        height: image height in pixels.
        near_plane: Gaussians nearer than this are not drawn.
        far_plane: Gaussians farther than this are not drawn.
        radius_clip: Gaussians whose radius in pixels is not above this are not drawn.
        eps2d: added to the diagonal of the projected covariance, in square pixels.
        sh_degree: degree of the SH to use, or None if `colors` are the channels themselves.
        packed: without effect on a CPU.
        tile_size: 16 on a CPU.
        backgrounds: what shines through, for the channels of `colors`. [C, D]
        render_mode: colours, accumulated depth D, expected depth ED, or both (depth is the last channel).
        sparse_grad: not on a CPU.
        absgrad: after the backward pass `info["means2d"].absgrad` holds the sums of absolute gradients.
        rasterize_mode: "antialiased" scales opacities by the projected area that `eps2d` adds (Mip-Splatting).
        channel_chunk: without effect on a CPU.
        distributed: not on a CPU.
        camera_model: "pinhole" on a CPU.
        covars: not on a CPU.
        extra_features: more channels per Gaussian, blended in the same pass; they follow the colours and precede the depth,
            and their background is 0. [N, E]

    Returns:
        Images [C, H, W, D (+ E) (+ 1)], accumulated opacities [C, H, W, 1], and gsplat's dictionary of intermediate results:
        `means2d` is the very tensor that was rasterised, so `retain_grad()` works on it.

    Raises:
        ValueError: a shape, a type, a mode or a value is wrong.
    """
    options = {
        "near_plane": near_plane,
        "far_plane": far_plane,
        "radius_clip": radius_clip,
        "eps2d": eps2d,
        "sh_degree": sh_degree,
        "backgrounds": backgrounds,
        "render_mode": render_mode,
        "absgrad": absgrad,
        "rasterize_mode": rasterize_mode,
        "extra_features": extra_features,
    }
    if means.device.type == "cuda":
        cuda_only = {
            "packed": packed,
            "tile_size": tile_size,
            "sparse_grad": sparse_grad,
            "channel_chunk": channel_chunk,
            "distributed": distributed,
            "camera_model": camera_model,
            "covars": covars,
        }
        return _rasterize_cuda(
            means, quats, scales, opacities, colors, viewmats, Ks, width, height, **options, **cuda_only
        )
    for name, value, wanted in (
        ("tile_size", tile_size, TILE_SIZE),
        ("sparse_grad", sparse_grad, False),
        ("distributed", distributed, False),
        ("camera_model", camera_model, "pinhole"),
        ("covars", None if covars is None else "a tensor", None),
    ):
        if value != wanted:
            raise ValueError(f"`{name}` must be {wanted!r} on a CPU, got {value!r}; other values need CUDA tensors.")
    check_inputs(means, quats, scales, opacities, colors, viewmats, Ks, width, height, **options)
    let_strategies_run()
    if load_library() is None:
        _warn_slow()
        _check_finite({"means": means, "quats": quats, "scales": scales, "opacities": opacities, "colors": colors})
        _check_finite({} if extra_features is None else {"extra_features": extra_features})
        return rasterize_reference(means, quats, scales, opacities, colors, viewmats, Ks, width, height, **options)
    return _rasterize_native(means, quats, scales, opacities, colors, viewmats, Ks, width, height, **options)


def _rasterize_native(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    near_plane: float,
    far_plane: float,
    radius_clip: float,
    eps2d: float,
    sh_degree: int | None,
    backgrounds: Tensor | None,
    render_mode: str,
    absgrad: bool,
    rasterize_mode: str,
    extra_features: Tensor | None,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    settings = ProjectSettings(
        width=width,
        height=height,
        near_plane=near_plane,
        far_plane=far_plane,
        radius_clip=radius_clip,
        eps2d=eps2d,
        sh_degree=sh_degree,
        with_color="RGB" in render_mode,
        with_depth="D" in render_mode,
        antialiased=rasterize_mode == "antialiased",
        colors_per_camera=colors.dim() == (3 if sh_degree is None else 4),
    )
    camera_centres = torch.inverse(viewmats)[:, :3, 3]
    radii, means2d, depths, conics, opacities2d, features = Project.apply(
        means, quats, scales, opacities, colors, extra_features, viewmats, camera_centres, Ks, settings
    )  # pyright: ignore[reportGeneralTypeIssues]
    backgrounds = _pad_backgrounds(backgrounds, features.shape[-1], settings.with_color)
    frame = Frame()
    expected_depth = render_mode.endswith("ED")
    render, alpha = Rasterize.apply(
        *(means2d, conics, opacities2d, features, backgrounds, depths.detach(), radii, frame),
        *(width, height, expected_depth, absgrad),
    )  # pyright: ignore[reportGeneralTypeIssues]
    info = _info(radii, means2d, depths, conics, opacities2d, width, height)
    info.update(frame.lists(radii, depths, info["tile_width"], info["tile_height"]))
    return render, alpha, info


def rasterize_reference(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    backgrounds: Tensor | None = None,
    render_mode: str = "RGB",
    absgrad: bool = False,
    rasterize_mode: str = "classic",
    extra_features: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The same in plain PyTorch, in float32 or float64; see `rasterization`."""
    cameras = viewmats.shape[0]
    radii, means2d, depths, conics, compensations = reference.project_gaussians(
        *(means, quats, scales, viewmats, Ks, width, height, near_plane, far_plane, radius_clip, eps2d)
    )
    opacities2d = opacities.expand(cameras, -1)
    if rasterize_mode == "antialiased":
        opacities2d = opacities2d * compensations
    channels = []
    if "RGB" in render_mode:
        if sh_degree is None:
            channels.append(colors.expand(cameras, *colors.shape[-2:]))
        else:
            directions = means - torch.inverse(viewmats)[:, None, :3, 3]
            coefficients = colors.expand(cameras, *colors.shape[-3:])
            channels.append((reference.spherical_harmonics(sh_degree, directions, coefficients) + 0.5).clamp(min=0.0))
    if extra_features is not None:
        channels.append(extra_features.expand(cameras, *extra_features.shape))
    if "D" in render_mode:
        channels.append(depths[..., None])
    features = torch.cat(channels, dim=-1)
    backgrounds = _pad_backgrounds(backgrounds, features.shape[-1], "RGB" in render_mode)
    render, alpha = reference.rasterize_gaussians(
        *(means2d, conics, opacities2d, features, depths, radii, width, height, backgrounds, absgrad)
    )
    if render_mode.endswith("ED"):
        render = torch.cat([render[..., :-1], render[..., -1:] / alpha.clamp(min=1e-10)], dim=-1)
    return render, alpha, _info(radii, means2d, depths, conics, opacities2d, width, height)


def check_cuda_kernels() -> None:
    """Load gsplat's CUDA kernels, which it compiles where there are none yet (minutes, once).

    Raises:
        RuntimeError: they are not there and cannot be compiled, with the ways out.
    """
    if import_module("gsplat.cuda._backend")._C is None:
        raise RuntimeError(
            "gsplat has no CUDA kernels: it compiles them with `nvcc`, which is not on the PATH. Install the CUDA toolkit of the "
            "version that torch was built for (`python -c 'import torch; print(torch.version.cuda)'`) and put its `bin` on the "
            "PATH, or install a gsplat 1.4.0 wheel with kernels (https://docs.gsplat.studio/whl), or train on the CPU by "
            "`--machine.device-type cpu`."
        )


def _rasterize_cuda(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    extra_features: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """gsplat; extra channels ride along as channels of `colors`, for which SH are evaluated beforehand."""
    from gsplat.rendering import rasterization as gsplat_rasterization

    if extra_features is not None:
        from gsplat import spherical_harmonics

        cameras = viewmats.shape[0]
        extra = extra_features.expand(cameras, *extra_features.shape)
        if "RGB" not in options["render_mode"]:
            raise ValueError(f"`extra_features` need an RGB render mode on CUDA, got {options['render_mode']!r}.")
        if options["sh_degree"] is not None:
            directions = means[None] - torch.inverse(viewmats)[:, None, :3, 3]
            coefficients = colors.expand(cameras, *colors.shape[-3:]).contiguous()
            rgb = spherical_harmonics(options["sh_degree"], directions, coefficients)
            colors = (rgb + 0.5).clamp(min=0.0)
            options["sh_degree"] = None
        colors = torch.cat([colors.expand(cameras, *colors.shape[-2:]), extra], dim=-1)
        options["backgrounds"] = _pad_backgrounds(options["backgrounds"], colors.shape[-1], True)
    return gsplat_rasterization(means, quats, scales, opacities, colors, viewmats, Ks, width, height, **options)


def _info(
    radii: Tensor, means2d: Tensor, depths: Tensor, conics: Tensor, opacities: Tensor, width: int, height: int
) -> dict[str, Any]:
    return {
        "camera_ids": None,
        "gaussian_ids": None,
        "radii": radii,
        "means2d": means2d,
        "depths": depths,
        "conics": conics,
        "opacities": opacities,
        "tile_width": math.ceil(width / TILE_SIZE),
        "tile_height": math.ceil(height / TILE_SIZE),
        "width": width,
        "height": height,
        "tile_size": TILE_SIZE,
        "n_cameras": radii.shape[0],
    }


def _pad_backgrounds(backgrounds: Tensor | None, channels: int, with_color: bool) -> Tensor | None:
    """Backgrounds of the colours, then 0 for every further channel. [C, channels]."""
    if backgrounds is None or not with_color:
        return None
    missing = channels - backgrounds.shape[-1]
    return torch.nn.functional.pad(backgrounds, (0, missing)) if missing else backgrounds


@cache
def _warn_slow() -> None:
    warnings.warn(
        "The native rasteriser was not built (no C++17 compiler at installation) or does not load: rasterising with "
        "PyTorch, 100 times slower and with gigabytes of memory for ten thousands of splats. Install a compiler (g++ or clang++; `CXX` may name it) and reinstall nerfstudio-enhancer; `pip install -v` shows what the compiler says.",
        stacklevel=3,
    )


def _check_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"`{name}` must be finite, but NaN or infinity was found.")


def check_inputs(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    sh_degree: int | None,
    backgrounds: Tensor | None,
    render_mode: str,
    rasterize_mode: str,
    extra_features: Tensor | None,
    near_plane: float,
    far_plane: float,
    radius_clip: float,
    eps2d: float,
    absgrad: bool,
) -> None:
    """Raise ValueError with rule, value and way out for anything that `rasterization` cannot draw on a CPU."""
    if render_mode not in RENDER_MODES:
        raise ValueError(f"`render_mode` must be one of {RENDER_MODES}, got {render_mode!r}.")
    if rasterize_mode not in RASTERIZE_MODES:
        raise ValueError(f"`rasterize_mode` must be one of {RASTERIZE_MODES}, got {rasterize_mode!r}.")
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise ValueError(
            f"An image has at least 1 x 1 and at most {MAX_SIDE} x {MAX_SIDE} pixels, got {width} x {height}."
        )
    for name, value in (
        ("near_plane", near_plane),
        ("far_plane", far_plane),
        ("radius_clip", radius_clip),
        ("eps2d", eps2d),
    ):
        if math.isnan(value) or (name == "eps2d" and value < 0):
            raise ValueError(f"`{name}` must be a number{' of at least 0' if name == 'eps2d' else ''}, got {value}.")
    if means.dim() != 2:
        raise ValueError(f"`means` must have shape [N, 3], got {list(means.shape)}.")
    if viewmats.dim() != 3:
        raise ValueError(f"`viewmats` must have shape [C, 4, 4], got {list(viewmats.shape)}.")
    n, c = means.shape[0], viewmats.shape[0]
    if c == 0:
        raise ValueError("`viewmats` must hold at least one camera, got shape [0, 4, 4].")
    if n * c >= 1 << 31:
        raise ValueError(f"Cameras times Gaussians must be below 2^31, got {c} x {n}; render fewer cameras at a time.")
    tensors: list[tuple[str, Tensor, list[list[int | str]]]] = [  # a letter stands for any length
        ("means", means, [[n, 3]]),
        ("quats", quats, [[n, 4]]),
        ("scales", scales, [[n, 3]]),
        ("opacities", opacities, [[n]]),
        ("viewmats", viewmats, [[c, 4, 4]]),
        ("Ks", Ks, [[c, 3, 3]]),
    ]
    if sh_degree is None:
        channels = colors.shape[-1] if colors.dim() else 0
        tensors.append(("colors", colors, [[n, "D"], [c, n, "D"]]))
    else:
        if not 0 <= sh_degree <= MAX_SH_DEGREE:
            raise ValueError(f"`sh_degree` must be 0 to {MAX_SH_DEGREE} on a CPU, or None, got {sh_degree}.")
        bases = colors.shape[-2] if colors.dim() >= 3 else 0
        channels = 3
        tensors.append(("colors", colors, [[n, "K", 3], [c, n, "K", 3]]))
        if bases < (sh_degree + 1) ** 2 and colors.dim() >= 3:
            raise ValueError(
                f"`colors` must hold at least {(sh_degree + 1) ** 2} SH coefficients for degree {sh_degree}, got {bases}."
            )
    if extra_features is not None:
        tensors.append(("extra_features", extra_features, [[n, "E"]]))
    if backgrounds is not None:
        tensors.append(("backgrounds", backgrounds, [[c, channels]]))
    for name, tensor, shapes in tensors:
        if not any(_fits(tensor.shape, shape) for shape in shapes):
            wanted = " or ".join(f"[{', '.join(map(str, shape))}]" for shape in shapes)
            raise ValueError(f"`{name}` must have shape {wanted}, got {list(tensor.shape)}.")
        if tensor.dtype != torch.float32:
            raise ValueError(f"`{name}` must be float32, got {tensor.dtype}; convert it with `.float()`.")
        if tensor.device.type != "cpu":
            raise ValueError(f"`{name}` must be on the CPU as `means` is, got {tensor.device}.")
    if "RGB" in render_mode and channels == 0:
        raise ValueError(f"`colors` must have at least one channel, got {list(colors.shape)}.")
    _check_finite({"viewmats": viewmats, "Ks": Ks} | ({} if backgrounds is None else {"backgrounds": backgrounds}))
    focal = torch.stack([Ks[:, 0, 0], Ks[:, 1, 1]])
    if not bool((focal > 0).all()):
        raise ValueError(f"`Ks` must have positive focal lengths, got {focal.min().item()}.")


def _fits(shape: torch.Size, wanted: Sequence[int | str]) -> bool:
    return len(shape) == len(wanted) and all(isinstance(w, str) or w == s for s, w in zip(shape, wanted))
