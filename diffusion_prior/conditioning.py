"""Frames into what the networks take: latents, image embeddings, micro-conditions, decoder conditions.

The only place where colours change between [0, 1] (outside) and [-1, 1] (inside the networks).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffusion_prior.types import WARP_CHANNELS

if TYPE_CHECKING:
    from diffusers import AutoencoderKLTemporalDecoder
    from transformers import CLIPVisionModelWithProjection
else:  # so that `normalised_disparity` and its like come without seconds of imports
    AutoencoderKLTemporalDecoder = CLIPVisionModelWithProjection = nn.Module

NEAR_QUANTILE = 0.02
"""Share of the well-covered pixels that lie in front of a frame's near depth."""
SOLID_ALPHA = 0.5
"""Pixels with more accumulated opacity than this decide the near depth."""
SEEN_ALPHA = 0.05
"""Pixels with less accumulated opacity than this have no disparity."""

MIN_POSE_BASELINE = 1e-2
"""Floor of the length that the pose-conditioned layout divides translations by, in the units of the poses."""
LENS_CONDITIONS = 3
"""How many of the 22 numbers of the pose-conditioned layout tell the field of view; the last ones."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Normalisation of OpenAI's CLIP image encoders, and of SVD's feature extractor."""


@dataclass(frozen=True)
class LatentCondition:
    """What the UNet is told about a batch of clips."""

    latents: Float[Tensor, "b f c h w"]
    """Latents of the condition frames, unscaled (as SVD concatenates them)."""
    extra: Float[Tensor, "b f e h w"]
    """Opacity and disparity at latent size; e = 0 where the UNet takes none."""
    embeddings: Float[Tensor, "b f 1 d"]
    """One CLIP image embedding per frame."""
    micro: Float[Tensor, "b *f m"]
    """Layout B [b 3]: `micro_conditions`. Layout A [b f 22]: `pose_conditions`."""

    def unconditional(self) -> LatentCondition:
        """Everything zero but the micro-conditions, which SVD keeps: the other branch of classifier-free guidance."""
        return replace(
            self,
            latents=torch.zeros_like(self.latents),
            extra=torch.zeros_like(self.extra),
            embeddings=torch.zeros_like(self.embeddings),
        )

    def frames(self, index: Int[Tensor, " t"]) -> LatentCondition:
        """The same condition for some of the frames."""
        return LatentCondition(
            latents=self.latents[:, index],
            extra=self.extra[:, index],
            embeddings=self.embeddings[:, index],
            micro=self.micro if self.micro.ndim == 2 else self.micro[:, index],
        )


