"""What a prior really takes on this machine: seconds and peak memory of one clip, measured, beside the estimate."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from diffusion_prior.kept_memory import keep_freed_memory
from diffusion_prior.memory import GIB, MemoryEstimate, estimate_memory
from diffusion_prior.prior import VideoPrior
from diffusion_prior.types import ConditionClip
from diffusion_prior.waiting_threads import let_waiting_threads_sleep


@dataclass(frozen=True)
class ClipTiming:
    """One clip, enhanced several times."""

    num_frames: int
    """Of the clip, both references included."""
    seconds: tuple[float, ...]
    """Of each time, in order; a first one, which loads kernels, is not among them."""
    peak_bytes: int | None
    """Most bytes that tensors took on the GPU, weights included, context and gaps not; None on a CPU."""
    estimate: MemoryEstimate
    """What was expected."""

    @property
    def median_seconds(self) -> float:
        """Of a clip."""
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        lines = [
            f"{self.median_seconds:.2f} s a clip of {self.num_frames} frames, {self.median_seconds / self.num_frames:.3f} s a "
            f"frame (median of {len(self.seconds)}: {min(self.seconds):.2f} to {max(self.seconds):.2f} s)",
            f"memory estimated: {self.estimate}",
        ]
        if self.peak_bytes is not None:
            lines.append(f"memory measured: {self.peak_bytes / GIB:.1f} GiB of tensors at the peak")
        return "\n".join(lines)


def time_clip(prior: VideoPrior, num_frames: int, height: int, width: int, repeats: int = 3) -> ClipTiming:
    """Enhance a clip of noise, once unmeasured and then several times.

    Args:
        prior: where and as it shall run.
        num_frames: of the clip, at least 2.
        height: of the frames in pixels.
        width: of the frames in pixels.
        repeats: measured times, at least 1.

    Raises:
        ValueError: no measured time is asked for.
        OutOfDeviceMemory: naming the ways to need less.
    """
    if repeats < 1:
        raise ValueError(f"`repeats` must be at least 1, got {repeats}.")
    let_waiting_threads_sleep()
    keep_freed_memory(prior.device)
    clip = noise_clip(num_frames, height, width)
    estimate = estimate_memory(prior, num_frames, height, width, prior.preset)
    prior.enhance(clip, torch.Generator().manual_seed(0))
    on_gpu = prior.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(prior.device)
    seconds = tuple(_seconds(prior, clip, seed) for seed in range(repeats))
    peak = torch.cuda.max_memory_allocated(prior.device) if on_gpu else None
    return ClipTiming(num_frames, seconds, peak, estimate)


def noise_clip(num_frames: int, height: int, width: int) -> ConditionClip:
    """A clip that every prior takes: noise in its pictures, cameras side by side."""
    generator = torch.Generator().manual_seed(0)
    rgb, alpha, disparity = (torch.rand(num_frames, c, height, width, generator=generator) for c in (3, 1, 1))
    camera_to_world = torch.eye(4)[:3].repeat(num_frames, 1, 1)
    camera_to_world[:, 0, 3] = torch.linspace(0, 1, num_frames)
    return ConditionClip(rgb, alpha, disparity, camera_to_world=camera_to_world, fov_x_rad=1.0)


def _seconds(prior: VideoPrior, clip: ConditionClip, seed: int) -> float:
    started = time.perf_counter()
    prior.enhance(clip, torch.Generator().manual_seed(seed))
    if prior.device.type == "cuda":
        torch.cuda.synchronize(prior.device)
    return time.perf_counter() - started
