"""A prior made ready for the clips of one run: precision, memory preset, and a line about what it will need."""

from __future__ import annotations

from collections.abc import Callable

import torch

from diffusion_prior.accounting import weight_bytes
from diffusion_prior.checkpoints import read_prior, resolve
from diffusion_prior.fitting import fit_clip
from diffusion_prior.memory import GIB, PRESETS, choose_preset, estimate_memory, explain_exhaustion
from diffusion_prior.prior import VideoPrior, fast_dtype
from diffusion_prior.sampling_config import SamplingConfig
from diffusion_prior.types import ConditionClip

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def prepare_prior(
    name: str,
    device: torch.device,
    sampling: SamplingConfig,
    clip: ConditionClip,
    say: Callable[[str], None],
) -> VideoPrior:
    """Load a prior for clips like the given one.

    Args:
        name: as in `checkpoints.load_prior`.
        device: where it shall compute.
        sampling: what the user asks for.
        clip: the first one; for larger ones see `plan_memory`.
        say: is told the estimated memory before anything is computed, on a GPU or where a preset was asked for.

    Raises:
        ValueError: unknown name, or a prior that is broken.
        FileNotFoundError: a part, or a hub repository, that cannot be had.
        OutOfDeviceMemory: the weights alone are too large for the GPU; names the ways to need less.
    """
    folders = resolve(name)
    prior = read_prior(folders.folder, folders.unet).eval()
    prior.sampling = sampling
    dtype = fast_dtype(device) if sampling.precision == "auto" else DTYPES[sampling.precision]
    prior.to(dtype=dtype)
    plan_memory(prior, device, clip, say)
    with explain_exhaustion(prior, fit_clip(clip, prior.fit, prior.frame_size).clip):
        return prior.to(device)


def plan_memory(prior: VideoPrior, device: torch.device, clip: ConditionClip, say: Callable[[str], None]) -> None:
    """Choose the memory preset with which a prior repairs clips up to the size of the given one, as `sampling.memory` says.

    Args:
        prior: to be used on `device`, whether it is there already or not.
        device: where it computes.
        clip: the largest so far.
        say: is told the estimated memory on a GPU or where a preset was asked for.
    """
    preset = prior.sampling.memory
    if preset == "auto" and device.type != "cuda":
        preset = "all"
    if preset != "all" or device.type == "cuda":
        preset = _announced(prior, preset, device, fit_clip(clip, prior.fit, prior.frame_size).clip, say)
    prior.use_memory_preset(PRESETS[preset])


def _announced(
    prior: VideoPrior, preset: str, device: torch.device, fitted: ConditionClip, say: Callable[[str], None]
) -> str:
    """The preset, decided, after the estimate was told."""
    height, width = fitted.rgb.shape[-2:]
    size = (fitted.num_frames, height, width)
    free = None
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for later counts as taken
        there = [module for module in prior.modules.values() if next(module.parameters()).is_cuda]
        free = torch.cuda.mem_get_info(device)[0] + weight_bytes(there)  # which the estimate counts too
    if preset == "auto":
        assert free is not None
        preset, estimate = choose_preset(prior, *size, free)
    else:
        estimate = estimate_memory(prior, *size, PRESETS[preset])
    text = (
        f"The prior will need about {estimate} for {size[0]} frames of {size[2]} x {size[1]} (memory preset {preset})."
    )
    if free is not None:
        text += f" {free / GIB:.1f} GiB are free."
        if estimate.peak > free:
            text += " That may not be enough: see `--pipeline.model.enhance.sampling.memory` and `.frame-size`."
    say(text)
    return preset
