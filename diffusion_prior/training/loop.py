"""The loop that all trainings share: steps, schedule, running average, checkpoints, validation, log.

Nothing random has a state: clips and noise of a step follow from the seed and the step's number. A killed training that
is started again with the same output therefore goes on with the losses that it would have had, with the same number of
processes or with another: a step averages the gradients of `batches_per_step` batches, whoever computes them.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, broadcast, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Dataset

from diffusion_prior.data.clips import ClipBatch, step_generator
from diffusion_prior.files import whole_file
from diffusion_prior.prior import VideoPrior, fast_dtype
from diffusion_prior.seeded import seeded
from diffusion_prior.training.config import TrainingConfig
from diffusion_prior.training.objectives import ema_decay_at, learning_rate_factor
from diffusion_prior.training.records import Records
from diffusion_prior.training.sharding import fit_optimizer, gathered, make_whole, shard, split_like, whole
from diffusion_prior.training.shards import ShardedClips
from diffusion_prior.waiting_threads import let_waiting_threads_sleep

CHECKPOINT_NAME = "checkpoint.pt"
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
    prior: VideoPrior
    losses: Losses

    @abstractmethod
    def dataset(self, rank: int, world_size: int) -> Dataset[ClipBatch]:
        """Batches by step for one process."""

    @abstractmethod
    def validate(self) -> Validation:
        """Judge the networks as they are now."""

    def finish(self) -> VideoPrior:
        """The prior with the networks as they are now."""
        return self.prior


@dataclass
class Progress:
    """How far a training is."""

    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    """Steps in a row in which some player's gradient was not finite."""

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
    """Running average of the first player's parameters that train."""
    batches_per_step: int | None = None
    """Batches whose gradients a step averages, over all processes; None until it is decided."""


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Processes, device and precision, as `accelerate launch` or `torchrun` sets them.

    Raises:
        ValueError: under accelerate's own FSDP, which would not split averages and checkpoints.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "launch with distributed_type MULTI_GPU and pass `--scale.sharding`: the loop splits the networks itself."
        )
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
    let_waiting_threads_sleep()
    output = config.output
    output.mkdir(parents=True, exist_ok=True)
    task.losses.to(accelerator.device).train()
    if config.scale.sharding:
        shard(task.losses, accelerator.device)
    state = _start(task.losses, config)
    if (output / CHECKPOINT_NAME).is_file():
        load_checkpoint(output / CHECKPOINT_NAME, state)
        logger.info(f"{task.name}: going on at step {state.progress.step}")
    state.batches_per_step = agreed_batches(state, config, accelerator.num_processes)
    with _records(output, state.progress.step, accelerator) as records:
        _train_steps(task, state, records, config, accelerator)
        _save(output, state, accelerator)
        _validate(task, state, records, config, accelerator)
    _copy_into(_first_player(task.losses), state.average)
    if config.scale.sharding:
        make_whole(task.losses)
    task.losses.eval()


@contextmanager
def _records(output: Path, step: int, accelerator: Accelerator) -> Iterator[Records | None]:
    """Within, the main process has the training's records; the others have none."""
    records = Records(output, step) if accelerator.is_main_process else None
    try:
        yield records
    finally:
        if records is not None:
            records.close()


def _train_steps(
    task: Task, state: State, records: Records | None, config: TrainingConfig, accelerator: Accelerator
) -> None:
    model = task.losses if config.scale.sharding else accelerator.prepare_model(task.losses)
    for step, batches in _batches(task, state, config, accelerator):
        share = _agreed_share(state.progress, config, accelerator)
        if share >= 1:
            break
        started = time.monotonic()
        figures = _train_step(model, state, batches, share, config, accelerator)
        state.progress.step = step + 1
        state.progress.seconds += time.monotonic() - started
        if step % config.log_every == 0:
            figures = _mean_figures(figures, accelerator)
            if records is not None:
                _log(records, task.name, state.progress, share, config, figures)
        if state.progress.step % config.save_every == 0:
            _save(config.output, state, accelerator)
        if state.progress.step % config.validate_every == 0:
            _validate(task, state, records, config, accelerator)


def agreed_batches(state: State, config: TrainingConfig, processes: int) -> int:
    """How many batches a step averages: what the checkpoint says, else the settings, else one per process.

    Raises:
        ValueError: where settings and checkpoint differ, or the processes cannot share them evenly.
    """
    asked, saved = config.scale.batches_per_step, state.batches_per_step
    if asked is not None and saved is not None and asked != saved:
        raise ValueError(
            f"batches_per_step must stay {saved}, as the checkpoint was trained, got {asked}; leave it out, or train "
            "into another output folder."
        )
    batches = saved or asked or processes
    if batches % processes:
        raise ValueError(
            f"batches_per_step must be a multiple of the number of processes: {batches} batches cannot be shared evenly "
            f"by {processes}. Start as many processes as divide it."
        )
    if batches > processes and len(state.losses.players) > 1:
        raise ValueError(
            f"a training against a discriminator takes one batch per process and step, got {batches} for {processes} "
            "process(es); start as many processes as it began with."
        )
    return batches


