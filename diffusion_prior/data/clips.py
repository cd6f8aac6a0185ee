"""Training clips from paired data: a reference photograph at each end, cameras of the gap between, always the same for the same step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Float32, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from diffusion_prior.axes import flip_camera_axes
from diffusion_prior.conditioning import fov_of_columns
from diffusion_prior.data.pairs import RunHeader, find_runs, read_header, read_rows
from diffusion_prior.types import WARP_CHANNELS

OPAQUE = 255
PICTURES = ("rgb", "alpha", "disparity", "warped", "target")
VALIDATION_SHARE = 12
"""One scene in this many is held out where no validation scenes are named."""


@dataclass(frozen=True)
class Gap:
    """The cameras of one run which lie between two neighbouring references."""

    header: RunHeader
    before: int
    after: int
    frames: tuple[int, ...]
    """Rows of the run in capture order."""


@dataclass(frozen=True)
class ClipBatch:
    """Clips as they are stored: what the prior is given, and what it should make of it."""

    rgb: UInt8[Tensor, "b t 3 h w"]
    """Renders; frames 0 and t-1 are the reference photographs. 255 = 1, as in all fields."""
    alpha: UInt8[Tensor, "b t 1 h w"]
    """Accumulated opacity; opaque at the references."""
    disparity: UInt8[Tensor, "b t 1 h w"]
    """Normalised disparity of the render, at the references too."""
    warped: UInt8[Tensor, "b t warps h w"]
    """References through the rendered depth, see `ConditionClip.warped`; the ends are warped onto themselves alone."""
    target: UInt8[Tensor, "b t 3 h w"]
    """Photographs of all frames."""
    thumbnail: UInt8[Tensor, "b t 3 s s"]
    """`rgb` as whole frames before any crop, squeezed into a small square: what the image encoder looks at."""
    camera_to_world: Float32[Tensor, "b t 3 4"]
    """OpenCV axes, the scene's world units; stored with OpenGL axes and turned by `read_cameras`."""
    fov_x_rad: Float32[Tensor, " b"]
    """Horizontal field of view of the (cropped) pictures in radians, 2 atan(width / (2 fx)): where a crop lies in its picture
    is not in it."""


@dataclass
class ClipConfig:
    """Which clips are drawn, and how they are varied."""

    num_frames: int = 4
    """Frames of a clip, both references included."""
    batch_size: int = 8
    """Clips of a batch; they are of one picture size."""
    crop_px: int | None = 160
    """Side of the square cut out of every clip; a shorter side of the picture stays as it is. None keeps whole pictures."""
    size_multiple: int = 16
    """Height and width are cut to multiples of this."""
    flip: bool = True
    """Mirror half of the clips left to right."""
    permute_channels: bool = True
    """Exchange red, green and blue in half of the clips."""
    swap_references: bool = True
    """Play half of the clips backwards."""
    good_render_probability: float = 0.15
    """Share of clips in which patches of the renders are drawn towards the photographs: such patches are to be left alone."""
    thumbnail_px: int = 64
    """Side of the whole frames that go along with a crop, for the image encoder. The trainings set it to the size that the
    encoder of their prior takes (64 bundled, 224 for Stable Video Diffusion), as it sees whole frames afterwards."""

    def __post_init__(self) -> None:
        if self.num_frames < 3:
            raise ValueError(f"num_frames must be at least 3 (two references and a render), got {self.num_frames}.")
        if self.thumbnail_px < 1:
            raise ValueError(f"thumbnail_px must be at least 1, got {self.thumbnail_px}.")


