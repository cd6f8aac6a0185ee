"""One round of the method as a function: render paths, repair them with the prior, weigh, hand over for storage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from diffusion_prior.conditioning import SOLID_ALPHA, normalised_disparity
from diffusion_prior.sampling_config import SamplingConfig
from diffusion_prior.types import WARP_CHANNELS, ConditionClip, EnhancedClip
from nerfstudio_enhancer.confidence import image_confidence, pixel_confidence, reference_agreement
from nerfstudio_enhancer.conventions import as_4x4, to_channels_first, to_channels_last, world_to_camera_opencv
from nerfstudio_enhancer.enhanced_views import EnhancedViews
from nerfstudio_enhancer.rendering import RenderedClip, render_clip, trajectory_cameras
from nerfstudio_enhancer.trajectory import TrajectoryConfig, plan_trajectories
from nerfstudio_enhancer.warping import WarpSources, frame_difference, warp_references

if TYPE_CHECKING:
    from nerfstudio_enhancer.model import EnhancerModel

Feed = Literal["enhanced", "renders", "mean-filled", "blurred", "photographs", "faultless"]

BLUR_SIGMA_SHARE = 0.01
"""Sigma of the control `blurred`, as a share of the image's longer side."""


@dataclass
class EnhanceConfig:
    """When rounds run, what they feed back and how it is weighed."""

    prior: str = "bundled"
    """Which prior repairs the frames: `bundled`, `none` (no rounds: plain training), a folder, or a hub name."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the prior is run: steps, scheduler, seed, picture size, precision, memory."""
    feed: Feed = "enhanced"
    """What a round feeds back. Anything but `enhanced` is a control of the benchmark: the un-enhanced renders, the renders
    with holes filled by the references' mean colour, blurred renders, (the oracle) real photographs that are neither
    reference nor test views, or (the ceiling of any prior on the same paths) what splats of all photographs but the test
    views show there."""
    start: int | None = None
    """Training step of the first round; None: after a third of the training."""
    every: int | None = None
    """Training steps between two rounds; None: a sixth of the training."""
    rounds: int = 1
    """Number of rounds; each replaces the enhanced views of the one before it."""
    diffusion_rounds: int | None = None
    """How many of the rounds sample and decode, the last ones; None: all. Those before them mend the large shapes of the renders
    only, in a part of the time, where the prior has a coarse repair."""
    ratio: float = 0.5
    """Probability that a batch is an enhanced view once a round has run, in [0, 1], where all views are needed in full."""
    unseen_range: tuple[float, float] = (0.2, 0.6)
    """Share of a view's pixels that no reference sees: up to the first number the view is not needed, from the second on in
    full, in between in part. So where references see what the paths show, they are what is trained on, and what of a path lies
    before the first view that is needed, or behind the last, is not repaired. (0, 0) needs all."""
    whole_paths: bool = False
    """Repair all of a path of which any view is needed, for priors that were trained on clips of one length."""
    lpips_weight: float = 0.05
    """Weight of LPIPS between splats and enhanced views; it forgives small shifts between views and costs time."""
    image_confidence: bool = True
    """Weigh enhanced views by their distance to the nearest reference view (farther = higher)."""
    pixel_confidence: bool = True
    """Weigh enhanced pixels by the size of the Gaussians that they show (larger = higher)."""
    confidence_floor: float = 0.5
    """Weight of the most certain view or pixel relative to the least certain one, in [0, 1)."""
    reference_agreement: bool = True
    """Enhanced pixels lose weight where they lie farther from what a reference shows there than the render does, and views
    with many such pixels are drawn less often."""
    trajectory: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    """Paths between and around the reference views."""
    warp_references: bool = True
    """Show the prior the references through the rendered depth, where it takes them."""
    repair_share: float = 0.4
    """Share of the prior's picture in the output `repaired` of finished splats, and in what evaluation measures as `repaired_*`
    beside the splats; the rest is the render. 0 repairs no render."""
    save_frames: bool = True
    """Write the frames and a contact sheet of each round as PNG under the run's folder."""

    @property
    def uses_prior(self) -> bool:
        """Whether a prior is set and what is fed back needs one."""
        return self.prior != "none" and self.feed == "enhanced"


@runtime_checkable
class Prior(Protocol):
    """Whatever repairs a clip."""

    def enhance(self, clip: ConditionClip, generator: torch.Generator) -> EnhancedClip: ...


