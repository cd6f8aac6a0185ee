"""Adapter to `diffusion_prior`: loads a prior at first use and never becomes part of the model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from nerfstudio.utils.rich_utils import CONSOLE

from diffusion_prior.sampling_config import SamplingConfig
from diffusion_prior.types import ConditionClip, EnhancedClip

if TYPE_CHECKING:
    from diffusion_prior.prior import VideoPrior


class LazyPrior:
    """A prior by name, read when the first clip comes. Not a module: state_dict stays splats."""

    def __init__(self, name: str, device: torch.device | str, sampling: SamplingConfig | None = None) -> None:
        self.name = name
        self.device = torch.device(device)
        self.sampling = sampling or SamplingConfig()
        self._prior: VideoPrior | None = None
        self._largest = 0

    def find(self) -> None:
        """Make sure that the prior is here and can do what is asked, without reading it; a hub repository is fetched.

        Raises:
            ValueError: unknown name, or `sampling.diffusion` off for a prior without coarse repair.
            FileNotFoundError: a hub repository that cannot be fetched, with the ways out.
        """
        from diffusion_prior.checkpoints import resolve

        self.sampling.check_against(resolve(self.name).has_coarse)

    def without_diffusion(self) -> LazyPrior:
        """The same prior with its coarse repair alone; as it is, where it has none or is told to leave it out."""
        from diffusion_prior.checkpoints import resolve

        if not (self.sampling.coarse and resolve(self.name).has_coarse):
            return self
        return LazyPrior(self.name, self.device, replace(self.sampling, diffusion=False))

    def enhance(self, clip: ConditionClip, generator: torch.Generator) -> EnhancedClip:
        """Repair a clip; see `diffusion_prior.prior.VideoPrior.enhance`.

        Raises:
            ValueError: unknown name, foreign or broken prior folder.
            OutOfDeviceMemory: the GPU is too small for it, with the ways out.
        """
        from diffusion_prior.runner import plan_memory, prepare_prior

        size = clip.rgb.numel()
        if self._prior is None:
            self._prior = prepare_prior(self.name, self.device, self.sampling, clip, CONSOLE.log)
        elif size > self._largest and self.device.type == "cuda" and self.sampling.memory == "auto":
            plan_memory(self._prior, self.device, clip, CONSOLE.log)
        self._largest = max(self._largest, size)
        return self._prior.enhance(clip, generator)
