"""Adapter to `diffusion_prior`: loads a prior at first use and never becomes part of the model."""

from __future__ import annotations

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

    def find(self) -> None:
        """Make sure that the prior is here and can do what is asked, without reading it; a hub repository is fetched.

        Raises:
            ValueError: unknown name, or `sampling.diffusion` off for a prior without coarse repair.
            FileNotFoundError: a hub repository that cannot be fetched, with the ways out.
        """
        from diffusion_prior.checkpoints import resolve

        self.sampling.check_against(resolve(self.name).has_coarse)

    def enhance(self, clip: ConditionClip, generator: torch.Generator) -> EnhancedClip:
        """Repair a clip; see `diffusion_prior.prior.VideoPrior.enhance`.

        Raises:
            ValueError: unknown name, foreign or broken prior folder.
            OutOfDeviceMemory: the GPU is too small for it, with the ways out.
        """
        if self._prior is None:
            from diffusion_prior.runner import prepare_prior

            self._prior = prepare_prior(self.name, self.device, self.sampling, clip, CONSOLE.log)
        return self._prior.enhance(clip, generator)