class ClipDataset(Dataset[ClipBatch]):
    """Batches by training step: item `i` depends on the data, the settings, the seed and `i` alone.

    So a run resumed at a step sees the batches it would have seen, and process `rank` of `world_size` reads others than its neighbours.
    """

    def __init__(
        self, gaps: Sequence[Gap], config: ClipConfig, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        """Keep what is drawn from, sorted by the size of its crops.

        Args:
            gaps: what is drawn from, see `find_gaps`.
            config: shape and variation of clips.
            seed: another seed gives other batches.
            rank: number of this process.
            world_size: how many processes draw.

        Raises:
            ValueError: if there is nothing to draw.
        """
        if not gaps:
            raise ValueError("no clips to draw: the paired data has no camera between two references.")
        self.config = config
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._by_size: dict[tuple[int, int], list[Gap]] = {}
        for gap in gaps:
            self._by_size.setdefault(crop_size(gap.header, config), []).append(gap)
        self._sizes = sorted(self._by_size)
        self._weights = {size: _gap_weights(self._by_size[size]) for size in self._sizes}

    def __getitem__(self, step: int) -> ClipBatch:
        """The batch of one step."""
        generator = step_generator(self._seed, step * self._world_size + self._rank)
        size = self._sizes[_draw(torch.tensor([self._weights[size].sum() for size in self._sizes]), generator)]
        gaps, weights = self._by_size[size], self._weights[size]
        clips = [
            augment(self._read(gap, generator), size, self.config, generator)
            for gap in (gaps[_draw(weights, generator)] for _ in range(self.config.batch_size))
        ]
        return collate(clips)

    def _read(self, gap: Gap, generator: torch.Generator) -> ClipBatch:
        return read_clip(gap, pick_frames(gap, self.config.num_frames, generator), self.config.thumbnail_px)


def find_gaps(root: Path, scenes: Iterable[str] | None = None) -> list[Gap]:
    """Every gap between two neighbouring references in the runs below a root folder.

    Args:
        root: folder of paired data.
        scenes: only these; all by default.

    Raises:
        FileNotFoundError: if there is no paired data.
    """
    wanted = None if scenes is None else set(scenes)
    headers = (read_header(folder) for folder in find_runs(root))
    return [gap for header in headers if wanted is None or header.scene in wanted for gap in gaps_of(header)]


def gaps_of(header: RunHeader) -> list[Gap]:
    """The gaps of one run, in capture order."""
    rows: dict[tuple[int, int], list[int]] = {}
    for row, ends in enumerate(zip(header.before.tolist(), header.after.tolist(), strict=True)):
        rows.setdefault(ends, []).append(row)
    return [Gap(header, before, after, tuple(frames)) for (before, after), frames in sorted(rows.items())]


def split_scenes(
    root: Path, validation_scenes: Sequence[str] = (), train_elsewhere: bool = False
) -> tuple[list[str], list[str]]:
    """Which scenes train and which validate.

    Args:
        root: folder of paired data.
        validation_scenes: names; if empty, one scene in twelve, evenly over the sorted names. A single scene serves as both.
        train_elsewhere: the scenes that train need not be there.

    Raises:
        ValueError: if a named scene is not there, or none is left to train on.
    """
    scenes = sorted({folder.parent.name for folder in find_runs(root)})
    unknown = sorted(set(validation_scenes) - set(scenes))
    if unknown:
        raise ValueError(f"validation scenes {unknown} are not in {root}; it has {scenes}.")
    if len(scenes) == 1:
        return scenes, scenes
    held_out = set(validation_scenes) or set(scenes[VALIDATION_SHARE // 2 :: VALIDATION_SHARE]) or {scenes[-1]}
    training = [scene for scene in scenes if scene not in held_out]
    if not training and not train_elsewhere:
        raise ValueError(f"all scenes of {root} are validation scenes; leave at least one to train on.")
    return training, sorted(held_out)


def pick_frames(gap: Gap, num_frames: int, generator: torch.Generator) -> list[int]:
    """One random row from each of `num_frames - 2` equal parts of the gap, in order; a short gap repeats rows."""
    parts = num_frames - 2
    position = (torch.arange(parts) + torch.rand(parts, generator=generator)) * len(gap.frames) / parts
    return [gap.frames[i] for i in position.long().clamp(max=len(gap.frames) - 1).tolist()]


def spread_frames(gap: Gap, num_frames: int) -> list[int]:
    """Rows evenly spread over the gap, in order: the same for validation every time."""
    parts = num_frames - 2
    position = (torch.arange(parts) + 0.5) * len(gap.frames) / parts
    return [gap.frames[i] for i in position.long().tolist()]


def read_clip(gap: Gap, frames: Sequence[int], thumbnail_px: int) -> ClipBatch:
    """A batch of one whole clip: the reference before, the frames of these rows, the reference after; and its thumbnails."""
    wanted: dict[str, Sequence[int]] = {name: frames for name in PICTURES if name != "rgb"} | {"render": frames}
    wanted |= {name: [gap.before, gap.after] for name in ("references", "reference_disparity")}
    rows = read_rows(gap.header.folder, wanted)
    first, last = rows["references"].split(1)
    first_disparity, last_disparity = rows["reference_disparity"].split(1)
    opaque = torch.full_like(first_disparity, OPAQUE)
    rgb = torch.cat([first, rows["render"], last])
    clip = (
        rgb,
        torch.cat([opaque, rows["alpha"], opaque]),
        torch.cat([first_disparity, rows["disparity"], last_disparity]),
        torch.cat(
            [_warped_onto_itself(first, rows["warped"]), rows["warped"], _warped_onto_itself(last, rows["warped"])]
        ),
        torch.cat([first, rows["target"], last]),
        thumbnails(rgb, thumbnail_px),
    )
    camera_to_world, fov_x_rad = read_cameras(gap, frames)
    return ClipBatch(
        *(rearrange(frames_of, "t c h w -> 1 t c h w") for frames_of in clip),
        camera_to_world=camera_to_world,
        fov_x_rad=fov_x_rad,
    )


def read_cameras(gap: Gap, frames: Sequence[int]) -> tuple[Float32[Tensor, "1 t 3 4"], Float32[Tensor, " 1"]]:
    """Camera-to-world matrices (OpenCV axes) of the frames of `read_clip`, and the first render's horizontal field of view."""
    ends = [gap.before, gap.after]
    wanted = {"camera_to_world": frames, "reference_camera_to_world": ends, "intrinsics": frames[:1]}
    rows = read_rows(gap.header.folder, wanted)
    first, last = rows["reference_camera_to_world"].split(1)
    poses = flip_camera_axes(torch.cat([first, rows["camera_to_world"], last]))
    fx = rows["intrinsics"][:, 0]
    return rearrange(poses, "t i j -> 1 t i j"), 2 * torch.atan(gap.header.width / (2 * fx))


def _warped_onto_itself(reference: UInt8[Tensor, "1 3 h w"], like: UInt8[Tensor, "t warps h w"]) -> Tensor:
    """A reference is fully seen by itself, and no other is looked for."""
    warped = torch.zeros_like(like[:1])
    warped[:, :3], warped[:, 3] = reference, OPAQUE
    return warped


def thumbnails(rgb: UInt8[Tensor, "*b 3 h w"], side: int) -> UInt8[Tensor, "*b 3 s s"]:
    """Whole frames squeezed into squares of a side in pixels, as `conditioning.embed_frames` does with floats."""
    flat = rgb.reshape(-1, *rgb.shape[-3:])
    size = (side, side)
    return F.interpolate(flat, size, mode="bilinear", antialias=True, align_corners=False).reshape(
        *rgb.shape[:-2], *size
    )


def validation_clips(
    gaps: Sequence[Gap], count: int, num_frames: int, size_multiple: int, thumbnail_px: int
) -> list[ClipBatch]:
    """Fixed whole clips, evenly spread over the gaps, cut to a multiple of a size."""
    chosen = [gaps[i * len(gaps) // count] for i in range(min(count, len(gaps)))]
    whole = ClipConfig(num_frames=num_frames, crop_px=None, size_multiple=size_multiple)
    clips = [read_clip(gap, spread_frames(gap, num_frames), thumbnail_px) for gap in chosen]
    return [cut(clip, crop_size(gap.header, whole), 0, 0) for clip, gap in zip(clips, chosen)]


def crop_size(header: RunHeader, config: ClipConfig) -> tuple[int, int]:
    """Height and width of the clips drawn from a run.

    Raises:
        ValueError: if its pictures are smaller than the multiple.
    """
    longest = config.crop_px or max(header.height, header.width)
    height, width = (
        min(longest, side) // config.size_multiple * config.size_multiple for side in (header.height, header.width)
    )
    if height == 0 or width == 0:
        raise ValueError(
            f"{header.folder} has pictures of {header.height} x {header.width} pixels, smaller than the multiple of "
            f"{config.size_multiple} that the networks need; make its pairs larger."
        )
    return height, width


def cut(clip: ClipBatch, size: tuple[int, int], top: int, left: int) -> ClipBatch:
    """The rectangle of a size at an offset, the same in every frame, and its field of view; thumbnails stay whole."""
    rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
    fov = fov_of_columns(clip.fov_x_rad, size[1], clip.rgb.shape[-1])
    return replace(_changed(clip, PICTURES, lambda frames: frames[..., rows, columns]), fov_x_rad=fov)


def mirror(clip: ClipBatch) -> ClipBatch:
    """Left and right exchanged, in pictures and poses: what cameras see of the scene's mirror image."""
    mirrored = _changed(clip, (*PICTURES, "thumbnail"), lambda frames: frames.flip(-1))
    return replace(mirrored, camera_to_world=mirror_poses(clip.camera_to_world))


def mirror_poses(camera_to_world: Float[Tensor, "*b 3 4"]) -> Float[Tensor, "*b 3 4"]:
    """Poses of cameras that see of the mirrored world (x -> -x) what the given ones see of the world, mirrored.

    S [R | t] S with S = diag(-1, 1, 1): world and camera are both reflected, so that R stays a rotation. Poses relative to
    each other do not depend on which plane of the world is the mirror.
    """
    return camera_to_world * camera_to_world.new_tensor([[1, -1, -1, -1], [-1, 1, 1, 1], [-1, 1, 1, 1]])


def augment(clip: ClipBatch, size: tuple[int, int], config: ClipConfig, generator: torch.Generator) -> ClipBatch:
    """Good patches, random crop, mirroring, direction and channel order, the same in all frames of the clip."""
    if float(torch.rand((), generator=generator)) < config.good_render_probability:
        clip = with_good_patches(clip, generator)
    height, width = clip.rgb.shape[-2:]
    top, left = _below(height - size[0] + 1, generator), _below(width - size[1] + 1, generator)
    clip = cut(clip, size, top, left)
    if config.flip and _below(2, generator):
        clip = mirror(clip)
    if config.swap_references and _below(2, generator):
        clip = _changed(clip, (*PICTURES, "thumbnail", "camera_to_world"), lambda frames: frames.flip(1))
    if config.permute_channels and _below(2, generator):
        order = torch.randperm(3, generator=generator)
        clip = _changed(clip, ("rgb", "target", "thumbnail"), lambda frames: frames[:, :, order])
        warps = torch.arange(clip.warped.shape[2]).unflatten(0, (-1, WARP_CHANNELS))
        warps[:, :3] = warps[:, order]
        clip = _changed(clip, ("warped",), lambda frames: frames[:, :, warps.flatten()])
    return clip


def with_good_patches(clip: ClipBatch, generator: torch.Generator) -> ClipBatch:
    """Draw smooth patches of the renders towards the photographs, as if the splats were right there."""
    batch, frames, _, height, width = clip.rgb.shape
    coarse = torch.rand(batch * frames, 1, 4, 4, generator=generator) * 3 - 1
    share = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False).clamp(0, 1)
    share = rearrange(share, "(b t) c h w -> b t c h w", b=batch)
    rgb = (clip.rgb + share * (clip.target.float() - clip.rgb.float())).round().to(torch.uint8)
    alpha = torch.maximum(clip.alpha.float(), share * OPAQUE).round().to(torch.uint8)
    return replace(clip, rgb=rgb, alpha=alpha, thumbnail=thumbnails(rgb, clip.thumbnail.shape[-1]))


def collate(clips: Sequence[ClipBatch]) -> ClipBatch:
    """Clips of one size as one batch."""
    return ClipBatch(
        **{
            entry.name: torch.cat([getattr(clip, entry.name) for clip in clips]).contiguous()
            for entry in fields(ClipBatch)
        }
    )


def to_float(frames: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Stored bytes as [0, 1]."""
    return frames.float() / OPAQUE


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator for one step of one run: no state has to be saved for a resumed run to draw the same."""
    mixed = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(1 << 62, (), generator=mixed))
    return torch.Generator().manual_seed((offset + step * 0x9E3779B97F4A7C15) % (1 << 63))


def _changed(clip: ClipBatch, names: Sequence[str], change: Callable[[Tensor], Tensor]) -> ClipBatch:
    return replace(clip, **{name: change(getattr(clip, name)) for name in names})


def _gap_weights(gaps: Sequence[Gap]) -> Tensor:
    """Scenes count by the square root of their frames, runs of a scene equally, gaps of a run by their frames."""
    runs: dict[Path, int] = {}
    largest: dict[str, int] = {}
    run_count: dict[str, int] = {}
    for gap in gaps:
        folder, scene = gap.header.folder, gap.header.scene
        if folder not in runs:
            runs[folder] = gap.header.num_frames
            run_count[scene] = run_count.get(scene, 0) + 1
            largest[scene] = max(largest.get(scene, 0), gap.header.num_frames)
    return torch.tensor(
        [
            largest[gap.header.scene] ** 0.5 / run_count[gap.header.scene] * len(gap.frames) / runs[gap.header.folder]
            for gap in gaps
        ],
        dtype=torch.float64,
    )


def _draw(weights: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(weights.double(), 1, generator=generator))


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))
