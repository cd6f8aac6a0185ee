"""Video prior of 3DGS-Enhancer: a clip of rendered frames between two photographs goes in, an enhanced clip comes out.

Importing the package is light; diffusers and transformers are loaded by the submodules that need them
(`diffusion_prior.prior`, `diffusion_prior.checkpoints`).
"""

from diffusion_prior.types import ConditionClip, EnhancedClip

__all__ = ["ConditionClip", "EnhancedClip"]
