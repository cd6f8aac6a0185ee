"""The fit of the depth network: cross entropy over the sweep's planes, exactly resumable."""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from diffusion_prior.files import whole_file
from diffusion_prior.prior import fast_dtype
from diffusion_prior.training.objectives import ema_decay_at, learning_rate_factor
from diffusion_prior.waiting_threads import let_waiting_threads_sleep
from nerfstudio_enhancer.stereo.depth_network import UNKNOWN_COST, DepthNetwork
from nerfstudio_enhancer.stereo.predict import picture_at, save_network

if TYPE_CHECKING:
    from nerfstudio_enhancer.depth_training.train_depth import TrainDepth

MIN_TRUSTED = 0.05
"""Samples with less true depth than this share of their pixels are left out."""

BLIND_SHARE = 0.15
"""Share of the samples that are shown without matching costs, so that the network learns to go by the picture alone."""

EMA_DECAY = 0.998
"""Of the average of the weights, which is what is kept."""

WARMUP_STEPS = 50
WEIGHT_DECAY = 0.02
REPORT_EVERY = 100
CHECKPOINT_EVERY_S = 300.0


@dataclass(frozen=True)
class Batch:
    """Samples of one size."""

    cost: Float[Tensor, "b d h w"]
    rgb: Float[Tensor, "b 3 H W"]
    rays: Float[Tensor, "b 3 h w"]
    inverse_depth: Float[Tensor, "b h w"]
    """0 at the farthest plane, 1 at the nearest."""
    trusted: Bool[Tensor, "b h w"]

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def fit(settings: TrainDepth, files: Sequence[Path], stop_after: int | None = None) -> Path:
    """Train and write `depth_network.safetensors`; goes on from `state.pt` if there is one, as if never interrupted.

    Args:
        settings: of the command.
        files: of samples.
        stop_after: stop earlier, after so many steps in all, with the state kept.
    """
    let_waiting_threads_sleep()
    samples = _Samples.read(files)
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = DepthNetwork().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=WEIGHT_DECAY)
    state_path, weights_path = settings.output / "state.pt", settings.output / "depth_network.safetensors"
    step = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True, map_location=device)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        CONSOLE.print(f"Going on after {step} steps.")
    CONSOLE.print(f"{samples.count} reference views of {samples.num_scenes} scenes.")
    begin_s = saved_s = time.monotonic()
    losses = []
    while step < min(settings.steps, stop_after or settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_factor(step, step / settings.steps, WARMUP_STEPS)
        batch = samples.draw(settings.batch, _generator_of(settings.seed, step)).to(device)
        losses.append(_step(network, optimizer, batch))
        step += 1
        _follow(average, network, ema_decay_at(step, EMA_DECAY))
        if step % REPORT_EVERY == 0:
            minutes = (time.monotonic() - begin_s) / 60
            CONSOLE.print(f"{step} steps, {minutes:.1f} min: loss {np.mean(losses[-REPORT_EVERY:]):.3f}")
        if time.monotonic() - saved_s > CHECKPOINT_EVERY_S:
            saved_s = time.monotonic()
            _save(state_path, network, average, optimizer, step)
    _save(state_path, network, average, optimizer, step)
    save_network(average, weights_path)
    return weights_path


def _generator_of(seed: int, step: int) -> np.random.Generator:
    """A step's draws depend on nothing but its number, so that a resumed fit repeats them."""
    return np.random.default_rng((seed, step))


def _step(network: DepthNetwork, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    device = batch.cost.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast_dtype(device) != torch.float32):
        logits = network(batch.cost, batch.rgb, batch.rays)
    loss = plane_cross_entropy(logits.float(), batch.inverse_depth, batch.trusted)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def _follow(average: DepthNetwork, network: DepthNetwork, decay: float) -> None:
    for mean, value in zip(average.parameters(), network.parameters()):
        mean.lerp_(value, 1 - decay)


def _save(
    path: Path,
    network: DepthNetwork,
    average: DepthNetwork,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    parts = {"network": network, "average": average, "optimizer": optimizer}
    with whole_file(path) as partial:
        torch.save({**{name: part.state_dict() for name, part in parts.items()}, "step": step}, partial)


def plane_cross_entropy(
    logits: Float[Tensor, "b d h w"], inverse_depth: Float[Tensor, "b h w"], trusted: Bool[Tensor, "b h w"]
) -> Float[Tensor, ""]:
    """Mean over trusted pixels of the cross entropy with the two planes next to the true depth, weighted by nearness.

    Args:
        logits: of the planes, far to near.
        inverse_depth: 0 at the farthest plane, 1 at the nearest; beyond the ends the end plane is right.
        trusted: pixels that count.
    """
    place = inverse_depth.clamp(0, 1) * (logits.shape[1] - 1)
    lower = place.floor().clamp(max=logits.shape[1] - 2).long()
    nearer = place - lower
    log_probability = F.log_softmax(logits, dim=1)
    below, above = (log_probability.gather(1, (lower + i)[:, None])[:, 0] for i in (0, 1))
    entropy = -((1 - nearer) * below + nearer * above)
    return (entropy * trusted).sum() / trusted.sum().clamp(min=1)


class _Samples:
    """All samples in memory, grouped by size, since a batch holds one size."""

    def __init__(self, samples: list[dict]) -> None:
        self.samples = samples
        per_scene = Counter(sample["scene"] for sample in samples)
        self.num_scenes, self.count = len(per_scene), len(samples)
        groups: dict[tuple, list[int]] = {}
        for index, sample in enumerate(samples):
            groups.setdefault(tuple(sample["cost"].shape), []).append(index)
        self.groups = list(groups.values())
        # A scene with many samples counts with their square root.
        self.weights = [np.array([per_scene[samples[i]["scene"]] ** -0.5 for i in group]) for group in self.groups]

    @classmethod
    def read(cls, files: Sequence[Path]) -> _Samples:
        """Read sample files.

        Raises:
            ValueError: if there is no sample with true depth.
        """
        samples = []
        for path in files:
            stored = torch.load(path, weights_only=True)
            for sample in stored["samples"]:
                if sample["trusted"].float().mean() >= MIN_TRUSTED:
                    samples.append({**sample, "rgb": stored["rgb"][sample["view"]], "scene": path.stem})
        if not samples:
            raise ValueError("No reference view has depth that other views confirm; give scenes with more overlap.")
        return cls(samples)

    def draw(self, count: int, generator: np.random.Generator) -> Batch:
        """A batch of one size, augmented."""
        totals = np.array([weights.sum() for weights in self.weights])
        group = int(generator.choice(len(self.groups), p=totals / totals.sum()))
        weights = self.weights[group] / totals[group]
        chosen = generator.choice(self.groups[group], count, p=weights)
        return augmented([self.samples[index] for index in chosen], generator)


def augmented(samples: Sequence[dict], generator: np.random.Generator) -> Batch:
    """Mirrored, in other light, and some without matching costs."""
    columns = []
    for sample in samples:
        size = sample["cost"].shape[-2:]
        values = {
            "cost": sample["cost"].float() / 255,
            "rgb": picture_at(sample["rgb"].float() / 255, size),
            "rays": sample["rays"].float(),
            "inverse_depth": sample["inverse_depth"].float(),
            "trusted": sample["trusted"],
        }
        if generator.random() < BLIND_SHARE:
            values["cost"] = torch.full_like(values["cost"], UNKNOWN_COST)
        if generator.random() < 0.5:
            values = {name: value.flip(-1) for name, value in values.items()}
            values["rays"][0] *= -1
        gamma, exposure = math.exp(generator.normal(0, 0.2)), math.exp(generator.normal(0, 0.15))
        balance = torch.from_numpy(np.exp(generator.normal(0, 0.12, (3, 1, 1)))).float()
        values["rgb"] = (values["rgb"].clamp(min=1e-3) ** gamma * balance * exposure).clamp(0, 1)
        columns.append(values)
    stacked = {name: torch.stack([column[name] for column in columns]) for name in columns[0]}
    for name in ("cost", "rgb"):
        stacked[name] = stacked[name].contiguous(memory_format=torch.channels_last)
    return Batch(**stacked)
