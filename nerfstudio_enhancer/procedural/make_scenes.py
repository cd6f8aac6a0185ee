"""`ns-enhancer make-scenes`: procedural scenes with exact depth, in nerfstudio's layout."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image

from nerfstudio_enhancer.jobs import Job, run_jobs, workers_and_threads

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")

SHAPES = ((4, 3), (3, 2), (16, 9), (3, 4))
"""Width to height of the pictures; a scene has one of them."""

DEPTH_UNIT = 1e-3
"""World units of a step of the depth pictures, as nerfstudio assumes."""

MOST_STEPS = 65535
"""What 16 bits hold; it stands for all that is farther, the sky too."""

FEWEST_VIEWS = 0.6
"""Of the views asked for, that a scene keeps; another arrangement is drawn where more are blocked."""

PRELOAD = ("nerfstudio_enhancer.procedural.render",)


@dataclass(frozen=True)
class MakeScenes:
    """Make scenes of textured solids, with photographs, poses and exact depth.

    They are training data for depth network and prior beside real scenes: tables with things on them, rooms, streets,
    places with trees and buildings, drawn at random. What exists in the output folder is kept, so that the command can be
    repeated to go on. `train-depth` learns from their depth directly; to `make-pairs` they are scenes like any other.
    """

    output: Path
    """Folder of the scenes: `procedural_00000/` and so on."""
    count: int = 100
    """How many."""
    first: int = 0
    """Number of the first; a scene's number decides what it is."""
    photographs: tuple[Path, ...] = ()
    """Folders of photographs, searched at any depth, that most textures are cut out of. Without them all textures are noise
    and patterns."""
    views: int = 24
    """Cameras of a scene; those that something stands in front of are left out."""
    size: int = 320
    """Longest side of the pictures in pixels."""
    jobs: int | None = None
    """Scenes at once; by default one for each core."""


def make_scenes(settings: MakeScenes) -> list[Path]:
    """Make what is missing.

    Returns:
        The folders of all scenes asked for.

    Raises:
        ValueError: if the settings leave nothing to do.
        FileNotFoundError: if a folder of photographs is missing or holds none.
        RuntimeError: if a scene failed; all others are kept.
    """
    for name, least in (("count", 1), ("first", 0), ("views", 4), ("size", 32)):
        if getattr(settings, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(settings, name)}.")
    photographs = [path for folder in settings.photographs for path in _pictures(folder)]
    numbers = range(settings.first, settings.first + settings.count)
    folders = {number: settings.output / f"procedural_{number:05d}" for number in numbers}
    settings.output.mkdir(parents=True, exist_ok=True)
    jobs = [
        Job(folder.name, make_scene, (folder, number, tuple(photographs), settings.views, settings.size),
            log=settings.output / "logs" / f"{folder.name}.log")
        for number, folder in folders.items()
        if not (folder / "transforms.json").exists()
    ]  # fmt: skip
    workers, threads = workers_and_threads(settings.jobs)
    begin_s = time.monotonic()
    failed = []
    for done, result in enumerate(run_jobs(jobs, workers, threads, PRELOAD), start=1):
        minutes = (time.monotonic() - begin_s) / 60
        CONSOLE.print(
            f"[{done}/{len(jobs)}] {result.key}: {result.wall_s:.0f} s, {minutes:.1f} min so far", markup=False
        )
        if result.error:
            failed.append(result)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(jobs)} scenes failed; the first: {failed[0].key}: {failed[0].error}")
    return list(folders.values())


def make_scene(folder: Path, number: int, photographs: tuple[Path, ...], num_views: int, size: int) -> None:
    """Draw one scene and write it as a whole: `images/`, `depth/` and `transforms.json`.

    Args:
        folder: of the scene, which appears when it is complete.
        number: decides everything, with the photographs.
        photographs: files that textures are cut out of.
        num_views: cameras; those that are blocked are left out.
        size: longest side of the pictures in pixels.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("images", "depth"):
        (partial / name).mkdir(parents=True)
    for attempt in range(100):
        generator = np.random.default_rng((number, attempt))
        if _write(partial, generator, photographs, num_views, size):
            partial.replace(folder)
            return
    raise RuntimeError(f"Scene {number} has no arrangement whose views are free; give another number.")


def _write(
    folder: Path, generator: np.random.Generator, photographs: tuple[Path, ...], num_views: int, size: int
) -> bool:
    """Whether enough of the views are free; then they are written."""
    from nerfstudio_enhancer.procedural.layout import draw_scene
    from nerfstudio_enhancer.procedural.render import Renderer, focal_px

    scene = draw_scene(generator, photographs, num_views)
    renderer = Renderer(scene)
    across, down = SHAPES[int(generator.integers(len(SHAPES)))]
    width, height = (round(size * side / max(across, down)) for side in (across, down))
    pictures = [renderer.render(view, width, height) for view in scene.views]
    free = [i for i, picture in enumerate(pictures) if float((picture.depth < scene.nearest).float().mean()) <= 0.25]
    if len(free) < FEWEST_VIEWS * num_views:
        return False
    brightness = float(np.mean([float(pictures[i].rgb.mean()) for i in free]))
    exposure = float(np.clip(generator.uniform(0.33, 0.55) / max(brightness, 0.02), 0.6, 3))
    wavering, noise = float(generator.choice([0, 0, 0.03, 0.08])), float(generator.choice([0, 0.01, 0.02]))
    frames = []
    for number, index in enumerate(free):
        view, picture = scene.views[index], pictures[index]
        rgb = picture.rgb.numpy() * exposure * np.exp(generator.normal(0, wavering))
        rgb = rgb.clip(0, 1) + noise * generator.standard_normal(rgb.shape)
        Image.fromarray((rgb.clip(0, 1) * 255).round().astype(np.uint8)).save(folder / f"images/{number:03d}.png")
        depth = picture.depth.numpy()
        depth = np.minimum(depth / DEPTH_UNIT, MOST_STEPS).round().astype(np.uint16)
        Image.fromarray(depth).save(folder / f"depth/{number:03d}.png")
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = view.axes * [1, -1, -1], view.centre  # OpenGL's axes
        frames.append(
            {
                "file_path": f"images/{number:03d}.png",
                "depth_file_path": f"depth/{number:03d}.png",
                "transform_matrix": pose.tolist(),
            }
        )
    focal = focal_px(scene.field_of_view, width, height)
    capture = {
        "camera_model": "OPENCV",
        "w": width,
        "h": height,
        "fl_x": focal,
        "fl_y": focal,
        "cx": width / 2,
        "cy": height / 2,
        "depth_unit_scale_factor": DEPTH_UNIT,
        "depth_clipped": True,
        "frames": frames,
    }
    (folder / "transforms.json").write_text(json.dumps(capture, indent=1))
    return True


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder of photographs at {folder}; give `--photographs` folders that exist."
        )
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not found:
        raise FileNotFoundError(f"{folder} holds no photograph ({', '.join(PICTURE_SUFFIXES)}).")
    return found