def _save(output: Path, state: State, accelerator: Accelerator) -> None:
    content = _checkpoint(state)  # split networks are gathered by all processes together
    if accelerator.is_main_process:
        save_checkpoint(output / CHECKPOINT_NAME, content)


def _checkpoint(state: State) -> dict[str, Any]:
    """Everything that a resumed training needs; parameters that do not train are in the prior that it starts from."""
    return {
        "version": CHECKPOINT_VERSION,
        "progress": {"step": state.progress.step, "seconds": state.progress.seconds},
        "batches_per_step": state.batches_per_step,
        "losses": whole(_trained_state(state.losses)),
        "optimizers": {name: whole(optimizer.state_dict()) for name, optimizer in state.optimizers.items()},
        "average": whole(state.average),
    }


def _trained_state(losses: Losses) -> dict[str, Tensor]:
    """Buffers and the parameters that train."""
    frozen = {name for name, parameter in losses.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in losses.state_dict().items() if name not in frozen}


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint; an older one stays until the new one is whole."""
    with whole_file(path) as partial:
        torch.save(content, partial)


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
    own, given = _trained_state(state.losses), content["losses"]
    if faults := [
        *(own.keys() ^ given.keys()),
        *(name for name in own.keys() & given.keys() if own[name].shape != given[name].shape),
    ]:
        raise ValueError(
            f"{path} holds other networks than those to be trained; use the settings that it was made with, "
            f"or another output folder. At fault: {', '.join(sorted(faults))}."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(split_like(given[name], tensor))
        for name, average in state.average.items():
            average.copy_(split_like(content["average"][name], average))
    for name, optimizer in state.optimizers.items():
        optimizer.load_state_dict(content["optimizers"][name])
        fit_optimizer(optimizer)
    state.progress = Progress(**content["progress"])
    state.batches_per_step = content.get("batches_per_step")


@contextmanager
def averaged_weights(network: nn.Module, average: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, the network has its averaged parameters."""
    own = {name: parameter.detach().clone() for name, parameter in network.named_parameters() if name in average}
    _copy_into(network, average)
    try:
        yield
    finally:
        _copy_into(network, own)


def _start(losses: Losses, config: TrainingConfig) -> State:
    optimizers = {
        name: make_optimizer([parameter for parameter in network.parameters() if parameter.requires_grad], config)
        for name, network in losses.players.items()
    }
    average = {
        name: parameter.detach().clone()
        for name, parameter in _first_player(losses).named_parameters()
        if parameter.requires_grad
    }
    return State(Progress(), losses, optimizers, average)


