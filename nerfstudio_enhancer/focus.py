"""Where the optical axes of several cameras meet, if they do; pure geometry."""

import torch
from jaxtyping import Float
from torch import Tensor

MIN_SPREAD_OF_AXES = 1e-3
"""Smallest eigenvalue, per camera, of the system to solve: two axes less than 3.6 degrees apart count as parallel."""


def focus_of_axes(
    centres: Float[Tensor, "k 3"], forward: Float[Tensor, "k 3"], max_gap: float = 0.5
) -> Float[Tensor, "3"] | None:
    """Point nearest to all optical axes (least squares), or None where they do not meet.

    They meet if they are not nearly parallel, the point lies before every camera, and it misses the axes by at most
    `max_gap` of the distance to the cameras, in the mean.

    Args:
        centres: camera centres.
        forward: unit viewing directions.
        max_gap: largest mean distance from the axes relative to the mean distance from the cameras.
    """
    across = torch.eye(3, dtype=centres.dtype, device=centres.device) - forward[:, :, None] * forward[:, None, :]
    system = across.sum(dim=0)
    if torch.linalg.eigvalsh(system)[0] < MIN_SPREAD_OF_AXES * len(centres):
        return None
    focus = torch.linalg.solve(system, torch.einsum("kij,kj->i", across, centres))
    to_focus = focus - centres
    ahead = (to_focus * forward).sum(dim=1)
    gap = torch.einsum("kij,kj->ki", across, to_focus).norm(dim=1).mean()
    if (ahead <= 0).any() or gap > max_gap * to_focus.norm(dim=1).mean():
        return None
    return focus
