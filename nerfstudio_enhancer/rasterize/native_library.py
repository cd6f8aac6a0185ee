"""Loads the compiled rasteriser through ctypes and mirrors its C structures (native/interface.h)."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

LIBRARY_PATH = Path(__file__).with_name("_native.so")
ABI_VERSION = 2
ISA_VARIABLE = "NERFSTUDIO_ENHANCER_ISA"
"""Environment variable that forces an instruction set: avx512, avx2 or baseline."""
INSTRUCTION_SETS = ("avx512", "avx2", "baseline")

BAD_INPUTS = {
    1: "means",
    2: "quats",
    4: "scales",
    8: "opacities",
    16: "colors",
    32: "extra_features",
}
OUT_OF_MEMORY = 1 << 16
TOO_MANY_INTERSECTIONS = 1 << 17


class ProjectArgs(ctypes.Structure):
    """NseProjectArgs of native/interface.h."""

    _fields_ = [
        *[(name, c_int64) for name in ("cameras", "gaussians")],
        *[(name, c_int32) for name in ("width", "height", "sh_degree", "color_stride", "color_channels")],
        *[(name, c_int32) for name in ("extra_channels", "with_depth", "antialiased", "colors_per_camera", "threads")],
        *[(name, c_float) for name in ("near_plane", "far_plane", "radius_clip", "eps2d")],
        *[(name, c_void_p) for name in ("means", "quats", "scales", "opacities", "colors", "extra")],
        *[(name, c_void_p) for name in ("viewmats", "camera_centres", "intrinsics")],
        *[(name, c_void_p) for name in ("radii", "means2d", "depths", "conics", "compensations")],
        *[(name, c_void_p) for name in ("opacities2d", "features")],
        *[(name, c_void_p) for name in ("v_means2d", "v_depths", "v_conics", "v_opacities2d", "v_features")],
        *[(name, c_void_p) for name in ("v_means", "v_quats", "v_scales", "v_opacities", "v_colors", "v_extra")],
        *[(name, c_void_p) for name in ("v_viewmats", "v_camera_centres")],
    ]


class RasterArgs(ctypes.Structure):
    """NseRasterArgs of native/interface.h."""

    _fields_ = [
        *[(name, c_int64) for name in ("cameras", "gaussians")],
        *[(name, c_int32) for name in ("width", "height", "channels", "normalise_last", "threads", "reserved")],
        *[(name, c_void_p) for name in ("frame", "means2d", "conics", "opacities", "features", "backgrounds")],
        *[(name, c_void_p) for name in ("depths", "radii", "render", "alpha", "v_render", "v_alpha")],
        *[(name, c_void_p) for name in ("v_means2d", "v_means2d_abs", "v_conics", "v_opacities")],
        *[(name, c_void_p) for name in ("v_features", "v_backgrounds")],
    ]


class SsimArgs(ctypes.Structure):
    """NseSsimArgs of native/interface.h."""

    _fields_ = [
        *[(name, c_int64) for name in ("batch", "channels", "height", "width")],
        *[(name, c_int64 * 4) for name in ("pred_strides", "target_strides", "grad_strides")],
        *[(name, c_int32) for name in ("threads", "reserved")],
        *[(name, c_void_p) for name in ("pred", "target", "mean", "derivatives")],
        ("scale", c_float),
        ("grad", c_void_p),
    ]


class PatchSource(ctypes.Structure):
    """NsePatchSource of native/interface.h."""

    _fields_ = [
        *[(name, c_void_p) for name in ("pairs", "base", "moves")],
        *[(name, c_int64) for name in ("height", "width")],
        ("epipole", c_float * 3),
        ("reserved", c_float),
    ]


class PatchArgs(ctypes.Structure):
    """NsePatchArgs of native/interface.h."""

    _fields_ = [
        ("pixels", c_int64),
        *[(name, c_int32) for name in ("sources", "samples", "threads")],
        ("floor", c_float),
        ("source", POINTER(PatchSource)),
        *[(name, c_void_p) for name in ("weights", "view", "mean", "variance", "offsets", "planes", "cost")],
    ]


@cache
def load_library() -> ctypes.CDLL | None:
    """The compiled library, or None where the installation had no compiler.

    None too, with a warning, where the library does not load: a wheel from a machine with newer system libraries.

    Raises:
        ValueError: `NERFSTUDIO_ENHANCER_ISA` names an instruction set that this machine or build lacks.
        RuntimeError: the library belongs to another version of this package.
    """
    if not LIBRARY_PATH.is_file():
        return None
    try:
        library = ctypes.CDLL(str(LIBRARY_PATH))
    except OSError as error:
        warnings.warn(
            f"The native rasteriser cannot be loaded here ({error}); install nerfstudio-enhancer from its sources, with a "
            "C++17 compiler, to rebuild it.",
            stacklevel=2,
        )
        return None
    library.nse_struct_size.restype = c_int64
    library.nse_struct_size.argtypes = [c_int]
    structs = (ProjectArgs, RasterArgs, SsimArgs, PatchArgs, PatchSource)
    sizes = [library.nse_struct_size(which) for which in range(len(structs))]
    expected = [ctypes.sizeof(struct) for struct in structs]
    if library.nse_abi_version() != ABI_VERSION or sizes != expected:
        raise RuntimeError(
            f"{LIBRARY_PATH} does not fit this version of nerfstudio-enhancer (structure sizes {sizes}, "
            f"expected {expected}); install the package again to rebuild it."
        )
    for name, struct in (("project", ProjectArgs), ("raster", RasterArgs), ("ssim", SsimArgs)):
        for direction in ("forward", "backward"):
            function = getattr(library, f"nse_{name}_{direction}")
            function.argtypes, function.restype = [POINTER(struct)], c_int
    library.nse_patch_cost.argtypes, library.nse_patch_cost.restype = [POINTER(PatchArgs)], c_int
    library.nse_frame_blended.argtypes = [c_void_p, c_int64, POINTER(c_int64)]
    library.nse_frame_blended.restype = None
    library.nse_vector_seconds.restype = c_double
    library.nse_isa.restype = c_char_p
    library.nse_select_isa.argtypes = [c_char_p]
    library.nse_frame_acquire.restype = c_void_p
    library.nse_frame_release.argtypes = [c_void_p]
    library.nse_frame_release.restype = None
    library.nse_frame_intersections.argtypes = [c_void_p]
    library.nse_frame_intersections.restype = c_int64
    library.nse_frame_bytes.argtypes = [c_void_p]
    library.nse_frame_bytes.restype = c_int64
    library.nse_frame_seconds.argtypes = [c_void_p, POINTER(c_double)]
    library.nse_frame_seconds.restype = None
    library.nse_frame_lists.argtypes = [c_void_p, c_int64, c_int64, c_int32, *[c_void_p] * 5]
    library.nse_frame_lists.restype = None
    forced = os.environ.get(ISA_VARIABLE)
    if not library.nse_select_isa(forced.encode() if forced else None):
        present = ", ".join(name for name in INSTRUCTION_SETS if library.nse_select_isa(name.encode()))
        raise ValueError(
            f"{ISA_VARIABLE}={forced!r} names an instruction set that this machine or build lacks; "
            f"choose one of {present}, or unset it."
        )
    return library


def available_instruction_sets() -> list[str]:
    """Kernels that this machine and build can run, best first."""
    library = load_library()
    if library is None:
        return []
    active = library.nse_isa()
    names = [name for name in INSTRUCTION_SETS if library.nse_select_isa(name.encode())]
    library.nse_select_isa(active)
    return names


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run the kernels `name` meanwhile, in every thread of the process: for tests and measurements.

    Raises:
        ValueError: this machine or build lacks them.
    """
    library = load_library()
    if name not in available_instruction_sets() or library is None:
        raise ValueError(f"The kernels {name!r} do not run here; choose one of {available_instruction_sets()}.")
    active = library.nse_isa()
    library.nse_select_isa(name.encode())
    try:
        yield
    finally:
        library.nse_select_isa(active)


def check_status(status: int) -> None:
    """Turn a status of the library into an exception."""
    if status == 0:
        return
    if status & OUT_OF_MEMORY:
        raise MemoryError("Not enough memory to rasterise; use fewer Gaussians or a smaller image.")
    if status & TOO_MANY_INTERSECTIONS:
        raise ValueError(
            "The Gaussians touch more than 2^31 tiles in total; use fewer or smaller Gaussians, a smaller image, "
            "or fewer cameras at a time."
        )
    names = ", ".join(f"`{name}`" for bit, name in BAD_INPUTS.items() if status & bit)
    raise ValueError(f"{names} must be finite, but NaN or infinity was found.")
