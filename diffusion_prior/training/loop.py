"""The loop that all trainings share: steps, schedule, running average, checkpoints, validation, log.

Nothing random has a state: clips and noise of a step follow from the seed and the step's number. A killed training that
is started again with the same output therefore goes on with the losses that it would have had.
"""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, broadcast
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffusion_prior.data.clips import ClipBatch, ClipDataset, step_generator
from diffusion_prior.prior import VideoPrior, fast_dtype
from diffusion_prior.training.config import TrainingConfig
from diffusion_prior.training.objectives import ema_decay_at, learning_rate_factor

CHECKPOINT_NAME = "checkpoint.pt"
LOG_NAME = "log.jsonl"
SHEETS_NAME = "sheets"
PRIOR_NAME = "prior"
CHECKPOINT_VERSION = 1
MAX_SKIPPED_STEPS = 20
NOISE_SEED_OFFSET = 1 << 32
"""Keeps the noise of a step apart from the choice of its clips."""

logger = get_logger(__name__)


@dataclass(frozen=True)
class Validation:
    """What a training shows of itself."""

    metrics: dict[str, float]
    """Mean figures over the validation clips."""
    sheet: Tensor | None = None
    """Contact sheet [3 h w] in [0, 1]."""


class Losses(nn.Module, ABC):
    """The networks under training, with the loss as their forward pass, so that any distributed wrapper applies."""

    @abstractmethod
    def forward(self, batch: ClipBatch, generator: torch.Generator, progress: float, player: str) -> dict[str, Tensor]:
        """The parts of the loss of one player; what is minimised is `loss`."""

    @property
    def players(self) -> dict[str, nn.Module]:
        """Networks with an optimiser of their own, in the order of their turns; the first one's average is kept."""
        return {"main": self}


class Task(ABC):
    """One training: its losses, its clips, its validation and what it leaves behind."""

    name: str
    losses: Losses

    @abstractmethod
    def dataset(self, rank: int, world_size: int) -> ClipDataset:
        """Batches by step for one process."""

    @abstractmethod
    def validate(self) -> Validation:
        """Judge the networks as they are now."""

    @abstractmethod
    def finish(self) -> VideoPrior:
        """The prior with the networks as they are now."""


@dataclass
class Progress:
    """How far a training is."""

    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    """Steps in a row whose gradient was not finite."""

    def share(self, config: TrainingConfig) -> float:
        """Share of the training that is done: of its steps, or of its time where that is further."""
        by_steps = self.step / config.steps
        if config.max_minutes is None:
            return min(1.0, by_steps)
        by_time = self.seconds / (60 * config.max_minutes) if config.max_minutes > 0 else 1.0
        return min(1.0, max(by_steps, by_time))


@dataclass
class State:
    """All that changes while training."""

    progress: Progress
    losses: Losses
    optimizers: dict[str, torch.optim.Optimizer]
    average: dict[str, Tensor] = field(default_factory=dict)
    """Running average of the first player's parameters."""


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Processes, device and precision, as `accelerate launch` or `torchrun` sets them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fast = fast_dtype(device) is torch.bfloat16 if config.precision == "auto" else config.precision == "bf16"
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if fast else "no",
        # attention to a single token leaves its queries and keys without a gradient
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def train(task: Task, config: TrainingConfig, accelerator: Accelerator) -> None:
    """Train, or go on training, until the steps or the minutes are over; the task then holds the averaged weights."""
    output = config.output
    (output / SHEETS_NAME).mkdir(parents=True, exist_ok=True)
    task.losses.to(accelerator.device).train()
    state = _start(task.losses, config)
    if (output / CHECKPOINT_NAME).is_file():
        load_checkpoint(output / CHECKPOINT_NAME, state)
        logger.info(f"{task.name}: going on at step {state.progress.step}")
    model = accelerator.prepare_model(task.losses)
    for step, batch in _batches(task, config, accelerator, state.progress.step):
        share = _agreed_share(state.progress, config, accelerator)
        if share >= 1:
            break
        started = time.monotonic()
        figures = _train_step(model, state, batch, share, config, accelerator)
        state.progress.step = step + 1
        state.progress.seconds += time.monotonic() - started
        if accelerator.is_main_process and step % config.log_every == 0:
            _log(output, task.name, state.progress, share, config, figures)
        if state.progress.step % config.save_every == 0 and accelerator.is_main_process:
            save_checkpoint(output / CHECKPOINT_NAME, state)
        if state.progress.step % config.validate_every == 0:
            _validate(task, state, config, accelerator)
    if accelerator.is_main_process:
        save_checkpoint(output / CHECKPOINT_NAME, state)
    _validate(task, state, config, accelerator)
    _copy_into(_first_player(task.losses), state.average)
    task.losses.eval()


def save_checkpoint(path: Path, state: State) -> None:
    """Write everything that a resumed training needs; an older checkpoint stays until the new one is whole."""
    content = {
        "version": CHECKPOINT_VERSION,
        "progress": {"step": state.progress.step, "seconds": state.progress.seconds},
        "losses": state.losses.state_dict(),
        "optimizers": {name: optimizer.state_dict() for name, optimizer in state.optimizers.items()},
        "average": state.average,
    }
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        torch.save(content, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: Path, state: State) -> None:
    """Put a checkpoint into a state that was built with the same settings.

    Raises:
        ValueError: if it is of another version or of other networks.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    if content.get("version") != CHECKPOINT_VERSION:
        raise ValueError(
            f"{path} must be a checkpoint of version {CHECKPOINT_VERSION}, got {content.get('version')!r}; "
            "train into another output folder."
        )
    try:
        state.losses.load_state_dict(content["losses"])
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds other networks than those to be trained; use the settings that it was made with, "
            f"or another output folder. {error}"
        ) from error
    for name, optimizer in state.optimizers.items():
        optimizer.load_state_dict(content["optimizers"][name])
    for name, average in state.average.items():
        average.copy_(content["average"][name])
    state.progress = Progress(**content["progress"])


@contextmanager
def averaged_weights(network: nn.Module, average: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, the network has its averaged parameters."""
    own = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    _copy_into(network, average)
    try:
        yield
    finally:
        _copy_into(network, own)


