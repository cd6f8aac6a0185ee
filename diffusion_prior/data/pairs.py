"""Paired-data format, version 2: one folder per run of sparse splats.

`<root>/<scene>/k<kk>_s<seed>_n<steps>[_<kind>]/` holds `meta.json` (who made it, shapes, checksum) and `frames.safetensors` (the arrays of `PairRun`
under their field names). Pictures are stored as 8-bit, so a frame of 320 x 240 pixels takes 1.2 MB and can be read by itself. Poses keep
the OpenGL axes of the scenes that they come from; `clips.read_cameras` turns them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float32, Int64, UInt8
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffusion_prior.files import save_file
from diffusion_prior.types import WARP_CHANNELS

FORMAT_NAME = "nerfstudio-enhancer-pairs"
FORMAT_VERSION = 2
META_NAME = "meta.json"
FRAMES_NAME = "frames.safetensors"

DTYPES = {
    "render": torch.uint8,
    "alpha": torch.uint8,
    "disparity": torch.uint8,
    "warped": torch.uint8,
    "target": torch.uint8,
    "references": torch.uint8,
    "reference_disparity": torch.uint8,
    "before": torch.int64,
    "after": torch.int64,
    "camera_to_world": torch.float32,
    "reference_camera_to_world": torch.float32,
    "intrinsics": torch.float32,
}


RunKind = Literal["photographs", "paths", "degraded"]
"""photographs: sparse splats at a scene's other cameras, beside the photographs taken there. paths: sparse splats along
smooth paths between and around the references, beside what splats trained on all photographs show there. degraded: those
splats themselves, damaged, along the same paths."""


@dataclass(frozen=True)
class PairRun:
    """What splats show at some cameras, and what should be seen there (`RunKind`)."""

    scene: str
    num_views: int
    """How many reference views the splats were trained on (k)."""
    seed: int
    steps: int
    """How many steps the splats were trained for."""
    render: UInt8[Tensor, "n 3 h w"]
    """What the splats show at the non-reference cameras, in capture order or along the paths; sRGB, 255 = 1."""
    alpha: UInt8[Tensor, "n 1 h w"]
    """Accumulated opacity; 255 = 1."""
    disparity: UInt8[Tensor, "n 1 h w"]
    """`diffusion_prior.conditioning.normalised_disparity` of the render; 255 = 1."""
    warped: UInt8[Tensor, "n warps h w"]
    """Reference photographs through the rendered depth: `diffusion_prior.types.ConditionClip.warped`; 255 = 1."""
    target: UInt8[Tensor, "n 3 h w"]
    """The photographs at the same cameras, or what the splats of all photographs show."""
    references: UInt8[Tensor, "k 3 h w"]
    """The photographs that the splats were trained on, in capture order."""
    reference_disparity: UInt8[Tensor, "k 1 h w"]
    """Disparity of the splats' own render at the references."""
    before: Int64[Tensor, " n"]
    """Index into `references` of the last reference before each camera in capture order, or where its path begins."""
    after: Int64[Tensor, " n"]
    """Index into `references` of the first reference after each camera in capture order, or where its path ends."""
    camera_to_world: Float32[Tensor, "n 3 4"]
    """OpenGL axes, the scene's world units."""
    reference_camera_to_world: Float32[Tensor, "k 3 4"]
    """OpenGL axes, the scene's world units."""
    intrinsics: Float32[Tensor, "n 4"]
    """fx, fy, cx, cy in pixels of the stored pictures."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Whatever else made the run what it is (regularisation, seed points, background); JSON values."""


@dataclass(frozen=True)
class RunHeader:
    """A run without its pictures: enough to plan which frames to read."""

    folder: Path
    scene: str
    num_views: int
    seed: int
    steps: int
    height: int
    width: int
    before: Int64[Tensor, " n"]
    after: Int64[Tensor, " n"]
    settings: dict[str, Any]
    sha256: str
    """Checksum of the pictures' file."""

    @property
    def num_frames(self) -> int:
        """How many non-reference cameras the run has."""
        return self.before.shape[0]


def run_folder(root: Path, scene: str, num_views: int, seed: int, steps: int, kind: RunKind = "photographs") -> Path:
    """Where a run belongs below the data's root folder."""
    name = f"k{num_views:02d}_s{seed}_n{steps}"
    return root / scene / (name if kind == "photographs" else f"{name}_{kind}")


