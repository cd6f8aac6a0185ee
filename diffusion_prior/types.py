"""What passes into and out of the video prior."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

WARP_CHANNELS = 4
"""Channels of one warped reference: r, g, b and how well it is seen."""


@dataclass(frozen=True)
class ConditionClip:
    """Rendered frames along one camera path, with a reference photograph at each end."""

    rgb: Float[Tensor, "t 3 h w"]
    """sRGB in [0, 1]. Frames 0 and t-1 are reference photographs, the others are renders."""
    alpha: Float[Tensor, "t 1 h w"]
    """Accumulated opacity in [0, 1]; 1 at the references."""
    disparity: Float[Tensor, "t 1 h w"]
    """`conditioning.normalised_disparity` in [0, 1]; 0 where nothing is seen. At the references: that of the render there."""
    warped: Float[Tensor, "t warps h w"] | None = None
    """Reference photographs as the frame's camera would see them through the rendered depth, best first: for each r, g, b
    in [0, 1] and `seen` in [0, 1], 0 where the reference does not see what the frame shows (r = g = b = 0 there). None
    where they are not known: priors that take them go without."""
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
        if self.warped is not None:
            _check_warped(self.warped, (frames, height, width))
        pictures = (("rgb", self.rgb), ("alpha", self.alpha), ("disparity", self.disparity), ("warped", self.warped))
        for name, given in pictures:
            if given is not None and not torch.isfinite(given).all():
                raise ValueError(f"`{name}` holds NaN or infinite values; give finite values in [0, 1].")

    @property
    def num_frames(self) -> int:
        """Frames including both references."""
        return self.rgb.shape[0]

    def between(self, frames: range) -> ConditionClip:
        """The same clip with these of its frames alone between its two references.

        Args:
            frames: indices in this clip, neither 0 nor t-1.
        """
        index = [0, *frames, self.num_frames - 1]
        names = ("rgb", "alpha", "disparity", "warped", "camera_to_world")
        kept = {name: getattr(self, name) for name in names}
        return replace(self, **{name: None if given is None else given[index] for name, given in kept.items()})

    def warps(self, count: int) -> Float[Tensor, "t warps h w"]:
        """The best `count` warped references; those that the clip lacks are seen nowhere."""
        frames, _, height, width = self.rgb.shape
        channels = WARP_CHANNELS * count
        taken = self.rgb.new_zeros(frames, channels, height, width)
        if self.warped is not None:
            given = self.warped[:, :channels]
            taken[:, : given.shape[1]] = given.to(taken)
        return taken


def _check_warped(warped: Tensor, wanted: tuple[int, int, int]) -> None:
    frames, channels, height, width = warped.shape
    if (frames, height, width) != wanted or channels % WARP_CHANNELS or channels == 0:
        raise ValueError(
            f"`warped` must hold {WARP_CHANNELS} channels (r, g, b, seen) for each warped reference, frames, height and "
            f"width {wanted} as `rgb`, got {tuple(warped.shape)}."
        )


@dataclass(frozen=True)
class EnhancedClip:
    """The same frames as the prior would have them."""

    rgb: Float[Tensor, "t 3 h w"]
    """sRGB in [0, 1]. Frames 0 and t-1 stand for the references; use the photographs themselves there."""