def _start(losses: Losses, config: TrainingConfig) -> State:
    optimizers: dict[str, torch.optim.Optimizer] = {
        name: torch.optim.AdamW(
            [parameter for parameter in network.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.99),
            fused=True,
        )
        for name, network in losses.players.items()
    }
    average = {name: parameter.detach().clone() for name, parameter in _first_player(losses).named_parameters()}
    return State(Progress(), losses, optimizers, average)


def _first_player(losses: Losses) -> nn.Module:
    return next(iter(losses.players.values()))


def _batches(
    task: Task, config: TrainingConfig, accelerator: Accelerator, start: int
) -> Iterator[tuple[int, ClipBatch]]:
    steps = range(start, config.steps)
    loader = DataLoader(
        task.dataset(accelerator.process_index, accelerator.num_processes),
        batch_size=None,
        sampler=steps,
        num_workers=config.loader_workers,
    )
    return zip(steps, loader, strict=False)


def _agreed_share(progress: Progress, config: TrainingConfig, accelerator: Accelerator) -> float:
    """The main process's progress: clocks differ, and all processes must stop at the same step."""
    share = torch.tensor(progress.share(config), dtype=torch.float64, device=accelerator.device)
    return float(broadcast(share) if accelerator.num_processes > 1 else share)  # type: ignore[arg-type]


def _train_step(
    model: nn.Module, state: State, batch: ClipBatch, share: float, config: TrainingConfig, accelerator: Accelerator
) -> dict[str, float]:
    """One turn of every player."""
    step = state.progress.step
    number = step * accelerator.num_processes + accelerator.process_index
    rate = config.learning_rate * learning_rate_factor(step, share, config.warmup_steps)
    figures: dict[str, float] = {"learning_rate": rate}
    for name, network in state.losses.players.items():
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        parts = model(batch, step_generator(config.seed + NOISE_SEED_OFFSET, number), share, name)
        accelerator.backward(parts["loss"])
        norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        if norm.isfinite():
            _optimizer_step(state.optimizers[name], rate)
            state.progress.skipped = 0
        else:
            _count_skipped(state.progress)
        state.losses.zero_grad(set_to_none=True)
        prefix = "" if len(state.optimizers) == 1 else f"{name}/"
        figures |= {f"{prefix}{part}": float(value.detach()) for part, value in parts.items()}
        figures[f"{prefix}gradient_norm"] = float(norm)
    decay = ema_decay_at(step, config.ema_decay)
    parameters = dict(_first_player(state.losses).named_parameters())
    with torch.no_grad():
        torch._foreach_lerp_(
            list(state.average.values()), [parameters[name] for name in state.average], weight=1 - decay
        )
    return figures


def _optimizer_step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def _count_skipped(progress: Progress) -> None:
    progress.skipped += 1
    if progress.skipped >= MAX_SKIPPED_STEPS:
        raise FloatingPointError(
            f"the gradient was not finite in {MAX_SKIPPED_STEPS} steps in a row (step {progress.step}); "
            "lower `learning_rate` or set `precision` to fp32, and resume."
        )


def _copy_into(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(weights[name])


def _validate(task: Task, state: State, config: TrainingConfig, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        started = time.monotonic()
        network = _first_player(task.losses)
        network.eval()
        with averaged_weights(network, state.average), torch.no_grad(), accelerator.autocast():
            validation = task.validate()
        network.train()
        step = state.progress.step
        _write_line(config.output, {"step": step, "seconds": round(state.progress.seconds, 1)} | validation.metrics)
        if validation.sheet is not None:
            save_picture(validation.sheet, config.output / SHEETS_NAME / f"step-{step:07d}.png")
        text = ", ".join(f"{name} {value:.4g}" for name, value in validation.metrics.items())
        logger.info(f"{task.name} step {step}: {text} (took {time.monotonic() - started:.0f} s)")
    accelerator.wait_for_everyone()


def save_picture(rgb: Tensor, path: Path) -> None:
    """Write a picture [3 h w] in [0, 1] as PNG."""
    pixels = (rgb.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(path)


def _log(
    output: Path, name: str, progress: Progress, share: float, config: TrainingConfig, figures: dict[str, float]
) -> None:
    seconds_per_step = progress.seconds / max(progress.step, 1)
    left = progress.seconds * (1 - share) / share if share > 0 else seconds_per_step * config.steps
    _write_line(output, {"step": progress.step, "seconds": round(progress.seconds, 1)} | figures)
    text = ", ".join(f"{part} {value:.4g}" for part, value in figures.items() if part != "learning_rate")
    logger.info(f"{name} step {progress.step} ({share:.1%}, {left / 60:.1f} min left): {text}")


def _write_line(output: Path, values: dict[str, Any]) -> None:
    rounded = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in values.items()}
    with (output / LOG_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(rounded) + "\n")
