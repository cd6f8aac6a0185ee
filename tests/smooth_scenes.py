"""Paired data of small made-up scenes."""

from pathlib import Path

import torch

from diffusion_prior.data.pairs import PairRun, run_folder, write_run

HEIGHT, WIDTH = 32, 40


def write_smooth_scene(
    root: Path, scene: str, seed: int, size: tuple[int, int] = (HEIGHT, WIDTH), grain_px: int = 8
) -> None:
    """Photographs without details below a size, and renders which are the same at 0.7 of the brightness."""
    height, width = size
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(6, 3, height // grain_px, width // grain_px, generator=generator)
    photographs = torch.nn.functional.interpolate(coarse, size, mode="bilinear").mul(255).to(torch.uint8)
    target, references = photographs[:4], photographs[4:]
    run = PairRun(
        scene=scene,
        num_views=2,
        seed=seed,
        steps=300,
        render=(target * 0.7).to(torch.uint8),
        alpha=torch.full((4, 1, height, width), 180, dtype=torch.uint8),
        disparity=torch.full((4, 1, height, width), 90, dtype=torch.uint8),
        warped=torch.full((4, 8, height, width), 120, dtype=torch.uint8),
        target=target,
        references=references,
        reference_disparity=torch.full((2, 1, height, width), 90, dtype=torch.uint8),
        before=torch.zeros(4, dtype=torch.int64),
        after=torch.ones(4, dtype=torch.int64),
        camera_to_world=torch.eye(4)[:3].repeat(4, 1, 1),
        reference_camera_to_world=torch.eye(4)[:3].repeat(2, 1, 1),
        intrinsics=torch.ones(4, 4),
    )
    write_run(run_folder(root, scene, 2, seed, 300), run)
