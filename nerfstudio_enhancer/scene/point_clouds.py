"""Points that a capture brings along: its own point cloud, and which points its reference views observe."""

from pathlib import Path

import numpy as np

from nerfstudio_enhancer.initial_splats import Tracks
from nerfstudio_enhancer.scene.capture import Capture, Frame
from nerfstudio_enhancer.scene.colmap_folder import read_observations, read_points


def read_capture_points(capture: Capture) -> tuple[np.ndarray, np.ndarray] | None:
    """The whole point cloud in the world of the poses, float64 [n, 3] and uint8 [n, 3]; None where there is none.

    Raises:
        FileNotFoundError: transforms.json names a point cloud that does not exist.
    """
    if capture.points_file is not None:
        return _read_ply(capture.points_file)
    points = None if capture.colmap_model is None else read_points(capture.colmap_model)
    if points is None or capture.applied_transform is None:
        return points
    xyz, rgb = points
    return xyz @ capture.applied_transform[:, :3].T + capture.applied_transform[:, 3], rgb


def reference_tracks(capture: Capture, references: list[Frame]) -> Tracks | None:
    """Observations by the reference views alone of the COLMAP model's points; None where there is no model.

    Positions and colours of the model's points are not read: other views had a share in them.
    """
    if capture.colmap_model is None:
        return None
    observed = read_observations(capture.colmap_model, [_colmap_name(frame) for frame in references])
    views, points, pixels = [], [], []
    for index, frame in enumerate(references):
        if _colmap_name(frame) not in observed:
            continue
        positions, ids, (width, height) = observed[_colmap_name(frame)]
        views.append(np.full(len(ids), index))
        points.append(ids)
        pixels.append(positions * [frame.width / width, frame.height / height])
    if not views:
        return None
    return Tracks.of_observations(np.concatenate(views), np.concatenate(points), np.concatenate(pixels))


def _colmap_name(frame: Frame) -> str:
    return frame.name.removeprefix("images/")


def _read_ply(points_file: Path) -> tuple[np.ndarray, np.ndarray] | None:
    import trimesh

    if not points_file.exists():
        raise FileNotFoundError(
            f"The point cloud {points_file} named by transforms.json (`ply_file_path`) does not exist; put it there, "
            "remove the entry, or pass `--seed-points triangulated`."
        )
    cloud = trimesh.load(points_file)
    xyz = np.asarray(cloud.vertices, dtype=np.float64)  # type: ignore[union-attr]
    if len(xyz) == 0:
        return None
    colours = getattr(cloud.visual, "vertex_colors", None) if isinstance(cloud, trimesh.Trimesh) else cloud.colors  # type: ignore[union-attr]
    if colours is None or len(colours) != len(xyz):
        rgb = np.full((len(xyz), 3), 127, dtype=np.uint8)
    else:
        rgb = np.asarray(colours, dtype=np.uint8)[:, :3]
    return xyz, np.ascontiguousarray(rgb)