def make_optimizer(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, its states in 32 or in 8 bits.

    Raises:
        ImportError: 8 bits without bitsandbytes.
    """
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "betas": (0.9, 0.99)}
    if config.scale.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]  # optional
    except ImportError as error:
        raise ImportError("optimizer=adamw8bit needs bitsandbytes: pip install bitsandbytes.") from error
    return AdamW8bit(parameters, **settings)


def _first_player(losses: Losses) -> nn.Module:
    return next(iter(losses.players.values()))


def _batches(
    task: Task, state: State, config: TrainingConfig, accelerator: Accelerator
) -> Iterator[tuple[int, list[ClipBatch]]]:
    """Every step with the batches that this process has in it."""
    steps = range(state.progress.step, config.steps)
    numbers = [number for step in steps for number in _numbers(step, state, accelerator)]
    loader = DataLoader(
        _dataset(task, state, config, accelerator),
        batch_size=None,
        sampler=numbers,
        num_workers=config.loader_workers,
    )
    batches = iter(loader)
    for step in steps:
        yield step, [next(batches) for _ in _numbers(step, state, accelerator)]


def _numbers(step: int, state: State, accelerator: Accelerator) -> range:
    """Numbers of the batches that this process has in one step; all clips and noise follow from them."""
    assert state.batches_per_step is not None
    count = state.batches_per_step // accelerator.num_processes
    first = step * state.batches_per_step + accelerator.process_index * count
    return range(first, first + count)


def _dataset(task: Task, state: State, config: TrainingConfig, accelerator: Accelerator) -> Dataset[ClipBatch]:
    if config.scale.shards is None:
        return task.dataset(0, 1)
    assert state.batches_per_step is not None
    return ShardedClips(config.scale, config.clips, config.seed, state.batches_per_step)


def _agreed_share(progress: Progress, config: TrainingConfig, accelerator: Accelerator) -> float:
    """The main process's progress: clocks differ, and all processes must stop at the same step."""
    share = torch.tensor(progress.share(config), dtype=torch.float64, device=accelerator.device)
    return float(broadcast(share) if accelerator.num_processes > 1 else share)  # type: ignore[arg-type]


def _train_step(
    model: nn.Module,
    state: State,
    batches: Sequence[ClipBatch],
    share: float,
    config: TrainingConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """One turn of every player."""
    step = state.progress.step
    rate = config.learning_rate * learning_rate_factor(step, share, config.warmup_steps)
    figures: dict[str, float] = {"learning_rate": rate}
    all_finite = True
    for name, network in state.losses.players.items():
        parts = _mean_gradient(model, state, batches, share, name, config, accelerator)
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        norm = whole(nn.utils.clip_grad_norm_(parameters, config.clip_norm))
        if norm.isfinite():
            _optimizer_step(state.optimizers[name], rate)
        all_finite = all_finite and bool(norm.isfinite())
        state.losses.zero_grad(set_to_none=True)
        prefix = "" if len(state.optimizers) == 1 else f"{name}/"
        figures |= {f"{prefix}{part}": value for part, value in parts.items()}
        figures[f"{prefix}gradient_norm"] = float(norm)
    _count_skipped(state.progress, all_finite)
    decay = ema_decay_at(step, config.ema_decay)
    parameters = dict(_first_player(state.losses).named_parameters())
    with torch.no_grad():
        torch._foreach_lerp_(
            list(state.average.values()), [parameters[name] for name in state.average], weight=1 - decay
        )
    return figures


def _mean_gradient(
    model: nn.Module,
    state: State,
    batches: Sequence[ClipBatch],
    share: float,
    player: str,
    config: TrainingConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Leave the gradient of one player, averaged over all batches of the step, in its parameters; the mean parts of its loss."""
    told: list[dict[str, float]] = []
    for number, batch in zip(_numbers(state.progress.step, state, accelerator), batches, strict=True):
        generator = step_generator(config.seed + NOISE_SEED_OFFSET, number)
        with _exchange(model, batch is batches[-1], accelerator), seeded(generator.initial_seed(), accelerator.device):
            with accelerator.autocast():
                parts = model(batch, generator, share, player)
            accelerator.backward(parts["loss"] / len(batches))
        told.append({part: float(value.detach()) for part, value in parts.items()})
    return _mean_of_told(told)


def _mean_of_told(told: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each figure over those that tell it: some parts of a loss are not computed for every batch."""
    names = dict.fromkeys(name for figures in told for name in figures)
    return {name: fmean(figures[name] for figures in told if name in figures) for name in names}


def _exchange(model: nn.Module, last: bool, accelerator: Accelerator) -> AbstractContextManager[Any]:
    """Within, gradients are exchanged between the processes only with the last batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        return nullcontext()
    return nullcontext() if last else accelerator.no_sync(model)


def _mean_figures(figures: dict[str, float], accelerator: Accelerator) -> dict[str, float]:
    """The figures of all processes, averaged."""
    if accelerator.num_processes == 1:
        return figures
    return _mean_of_told(gather_object([figures]))


def _optimizer_step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def _count_skipped(progress: Progress, all_finite: bool) -> None:
    progress.skipped = 0 if all_finite else progress.skipped + 1
    if progress.skipped >= MAX_SKIPPED_STEPS:
        raise FloatingPointError(
            f"the gradient was not finite in {MAX_SKIPPED_STEPS} steps in a row (step {progress.step}); "
            "lower `learning_rate` or set `precision` to fp32, and resume."
        )


def _copy_into(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


def _validate(
    task: Task, state: State, records: Records | None, config: TrainingConfig, accelerator: Accelerator
) -> None:
    """Judge the averaged weights: the main process alone, or all together where the network is split over them."""
    split = config.scale.sharding
    if records is not None or split:
        started = time.monotonic()
        network = _first_player(task.losses)
        network.eval()
        together = gathered(task.losses) if split else nullcontext()
        with averaged_weights(network, state.average), together, torch.no_grad(), accelerator.autocast():
            validation = task.validate()
        network.train()
        if records is not None:
            _show(task.name, validation, state.progress, records, time.monotonic() - started)
    accelerator.wait_for_everyone()


def _show(name: str, validation: Validation, progress: Progress, records: Records, seconds: float) -> None:
    records.validation(progress.step, progress.seconds, validation.metrics, validation.sheet)
    text = ", ".join(f"{part} {value:.4g}" for part, value in validation.metrics.items())
    logger.info(f"{name} step {progress.step}: {text} (took {seconds:.0f} s)")


def _log(
    records: Records, name: str, progress: Progress, share: float, config: TrainingConfig, figures: dict[str, float]
) -> None:
    seconds_per_step = progress.seconds / max(progress.step, 1)
    left = progress.seconds * (1 - share) / share if share > 0 else seconds_per_step * config.steps
    records.training(progress.step, progress.seconds, figures)
    text = ", ".join(f"{part} {value:.4g}" for part, value in figures.items() if part != "learning_rate")
    logger.info(f"{name} step {progress.step} ({share:.1%}, {left / 60:.1f} min left): {text}")
