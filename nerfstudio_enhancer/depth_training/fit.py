"""The fit of the depth network: cross entropy over the sweep's planes, exactly resumable."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor
from torch.utils.data import DataLoader

from diffusion_prior.files import whole_file
from diffusion_prior.prior import fast_dtype
from diffusion_prior.training.objectives import ema_decay_at, learning_rate_factor
from diffusion_prior.waiting_threads import let_waiting_threads_sleep
from nerfstudio_enhancer.depth_training.samples import Batch, References, read_scene
from nerfstudio_enhancer.stereo.depth_network import DepthNetwork
from nerfstudio_enhancer.stereo.predict import save_network

if TYPE_CHECKING:
    from nerfstudio_enhancer.depth_training.train_depth import TrainDepth

EMA_DECAY = 0.998
"""Of the average of the weights, which is what is kept."""

WARMUP_STEPS = 50
WEIGHT_DECAY = 0.02
REPORT_EVERY = 100
CHECKPOINT_EVERY_S = 300.0


def fit(settings: TrainDepth, files: Sequence[Path], stop_after: int | None = None) -> Path:
    """Train and write `depth_network.safetensors`; goes on from `state.pt` if there is one, as if never interrupted.

    Args:
        settings: of the command.
        files: of the scenes' views, as `whole_splats.store_views` writes them.
        stop_after: stop earlier, after so many steps in all, with the state kept.
    """
    let_waiting_threads_sleep()
    samples = References([read_scene(path) for path in files], settings.batch, settings.seed)
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
    num_views = sum(len(scene.views) for scene in samples.scenes)
    CONSOLE.print(f"{num_views} photographs of {len(samples.scenes)} scenes.")
    end = min(settings.steps, stop_after or settings.steps)
    batches = DataLoader(samples, batch_size=None, sampler=range(step, end), num_workers=settings.loaders)
    begin_s = saved_s = time.monotonic()
    losses = []
    for batch in batches:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_factor(step, step / settings.steps, WARMUP_STEPS)
        losses.append(_step(network, optimizer, batch.to(device)))
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
