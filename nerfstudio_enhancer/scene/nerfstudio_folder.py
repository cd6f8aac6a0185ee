"""Captures in nerfstudio's own format: transforms.json beside a folder of photographs."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from nerfstudio_enhancer.scene.capture import WAY_OUT_UNPOSED, Capture, Frame, in_capture_order
from nerfstudio_enhancer.scene.colmap_folder import find_colmap_model

# The transform by which ns-process-data turned COLMAP's world before it wrote down `applied_transform`.
LEGACY_APPLIED_TRANSFORM = np.array([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0]])
BROWN_KEYS = ("k1", "k2", "k3", "k4", "p1", "p2")


def read_nerfstudio_folder(data: Path) -> Capture:
    """Read transforms.json (given itself or its folder) as nerfstudio's `nerfstudio-data` does.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or lacks intrinsics or poses.
    """
    transforms_file = data if data.suffix == ".json" else data / "transforms.json"
    folder = transforms_file.parent
    meta = _load(transforms_file)
    frames = [_frame(entry, meta, folder, transforms_file) for entry in meta["frames"]]
    colmap_model = find_colmap_model(folder)
    return Capture(
        folder=folder,
        frames=in_capture_order(frames, transforms_file),
        camera_model=str(meta.get("camera_model", "OPENCV")),
        applied_transform=_applied_transform(meta, folder),
        applied_scale=float(meta.get("applied_scale", 1.0)),
        orientation_override=meta.get("orientation_override"),
        fisheye_crop_radius=meta.get("fisheye_crop_radius"),
        named_splits={
            split: [_name(path) for path in meta[f"{split}_filenames"]]
            for split in ("train", "val", "test")
            if f"{split}_filenames" in meta
        },
        points_file=folder / meta["ply_file_path"] if "ply_file_path" in meta else None,
        colmap_model=colmap_model,
    )


def _load(transforms_file: Path) -> dict[str, Any]:
    if not transforms_file.exists():
        raise FileNotFoundError(f"{transforms_file} does not exist. {WAY_OUT_UNPOSED}")
    try:
        meta = json.loads(transforms_file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{transforms_file} is no valid JSON: {error}. Copy it again, or make it anew.") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("frames"), list):
        raise ValueError(f"{transforms_file} has no list `frames`. {WAY_OUT_UNPOSED}")
    return meta


def _frame(entry: dict[str, Any], meta: dict[str, Any], folder: Path, transforms_file: Path) -> Frame:
    if "file_path" not in entry:
        raise ValueError(f"A frame of {transforms_file} has no `file_path`.")
    name = _name(entry["file_path"])
    if "transform_matrix" not in entry:
        raise ValueError(f"The frame {name} of {transforms_file} has no `transform_matrix`. {WAY_OUT_UNPOSED}")

    def intrinsic(key: str) -> float:
        value = meta.get(key, entry.get(key))  # the scene's value goes first, as in nerfstudio
        if value is None:
            raise ValueError(f"{transforms_file} states `{key}` neither for the scene nor for the frame {name}.")
        return float(value)

    return Frame(
        image=folder / name,
        name=name,
        camera_to_world=_pose(entry["transform_matrix"], name),
        width=int(intrinsic("w")),
        height=int(intrinsic("h")),
        fx=intrinsic("fl_x"),
        fy=intrinsic("fl_y"),
        cx=intrinsic("cx"),
        cy=intrinsic("cy"),
        distortion=_distortion(entry, meta),
        mask=folder / entry["mask_path"] if "mask_path" in entry else None,
    )


def _name(file_path: str) -> str:
    return Path(file_path).as_posix()


def _pose(rows: Any, name: str) -> np.ndarray:
    try:
        pose = np.array(rows, dtype=np.float64)
    except (TypeError, ValueError):
        pose = np.empty(0)
    if pose.shape not in ((3, 4), (4, 4)):
        raise ValueError(f"The pose of {name} must be 3x4 or 4x4 numbers, got {rows}.")
    return np.vstack([pose[:3], [0.0, 0.0, 0.0, 1.0]])


def _distortion(entry: dict[str, Any], meta: dict[str, Any]) -> tuple[float, ...]:
    """k1, k2, k3, k4, p1, p2; a scene's values go before a frame's, as in nerfstudio."""
    per_scene = any(key in meta for key in (*BROWN_KEYS, "distortion_params"))
    source = meta if per_scene else entry
    if "distortion_params" in source:
        return tuple(float(value) for value in source["distortion_params"])
    return tuple(float(source.get(key, 0.0)) for key in BROWN_KEYS)


def _applied_transform(meta: dict[str, Any], folder: Path) -> np.ndarray | None:
    if "applied_transform" in meta:
        return np.array(meta["applied_transform"], dtype=np.float64)[:3]
    if (folder / "colmap/sparse/0").exists():
        return LEGACY_APPLIED_TRANSFORM
    return None
