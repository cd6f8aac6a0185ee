"""Depth that comes with a scene, of a sensor or of a renderer, in the place of that of splats."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from diffusion_prior.files import whole_file
from nerfstudio_enhancer.depth_training.samples import FAR_AWAY
from nerfstudio_enhancer.depth_training.whole_splats import WholeScene
from nerfstudio_enhancer.procedural.make_scenes import MOST_STEPS
from nerfstudio_enhancer.scene.capture import Capture, Frame, read_capture
from nerfstudio_enhancer.scene.photographs import checked_photographs, read_rgb_and_usable


def knows_depth(data: Path) -> bool:
    """Whether every photograph of a capture has a depth picture, and none is distorted, so that both show the same pixels."""
    frames = read_capture(data).frames
    return all(frame.depth is not None and not any(frame.distortion) for frame in frames)


def store_known_views(scene: WholeScene) -> None:
    """Store what `whole_splats.store_views` stores, with the capture's own depth.

    Where it is unknown, opacity is 0; what is farther than the capture can say (`Capture.depth_clipped`) is `samples.FAR_AWAY`.

    Raises:
        FileNotFoundError: if a photograph or depth picture is missing.
        ValueError: if a depth picture has no single channel, or another shape than its photograph.
    """
    capture = read_capture(scene.data)
    count = min(scene.max_views, len(capture.frames))
    chosen = np.linspace(0, len(capture.frames) - 1, count).round().astype(int)
    frames = checked_photographs([capture.frames[i] for i in chosen], capture.folder, needs_pixels=True, as_named=False)
    views = [_view(frame, scene.size, capture) for frame in frames]
    with whole_file(scene.output) as partial:
        torch.save(views, partial)


def _view(frame: Frame, size: int | None, capture: Capture) -> dict:
    rgb, usable = read_rgb_and_usable(frame)
    height, width = rgb.shape[:2]
    steps = _read_depth(frame, width / height)
    depth = steps * capture.depth_unit
    if capture.depth_clipped:
        depth[steps >= MOST_STEPS] = FAR_AWAY
    scale = 1.0 if size is None else min(1.0, size / max(height, width))
    small = (round(width * scale), round(height * scale))
    rgb = cv2.resize(rgb, small, interpolation=cv2.INTER_AREA)
    depth = cv2.resize(depth, small, interpolation=cv2.INTER_NEAREST)
    usable = cv2.resize(usable.astype(np.uint8), small, interpolation=cv2.INTER_NEAREST) > 0
    known = usable & np.isfinite(depth) & (depth > 0)
    across, down = small[0] / width, small[1] / height
    return {
        "rgb": torch.from_numpy(rgb),
        "depth": torch.from_numpy(np.where(known, depth, 1.0).astype(np.float32)),
        "alpha": torch.from_numpy(known.astype(np.uint8) * 255),
        "camera_to_world": torch.from_numpy(frame.camera_to_world[:3]).float(),
        "intrinsics": torch.tensor([frame.fx * across, frame.fy * down, frame.cx * across, frame.cy * down]),
    }


def _read_depth(frame: Frame, aspect: float) -> np.ndarray:
    """In steps, float64 [h, w]."""
    assert frame.depth is not None
    if not frame.depth.exists():
        raise FileNotFoundError(
            f"The depth picture {frame.depth} of {frame.name} is missing; put it there, or take `depth_file_path` from all frames."
        )
    if frame.depth.suffix == ".npy":
        depth = np.load(frame.depth)
    else:
        with Image.open(frame.depth) as opened:
            depth = np.array(opened)
    if depth.ndim != 2 or abs(depth.shape[1] / depth.shape[0] / aspect - 1) > 0.02:
        raise ValueError(
            f"The depth picture {frame.depth} must have one channel and the shape of its photograph ({aspect:.3f} times as wide as high), "
            f"got an array of {depth.shape}; render it at the photograph's size."
        )
    return depth.astype(np.float64)
