"""A training on a GPU, as far as it can be told without one: no operation mixes devices (see `pretend_cuda`)."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from pretend_cuda import PretendedTensor, off_pretended, on_pretended, pretended_cuda
from tiny_training import START, STEPS

from diffusion_prior.sampling_config import SamplingConfig
from diffusion_prior.types import ConditionClip
from nerfstudio_enhancer.depth_training import whole_splats
from nerfstudio_enhancer.evaluation import cell, methods
from nerfstudio_enhancer.pairs import sparse_splats
from nerfstudio_enhancer.pairs.make_pairs import SplatTraining
from nerfstudio_enhancer.prior import LazyPrior
from nerfstudio_enhancer.rasterize import dispatch

pytestmark = pytest.mark.slow


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A pretended GPU; in the place of gsplat's kernels stand our own for the CPU."""
    rasterize = dispatch._rasterize_native

    def on_gpu(*args, packed, tile_size, sparse_grad, channel_chunk, distributed, camera_model, covars, **options):
        tensors = [value for value in (*args, *options.values()) if isinstance(value, torch.Tensor)]
        assert all(isinstance(tensor, PretendedTensor) for tensor in tensors)
        return on_pretended(rasterize(*off_pretended(args), **off_pretended(options)))

    monkeypatch.setattr(dispatch, "_rasterize_cuda", on_gpu)
    monkeypatch.setattr("nerfstudio_enhancer.trainer.check_cuda_kernels", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1 << 34, 1 << 34))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pretended_cuda() as device:
        yield device


@pytest.fixture
def gpu_config(config: TrainerConfig) -> TrainerConfig:
    """Settings of a small training on a GPU that densifies in every step."""
    config.machine.device_type = "cuda"
    model = config.pipeline.model
    model.warmup_length, model.refine_every, model.stop_split_at = 1, 1, STEPS
    model.densify_grad_thresh = 1e-6
    return config


def trained(config: TrainerConfig) -> Trainer:
    config.save_config()
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    trainer.train()
    return trainer


def is_on_gpu(trainer: Trainer) -> bool:
    return all(isinstance(value, PretendedTensor) for value in trainer.pipeline.model.gauss_params.values())


def test_mixed_devices_are_refused(cuda: torch.device) -> None:
    there, here = torch.ones(3, device=cuda), torch.ones(3)
    assert there.device == (there * 2).device == torch.nn.Linear(1, 1).to(cuda).weight.device == cuda
    assert there.cpu().device == here.device == torch.device("cpu")
    for mixing in (
        lambda: there + here,
        lambda: torch.cat([here, there]),
        lambda: torch.nn.functional.linear(there, here[None]),
        lambda: here[there.long()],
        there.numpy,
        lambda: torch.rand(3, device=cuda, generator=torch.Generator()),
    ):
        with pytest.raises((RuntimeError, TypeError), match=r"device|cuda"):
            mixing()
    assert (there + torch.tensor(1.0))[torch.tensor([0])].item() == 2  # as a real one allows


def test_a_training_with_the_bundled_prior_and_everything_on_mixes_no_devices(
    gpu_config: TrainerConfig, cuda: torch.device
) -> None:
    model, data = gpu_config.pipeline.model, gpu_config.pipeline.datamanager.dataparser
    data.seed_points, data.initial.stereo.refine_px, data.test_every = "stereo", 64, 7
    model.enhance.prior, model.enhance.ratio = "bundled", 1.0
    model.enhance.unseen_range = (0.0, 0.0)
    model.depth_weight, model.lpips_every = 0.1, 1
    model.camera_optimizer.mode, model.use_bilateral_grid = "SO3xR3", True
    model.rasterize_mode, model.color_corrected_metrics = "antialiased", True
    trainer = trained(gpu_config)
    assert is_on_gpu(trainer)
    measured = cell.evaluate(trainer)
    assert measured["repaired_psnr"] != measured["psnr"]


def test_masks_and_transparency_mix_no_devices(
    gpu_config: TrainerConfig, nerfstudio_folder: Callable[..., Path], cuda: torch.device
) -> None:
    folder = nerfstudio_folder(num_images=10, width=64, height=48, mode="RGBA", masks=True)
    gpu_config.data = gpu_config.pipeline.datamanager.data = folder
    gpu_config.pipeline.model.enhance.ratio = 1.0
    assert is_on_gpu(trained(gpu_config))


@pytest.mark.parametrize("feed", ["blurred", "photographs", "faultless"])
def test_controls_mix_no_devices(gpu_config: TrainerConfig, cuda: torch.device, feed: str) -> None:
    gpu_config.pipeline.model.enhance.prior, gpu_config.pipeline.model.enhance.feed = "none", feed
    gpu_config.max_num_iterations = START + 1
    assert is_on_gpu(trained(gpu_config))


def test_a_resumed_run_mixes_no_devices(gpu_config: TrainerConfig, cuda: torch.device) -> None:
    gpu_config.load_dir = trained(gpu_config).checkpoint_dir
    gpu_config.timestamp, gpu_config.max_num_iterations = "resumed", 2
    assert is_on_gpu(trained(gpu_config))


def test_finished_splats_are_shown_and_repaired_on_one_device(gpu_config: TrainerConfig, cuda: torch.device) -> None:
    pipeline = gpu_config.pipeline.setup(device=cuda, test_mode="test")
    pipeline.eval()
    camera, _ = next(iter(pipeline.datamanager.fixed_indices_eval_dataloader))
    box = OrientedBox.from_params(pos=(0.0, 0.0, 0.0), rpy=(0.0, 0.0, 0.0), scale=(1.0, 1.0, 1.0))
    shown = pipeline.model.get_outputs_for_camera(camera, obb_box=box)
    assert {shown[name].device for name in ("rgb", "depth", "confidence", "repaired")} == {cuda}


def test_pairs_along_paths_are_made_on_one_device(
    nerfstudio_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: torch.device
) -> None:
    def on_gpu() -> TrainerConfig:
        config = methods.method_config()
        config.machine.device_type = "cuda"
        return config

    for module in (sparse_splats, whole_splats):
        monkeypatch.setattr(module, "method_config", on_gpu)
    training = SplatTraining(
        nerfstudio_folder(), tmp_path / "pairs", 3, 0, (3,), 64, 4, True, random_points=True, paths=True, whole_steps=3
    )
    assert sparse_splats.make_runs(training, [3]) == 3  # photographs, paths and damaged splats


@pytest.mark.parametrize(
    "settings",
    [
        {"memory": "8gb", "steps": 2, "sampler": "heun", "num_frames": 4, "min_guidance": 1.5, "max_guidance": 2.0},
        {"memory": "all", "steps": 2, "sampler": "dpm++2m", "fit": "tile", "frame_size": (32, 48)},
        {"memory": "all", "fit": "pad", "frame_size": (64, 64), "std": False, "colour_correction": True},
    ],
)
def test_a_prior_mixes_no_devices_however_it_is_run(prior_folder: Path, cuda: torch.device, settings: dict) -> None:
    frames = 5
    rgb = torch.rand(frames, 3, 48, 64)
    clip = ConditionClip(rgb, torch.ones_like(rgb[:, :1]), torch.zeros_like(rgb[:, :1]))
    prior = LazyPrior(str(prior_folder), cuda, SamplingConfig(**settings))
    assert prior.enhance(clip, torch.Generator().manual_seed(0)).rgb.shape == rgb.shape
