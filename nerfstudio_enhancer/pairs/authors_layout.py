"""Paired data as 3DGS-Enhancer's authors keep it on disk, to and from ours.

A scene is a COLMAP folder: `images_4/<stem>.png` (the photographs) and `sparse/0` (their cameras). For k reference views
`lr/<k>/train_<k>/` holds what the splats show: `<stem>.png`, or `<stem>_ref.png` at a reference view. Opacity, depth and
steps have no place in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from diffusion_prior.data.pairs import PairRun, find_runs, read_run, run_folder, write_run
from diffusion_prior.types import WARP_CHANNELS
from nerfstudio_enhancer.conventions import as_4x4, world_to_camera_opencv
from nerfstudio_enhancer.scene.capture import Frame
from nerfstudio_enhancer.scene.colmap_folder import COLMAP_TO_NERFSTUDIO_WORLD, read_colmap_folder
from nerfstudio_enhancer.warping import WARPED_REFERENCES

PHOTOGRAPHS = "images_4"
REFERENCE_SUFFIX = "_ref"
UNKNOWN_STEPS = 0
"""Steps of a run that does not tell them."""


def convert_pairs(source: Path, output: Path, to: Literal["authors", "ours"]) -> list[Path]:
    """Convert all paired data in a folder.

    Args:
        source: folder to read: ours, or one with the authors' scenes in it.
        output: folder to write to; nothing in it is overwritten.
        to: which format to write.

    Returns:
        Folders written: scenes in the authors' layout, or runs in ours.

    Raises:
        FileNotFoundError: if there is nothing to convert.
        ValueError: if something cannot be read, or would be overwritten.
    """
    return _to_authors(source, output) if to == "authors" else _to_ours(source, output)


def _to_authors(source: Path, output: Path) -> list[Path]:
    written = []
    for folder in find_runs(source):
        target = output / f"{folder.parent.name}_{folder.name}"
        _refuse_existing(target)
        write_authors_scene(read_run(folder), target)
        written.append(target)
    return written


def _to_ours(source: Path, output: Path) -> list[Path]:
    scenes = sorted({path.parents[2] for path in source.glob("**/lr/*/train_*") if path.is_dir()})
    if not scenes:
        raise FileNotFoundError(f"no scene below {source} has a folder lr/<k>/train_<k>.")
    written = []
    for scene in scenes:
        for views in numbers_of_views(scene):
            run = read_authors_scene(scene, views)
            target = run_folder(output, run.scene, run.num_views, run.seed, run.steps)
            _refuse_existing(target)
            write_run(target, run)
            written.append(target)
    return written


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise ValueError(f"{folder} is there already; delete it or choose another `--output`.")


def numbers_of_views(scene: Path) -> list[int]:
    """For which numbers of reference views a scene in the authors' layout has renders."""
    found = (re.fullmatch(r"train_(\d+)", path.name) for path in scene.glob("lr/*/train_*"))
    return sorted(int(match[1]) for match in found if match)


def read_authors_scene(scene: Path, views: int) -> PairRun:
    """Read what the splats of `views` references show of a scene in the authors' layout.

    Cameras whose photograph or render is missing are left out.

    Raises:
        FileNotFoundError: if there are no renders, or no COLMAP model.
        ValueError: if fewer than two references or no other camera have both, or pictures differ in size.
    """
    renders = scene / "lr" / str(views) / f"train_{views}"
    if not renders.is_dir():
        raise FileNotFoundError(f"{scene} has no renders for {views} reference views: {renders} is missing.")
    frames = [frame for frame in read_colmap_folder(scene).frames if frame.image.is_file()]
    references = [(at, frame) for at, frame in enumerate(frames) if _render(renders, frame, REFERENCE_SUFFIX).is_file()]
    others = [(at, frame) for at, frame in enumerate(frames) if _render(renders, frame).is_file()]
    if len(references) < 2 or not others:
        raise ValueError(
            f"{renders} must hold the renders of at least 2 reference views (<stem>{REFERENCE_SUFFIX}.png) and 1 other "
            f"(<stem>.png) whose photographs are there, got {len(references)} and {len(others)}."
        )
    before = [min(max(sum(place < at for place, _ in references) - 1, 0), len(references) - 2) for at, _ in others]
    shown = _pictures([_render(renders, frame) for _, frame in others])
    height, width = shown.shape[-2:]
    flat = torch.zeros(len(others), 1, height, width, dtype=torch.uint8)
    return PairRun(
        scene=scene.name,
        num_views=len(references),
        seed=0,
        steps=UNKNOWN_STEPS,
        render=shown,
        alpha=torch.full_like(flat, 255),
        disparity=flat,
        warped=flat.expand(-1, WARPED_REFERENCES * WARP_CHANNELS, -1, -1),
        target=_pictures([frame.image for _, frame in others], (height, width)),
        references=_pictures([frame.image for _, frame in references], (height, width)),
        reference_disparity=flat[:1].expand(len(references), -1, -1, -1),
        before=torch.tensor(before),
        after=torch.tensor(before) + 1,
        camera_to_world=_poses([frame for _, frame in others]),
        reference_camera_to_world=_poses([frame for _, frame in references]),
        intrinsics=torch.tensor([_intrinsics(frame, height, width) for _, frame in others], dtype=torch.float32),
        settings={"layout": "3DGS-Enhancer's authors"},
    )


