"""A tiny but real scene, ray traced: a textured box on a textured floor before a textured wall.

Every pixel has a known colour and depth, so that poses, intrinsics and triangulated points can be checked for truth.
World: z up, floor z = 0, wall y = 2, box 0.9 wide standing on the floor around the origin.
"""

import json
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from nerfstudio_enhancer.initial_splats import ReferenceView

BOX_LOW, BOX_HIGH = np.array([-0.45, -0.45, 0.0]), np.array([0.45, 0.45, 0.9])
FLOOR_HALF_SIDE, WALL_Y, WALL_HEIGHT = 3.0, 2.0, 2.5
SKY_RGB = np.array([0.55, 0.7, 0.9])


@dataclass(frozen=True)
class TinyScene:
    """Photographs of the scene with everything that is known about them."""

    images: np.ndarray
    """uint8 [n, h, w, 3]."""
    depth: np.ndarray
    """float64 [n, h, w] along the optical axis, infinite in the sky."""
    camera_to_world: np.ndarray
    """float64 [n, 4, 4], OpenGL axes."""
    focal_px: float

    @property
    def height(self) -> int:
        return self.images.shape[1]

    @property
    def width(self) -> int:
        return self.images.shape[2]

    @property
    def names(self) -> list[str]:
        """File names whose order by number is not the order of their letters."""
        return [f"view_{index + 1}.png" for index in range(len(self.images))]

    def world_to_camera_opencv(self, index: int) -> np.ndarray:
        """[4, 4] of one photograph."""
        return np.linalg.inv(self.camera_to_world[index] @ np.diag([1.0, -1.0, -1.0, 1.0]))

    def project(self, index: int, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [m, 2] and depths [m] of world points [m, 3] in one photograph; the first pixel's centre is 0.5."""
        world_to_camera = self.world_to_camera_opencv(index)
        x, y, z = world_to_camera[:3, :3] @ points.T + world_to_camera[:3, 3:]
        pixel = np.stack([x / z * self.focal_px + self.width / 2, y / z * self.focal_px + self.height / 2], axis=1)
        return pixel, z

    def distance_to_surface(self, points: np.ndarray) -> np.ndarray:
        """Distance [m] of world points [m, 3] from the nearest surface of the scene."""
        floor = np.abs(points[:, 2])
        wall = np.abs(points[:, 1] - WALL_Y)
        outside = np.maximum(np.maximum(BOX_LOW - points, points - BOX_HIGH), 0)
        inside = np.minimum(points - BOX_LOW, BOX_HIGH - points).min(axis=1)
        box = np.where(inside > 0, inside, np.linalg.norm(outside, axis=1))
        return np.minimum(np.minimum(floor, wall), box)


@cache
def tiny_scene(num_images: int = 10, width: int = 64, height: int = 48, arc_deg: float = 70.0) -> TinyScene:
    """Ray trace `num_images` photographs from an arc around the box; all look at its middle."""
    focal_px = 0.95 * width
    poses = [_look_at_box(np.deg2rad(angle)) for angle in np.linspace(-arc_deg / 2, arc_deg / 2, num_images)]
    pictures = [_trace(pose, width, height, focal_px) for pose in poses]
    return TinyScene(
        images=np.stack([image for image, _ in pictures]),
        depth=np.stack([depth for _, depth in pictures]),
        camera_to_world=np.stack(poses),
        focal_px=focal_px,
    )


def write_nerfstudio_folder(
    folder: Path,
    scene: TinyScene,
    mode: str = "RGB",
    masks: bool = False,
    per_frame_intrinsics: bool = False,
    extra: dict | None = None,
) -> Path:
    """Write the scene as nerfstudio-data: transforms.json, images/, masks/. `mode`: RGB, RGBA (sky transparent) or L."""
    intrinsics = {
        "fl_x": scene.focal_px,
        "fl_y": scene.focal_px,
        "cx": scene.width / 2,
        "cy": scene.height / 2,
        "w": scene.width,
        "h": scene.height,
    }
    frames = []
    for index, name in enumerate(scene.names):
        frame = {"file_path": f"images/{name}", "transform_matrix": scene.camera_to_world[index].tolist()}
        if per_frame_intrinsics:
            frame |= intrinsics
        if masks:
            frame["mask_path"] = f"masks/{name}"
        frames.append(frame)
    _write_images(folder, scene, mode, masks)
    meta = (
        {"camera_model": "OPENCV"} | ({} if per_frame_intrinsics else intrinsics) | {"frames": frames} | (extra or {})
    )
    (folder / "transforms.json").write_text(json.dumps(meta))
    return folder


def write_colmap_folder(
    folder: Path, scene: TinyScene, binary: bool = True, model: str = "sparse/0", num_points: int = 150
) -> Path:
    """Write the scene as COLMAP does: images/ and a sparse model with true points and their observations."""
    _write_images(folder, scene, "RGB", masks=False)
    points, rgb = surface_points(scene, num_points)
    observations = [visible_points(scene, index, points) for index in range(len(scene.images))]
    (folder / model).mkdir(parents=True, exist_ok=True)
    write = _write_model_binary if binary else _write_model_text
    write(folder / model, scene, points, rgb, observations)
    return folder


def surface_points(scene: TinyScene, num_points: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """True points [m, 3] of surfaces seen in the photographs, and their colours uint8 [m, 3]."""
    rng = np.random.default_rng(seed)
    points, colours = [], []
    while len(points) < num_points:
        index = int(rng.integers(len(scene.images)))
        row, column = int(rng.integers(scene.height)), int(rng.integers(scene.width))
        depth = scene.depth[index, row, column]
        if np.isfinite(depth):
            points.append(_unproject(scene, index, np.array([column + 0.5, row + 0.5]), depth))
            colours.append(scene.images[index, row, column])
    return np.array(points), np.array(colours)


def visible_points(scene: TinyScene, index: int, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [m] of the points that one photograph shows, and their pixels [m, 2]."""
    pixel, z = scene.project(index, points)
    column, row = np.floor(pixel).astype(int).T
    inside = (z > 0) & (column >= 0) & (column < scene.width) & (row >= 0) & (row < scene.height)
    column, row = np.clip(column, 0, scene.width - 1), np.clip(row, 0, scene.height - 1)
    seen = np.flatnonzero(inside & (np.abs(scene.depth[index, row, column] - z) < 0.05 * z))
    return seen, pixel[seen]


def reference_view(scene: TinyScene, index: int) -> ReferenceView:
    """One photograph as a reference view of the package."""
    return ReferenceView(
        world_to_camera=scene.world_to_camera_opencv(index),
        fx=scene.focal_px,
        fy=scene.focal_px,
        cx=scene.width / 2,
        cy=scene.height / 2,
        width=scene.width,
        height=scene.height,
        distortion=(0.0,) * 6,
        fisheye=False,
        read_pixels=lambda: (scene.images[index], np.ones(scene.images.shape[1:3], dtype=bool)),
    )


def _look_at_box(angle_rad: float) -> np.ndarray:
    target = np.array([0.0, 0.0, 0.4])
    centre = np.array([3.0 * np.sin(angle_rad), -3.0 * np.cos(angle_rad), 1.6])
    backward = (centre - target) / np.linalg.norm(centre - target)
    right = np.cross([0.0, 0.0, 1.0], backward)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(backward, right), backward, centre], axis=1)
    return pose


def _trace(pose: np.ndarray, width: int, height: int, focal_px: float) -> tuple[np.ndarray, np.ndarray]:
    """Colours uint8 [h, w, 3], the mean of four rays a pixel, and depths [h, w] of the pixels' centres."""
    colour = np.zeros((height, width, 3))
    for dx in (0.25, 0.75):
        for dy in (0.25, 0.75):
            colour += _trace_rays(pose, width, height, focal_px, dx, dy)[0] / 4
    _, depth = _trace_rays(pose, width, height, focal_px, 0.5, 0.5)
    return np.rint(colour * 255).astype(np.uint8), depth


def _trace_rays(
    pose: np.ndarray, width: int, height: int, focal_px: float, dx: float, dy: float
) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.meshgrid(np.arange(width) + dx, np.arange(height) + dy)
    in_camera = np.stack([(x - width / 2) / focal_px, -(y - height / 2) / focal_px, -np.ones_like(x)], axis=-1)
    rays = in_camera @ pose[:3, :3].T  # of depth 1
    origin = pose[:3, 3]
    depth, colour = np.full(x.shape, np.inf), np.broadcast_to(SKY_RGB, (*x.shape, 3)).copy()
    for hit, surface in _hits(origin, rays):
        nearer = hit < depth
        depth = np.where(nearer, hit, depth)
        colour[nearer] = _texture(origin + hit[nearer][:, None] * rays[nearer], surface)
    return colour, depth


def _hits(origin: np.ndarray, rays: np.ndarray):
    """Depth at which rays meet each surface (infinite where they miss), with the surface's number."""
    with np.errstate(divide="ignore", invalid="ignore"):
        floor = -origin[2] / rays[..., 2]
        at = origin + floor[..., None] * rays
        yield np.where((floor > 0) & (np.abs(at[..., :2]).max(axis=-1) < FLOOR_HALF_SIDE), floor, np.inf), 0
        wall = (WALL_Y - origin[1]) / rays[..., 1]
        at = origin + wall[..., None] * rays
        on_wall = (wall > 0) & (np.abs(at[..., 0]) < FLOOR_HALF_SIDE) & (at[..., 2] > 0) & (at[..., 2] < WALL_HEIGHT)
        yield np.where(on_wall, wall, np.inf), 1
        first, second = (BOX_LOW - origin) / rays, (BOX_HIGH - origin) / rays
        enter, leave = np.minimum(first, second).max(axis=-1), np.maximum(first, second).min(axis=-1)
        yield np.where((enter > 0) & (enter < leave), enter, np.inf), 2


def _texture(points: np.ndarray, surface: int) -> np.ndarray:
    """Colours of surface points: smooth random blobs, other ones for each direction and surface."""
    colour = np.zeros((*points.shape[:-1], 3))
    for axes, weight in (((0, 1), 0.4), ((1, 2), 0.3), ((0, 2), 0.3)):
        colour += weight * _blobs(points[..., axes[0]], points[..., axes[1]], surface * 3 + sum(axes))
    return colour


def _blobs(u: np.ndarray, v: np.ndarray, number: int) -> np.ndarray:
    """Bilinear interpolation of a grid of random colours, 12 cells a unit length."""
    grid = np.random.default_rng(number).random((128, 128, 3))
    u, v = np.clip(np.nan_to_num(u) * 12 + 60, 0, 126), np.clip(np.nan_to_num(v) * 12 + 60, 0, 126)
    i, j = u.astype(int), v.astype(int)
    a, b = (u - i)[..., None], (v - j)[..., None]
    top = grid[i, j] * (1 - b) + grid[i, j + 1] * b
    bottom = grid[i + 1, j] * (1 - b) + grid[i + 1, j + 1] * b
    return top * (1 - a) + bottom * a


def _unproject(scene: TinyScene, index: int, pixel: np.ndarray, depth: float) -> np.ndarray:
    x, y = (pixel - [scene.width / 2, scene.height / 2]) / scene.focal_px * depth
    return (scene.camera_to_world[index] @ np.array([x, -y, -depth, 1.0]))[:3]


def _write_images(folder: Path, scene: TinyScene, mode: str, masks: bool) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, pixels, depth in zip(scene.names, scene.images, scene.depth):
        image = Image.fromarray(pixels)
        solid = Image.fromarray(np.where(np.isfinite(depth), 255, 0).astype(np.uint8))
        if mode == "RGBA":
            image.putalpha(solid)
        (image.convert("L") if mode == "L" else image).save(folder / "images" / name)
        if masks:
            (folder / "masks").mkdir(exist_ok=True)
            solid.save(folder / "masks" / name)


def _quaternion_and_translation(scene: TinyScene, index: int) -> tuple[np.ndarray, np.ndarray]:
    from scipy.spatial.transform import Rotation

    world_to_camera = scene.world_to_camera_opencv(index)
    x, y, z, w = Rotation.from_matrix(world_to_camera[:3, :3]).as_quat()
    return np.array([w, x, y, z]), world_to_camera[:3, 3]


def _tracks(observations: list, num_points: int) -> list[list[tuple[int, int]]]:
    """For each point the (image number, number of the observation in that image) that see it."""
    tracks: list[list[tuple[int, int]]] = [[] for _ in range(num_points)]
    for index, (seen, _) in enumerate(observations):
        for position, point in enumerate(seen):
            tracks[point].append((index + 1, position))
    return tracks


def _write_model_text(model: Path, scene: TinyScene, points: np.ndarray, rgb: np.ndarray, observations: list) -> None:
    f, w, h = scene.focal_px, scene.width, scene.height
    (model / "cameras.txt").write_text(f"# cameras\n1 PINHOLE {w} {h} {f} {f} {w / 2} {h / 2}\n")
    lines = ["# images"]
    for index, (name, (seen, pixel)) in enumerate(zip(scene.names, observations)):
        quaternion, translation = _quaternion_and_translation(scene, index)
        lines.append(" ".join(map(repr, [index + 1, *quaternion.tolist(), *translation.tolist(), 1])) + f" {name}")
        lines.append(" ".join(f"{x!r} {y!r} {point}" for (x, y), point in zip(pixel.tolist(), seen.tolist())))
    (model / "images.txt").write_text("\n".join(lines) + "\n")
    lines = ["# points"]
    for point, track in enumerate(_tracks(observations, len(points))):
        numbers = [
            point,
            *points[point].tolist(),
            *rgb[point].tolist(),
            0.5,
            *np.array(track).ravel().astype(int).tolist(),
        ]
        lines.append(" ".join(map(repr, numbers)))
    (model / "points3D.txt").write_text("\n".join(lines) + "\n")


def _write_model_binary(model: Path, scene: TinyScene, points: np.ndarray, rgb: np.ndarray, observations: list) -> None:
    f, w, h = scene.focal_px, scene.width, scene.height
    pinhole = 1
    (model / "cameras.bin").write_bytes(struct.pack("<QiiQQdddd", 1, 1, pinhole, w, h, f, f, w / 2, h / 2))
    data = struct.pack("<Q", len(scene.names))
    for index, (name, (seen, pixel)) in enumerate(zip(scene.names, observations)):
        quaternion, translation = _quaternion_and_translation(scene, index)
        data += struct.pack("<idddddddi", index + 1, *quaternion, *translation, 1) + name.encode() + b"\0"
        data += struct.pack("<Q", len(seen))
        data += b"".join(struct.pack("<ddq", x, y, point) for (x, y), point in zip(pixel, seen))
    (model / "images.bin").write_bytes(data)
    data = struct.pack("<Q", len(points))
    for point, track in enumerate(_tracks(observations, len(points))):
        data += struct.pack("<QdddBBBd", point, *points[point], *rgb[point].tolist(), 0.5)
        data += struct.pack("<Q", len(track)) + b"".join(struct.pack("<ii", *entry) for entry in track)
    (model / "points3D.bin").write_bytes(data)