@dataclass(frozen=True)
class References:
    """The reference views at training resolution, undistorted."""

    photographs: list[Float[Tensor, "_h _w 3"]]
    """sRGB in [0, 1]; sizes may differ. What is not usable has the mean colour of the rest."""
    cameras: Cameras
    """Shape [k]."""
    usable: list[Float[Tensor, "_h _w 1"]] | None = None
    """1 where a photograph may be used, 0 where a mask or transparency leaves it out; None: everywhere."""
    transparent: bool = False
    """Whether any photograph is transparent in part: what stands free is seen, and nothing is behind it."""


@dataclass(frozen=True)
class RoundClip:
    """One clip of a round with what it came from, for the contact sheet."""

    views: EnhancedViews
    rendered: Float[Tensor, "t h w 3"]
    frame_difference: tuple[float, float] | None
    """`warping.frame_difference` of what is fed back and of its renders; None for less than two frames."""
    fed: range
    """Which of the views are what is fed back, from the first to the last one that is needed; the others are the renders."""


def enhance_step(
    model: EnhancerModel,
    references: References,
    config: EnhanceConfig,
    prior: Prior | None,
    generator: torch.Generator,
    oracle: References | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    faultless: Callable[[Cameras], Float[Tensor, "t h w 3"]] | None = None,
) -> list[RoundClip]:
    """Make the enhanced views of one round. Only reference views shape it, except for the oracle.

    Args:
        model: the splats; their mode and parameters stay as they are.
        references: reference photographs and cameras.
        config: paths, feed and weights.
        prior: repairs the frames; needed for `feed="enhanced"` only.
        generator: draws paths and the prior's noise.
        oracle: real photographs at other poses, for `feed="photographs"` only.
        on_progress: called with (frames done, frames in all).
        faultless: frames [t h w 3] at cameras, for `feed="faultless"` only.

    Raises:
        ValueError: fewer than 2 reference views; a prior, an oracle or faultless frames that the feed needs are missing.
    """
    if config.feed == "photographs":
        if oracle is None or not oracle.photographs:
            raise ValueError(
                "feed='photographs' needs photographs that are neither reference nor test views; there are none. "
                "Use `--num-views` on a scene with more images."
            )
        clips = [_oracle_clip(model, oracle, index) for index in range(len(oracle.photographs))]
    else:
        if config.feed == "faultless" and faultless is None:
            raise ValueError("feed='faultless' needs `faultless`, which the rounds of a training give it; got None.")
        if config.feed == "enhanced" and prior is None:
            raise ValueError(
                "feed='enhanced' needs a prior, got prior='none'. Use `--pipeline.model.enhance.prior bundled`."
            )
        clips = _path_clips(model, references, config, prior, generator, on_progress, faultless)
    return _weigh(clips, references, config)


@dataclass(frozen=True)
class _UnweighedClip:
    rgb: Float[Tensor, "t h w 3"]
    rendered: RenderedClip
    cameras: Cameras
    need: Float[Tensor, " t"]
    agreement: Float[Tensor, "t h w 1"]
    differences: tuple[float, float] | None
    fed: range

    @classmethod
    def of(cls, rendered: RenderedClip, cameras: Cameras, need, fed: range, frames, agreement) -> _UnweighedClip:
        """One clip, kept in the CPU's memory: a round has many, and a GPU has its prior to hold.

        Args:
            rendered: the renders.
            cameras: theirs.
            need: of each of them.
            fed: those in whose place something is fed back; the others are not needed.
            frames: which is that.
            agreement: of that with the references.
        """
        at = slice(fed.start, fed.stop)
        rgb, agrees = rendered.rgb.clone(), torch.ones_like(rendered.alpha)
        rgb[at], agrees[at] = frames, agreement
        ours, renders = (
            frame_difference(shown[at], rendered.depth[at], rendered.alpha[at], cameras[at])
            for shown in (rgb, rendered.rgb)
        )
        differences = None if ours is None or renders is None else (ours, renders)
        need = need * agrees.mean(dim=(1, 2, 3)).cpu()
        return cls(rgb.cpu(), _each(rendered, Tensor.cpu), cameras, need, agrees.cpu(), differences, fed)


def _each(rendered: RenderedClip, change: Callable[[Tensor], Tensor]) -> RenderedClip:
    return RenderedClip(**{name: change(value) for name, value in vars(rendered).items()})


