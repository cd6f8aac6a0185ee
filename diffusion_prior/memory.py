"""GPU memory of a prior: presets by the size of the card, estimates made before anything runs, errors that name the way out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from diffusion_prior.accounting import Cost, cost_of, weight_bytes
from diffusion_prior.cpu_speed import SingleTokenProcessor, SlicedProcessor

if TYPE_CHECKING:
    from diffusion_prior.prior import VideoPrior
    from diffusion_prior.types import ConditionClip

GIB = 1024**3
CONTEXT_BYTES = int(0.6 * GIB)
"""What a CUDA context and its libraries take before the first tensor."""
WORKSPACE_FACTOR = 1.15
"""Intermediate tensors are multiplied by this for kernels' workspaces and gaps between allocations. An assumption."""
EXHAUSTION = re.compile(r"out of memory|CU\w+_STATUS_(ALLOC_FAILED|INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED)")
"""In the messages of errors that have no class of their own: CUDA's runtime, cuBLAS, cuSOLVER, cuDNN before and since 9."""


@dataclass(frozen=True)
class MemoryPreset:
    """What is given up for less memory; results stay the same but for rounding and, at decoding, where windows meet."""

    offload: bool = False
    """Networks rest on the CPU and come to the GPU one at a time."""
    slices: bool = False
    """Attention and feed-forward layers of the UNet work on one frame (or one row of pixels) at a time."""
    decode_frames: int | None = None
    """Longest window that is decoded at once, both references included; at least 3. None decodes what is sampled at once."""
    decode_tile_px: int | None = None
    """Side of the square tiles that are decoded at once; None for whole frames."""


PRESETS = {
    "all": MemoryPreset(),
    "80gb": MemoryPreset(),
    "24gb": MemoryPreset(decode_frames=10),
    "16gb": MemoryPreset(decode_frames=6),
    "12gb": MemoryPreset(offload=True, decode_frames=6),
    "8gb": MemoryPreset(offload=True, slices=True, decode_frames=5, decode_tile_px=512),
}
"""By the memory of the card, from the fastest to the thriftiest."""


class OutOfDeviceMemory(RuntimeError):
    """The GPU's memory was not enough; says what can be done."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device while each part runs: weights there, intermediate tensors, the clip, the context."""

    encode: int
    embed: int
    denoise: int
    decode: int

    @property
    def peak(self) -> int:
        """Most of them."""
        return max(self.encode, self.embed, self.denoise, self.decode)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {bytes_ / GIB:.1f}" for name, bytes_ in vars(self).items())
        return f"{self.peak / GIB:.1f} GiB ({parts})"


def estimate_memory(
    prior: VideoPrior, num_frames: int, height: int, width: int, preset: MemoryPreset
) -> MemoryEstimate:
    """What enhancing one clip will take, counted from the networks themselves on the meta device in seconds.

    Args:
        prior: its networks' sizes and precision count, not where they are.
        num_frames: of the clip.
        height: of the frames that are sampled, see `fitting.fit_clip`.
        width: of the frames that are sampled.
        preset: what is given up.
    """
    return next(estimate_presets(prior, num_frames, height, width, [preset]))


