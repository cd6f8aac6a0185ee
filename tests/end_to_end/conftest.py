from collections.abc import Callable
from pathlib import Path

import pytest
from nerfstudio.engine.trainer import TrainerConfig
from tiny_prior import tiny_prior
from tiny_training import tiny_training

from diffusion_prior.checkpoints import save_prior


@pytest.fixture(scope="package")
def prior_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained prior as a folder."""
    folder = tmp_path_factory.mktemp("prior") / "tiny"
    save_prior(tiny_prior(), folder)
    return folder


@pytest.fixture
def config(nerfstudio_folder: Callable[..., Path], tmp_path: Path, prior_folder: Path) -> TrainerConfig:
    """Settings of a small training."""
    return tiny_training(nerfstudio_folder(num_images=10, width=64, height=48), tmp_path / "outputs", prior_folder)