def write_run(folder: Path, run: PairRun) -> None:
    """Write a run so that the folder is whole or absent, whenever the process dies; an older run there is replaced.

    Raises:
        ValueError: if the arrays do not fit together (`check_arrays`).
        OSError: if the disk is full or not writable; nothing of this run is left behind then.
    """
    arrays = {name: getattr(run, name) for name in DTYPES}
    check_arrays(arrays, run.num_views)
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        save_file({name: array.contiguous() for name, array in arrays.items()}, partial / FRAMES_NAME)
        (partial / META_NAME).write_text(json.dumps(_meta(run, partial / FRAMES_NAME), indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_run(folder: Path) -> PairRun:
    """Read a whole run.

    Raises:
        FileNotFoundError: if the folder is not a run.
        ValueError: if it is of another format or version, or its arrays do not fit together.
    """
    meta = _read_meta(Path(folder))
    arrays = load_file(Path(folder) / FRAMES_NAME)
    _check_names(Path(folder), set(arrays))
    check_arrays(arrays, meta["num_views"])
    values: dict[str, Any] = {**arrays}
    values |= {name: meta[name] for name in ("scene", "num_views", "seed", "steps", "settings")}
    return PairRun(**values)


def read_header(folder: Path) -> RunHeader:
    """Read what a run holds, without its pictures; errors as in `read_run`."""
    folder = Path(folder)
    meta = _read_meta(folder)
    with safe_open(folder / FRAMES_NAME, framework="pt") as frames:
        _check_names(folder, set(frames.keys()))
        before, after = frames.get_tensor("before"), frames.get_tensor("after")
    names = ("scene", "num_views", "seed", "steps", "height", "width", "settings", "sha256")
    return RunHeader(folder=folder, before=before, after=after, **{name: meta[name] for name in names})


def read_rows(folder: Path, rows: dict[str, Sequence[int]]) -> dict[str, Tensor]:
    """Read chosen rows of a run's arrays without loading the rest.

    Args:
        folder: the run.
        rows: for each array's name, which of its rows; a row may be asked for twice.

    Returns:
        Arrays under the same names, rows in the order asked for.
    """
    with safe_open(Path(folder) / FRAMES_NAME, framework="pt") as frames:
        return {name: _rows_of(frames.get_slice(name), indices) for name, indices in rows.items()}


def find_runs(root: Path) -> list[Path]:
    """Every run below a root folder, sorted by scene and name; half-written ones are not seen.

    Raises:
        FileNotFoundError: if there is none.
    """
    folders = sorted(
        meta.parent for meta in Path(root).glob(f"*/*/{META_NAME}") if not meta.parent.name.startswith(".")
    )
    if not folders:
        raise FileNotFoundError(
            f"no paired data below {root}: expected <scene>/k<views>_s<seed>_n<steps>/{META_NAME}; "
            "make some with `ns-enhancer make-pairs`."
        )
    return folders


def verify_run(folder: Path) -> None:
    """Check a run on disk: format, checksum, shapes, dtypes, indices and finite cameras.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: naming the first thing that is wrong.
    """
    folder = Path(folder)
    meta = _read_meta(folder)
    digest = _sha256(folder / FRAMES_NAME)
    if digest != meta["sha256"]:
        raise ValueError(
            f"{folder / FRAMES_NAME} has checksum {digest}, {META_NAME} says {meta['sha256']}; make the run anew."
        )
    run = read_run(folder)
    if (run.render.shape[-2], run.render.shape[-1]) != (meta["height"], meta["width"]):
        raise ValueError(
            f"{folder}: pictures are {tuple(run.render.shape[-2:])} pixels, {META_NAME} says {(meta['height'], meta['width'])}."
        )


def check_arrays(arrays: dict[str, Tensor], num_views: int) -> None:
    """Check that a run's arrays, under the names of `PairRun`, fit together.

    Raises:
        ValueError: naming the array, what it should be and what it is.
    """
    n, _, h, w = arrays["render"].shape
    k = num_views
    shapes = {
        "render": (n, 3, h, w),
        "alpha": (n, 1, h, w),
        "disparity": (n, 1, h, w),
        "warped": (n, arrays["warped"].shape[1] // WARP_CHANNELS * WARP_CHANNELS, h, w),
        "target": (n, 3, h, w),
        "references": (k, 3, h, w),
        "reference_disparity": (k, 1, h, w),
        "before": (n,),
        "after": (n,),
        "camera_to_world": (n, 3, 4),
        "reference_camera_to_world": (k, 3, 4),
        "intrinsics": (n, 4),
    }
    for name, shape in shapes.items():
        array = arrays[name]
        if tuple(array.shape) != shape or array.dtype != DTYPES[name]:
            raise ValueError(
                f"{name} must be {DTYPES[name]} of shape {shape} ({k} reference views), "
                f"got {array.dtype} of shape {tuple(array.shape)}."
            )
    if n == 0:
        raise ValueError("a run needs at least one camera that is no reference view, got none.")
    for name in ("before", "after"):
        lowest, highest = int(arrays[name].min()), int(arrays[name].max())
        if lowest < 0 or highest >= k:
            raise ValueError(f"{name} must index the {k} references, got {lowest} to {highest}.")
    for name in ("camera_to_world", "reference_camera_to_world", "intrinsics"):
        if not arrays[name].isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity.")


def _meta(run: PairRun, frames_path: Path) -> dict[str, Any]:
    return {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "scene": run.scene,
        "num_views": run.num_views,
        "seed": run.seed,
        "steps": run.steps,
        "num_frames": run.render.shape[0],
        "height": run.render.shape[2],
        "width": run.render.shape[3],
        "settings": run.settings,
        "sha256": _sha256(frames_path),
    }


def _read_meta(folder: Path) -> dict[str, Any]:
    for name in (META_NAME, FRAMES_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a run of paired data: {name} is missing.")
    meta = json.loads((folder / META_NAME).read_text(encoding="utf-8"))
    if meta.get("format") != FORMAT_NAME or meta.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder / META_NAME} must be {FORMAT_NAME} version {FORMAT_VERSION}, "
            f"got {meta.get('format')!r} version {meta.get('version')!r}; make the pairs with this release."
        )
    return meta


def _check_names(folder: Path, names: set[str]) -> None:
    if names != set(DTYPES):
        raise ValueError(
            f"{folder / FRAMES_NAME} must hold {sorted(DTYPES)}, lacks {sorted(set(DTYPES) - names)} "
            f"and has {sorted(names - set(DTYPES))} too many."
        )


def _rows_of(array_slice: Any, indices: Sequence[int]) -> Tensor:
    rows = {index: array_slice[index : index + 1] for index in set(indices)}
    return torch.cat([rows[index] for index in indices])


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
