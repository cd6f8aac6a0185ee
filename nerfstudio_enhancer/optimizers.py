"""Adam in one fused kernel: on a CPU the stock loop over parameters costs as much as the rasteriser."""

from dataclasses import dataclass

from nerfstudio.engine.optimizers import AdamOptimizerConfig


@dataclass
class FusedAdamConfig(AdamOptimizerConfig):
    """Adam with torch's fused implementation."""

    fused: bool = True
    """One kernel for the whole update (CPU and CUDA)."""
