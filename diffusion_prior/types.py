"""What passes into and out of the video prior."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ConditionClip:
    """Rendered frames along one camera path, with a reference photograph at each end."""

    rgb: Float[Tensor, "t 3 h w"]
    """sRGB in [0, 1]. Frames 0 and t-1 are reference photographs, the others are renders."""
    alpha: Float[Tensor, "t 1 h w"]
    """Accumulated opacity in [0, 1]; 1 at the references."""
    disparity: Float[Tensor, "t 1 h w"]
    """`conditioning.normalised_disparity` in [0, 1]; 0 where nothing is seen. At the references: that of the render there."""
    camera_to_world: Float[Tensor, "t 3 4"] | None = None
    """OpenCV axes (x right, y down, z forward). Only the pose-conditioned layout reads it."""
    fov_x_rad: float | None = None
    """Horizontal field of view in radians. Only the pose-conditioned layout reads it."""

    def __post_init__(self) -> None:
        """Refuse clips which no prior can enhance.

        Raises:
            ValueError: fewer than 2 frames, frame counts or sizes that differ, or values that are not finite.
        """
        frames, _, height, width = self.rgb.shape
        if frames < 2:
            raise ValueError(f"a clip needs at least 2 frames (a reference photograph at each end), got {frames}.")
        for name, given in (("alpha", self.alpha), ("disparity", self.disparity)):
            if tuple(given.shape) != (frames, 1, height, width):
                raise ValueError(
                    f"`{name}` must be {(frames, 1, height, width)} as `rgb` is, got {tuple(given.shape)}."
                )
        for name, given in (("rgb", self.rgb), ("alpha", self.alpha), ("disparity", self.disparity)):
            if not torch.isfinite(given).all():
                raise ValueError(f"`{name}` holds NaN or infinite values; give finite values in [0, 1].")

    @property
    def num_frames(self) -> int:
        """Frames including both references."""
        return self.rgb.shape[0]


@dataclass(frozen=True)
class EnhancedClip:
    """The same frames as the prior would have them."""

    rgb: Float[Tensor, "t 3 h w"]
    """sRGB in [0, 1]. Frames 0 and t-1 stand for the references; use the photographs themselves there."""