def estimate_presets(
    prior: VideoPrior, num_frames: int, height: int, width: int, presets: Iterable[MemoryPreset]
) -> Iterator[MemoryEstimate]:
    """`estimate_memory` of one clip under several presets, each when it is asked for; what they share is counted once."""
    factor = prior.latent_factor
    rows, columns = (max(2, -(-side // factor)) for side in (height, width))
    pictures = num_frames * rows * columns * factor**2 * (5 + prior.std.condition_channels) * 4
    window = min(num_frames, prior.effective_config.num_frames)
    tile = prior._latent_tile or (rows, columns)
    denoised = (window, min(rows, tile[0]), min(columns, tile[1]))
    used = {"encode": prior.vae, "embed": prior.image_encoder, "denoise": prior.unet, "decode": prior.std}
    everything = weight_bytes(prior.modules.values())
    counted = _COUNTED.setdefault(_make(prior), {})

    def cost(part: Callable[..., Cost], *arguments: int) -> Cost:
        key = (part, *arguments)
        if key not in counted:
            counted[key] = part(prior, *arguments)
        return counted[key]

    for preset in presets:
        decoded = min(window, preset.decode_frames or window)
        side = preset.decode_tile_px and max(1, preset.decode_tile_px // factor)
        work = {
            "encode": cost(encoding_cost, rows, columns),
            "embed": cost(embedding_cost, num_frames),
            "denoise": cost(denoising_cost, *denoised, preset.slices),
            "decode": cost(decoding_cost, decoded, min(rows, side or rows), min(columns, side or columns)),
        }
        yield MemoryEstimate(
            **{
                name: (weight_bytes([used[name]]) if preset.offload else everything)
                + int(WORKSPACE_FACTOR * cost.peak_bytes)
                + pictures
                + CONTEXT_BYTES
                for name, cost in work.items()
            }
        )


_COUNTED: dict[tuple, dict[tuple, Cost]] = {}
"""What parts of priors of one make have been found to cost: every round reads its prior anew, and counting takes seconds."""


def _make(prior: VideoPrior) -> tuple:
    """Equal for priors whose networks compute alike, whatever their weights."""
    parts = ((name, str(module.config), module.dtype) for name, module in prior.modules.items())
    return str(prior.config), *parts


def choose_preset(
    prior: VideoPrior, num_frames: int, height: int, width: int, free_bytes: int
) -> tuple[str, MemoryEstimate]:
    """The first preset whose estimate fits into the free memory, the thriftiest where none does, and its estimate."""
    *others, thriftiest = PRESETS
    estimates = estimate_presets(prior, num_frames, height, width, PRESETS.values())
    for name, estimate in zip(others, estimates):
        if estimate.peak <= free_bytes:
            return name, estimate
    return thriftiest, next(estimates)


@contextmanager
def explain_exhaustion(prior: VideoPrior, clip: ConditionClip) -> Iterator[None]:
    """Within, running out of GPU memory raises an error that says what to do.

    Raises:
        OutOfDeviceMemory: in place of torch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_exhaustion(error):
            raise
        height, width = clip.rgb.shape[-2:]
        presets = [prior.preset, PRESETS["8gb"]]
        estimate, thrifty = estimate_presets(prior, clip.num_frames, height, width, presets)
        raise OutOfDeviceMemory(
            f"the GPU's memory is not enough to enhance {clip.num_frames} frames of {width} x {height} pixels: about "
            f"{estimate} are needed as it was run. Ways out: `--pipeline.model.enhance.sampling.memory 8gb` (about "
            f"{thrifty.peak / GIB:.1f} GiB), fewer frames at once (`.num-frames`), smaller pictures (`.frame-size`), or "
            "a GPU that nothing else uses."
        ) from error


def is_exhaustion(error: RuntimeError) -> bool:
    """Whether an error says that the GPU's memory was not enough; the libraries of CUDA say so in plain RuntimeErrors."""
    # torch.OutOfMemoryError, by the name that it has had before torch 2.5 too
    return isinstance(error, torch.cuda.OutOfMemoryError) or EXHAUSTION.search(str(error)) is not None


def set_slicing(unet: nn.Module, slices: bool) -> None:
    """Switch, in place, between whole and sliced attention and feed-forward layers."""
    for part in unet.modules():
        if isinstance(getattr(part, "processor", None), SingleTokenProcessor):
            part.set_processor(SlicedProcessor() if slices else SingleTokenProcessor())  # pyright: ignore
        if hasattr(part, "set_chunk_feed_forward"):
            chunked = {"chunk_size": 1, "dim": 0} if slices else {"chunk_size": None, "dim": 0}
            part.set_chunk_feed_forward(**chunked)  # pyright: ignore[reportCallIssue]


def encoding_cost(prior: VideoPrior, rows: int, columns: int) -> Cost:
    """One frame through the VAE's encoder; rows and columns in latents."""
    side = prior.latent_factor // prior.config.patch_size
    frame = (1, prior.vae.config["in_channels"], rows * side, columns * side)
    return _meta_call(prior.vae.encoder, torch.empty(frame, dtype=prior.vae.dtype, device="meta"))


def embedding_cost(prior: VideoPrior, num_frames: int) -> Cost:
    """Frames through the image encoder, together."""
    side: int = prior.image_encoder.config.image_size  # pyright: ignore[reportAssignmentType]  # one number in CLIP
    frames = torch.empty((num_frames, 3, side, side), dtype=prior.image_encoder.dtype, device="meta")
    return _meta_call(prior.image_encoder, frames)


def denoising_cost(prior: VideoPrior, frames: int, rows: int, columns: int, slices: bool = False) -> Cost:
    """One pass of the UNet over one window; rows and columns in latents."""
    set_slicing(prior.unet, slices)
    try:
        return _meta_call(prior.unet, *unet_stand_ins(prior, frames, rows, columns))
    finally:
        set_slicing(prior.unet, prior.preset.slices)


def unet_stand_ins(prior: VideoPrior, frames: int, rows: int, columns: int) -> list[torch.Tensor]:
    """Arguments of the UNet's forward pass for one clip, on the meta device."""
    config, dtype = prior.unet.config, prior.unet.dtype
    micro = (1, 3) if prior.unet.layout == "B" else (1, frames, config["pose_conditions"])
    return [
        torch.empty((1, frames, config["in_channels"], rows, columns), dtype=dtype, device="meta"),
        torch.empty(1, device="meta"),
        torch.empty((1, frames, 1, prior.image_encoder.config.projection_dim), dtype=dtype, device="meta"),
        torch.empty(micro, device="meta"),
    ]


def decoding_cost(prior: VideoPrior, frames: int, rows: int, columns: int) -> Cost:
    """One window through the STD; rows and columns in latents."""
    config, dtype, factor = prior.std.config, prior.std.dtype, prior.latent_factor
    condition = (1, frames, prior.std.condition_channels, rows * factor, columns * factor)
    return _meta_call(
        prior.std,
        torch.empty((1, frames, config["latent_channels"], rows, columns), dtype=dtype, device="meta"),
        torch.empty(condition, dtype=dtype, device="meta"),
    )


def _meta_call(module: nn.Module, *arguments: torch.Tensor) -> Cost:
    """One forward pass, counted."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    with torch.no_grad():
        return cost_of(lambda: torch.func.functional_call(module, stand_ins, arguments))
