"""Where the time of a training step goes on this machine: `python -m nerfstudio_enhancer.rasterize.profile_step`.

Trains the registered method on a made-up scene with nerfstudio's own trainer and viewer, and times its parts. Each part is
charged what it spends itself, not what the parts that it calls spend.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import tyro
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.utils import writer
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image
from pytorch_msssim import SSIM

from nerfstudio_enhancer.rasterize.bench import SH_DEGREE, synthetic_scene

NUM_VIEWS = 12


@dataclass(frozen=True)
class ProfileStep:
    """Train a few steps on a made-up scene and print where their time goes."""

    output: Path | None = None
    """JSON file for the figures; none by default."""
    gaussians: int = 50_000
    """Splats of the scene."""
    width: int = 480
    """Image width in pixels; the height is two thirds of it."""
    steps: int = 100
    """Steps that are timed. Every hundredth densifies."""
    warm_up: int = 10
    """Steps before them."""
    viewer: bool = True
    """Run nerfstudio's viewer beside the training, as `ns-train` does."""
    stock: bool = False
    """Use splatfacto's own D-SSIM (pytorch_msssim) and Adam (one parameter after the other), for comparison."""


class Sections:
    """Time by part of the step; a part that runs inside another is taken out of it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def timed(self, name: str, function: Callable) -> Callable:
        """`function`, charging `name`."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - start
                self.seconds[name] += whole - self._inner.pop()
                if self._inner:
                    self._inner[-1] += whole

        return wrapped


RASTERISER = "rasteriser"
"""The part that everything else is compared with: projection with SH, binning, raster stage, forward and backward."""


def profile_step(command: ProfileStep) -> dict[str, Any]:
    """Milliseconds per step: `step_ms`, `rasteriser_ms`, `everything_else_ms`, `parts_ms`; seconds to the first step.

    Raises:
        ValueError: fewer than one step.
    """
    if command.steps < 1 or command.warm_up < 0:
        raise ValueError(f"`steps` must be at least 1 and `warm_up` 0, got {command.steps} and {command.warm_up}.")
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder), command)
        config.get_base_dir().mkdir(parents=True)
        begun = time.perf_counter()
        trainer = config.setup(local_rank=0, world_size=1)
        trainer.setup()
        set_up = time.perf_counter() - begun
        _place_splats(trainer.pipeline.model, command)
        if command.stock:
            trainer.pipeline.model.ssim = SSIM(data_range=1.0, size_average=True, channel=3).forward
        sections, marks = Sections(), {}

        def mark_start(step: int) -> None:
            if step == command.warm_up:
                sections.seconds.clear()
                marks["start"] = time.perf_counter()

        def mark_end(step: int) -> None:
            marks.setdefault("first", time.perf_counter())
            marks["end"] = time.perf_counter()

        before, after = TrainingCallbackLocation.BEFORE_TRAIN_ITERATION, TrainingCallbackLocation.AFTER_TRAIN_ITERATION
        trainer.callbacks = [
            TrainingCallback([before], mark_start),
            *trainer.callbacks,
            TrainingCallback([after], mark_end),
        ]
        started = time.perf_counter()
        with ExitStack() as stack:
            for owner, attribute, name in _parts(trainer):
                original = owner.__dict__.get(attribute, getattr(owner, attribute))
                static = isinstance(original, staticmethod)
                timed = sections.timed(name, original.__func__ if static else original)
                stack.enter_context(mock.patch.object(owner, attribute, staticmethod(timed) if static else timed))
            trainer.train()
        splats = trainer.pipeline.model.num_points
        trainer.shutdown()
        _close_writers()
    steps = command.steps
    parts = {name: 1e3 * seconds / steps for name, seconds in sections.seconds.items()}
    step = 1e3 * (marks["end"] - marks["start"]) / steps
    parts["the trainer's own loop, log writers"] = step - sum(parts.values())
    return {
        "step_ms": step,
        "rasteriser_ms": parts[RASTERISER],
        "everything_else_ms": step - parts[RASTERISER],
        "parts_ms": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "threads": torch.get_num_threads(),
        "splats_at_the_end": splats,
        "seconds_of_set_up": set_up,
        "seconds_from_start_of_training_to_end_of_first_step": marks["first"] - started,
    }


def _close_writers() -> None:
    """Nerfstudio keeps its event writers for the life of the process; theirs is a folder that is about to go."""
    for event_writer in writer.EVENT_WRITERS:
        if isinstance(event_writer, writer.TensorboardWriter):
            event_writer.tb_writer.close()
    writer.EVENT_WRITERS.clear()


