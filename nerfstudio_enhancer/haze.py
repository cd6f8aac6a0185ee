"""Haze of finished splats: what is seen from behind, or from so near that it covers the view, fades.

Nothing tells how far away lies what one photograph alone sees. Its background may hang in the air on the other side of the scene,
right in front of a camera there. Real surfaces are looked at from where they are open to view, so that a splat which a camera
sees from behind is such haze, or the back of a wall that hides what is shown. And what is as large as its distance hides all
else, where the photographs that it was made for show other things before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nerfstudio_enhancer.losses import DEPTH_FLOOR

if TYPE_CHECKING:
    from nerfstudio_enhancer.model import EnhancerModel

LEAST_PIXELS = 0.05
"""A reference sees no Gaussian that makes up less than so many of its pixels."""
LEAST_OF_BEST = 0.1
"""Nor one that makes up less than this share of what it does in the reference that sees it best."""
BACK_COS, FRONT_COS = -0.5, 0.5
"""Cosines of the angles between a camera and the nearest reference, seen from the Gaussian, at which it has faded (120 degrees)
and up to which it shows in full (60 degrees)."""
LEAST_VEIL, WHOLE_VEIL = 1 / 3, 2 / 3
"""Second largest standard deviation of a Gaussian over its distance from the camera up to which it shows in full and from which
on it has faded: a sheet of this size covers the view."""


def veil_share(scales: Float[Tensor, "n 3"], distance: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """What the sheets that would cover a view keep of their opacity, in [0, 1].

    Args:
        scales: standard deviations of the Gaussians, world units.
        distance: of their means from the camera, world units.
    """
    size = scales.median(dim=-1).values / distance.clamp(min=DEPTH_FLOOR)
    return ((WHOLE_VEIL - size) / (WHOLE_VEIL - LEAST_VEIL)).clamp(0, 1)


@dataclass(frozen=True)
class SeenFrom:
    """Which references see each Gaussian, and where they stand."""

    seen: Bool[Tensor, "k n"]
    centres: Float[Tensor, "k 3"]
    """Camera centres, world units."""

    @classmethod
    def of(cls, model: EnhancerModel, references: Cameras) -> SeenFrom:
        """Render every reference camera (shape [k]) to see what shows there."""
        pixels = torch.stack([model.pixels_of_each(references[index : index + 1]) for index in range(len(references))])
        best = pixels.max(dim=0, keepdim=True).values
        seen = pixels > torch.clamp(LEAST_OF_BEST * best, min=LEAST_PIXELS)
        return cls(seen, references.camera_to_worlds[:, :3, 3].to(pixels))

    def share(self, means: Float[Tensor, "n 3"], centre: Float[Tensor, "3"]) -> Float[Tensor, " n"]:
        """What a camera leaves of each Gaussian's opacity, in [0, 1]; 1 for those that no reference sees.

        Args:
            means: of the Gaussians, world units.
            centre: of the camera, world units.
        """
        towards = torch.nn.functional.normalize(centre - means, dim=-1)
        nearest = means.new_full((means.shape[0],), -1.0)
        for seen, reference in zip(self.seen, self.centres):
            cosine = (torch.nn.functional.normalize(reference - means, dim=-1) * towards).sum(-1)
            nearest = torch.where(seen, torch.maximum(nearest, cosine), nearest)
        share = ((nearest - BACK_COS) / (FRONT_COS - BACK_COS)).clamp(0, 1)
        return torch.where(self.seen.any(dim=0), share, torch.ones_like(share))
