"""Captures in COLMAP's format: a sparse model beside a folder of photographs."""

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nerfstudio_enhancer.conventions import camera_to_world_opengl
from nerfstudio_enhancer.scene.capture import Capture, Frame, in_capture_order

MODEL_FOLDERS = ("sparse/0", "colmap/sparse/0", "sparse")
# COLMAP's world often has y down; nerfstudio's has z up (nerfstudio's ColmapDataParser does the same).
COLMAP_TO_NERFSTUDIO_WORLD = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]])


def find_colmap_model(folder: Path) -> Path | None:
    """The folder's COLMAP model (cameras and images, text or binary), or None."""
    for name in MODEL_FOLDERS:
        model = folder / name
        if any(_has_model(model, suffix) for suffix in ("bin", "txt")):
            return model
    return None


def half_a_model(folder: Path) -> str | None:
    """Which file of a COLMAP model is there without the one that it needs beside it; None where there is neither."""
    for name, suffix in itertools.product(MODEL_FOLDERS, ("bin", "txt")):
        files = [folder / name / f"{kind}.{suffix}" for kind in ("cameras", "images")]
        there = [path for path in files if path.is_file()]
        if len(there) == 1:
            (missing,) = set(files) - set(there)
            return f"{folder / name} holds {there[0].name} but no {missing.name}"
    return None


def read_colmap_folder(data: Path) -> Capture:
    """Read a COLMAP model and name the photographs it poses.

    Raises:
        FileNotFoundError: there is no model, or no folder `images` or `images_N`.
        ValueError: a camera model that nerfstudio cannot undistort, or several models.
    """
    model = find_colmap_model(data)
    if model is None:
        raise FileNotFoundError(f"{data} has no COLMAP model in {', '.join(MODEL_FOLDERS)}.")
    try:
        cameras, images = _read_model(model)
    except Exception as error:  # nerfstudio's readers raise struct.error, IndexError, KeyError, ...
        raise ValueError(f"The COLMAP model in {model} cannot be read ({type(error).__name__}: {error}).") from error

    photographs = _photograph_folder(data)
    frames, models = [], set()
    for image in images.values():
        intrinsics = _intrinsics(cameras[image.camera_id], model)
        models.add(intrinsics["camera_model"])
        frames.append(_frame(image, intrinsics, photographs, data))
    if len(models) > 1:
        raise ValueError(f"The COLMAP model in {model} mixes the camera models {sorted(models)}; only one may be used.")
    return Capture(
        folder=data,
        frames=in_capture_order(frames, model),
        camera_model=models.pop(),
        applied_transform=COLMAP_TO_NERFSTUDIO_WORLD,
        named_splits=_named_splits(data, photographs),
        colmap_model=model,
    )


def _read_model(model: Path) -> tuple[dict[int, Any], dict[int, Any]]:
    """Cameras and images of a COLMAP model by their numbers, from its binary files where it has both kinds."""
    from nerfstudio.data.utils import colmap_parsing_utils as colmap

    if _has_model(model, "bin"):
        return colmap.read_cameras_binary(model / "cameras.bin"), colmap.read_images_binary(model / "images.bin")
    images = colmap.read_images_text(model / "images.txt")
    names = _names_in_text(model / "images.txt")
    return colmap.read_cameras_text(model / "cameras.txt"), {
        number: image._replace(name=names[number]) for number, image in images.items()
    }


