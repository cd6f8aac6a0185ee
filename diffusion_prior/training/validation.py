"""How the trainings judge themselves: fixed clips, the render itself as control, contact sheets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from diffusion_prior.data.clips import ClipBatch, to_float
from diffusion_prior.perceptual import lpips_alex
from diffusion_prior.training.objectives import psnr
from diffusion_prior.types import ConditionClip

SHEET_WIDTH_PX = 200
"""Width of one picture on a contact sheet."""
SHEET_ROWS = 8


def condition_clip(clip: ClipBatch) -> ConditionClip:
    """The condition of a batch of one clip."""
    return ConditionClip(
        rgb=to_float(clip.rgb[0]),
        alpha=to_float(clip.alpha[0]),
        disparity=to_float(clip.disparity[0]),
        warped=to_float(clip.warped[0]),
        camera_to_world=clip.camera_to_world[0],
        fov_x_rad=float(clip.fov_x_rad[0]),
    )


def judge(
    clips: Sequence[ClipBatch], predictors: dict[str, Callable[[ClipBatch, int], Float[Tensor, "t 3 h w"]]]
) -> tuple[dict[str, float], Float[Tensor, "3 h w"]]:
    """Compare predicted frames with the photographs, on the frames between the references.

    Args:
        clips: batches of one whole clip each.
        predictors: name -> frames in [0, 1] of a clip (given with its number); the render is judged beside them.

    Returns:
        `<name>/psnr` and `<name>/lpips` (means), and a contact sheet: a row is render | predictions | photograph.
    """
    scores: dict[str, list[Tensor]] = {}
    rows = []
    for number, clip in enumerate(clips):
        target = to_float(clip.target[0])
        pictures = {"render": to_float(clip.rgb[0])}
        pictures |= {name: predict(clip, number).float().clamp(0, 1) for name, predict in predictors.items()}
        for name, frames in pictures.items():
            middle, truth = frames[1:-1], target[1:-1]
            with torch.autocast(device_type=middle.device.type, enabled=False):
                scores.setdefault(f"{name}/psnr", []).append(psnr(middle, truth))
                scores.setdefault(f"{name}/lpips", []).append(lpips_alex(middle, truth))
        if len(rows) < SHEET_ROWS:
            at = target.shape[0] // 2
            rows.append([frames[at] for frames in pictures.values()] + [target[at]])
    return {name: float(torch.cat(values).mean()) for name, values in scores.items()}, contact_sheet(rows)


def contact_sheet(rows: Sequence[Sequence[Float[Tensor, "3 _ _"]]]) -> Float[Tensor, "3 h w"]:
    """Pictures in rows, each scaled to one width."""
    lines = [torch.cat([_scaled(picture) for picture in row], dim=-1) for row in rows]
    return torch.cat(lines, dim=-2)


def _scaled(picture: Float[Tensor, "3 _ _"]) -> Float[Tensor, "3 h w"]:
    height = round(picture.shape[-2] * SHEET_WIDTH_PX / picture.shape[-1])
    batch = rearrange(picture, "c h w -> 1 c h w")
    return F.interpolate(batch, (height, SHEET_WIDTH_PX), mode="bilinear", antialias=True, align_corners=False)[0]