def _parts(trainer: Any) -> list[tuple[Any, str, str]]:
    """What is timed: owner, attribute, name of the part."""
    from nerfstudio_enhancer import model as model_module
    from nerfstudio_enhancer.rasterize import native_ops, ssim

    model, datamanager = trainer.pipeline.model, trainer.pipeline.datamanager
    backward = "backward pass: activations, compositing, L1, torch"
    return [
        (model_module, "rasterization", RASTERISER),
        (native_ops.Project, "backward", RASTERISER),
        (native_ops.Rasterize, "backward", RASTERISER),
        (datamanager, "next_train", "data loading"),
        (model, "get_outputs", "forward pass: activations, compositing"),
        (model, "get_metrics_dict", "metrics (PSNR)"),
        (model, "get_loss_dict", "L1 and regularisation"),
        (model, "ssim", "D-SSIM"),
        (ssim._FusedSsim, "backward", "D-SSIM"),
        (torch.Tensor, "backward", backward),
        (trainer.optimizers, "optimizer_scaler_step_some", "Adam"),
        (trainer.optimizers, "zero_grad_some", "Adam"),
        (trainer.optimizers, "scheduler_step_all", "learning rates"),
        (model.strategy, "step_pre_backward", "densification"),
        (model.strategy, "step_post_backward", "densification"),
        (trainer, "_update_viewer_state", "viewer"),
    ]


def _config(folder: Path, command: ProfileStep) -> Any:
    """The registered method on the made-up scene, with every SH degree in use from the start."""
    from nerfstudio.configs.method_configs import all_methods

    config: Any = copy.deepcopy(all_methods["3dgs-enhancer"])
    config.data = _write_photographs(folder / "scene", command.width)
    config.output_dir, config.experiment_name, config.timestamp = folder / "outputs", "profile", "run"
    config.vis = "viewer" if command.viewer else "tensorboard"
    config.viewer.quit_on_train_completion = True
    config.machine.device_type = "cpu"
    config.max_num_iterations = command.warm_up + command.steps
    config.few_views_iterations = None  # its schedule holds as it is stated
    config.steps_per_save = 10**9
    config.pipeline.datamanager.data = config.data
    dataparser = config.pipeline.datamanager.dataparser
    dataparser.seed_points = "random"
    dataparser.orientation_method = dataparser.center_method = "none"
    dataparser.auto_scale_poses = False
    if command.stock:
        for group in config.optimizers.values():
            group["optimizer"] = AdamOptimizerConfig(lr=group["optimizer"].lr, eps=group["optimizer"].eps)
    model = config.pipeline.model
    model.random_init, model.num_random = True, command.gaussians
    model.sh_degree, model.sh_degree_interval = SH_DEGREE, 1
    model.warmup_length = 0
    model.enhance.prior = "none"
    return config


def _write_photographs(folder: Path, width: int) -> Path:
    """Smooth random pictures from cameras near the origin that look along +z of OpenCV, as nerfstudio-data."""
    height = width * 2 // 3
    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    frames = []
    for number in range(NUM_VIEWS):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 18, 3), dtype=np.uint8))
        name = f"images/{number:03d}.png"
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / name)
        angle = 2 * math.pi * number / NUM_VIEWS
        pose = np.diag([1.0, -1.0, -1.0, 1.0])  # OpenCV to OpenGL axes
        pose[:2, 3] = 0.1 * math.cos(angle), 0.1 * math.sin(angle)
        frames.append({"file_path": name, "transform_matrix": pose.tolist()})
    camera = {"fl_x": width, "fl_y": width, "cx": width / 2, "cy": height / 2, "w": width, "h": height}
    (folder / "transforms.json").write_text(json.dumps({"camera_model": "OPENCV", **camera, "frames": frames}))
    return folder


@torch.no_grad()
def _place_splats(model: Any, command: ProfileStep) -> None:
    """The splats of the rasteriser's benchmark, in the tensors that the optimizers hold."""
    scene = synthetic_scene(command.gaussians, command.width, command.width * 2 // 3)
    values = {
        "means": scene["means"],
        "quats": scene["quats"],
        "scales": scene["scales"].log(),
        "opacities": torch.logit(scene["opacities"])[:, None],
        "features_dc": scene["colors"][:, 0],
        "features_rest": scene["colors"][:, 1:],
    }
    for name, value in values.items():
        model.gauss_params[name].copy_(value)


def table(result: dict[str, Any]) -> list[str]:
    """Markdown lines."""
    rows = [f"| {name} | {ms:.1f} | {100 * ms / result['step_ms']:.0f} % |" for name, ms in result["parts_ms"].items()]
    return [
        "| part of the step | ms | share |",
        "|---|---|---|",
        *rows,
        f"| step | {result['step_ms']:.1f} | 100 % |",
        "",
        f"rasteriser {result['rasteriser_ms']:.1f} ms, everything else {result['everything_else_ms']:.1f} ms, "
        f"{result['threads']} threads, {result['splats_at_the_end']} splats at the end",
        f"set-up {result['seconds_of_set_up']:.1f} s, then "
        f"{result['seconds_from_start_of_training_to_end_of_first_step']:.1f} s to the end of the first step",
    ]


def main() -> None:
    """Run `ProfileStep` from the command line."""
    command = tyro.cli(ProfileStep)
    result = profile_step(command)
    if command.output is not None:
        command.output.parent.mkdir(parents=True, exist_ok=True)
        command.output.write_text(json.dumps(result, indent=2) + "\n")
    for line in table(result):
        CONSOLE.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
