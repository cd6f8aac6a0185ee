"""Adapter to `diffusion_prior`: loads a prior at first use and never becomes part of the model."""

from __future__ import annotations

import torch

from diffusion_prior.types import ConditionClip, EnhancedClip


class LazyPrior:
    """A prior by name, read when the first clip comes. Not a module: state_dict stays splats."""

    def __init__(self, name: str, device: torch.device | str) -> None:
        self.name = name
        self.device = torch.device(device)
        self._prior = None

    def enhance(self, clip: ConditionClip, generator: torch.Generator) -> EnhancedClip:
        """Repair a clip; see `diffusion_prior.prior.VideoPrior.enhance`.

        Raises:
            ValueError: unknown name, foreign or broken prior folder.
        """
        if self._prior is None:
            from diffusion_prior.checkpoints import load_prior

            self._prior = load_prior(self.name, self.device)
        return self._prior.enhance(clip, generator)