def _path_clips(model, references, config, prior, generator, on_progress, faultless) -> list[_UnweighedClip]:
    """Render each trajectory, and repair it if any of its views is needed; clips end on references, which are cut off."""
    trajectories = plan_trajectories(references.cameras.camera_to_worlds.cpu(), config.trajectory, generator)
    total = sum(trajectory.camera_to_world.shape[0] - 2 for trajectory in trajectories)
    sources = WarpSources.of(model, references)
    mean = mean_colour(references)
    inner = slice(1, -1)
    done = 0
    clips = []
    for trajectory in trajectories:
        first, last = trajectory.first, trajectory.last
        cameras = trajectory_cameras(
            trajectory.camera_to_world, references.cameras[first : first + 1], references.cameras[last : last + 1]
        )
        rendered = render_clip(model, cameras.to(model.device))
        ends = reference_frame(references, first, rendered), reference_frame(references, last, rendered)
        condition = condition_clip(rendered, ends, cameras, sources)
        need = view_need(condition, config.unseen_range, references.transparent)[inner].cpu()
        fed = _fed_span(need, config.whole_paths)
        renders = _each(rendered, itemgetter(inner))
        frames, agreement = renders.rgb[:0], renders.alpha[:0]
        if fed:  # a prior takes seconds a frame, and well covered scenes need few
            part = slice(fed.start + 1, fed.stop + 1)
            shown = condition.between(range(part.start, part.stop))
            if config.feed == "faultless":
                frames = faultless(cameras[part]).to(rendered.rgb)
            else:
                frames = _feed(
                    _each(rendered, itemgetter(part)), shown, config, prior, generator, mean.to(rendered.rgb)
                )
            agreement = torch.ones_like(frames[..., :1])
            if config.reference_agreement and config.feed == "enhanced":
                assert shown.warped is not None
                agreement = reference_agreement(frames.clamp(0, 1), rendered.rgb[part], shown.warped[inner])
        clips.append(_UnweighedClip.of(renders, cameras[inner], need, fed, frames, agreement))
        done += len(need)
        if on_progress is not None:
            on_progress(done, total)
    return clips


def _fed_span(need: Float[Tensor, " t"], whole: bool) -> range:
    """From the first to the last frame that is needed at all, or all frames; empty where none is needed."""
    needed = need.nonzero().flatten().tolist()
    if not needed:
        return range(0)
    return range(len(need)) if whole else range(needed[0], needed[-1] + 1)


def view_need(
    condition: ConditionClip, unseen_range: tuple[float, float], transparent: bool = False
) -> Float[Tensor, " t"]:
    """How much each frame of a clip is needed, by the share of its pixels that no reference sees.

    Args:
        condition: with warped references, the best first.
        unseen_range: see `EnhanceConfig.unseen_range`.
        transparent: whether nothing is where the splats show nothing; only what they show counts then.
    """
    low, high = unseen_range
    assert condition.warped is not None
    seen = condition.warped[:, WARP_CHANNELS - 1]
    shown = (condition.alpha[:, 0] >= SOLID_ALPHA).to(seen) if transparent else torch.ones_like(seen)
    unseen = ((1 - seen) * shown).sum(dim=(-2, -1)) / shown.sum(dim=(-2, -1)).clamp(min=1)
    return ((unseen - low) / (high - low)).clamp(0, 1) if high > low else torch.ones_like(unseen)


def _feed(rendered, condition, config, prior, generator, mean_colour) -> Float[Tensor, "t h w 3"]:
    """The frames that are fed back for the rendered ones, which `condition` has between its references."""
    if config.feed == "renders":
        return rendered.rgb
    if config.feed == "mean-filled":
        return rendered.alpha * rendered.rgb + (1 - rendered.alpha) * mean_colour
    if config.feed == "blurred":
        sigma = BLUR_SIGMA_SHARE * max(rendered.rgb.shape[1:3])
        size = 2 * int(3 * sigma) + 1
        return to_channels_last(gaussian_blur(to_channels_first(rendered.rgb), [size, size], [sigma, sigma]))
    assert prior is not None
    shown = condition if config.warp_references else replace(condition, warped=None)
    return to_channels_last(prior.enhance(shown, generator).rgb[1:-1]).to(rendered.rgb)


