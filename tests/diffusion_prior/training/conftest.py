from pathlib import Path

import pytest
from smooth_scenes import write_smooth_scene

from diffusion_prior.checkpoints import save_prior
from diffusion_prior.prior import PriorConfig, build_compact_prior


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
