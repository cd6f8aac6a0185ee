"""What a folder of posed photographs holds, before any of it is chosen for training."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

WAY_OUT_UNPOSED = (
    "Photographs without poses must be posed first: "
    "`ns-process-data images --data PHOTOGRAPHS --output-dir FOLDER`, then pass FOLDER."
)


@dataclass(frozen=True)
class Frame:
    """One photograph with its pose and intrinsics, as the capture states them; the file has not been opened."""

    image: Path
    """Photograph file."""
    name: str
    """Name relative to the capture, by which splits and reference views are named."""
    camera_to_world: np.ndarray
    """[4, 4] float64, OpenGL axes, world of the capture."""
    width: int
    """Pixels, of the picture for which the intrinsics hold."""
    height: int
    fx: float
    """Focal lengths and principal point in pixels; the centre of the first pixel is (0.5, 0.5)."""
    fy: float
    cx: float
    cy: float
    distortion: tuple[float, ...]
    """nerfstudio's order: k1, k2, k3, k4, p1, p2 (fisheye: k1 to k4)."""
    mask: Path | None = None
    """White = use, black = ignore; the same size as the photograph."""


@dataclass(frozen=True)
class Capture:
    """Every posed photograph of a folder in capture order, and what else the folder knows."""

    folder: Path
    frames: tuple[Frame, ...]
    """Sorted by name, numbers by value: IMG_2 before IMG_10."""
    camera_model: str
    """nerfstudio's name, for example OPENCV or OPENCV_FISHEYE."""
    applied_transform: np.ndarray | None = None
    """[3, 4] transform that led from the original world to the world of the poses."""
    applied_scale: float = 1.0
    orientation_override: str | None = None
    fisheye_crop_radius: float | None = None
    named_splits: dict[str, list[str]] = field(default_factory=dict)
    """Names by split ("train", "val", "test"), where the capture brings such lists."""
    points_file: Path | None = None
    """Point cloud (.ply) in the world of the poses."""
    colmap_model: Path | None = None
    """Folder with COLMAP's cameras, images and points3D."""


def read_capture(data: Path) -> Capture:
    """Read a nerfstudio-data folder (or its .json file) or a COLMAP folder; which of them is told by looking.

    Raises:
        FileNotFoundError: the folder does not exist, or holds no poses.
        ValueError: the poses or intrinsics cannot be understood.
    """
    from nerfstudio_enhancer.scene.colmap_folder import find_colmap_model, half_a_model, read_colmap_folder
    from nerfstudio_enhancer.scene.nerfstudio_folder import read_nerfstudio_folder

    if not data.exists():
        raise FileNotFoundError(
            f"The data folder {data.absolute()} does not exist. In training give an existing one by `--data`; of a finished run "
            "change `data` in its config.yml (a relative path counts from the folder in which the command runs)."
        )
    if data.suffix == ".json" or (data / "transforms.json").exists():
        return read_nerfstudio_folder(data)
    if find_colmap_model(data) is not None:
        return read_colmap_folder(data)
    half = half_a_model(data)
    if half is not None:
        raise FileNotFoundError(f"{half}: the model is not whole. Copy the rest of it there, or export it again.")
    raise FileNotFoundError(
        f"{data} has no poses: neither transforms.json nor a COLMAP model in sparse/0, colmap/sparse/0 or sparse was "
        f"found. {WAY_OUT_UNPOSED}"
    )


def in_capture_order(frames: list[Frame], folder: Path) -> tuple[Frame, ...]:
    """Frames sorted by name, numbers by value; refuses an empty capture and a photograph listed twice."""
    if not frames:
        raise ValueError(f"{folder} lists no posed photograph. {WAY_OUT_UNPOSED}")
    seen: set[Path] = set()
    for frame in frames:
        if frame.image in seen:
            raise ValueError(
                f"The photograph {frame.name} is listed twice in {folder}, so that it could be a reference view and a "
                "test view at once; remove one of the two entries."
            )
        seen.add(frame.image)
    return tuple(sorted(frames, key=lambda frame: natural_key(frame.name)))


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorting key under which numbers inside a name compare by value."""
    parts = re.split(r"(\d+)", name)
    return tuple((1, int(part), part) if part.isdigit() else (0, 0, part) for part in parts)