def condition_clip(
    rendered: RenderedClip,
    ends: tuple[Float[Tensor, "h w 4"], Float[Tensor, "h w 4"]],
    cameras: Cameras,
    sources: WarpSources | None = None,
) -> ConditionClip:
    """The prior's input: the renders with the reference photographs as first and last frame (paper, section 4.1).

    Args:
        rendered: what the splats show along the path.
        ends: `reference_frame` of the references at which it begins and ends.
        cameras: of the frames.
        sources: references to warp into every frame; None warps none.
    """
    rgb, alpha = rendered.rgb.clone(), rendered.alpha.clone()
    for at, end in zip((0, -1), ends):
        rgb[at], alpha[at] = end.to(rgb).split([3, 1], dim=-1)
    warped = None
    if sources is not None:
        warped = warp_references(rendered.depth, rendered.alpha, cameras, sources)
        for at in (0, -1):
            warped[at] = 0
            warped[at, :3], warped[at, 3] = to_channels_first(rgb[at]), alpha[at, ..., 0]
    width, fx = int(cameras.width[0].item()), float(cameras.fx[0].item())
    camera_to_world = torch.linalg.inv(world_to_camera_opencv(as_4x4(cameras.camera_to_worlds.cpu())))
    return ConditionClip(
        rgb=to_channels_first(rgb),
        alpha=to_channels_first(alpha),
        disparity=normalised_disparity(to_channels_first(rendered.depth), to_channels_first(rendered.alpha)),
        warped=warped,
        camera_to_world=camera_to_world[:, :3],
        fov_x_rad=2 * float(torch.atan(torch.tensor(width / (2 * fx)))),
    )


def _oracle_clip(model, oracle: References, index: int) -> _UnweighedClip:
    camera = oracle.cameras[index : index + 1]
    rendered = render_clip(model, camera.to(model.device))
    photograph = oracle.photographs[index][None].to(rendered.rgb)
    return _UnweighedClip.of(rendered, camera, torch.ones(1), range(1), photograph, torch.ones_like(rendered.alpha))


def _weigh(clips: list[_UnweighedClip], references: References, config: EnhanceConfig) -> list[RoundClip]:
    """Confidence of all views of a round together, so that its mean over the round is 1. The oracle is trusted fully.

    What the references contradict is taken away after that: its weight goes to nothing else.
    """
    trusted = config.feed == "photographs"
    centres = torch.cat([clip.cameras.camera_to_worlds[..., 3].cpu() for clip in clips])
    image = torch.ones(centres.shape[0])
    if config.image_confidence and not trusted:
        image = image_confidence(centres, references.cameras.camera_to_worlds[..., 3].cpu(), config.confidence_floor)
    out, start = [], 0
    for clip in clips:
        count = clip.rgb.shape[0]
        pixel = torch.ones_like(clip.rendered.alpha)
        if config.pixel_confidence and not trusted:
            pixel = pixel_confidence(clip.rendered.scale_map, clip.rendered.alpha, config.confidence_floor)
        cameras = clip.cameras
        intrinsics = torch.cat([cameras.fx, cameras.fy, cameras.cx, cameras.cy], dim=-1).reshape(count, 4).float().cpu()
        views = EnhancedViews(
            rgb=clip.rgb.clamp(0, 1).half(),
            pixel_confidence=(pixel * clip.agreement).half(),
            image_confidence=image[start : start + count].float(),
            need=clip.need.float(),
            camera_to_world=cameras.camera_to_worlds.float().cpu(),
            intrinsics=intrinsics,
            alpha=clip.rendered.alpha.half() if references.transparent and not trusted else None,
        )
        out.append(RoundClip(views, clip.rendered.rgb, clip.differences, clip.fed))
        start += count
    return out


def reference_frame(references: References, index: int, rendered: RenderedClip) -> Float[Tensor, "h w 4"]:
    """A reference at the clip's size (references of one scene may differ in size): r, g, b and usable."""
    photograph = references.photographs[index]
    usable = torch.ones_like(photograph[..., :1]) if references.usable is None else references.usable[index]
    frame = torch.cat([photograph, usable], dim=-1)
    size = rendered.rgb.shape[1:3]
    if frame.shape[:2] == size:
        return frame
    resized = F.interpolate(to_channels_first(frame[None]), size=size, mode="bilinear", antialias=True)
    return to_channels_last(resized)[0]


def mean_colour(references: References) -> Float[Tensor, "3"]:
    """Mean colour of the reference photographs, each counting alike; sRGB in [0, 1]."""
    return torch.stack([photograph.reshape(-1, 3).mean(0).cpu() for photograph in references.photographs]).mean(0)
