from pathlib import Path

import pytest
import torch

from diffusion_prior.checkpoints import save_prior
from diffusion_prior.data.pairs import PairRun, run_folder, write_run
from diffusion_prior.prior import PriorConfig, build_compact_prior

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


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """Paired data of two small scenes; the second one validates."""
    root = tmp_path_factory.mktemp("pairs")
    write_smooth_scene(root, "beer", 0)
    write_smooth_scene(root, "coke", 1)
    return root


@pytest.fixture(scope="session")
def other_pairs(tmp_path_factory) -> Path:
    """Paired data of three small scenes, none of them in `pairs`; the last one validates."""
    root = tmp_path_factory.mktemp("other-pairs")
    for seed, scene in enumerate(("ale", "juice", "water"), start=2):
        write_smooth_scene(root, scene, seed)
    return root


@pytest.fixture(scope="session")
def fine_pairs(tmp_path_factory) -> Path:
    """Paired data of one scene, larger than what image encoders take, with details of 4 pixels."""
    root = tmp_path_factory.mktemp("fine-pairs")
    write_smooth_scene(root, "fine", 0, size=(160, 200), grain_px=4)
    return root


@pytest.fixture(scope="session")
def tiny_prior(tmp_path_factory) -> Path:
    """A prior of the bundled architecture, as small as its norms allow."""
    prior = build_compact_prior(
        seed=0,
        config=PriorConfig(
            patch_size=2,
            extra_condition_channels=2,
            num_frames=6,
            window_overlap=1,
            num_inference_steps=1,
            sigma_max=80.0,
            max_guidance=1.0,
            noise_augmentation=0.0,
        ),
        vae={"block_out_channels": (32, 32), "latent_channels": 4},
        unet={"block_out_channels": (32, 32), "num_attention_heads": (1, 1), "cross_attention_dim": 16},
        image_encoder={"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "projection_dim": 16},
        condition_widths=(8, 8),
    )
    folder = tmp_path_factory.mktemp("prior") / "tiny"
    save_prior(prior, folder)
    return folder