def write_authors_scene(run: PairRun, scene: Path) -> None:
    """Write a run as a scene in the authors' layout; its photographs are numbered in capture order.

    A run does not keep the intrinsics of its references: they get those of its first other camera.
    """
    renders = scene / "lr" / str(run.num_views) / f"train_{run.num_views}"
    for folder in (renders, scene / PHOTOGRAPHS, scene / "sparse" / "0", scene / "sparse" / "0_render"):
        folder.mkdir(parents=True)
    placed = [(float(i), "reference", i) for i in range(run.num_views)]
    placed += [(int(run.before[i]) + 0.5, "other", i) for i in range(len(run.render))]
    cameras, images = [], []
    for number, (_, kind, i) in enumerate(sorted(placed, key=lambda entry: entry[0])):
        stem = f"frame_{number:05d}"
        photograph = run.references[i] if kind == "reference" else run.target[i]
        _save(photograph, scene / PHOTOGRAPHS / f"{stem}.png")
        # At its references a run keeps no render. The splats have learned the photographs by heart.
        suffix, shown = (REFERENCE_SUFFIX, photograph) if kind == "reference" else ("", run.render[i])
        _save(shown, renders / f"{stem}{suffix}.png")
        pose = (run.reference_camera_to_world if kind == "reference" else run.camera_to_world)[i]
        intrinsics = run.intrinsics[0 if kind == "reference" else i]
        cameras.append(_camera_line(number + 1, photograph, intrinsics))
        images.append(f"{_image_line(number + 1, pose)} {number + 1} {stem}.png\n\n")
    for model in ("0", "0_render"):
        for name, lines in (("cameras", cameras), ("images", images), ("points3D", [])):
            (scene / "sparse" / model / f"{name}.txt").write_text("".join(lines), encoding="utf-8")


def _render(folder: Path, frame: Frame, suffix: str = "") -> Path:
    return folder / f"{Path(frame.name).stem}{suffix}.png"


def _pictures(paths: Sequence[Path], size: tuple[int, int] | None = None) -> UInt8[Tensor, "n 3 h w"]:
    """Pictures of one size (height, width), by default the first one's."""
    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            pictures.append(torch.from_numpy(np.array(picture.convert("RGB"))).movedim(-1, 0))
        size = size or tuple(pictures[0].shape[-2:])
        if tuple(pictures[-1].shape[-2:]) != size:
            raise ValueError(
                f"{path} has {tuple(pictures[-1].shape[-2:])} pixels (h, w), others of the scene {size}; renders and photographs must be of one size."
            )
    return torch.stack(pictures)


def _poses(frames: Sequence[Frame]) -> Tensor:
    return torch.from_numpy(np.stack([frame.camera_to_world[:3] for frame in frames])).float()


def _intrinsics(frame: Frame, height: int, width: int) -> list[float]:
    """Fx, fy, cx, cy for pictures of another size than the model's."""
    x, y = width / frame.width, height / frame.height
    return [frame.fx * x, frame.fy * y, frame.cx * x, frame.cy * y]


def _save(picture: UInt8[Tensor, "3 h w"], path: Path) -> None:
    Image.fromarray(picture.movedim(0, -1).numpy()).save(path)


def _camera_line(number: int, picture: Tensor, intrinsics: Tensor) -> str:
    height, width = picture.shape[-2:]
    return f"{number} PINHOLE {width} {height} {' '.join(f'{value:.9g}' for value in intrinsics.tolist())}\n"


def _image_line(number: int, camera_to_world: Tensor) -> str:
    """Number, quaternion (w first) and translation of a COLMAP image, as `read_colmap_folder` turns them back."""
    from nerfstudio.data.utils.colmap_parsing_utils import rotmat2qvec

    to_colmap = torch.linalg.inv(as_4x4(torch.from_numpy(COLMAP_TO_NERFSTUDIO_WORLD)))
    pose = world_to_camera_opencv(to_colmap @ as_4x4(camera_to_world.double())).numpy()
    values = [*rotmat2qvec(pose[:3, :3]), *pose[:3, 3]]
    return f"{number} {' '.join(f'{value:.12g}' for value in values)}"
