"""A training of the method on the tiny scene, small in every respect."""

import copy
from pathlib import Path

from nerfstudio.configs.method_configs import all_methods
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.scripts.train import train_loop

START = 4
STEPS = 8


def tiny_training(data: Path, output_dir: Path, prior: Path) -> TrainerConfig:
    """The method as registered, with three references of the tiny scene and one round after a few steps."""
    config = copy.deepcopy(all_methods["3dgs-enhancer"])
    config.data = data
    config.output_dir, config.experiment_name, config.timestamp = output_dir, "tiny", "first"
    config.vis = "tensorboard"
    config.viewer.quit_on_train_completion = True
    config.machine.device_type = "cpu"
    config.max_num_iterations = STEPS
    config.few_views_iterations = None  # what a test states in steps is to hold
    config.pipeline.model.num_downscales = 0
    config.steps_per_save = 1000
    config.pipeline.datamanager.data = config.data
    config.pipeline.datamanager.dataparser.num_views = 3
    config.pipeline.datamanager.dataparser.test_every = 3
    config.pipeline.datamanager.dataparser.seed_points = "random"
    enhance = config.pipeline.model.enhance
    enhance.prior, enhance.start, enhance.every, enhance.rounds = str(prior), START, 2, 1
    enhance.trajectory.min_frames = enhance.trajectory.max_frames = 3
    return config


def train(config: TrainerConfig) -> Path:
    """Train as ns-train does.

    Returns:
        The run's folder.
    """
    config.save_config()
    train_loop(local_rank=0, world_size=1, config=config)
    return config.get_base_dir()
