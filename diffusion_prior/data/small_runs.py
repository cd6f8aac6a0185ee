"""Small copies of paired data, for networks that look at small pictures: reading and shrinking whole ones takes longer than such a network."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from diffusion_prior.coarse import shrunk
from diffusion_prior.data.pairs import META_NAME, PairRun, RunHeader, find_runs, read_header, read_run, write_run

PICTURES = ("render", "alpha", "disparity", "warped", "target", "references", "reference_disparity")
SOURCE = "copy_of"
"""Setting of a copy under which the checksum of what it was made of stands."""

logger = logging.getLogger(__name__)


def small_runs(root: Path, output: Path, side: int, scenes: Iterable[str]) -> list[RunHeader]:
    """Copy the runs of some scenes with pictures of a size; what is there already stays, so that a killed copy goes on.

    Args:
        root: folder of paired data.
        output: folder of the copies, of the same layout. A copy of what is no longer in `root` stays, and is not returned.
        side: longer side of their pictures in pixels; smaller pictures stay as they are.
        scenes: names of the scenes.

    Returns:
        The copies, sorted by scene and name.

    Raises:
        FileNotFoundError: if there is no paired data.
        ValueError: if a run is broken.
        OSError: if the disk is full.
    """
    wanted = set(scenes)
    copies, made = [], 0
    for folder in find_runs(root):
        if folder.parent.name not in wanted:
            continue
        copy = output / folder.relative_to(root)
        source = read_header(folder).sha256
        if not _is_copy(copy, source, side):
            run = small_run(read_run(folder), side)
            write_run(copy, replace(run, settings={**run.settings, SOURCE: [source, side]}))
            made += 1
        copies.append(read_header(copy))
    if made:
        logger.info(f"{made} runs copied to {output}, their longer side {side} pixels")
    return copies


def _is_copy(copy: Path, source: str, side: int) -> bool:
    return (copy / META_NAME).is_file() and read_header(copy).settings.get(SOURCE) == [source, side]


def small_run(run: PairRun, side: int) -> PairRun:
    """A run whose pictures are shrunk, each pixel the mean of those that it stands for, and its intrinsics with them."""
    small = {name: _shrunk(getattr(run, name), side) for name in PICTURES}
    height, width = run.render.shape[-2:]
    new_height, new_width = small["render"].shape[-2:]
    scale = torch.tensor([new_width / width, new_height / height])
    return replace(run, **small, intrinsics=run.intrinsics * scale.repeat(2))


def _shrunk(pictures: UInt8[Tensor, "n c h w"], side: int) -> UInt8[Tensor, "n c h2 w2"]:
    return shrunk(pictures[None].float(), side)[0].round().to(torch.uint8)