def to_signed(rgb: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """[0, 1] -> [-1, 1]."""
    return rgb * 2 - 1


def to_unit(signed: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """[-1, 1] -> [0, 1], not clamped."""
    return (signed + 1) / 2


def normalised_disparity(depth: Float[Tensor, "t 1 h w"], alpha: Float[Tensor, "t 1 h w"]) -> Float[Tensor, "t 1 h w"]:
    """Disparity in [0, 1], each frame by itself: clamp(near / depth, 0, 1) where something is seen, else 0.

    `near` is the 2 % quantile of the frame's depth where alpha > 0.5, of the whole frame where no pixel is so solid.
    Independent of the scene's scale.

    Args:
        depth: distance along the view axis in any unit, > 0 where something is seen.
        alpha: accumulated opacity, [0, 1].
    """
    frames = []
    for frame_depth, frame_alpha in zip(depth, alpha):
        solid = frame_depth[frame_alpha > SOLID_ALPHA]
        near = _quantile(solid if solid.numel() else frame_depth.flatten(), NEAR_QUANTILE)
        ratio = (near / frame_depth.clamp(min=torch.finfo(depth.dtype).tiny)).nan_to_num(0.0).clamp(0, 1)
        frames.append(torch.where(frame_alpha > SEEN_ALPHA, ratio, torch.zeros_like(ratio)))
    return torch.stack(frames)


def _quantile(values: Float[Tensor, " n"], share: float) -> Float[Tensor, ""]:
    """The value with `share` of the others below it (torch.quantile refuses more than 2^24 of them)."""
    rank = 1 + int(share * (values.numel() - 1))
    return values.kthvalue(rank).values


def pad_to_multiple(frames: Float[Tensor, "*b c h w"], multiple: int, at_least: int = 0) -> Float[Tensor, "*b c h2 w2"]:
    """Repeat the last row and column until height and width divide by `multiple` and are `at_least` so long."""
    height, width = frames.shape[-2:]
    rows, columns = (-(-max(side, at_least) // multiple) * multiple for side in (height, width))
    row = torch.arange(rows, device=frames.device).clamp(max=height - 1)
    column = torch.arange(columns, device=frames.device).clamp(max=width - 1)
    return frames[..., row[:, None], column]


def encode_frames(
    vae: AutoencoderKLTemporalDecoder, rgb: Float[Tensor, "*b 3 h w"], patch_size: int, at_once: int | None = None
) -> Float[Tensor, "*b c h2 w2"]:
    """Unscaled latents (the posterior's mode) of frames.

    Args:
        vae: whose encoder is used; it looks at every frame by itself.
        rgb: frames in [0, 1] whose sides divide by the whole factor.
        patch_size: pixels that the prior's pixel unshuffling puts into channels, along each side.
        at_once: most frames that are encoded together, for less memory; None for all of them.
    """
    frames = rgb.reshape(-1, *rgb.shape[-3:])
    parts = []
    for part in frames.split(at_once or len(frames)):
        pixels = F.pixel_unshuffle(to_signed(part).to(vae.dtype), patch_size)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        parts.append(vae.encode(pixels).latent_dist.mode())  # pyright: ignore[reportAttributeAccessIssue]  # diffusers' union
    latents = torch.cat(parts)
    return latents.reshape(*rgb.shape[:-3], *latents.shape[1:]).to(rgb.dtype)


def embed_frames(
    image_encoder: CLIPVisionModelWithProjection, rgb: Float[Tensor, "*b 3 h w"]
) -> Float[Tensor, "*b 1 d"]:
    """CLIP image embedding of every frame in [0, 1]; differentiable."""
    side = encoder_side(image_encoder)
    pixels = rgb.reshape(-1, *rgb.shape[-3:])
    pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    mean = torch.tensor(CLIP_MEAN, dtype=pixels.dtype, device=pixels.device)[:, None, None]
    std = torch.tensor(CLIP_STD, dtype=pixels.dtype, device=pixels.device)[:, None, None]
    embeds = image_encoder(pixel_values=((pixels - mean) / std).to(image_encoder.dtype)).image_embeds
    return embeds.reshape(*rgb.shape[:-3], 1, -1).to(rgb.dtype)


def encoder_side(image_encoder: CLIPVisionModelWithProjection) -> int:
    """Height and width in pixels of what the image encoder takes: whole frames are squeezed into this square."""
    return image_encoder.config.image_size  # pyright: ignore[reportReturnType]  # one number in CLIP


def latent_extras(
    alpha: Float[Tensor, "*b 1 h w"], disparity: Float[Tensor, "*b 1 h w"], factor: int
) -> Float[Tensor, "*b 2 h2 w2"]:
    """Opacity and disparity averaged over the pixels of each latent."""
    both = torch.cat([alpha, disparity], dim=-3)
    pooled = F.avg_pool2d(both.reshape(-1, *both.shape[-3:]), factor)
    return pooled.reshape(*both.shape[:-3], *pooled.shape[1:])


def micro_conditions(
    fps: float, motion_bucket: float, noise_augmentation: float, batch: int, device: torch.device | str
) -> Float[Tensor, "b 3"]:
    """SVD's three numbers per clip. SVD was trained on fps - 1, which is what enters."""
    return torch.tensor([[fps - 1, motion_bucket, noise_augmentation]], device=device).repeat(batch, 1)


def decoder_condition(
    rgb: Float[Tensor, "*b t 3 h w"],
    alpha: Float[Tensor, "*b t 1 h w"],
    disparity: Float[Tensor, "*b t 1 h w"],
    warped: Float[Tensor, "*b t warps h w"] | None = None,
) -> Float[Tensor, "*b t condition h w"]:
    """What the STD sees of a clip: every frame's render, opacity and disparity, both references unaligned, and warps.

    Args:
        rgb: frames in [0, 1] whose first and last are the reference photographs.
        alpha: opacity in [0, 1].
        disparity: `normalised_disparity`.
        warped: `ConditionClip.warped`; None for an STD that takes none.

    Returns:
        11 channels, and 4 more for each warped reference: its colours in [-1, 1], 0 where it is not seen, and `seen`.
    """
    signed = to_signed(rgb)
    frames = rgb.shape[-4]
    first, last = (repeat(signed[..., at, :, :, :], "... c h w -> ... t c h w", t=frames) for at in (0, -1))
    parts = [signed, alpha, disparity, first, last]
    if warped is not None and warped.shape[-3]:
        for warp in warped.split(WARP_CHANNELS, dim=-3):
            seen = warp[..., 3:, :, :]
            parts += [to_signed(warp[..., :3, :, :]) * seen, seen]
    return torch.cat(parts, dim=-3)


def pose_conditions(
    camera_to_world: Float[Tensor, "t 3 4"], fov_x_rad: float, micro: Float[Tensor, " 3"]
) -> Float[Tensor, "t 22"]:
    """The 22 numbers per frame of the pose-conditioned layout (A).

    fps, motion bucket, noise augmentation; the 16 of inv(camera_to_world_i) @ camera_to_world_0 with translations
    divided by the longest of them (at least 0.01); the horizontal field of view, its sine and its cosine.

    Args:
        camera_to_world: rigid poses, OpenCV axes.
        fov_x_rad: horizontal field of view.
        micro: fps, motion bucket and noise augmentation.
    """
    frames = len(camera_to_world)
    bottom = torch.tensor([0.0, 0.0, 0.0, 1.0]).to(camera_to_world).expand(frames, 1, 4)
    matrices = torch.cat([camera_to_world, bottom], dim=1)
    relative = torch.linalg.inv(matrices) @ matrices[0]
    relative[:, :3, 3] /= relative[:, :3, 3].norm(dim=-1).max().clamp(min=MIN_POSE_BASELINE)
    lens = _lens(torch.tensor(fov_x_rad).to(camera_to_world))
    return torch.cat([micro.expand(frames, 3), rearrange(relative, "t i j -> t (i j)"), lens.expand(frames, 3)], dim=-1)


def narrow_pose_conditions(told: Float[Tensor, "*b 22"], part: int, whole: int) -> Float[Tensor, "*b 22"]:
    """`pose_conditions` of some columns of the pictures: their field of view, and everything else as it is.

    Args:
        told: of the whole pictures.
        part: how many columns, wherever they lie.
        whole: how many columns the pictures have, in the same unit.
    """
    rest, fov = told[..., :-LENS_CONDITIONS], told[..., -LENS_CONDITIONS]
    return torch.cat([rest, _lens(fov_of_columns(fov, part, whole))], dim=-1)


def fov_of_columns(fov_x_rad: Float[Tensor, "*b"], part: int, whole: int) -> Float[Tensor, "*b"]:
    """Horizontal field of view, in radians, that pictures with another number of columns at the same focal length have.

    2 atan(tan(fov / 2) part / whole): where the columns lie in the picture is not in it.

    Args:
        fov_x_rad: of pictures with `whole` columns.
        part: number of columns asked for; more than `whole` where a picture is padded.
        whole: number of columns, in the same unit.
    """
    return 2 * torch.atan(torch.tan(fov_x_rad / 2) * part / whole)


def _lens(fov_x_rad: Float[Tensor, "*b"]) -> Float[Tensor, "*b 3"]:
    return torch.stack([fov_x_rad, fov_x_rad.sin(), fov_x_rad.cos()], dim=-1)