def _names_in_text(path: Path) -> dict[int, str]:
    """Names of photographs by their numbers, whole: nerfstudio's reader ends them at the first space."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    names, at = {}, 0
    while at < len(lines):
        if lines[at] and not lines[at].startswith("#"):
            entries = lines[at].split(maxsplit=9)
            names[int(entries[0])] = entries[9]
            at += 1  # behind it come its points, in a line that may be empty
        at += 1
    return names


def read_observations(model: Path, names: Iterable[str]) -> dict[str, tuple[np.ndarray, np.ndarray, tuple[int, int]]]:
    """Which points of a COLMAP model the named photographs observe, and where; no other photograph is looked at.

    Returns:
        By name: [n, 2] pixel positions, [n] point ids and the (width, height) for which the positions hold.
        Names that the model does not know are left out.
    """
    cameras, images = _read_model(model)
    by_name = {image.name: image for image in images.values()}
    observations = {}
    for name in names:
        image = by_name.get(name) or by_name.get(Path(name).name)
        if image is not None:
            seen = image.point3D_ids >= 0
            camera = cameras[image.camera_id]
            observations[name] = (image.xys[seen], image.point3D_ids[seen], (camera.width, camera.height))
    return observations


def read_points(model: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """All points of a COLMAP model in its own world: [n, 3] float64 positions and [n, 3] uint8 colours, or None."""
    from nerfstudio.data.utils.colmap_parsing_utils import read_points3D_binary, read_points3D_text

    if (model / "points3D.bin").exists():
        points = read_points3D_binary(model / "points3D.bin")
    elif (model / "points3D.txt").exists():
        points = read_points3D_text(model / "points3D.txt")
    else:
        return None
    if not points:
        return None
    xyz = np.array([point.xyz for point in points.values()], dtype=np.float64)
    rgb = np.array([point.rgb for point in points.values()], dtype=np.uint8)
    return xyz, rgb


def _has_model(model: Path, suffix: str) -> bool:
    return (model / f"cameras.{suffix}").exists() and (model / f"images.{suffix}").exists()


def _photograph_folder(data: Path) -> Path:
    """`images`, or where only downscaled copies are there the largest `images_N`."""
    if (data / "images").is_dir():
        return data / "images"
    copies = [
        (int(match[1]), path) for path in data.glob("images_*") if (match := re.fullmatch(r"images_(\d+)", path.name))
    ]
    if not copies:
        raise FileNotFoundError(f"{data} has a COLMAP model but no folder `images` (or `images_N`) with photographs.")
    return min(copies)[1]


def _intrinsics(camera, model: Path) -> dict:
    from nerfstudio.process_data.colmap_utils import parse_colmap_camera_params

    try:
        intrinsics = parse_colmap_camera_params(camera)
    except NotImplementedError as error:
        raise ValueError(
            f"The camera model {camera.model} in {model} is not supported; undistort the photographs first "
            "(`colmap image_undistorter`)."
        ) from error
    return intrinsics


def _frame(image, intrinsics: dict, photographs: Path, data: Path) -> Frame:
    world_to_camera = np.eye(4)
    world_to_camera[:3, :3] = image.qvec2rotmat()
    world_to_camera[:3, 3] = image.tvec
    camera_to_world = camera_to_world_opengl(torch.from_numpy(world_to_camera)).numpy()
    mask = _mask(data, image.name)
    return Frame(
        image=photographs / image.name,
        name=image.name,
        camera_to_world=np.vstack([COLMAP_TO_NERFSTUDIO_WORLD, [0, 0, 0, 1]]) @ camera_to_world,
        width=int(intrinsics["w"]),
        height=int(intrinsics["h"]),
        fx=intrinsics["fl_x"],
        fy=intrinsics["fl_y"],
        cx=intrinsics["cx"],
        cy=intrinsics["cy"],
        distortion=tuple(float(intrinsics.get(key, 0.0)) for key in ("k1", "k2", "k3", "k4", "p1", "p2")),
        mask=mask,
    )


def _mask(data: Path, name: str) -> Path | None:
    """masks/NAME.png beside the photographs, named as nerfstudio (stem.png) or COLMAP (name.jpg.png) names it."""
    for mask in ((data / "masks" / name).with_suffix(".png"), data / "masks" / f"{name}.png"):
        if mask.exists():
            return mask
    return None


def _named_splits(data: Path, photographs: Path) -> dict[str, list[str]]:
    """The lists train_list.txt, validation_list.txt and test_list.txt, as nerfstudio's ColmapDataParser reads them."""
    lists = {"train": "train_list.txt", "val": "validation_list.txt", "test": "test_list.txt"}
    return {
        split: [line.strip() for line in (data / file).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        for split, file in lists.items()
        if (data / file).exists()
    }
