"""How a prior is run: what a user may change without another prior. Light: no network library is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Fit = Literal["auto", "as-is", "pad", "tile"]
Memory = Literal["auto", "all", "8gb", "12gb", "16gb", "24gb", "80gb"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Sampler = Literal["euler", "heun", "dpm++2m"]
Schedule = Literal["karras", "exponential"]


@dataclass
class SamplingConfig:
    """Sampling, picture size, precision and memory. None keeps what the prior itself says."""

    steps: int | None = None
    """Sampling steps; time grows with them."""
    sampler: Sampler = "euler"
    """Solver: euler (the paper), heun (second order, two network passes a step), dpm++2m (second order, one pass)."""
    schedule: Schedule = "karras"
    """How noise levels are spaced: karras (EDM, SVD's) or exponential (evenly in their logarithm)."""
    seed: int | None = None
    """Seed of the noise of every clip. None draws it from the run's own generator."""
    min_guidance: float | None = None
    """Classifier-free guidance at a clip's first frame."""
    max_guidance: float | None = None
    """Classifier-free guidance at a clip's last frame; at 1 and 1 the unconditional pass is left out: half the time."""
    coarse: bool = True
    """Mend large shapes of the renders before anything is sampled, where the prior has a coarse repair."""
    diffusion: bool = True
    """Sample and decode every clip; False: the coarse repair alone, whose frames take a small part of the time and lack detail."""
    std: bool = True
    """Decode with the spatial-temporal decoder, which sees the renders; False: with the VAE's own."""
    colour_correction: bool | None = None
    """Match every frame's mean and standard deviation to the first reference's, as the paper does."""
    num_frames: int | None = None
    """Longest window; longer clips go in overlapping ones. Fewer frames take less memory."""
    fit: Fit = "auto"
    """How frames that are no frames of the prior's own size are brought to it, always without stretching.
    as-is: their sides padded to whole latents. pad: scaled down and padded to `frame_size`. tile: scaled down until their
    shorter side fits (the longer too where that takes no more than a tenth), then overlapping tiles of `frame_size`. auto: as-is for a prior of no fixed size, else tile."""
    frame_size: tuple[int, int] | None = None
    """Height and width in pixels for `fit`; the prior's own size by default."""
    precision: Precision = "auto"
    """Arithmetic of the networks; auto takes the fastest that the device is good at."""
    memory: Memory = "auto"
    """What to do about little GPU memory: the preset for a card of that size (see `memory.PRESETS`), all for none of
    it, auto for the first preset that fits into what is free."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ValueError: naming the field, its rule and the given value.
        """
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps}.")
        if not (self.diffusion or self.coarse):
            raise ValueError("`diffusion` and `coarse` must not both be False: nothing would be repaired.")
        if self.num_frames is not None and self.num_frames < 3:
            raise ValueError(f"`num_frames` must be at least 3 (two references and a render), got {self.num_frames}.")
        if self.frame_size is not None and min(self.frame_size) < 1:
            raise ValueError(f"`frame_size` must be positive, got {self.frame_size} (height, width) pixels.")

    def check_against(self, has_coarse: bool) -> None:
        """Refuse to sample nothing from a prior that cannot repair without it.

        Args:
            has_coarse: whether the prior has a coarse repair.

        Raises:
            ValueError: where nothing would be repaired.
        """
        if not (self.diffusion or has_coarse):
            raise ValueError("`diffusion` must be True for a prior without coarse repair: nothing would be repaired.")
