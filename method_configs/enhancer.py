"""`ns-train 3dgs-enhancer` and its full-size sibling `3dgs-enhancer-svd`: the values that fit the device at hand."""

from typing import Any

import torch
from nerfstudio.configs.base_config import LoggingConfig, MachineConfig, ViewerConfig
from nerfstudio.engine.schedulers import ExponentialDecaySchedulerConfig
from nerfstudio.plugins.types import MethodSpecification

ON_GPU = torch.cuda.is_available()
STEPS = 30000 if ON_GPU else 3000
FEW_VIEWS_STEPS = 3000 if ON_GPU else 1500
SVD_PATHS = 12
"""Paths of a round at full size: a ring through the paper's largest number of references."""


def _full_size() -> MethodSpecification:
    """Stable Video Diffusion as prior: with its two references every path is one clip of its own length."""
    from diffusion_prior.published import LAYOUT_B_FRAMES, SVD_REPOSITORY
    from nerfstudio_enhancer.trajectory import TrajectoryConfig

    between = LAYOUT_B_FRAMES - 2
    return _specification(
        "3dgs-enhancer-svd",
        "3DGS-Enhancer with a prior of the paper's size, Stable Video Diffusion or one trained from it (CUDA).",
        prior=SVD_REPOSITORY,
        rounds=2,  # each takes minutes
        whole_paths=True,
        repair_share=0.0,  # seconds for each test view
        trajectory=TrajectoryConfig(min_frames=between, max_frames=between, max_total_frames=SVD_PATHS * between),
    )


def _compact() -> MethodSpecification:
    from nerfstudio_enhancer.trajectory import TrajectoryConfig

    # One window of the bundled prior holds eight frames and two references, and more frames on the same path teach no more.
    short = TrajectoryConfig(min_frames=2, max_frames=8, max_total_frames=40)
    return _specification(
        "3dgs-enhancer",
        "3DGS-Enhancer: Gaussian splats from few photographs, repaired by a video diffusion prior (CPU or CUDA).",
        trajectory=TrajectoryConfig() if ON_GPU else short,
    )


def _specification(method_name: str, description: str, **enhance: Any) -> MethodSpecification:
    """A method by its name; `enhance` are the settings of its rounds that differ from the defaults."""
    from nerfstudio_enhancer.datamanager import EnhancerDataManagerConfig
    from nerfstudio_enhancer.enhance_step import EnhanceConfig
    from nerfstudio_enhancer.model import EnhancerModelConfig
    from nerfstudio_enhancer.optimizers import FusedAdamConfig
    from nerfstudio_enhancer.pipeline import EnhancerPipelineConfig
    from nerfstudio_enhancer.scene.sparse_views import SparseViewsDataParserConfig
    from nerfstudio_enhancer.trainer import EnhancerTrainerConfig

    # Early and again and again: what one round repairs is what the next one starts from, and splats that train on without
    # new views learn the few references by heart.
    rounds = EnhanceConfig(**{"rounds": 4, **enhance})
    small = {
        "warmup_length": 200,
        "num_downscales": 0,
        "sh_degree": 2,
        "sh_degree_interval": 600,
        "stop_split_at": 1500,
        "stop_screen_size_at": 1500,
        "densify_grad_thresh": 0.0012,
    }
    model = EnhancerModelConfig(enhance=rounds, **({} if ON_GPU else small))
    return MethodSpecification(
        config=EnhancerTrainerConfig(
            method_name=method_name,
            steps_per_eval_image=STEPS,
            steps_per_eval_batch=0,
            steps_per_save=2000 if ON_GPU else 1000,
            steps_per_eval_all_images=STEPS,
            schedule_iterations=STEPS,
            few_views_iterations=FEW_VIEWS_STEPS,
            mixed_precision=False,
            machine=MachineConfig(device_type="cuda" if ON_GPU else "cpu"),
            logging=LoggingConfig(steps_per_log=10 if ON_GPU else 50),
            pipeline=EnhancerPipelineConfig(
                datamanager=EnhancerDataManagerConfig(
                    dataparser=SparseViewsDataParserConfig(),
                    cache_images_type="uint8",
                    max_image_size=1600 if ON_GPU else 480,
                ),
                model=model,
            ),
            optimizers={
                "means": {
                    "optimizer": FusedAdamConfig(lr=1.6e-4, eps=1e-15),
                    "scheduler": ExponentialDecaySchedulerConfig(lr_final=1.6e-6, max_steps=STEPS),
                },
                "features_dc": {"optimizer": FusedAdamConfig(lr=0.0025, eps=1e-15), "scheduler": None},
                "features_rest": {"optimizer": FusedAdamConfig(lr=0.0025 / 20, eps=1e-15), "scheduler": None},
                "opacities": {"optimizer": FusedAdamConfig(lr=0.05, eps=1e-15), "scheduler": None},
                "scales": {"optimizer": FusedAdamConfig(lr=0.005, eps=1e-15), "scheduler": None},
                "quats": {"optimizer": FusedAdamConfig(lr=0.001, eps=1e-15), "scheduler": None},
                "camera_opt": {
                    "optimizer": FusedAdamConfig(lr=1e-4, eps=1e-15),
                    "scheduler": ExponentialDecaySchedulerConfig(
                        lr_final=5e-7, max_steps=STEPS, warmup_steps=STEPS // 30, lr_pre_warmup=0
                    ),
                },
                "bilateral_grid": {
                    "optimizer": FusedAdamConfig(lr=2e-3, eps=1e-15),
                    "scheduler": ExponentialDecaySchedulerConfig(
                        lr_final=1e-4, max_steps=STEPS, warmup_steps=STEPS // 30, lr_pre_warmup=0
                    ),
                },
            },
            viewer=ViewerConfig(num_rays_per_chunk=1 << 15),
            vis="viewer",
        ),
        description=description,
    )


try:
    enhancer_method, enhancer_svd_method = _compact(), _full_size()
except ImportError as error:
    # nerfstudio loads plug-ins outside any try: an error here would break ns-train for every method. It warns about an
    # object that is no specification, shows it, and goes on.
    enhancer_method = enhancer_svd_method = f"3dgs-enhancer, which cannot be used: {error}"
