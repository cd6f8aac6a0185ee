"""The video prior: a latent diffusion model over clips, then the spatial-temporal decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLTemporalDecoder
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from diffusion_prior.coarse import CoarseRepair
from diffusion_prior.colour import match_first_reference
from diffusion_prior.conditioning import (
    LatentCondition,
    decoder_condition,
    embed_frames,
    encode_frames,
    latent_extras,
    micro_conditions,
    pad_to_multiple,
    pose_conditions,
    to_unit,
)
from diffusion_prior.cpu_speed import speed_up
from diffusion_prior.fitting import fit_clip
from diffusion_prior.memory import PRESETS, MemoryPreset, explain_exhaustion, set_slicing
from diffusion_prior.misread_poses import misread_poses
from diffusion_prior.noise import expand_to, exponential_sigmas, karras_sigmas, precondition
from diffusion_prior.published import LAYOUT_B_FRAMES
from diffusion_prior.sampler import SAMPLERS, frame_guidance, guide
from diffusion_prior.sampling_config import Fit, SamplingConfig
from diffusion_prior.seeded import seeded
from diffusion_prior.std import SpatialTemporalDecoder
from diffusion_prior.tiles import Tile, blend_tiles, crop_condition, tile_grid
from diffusion_prior.types import ConditionClip, EnhancedClip
from diffusion_prior.unet import SpatioTemporalUNet


@dataclass(frozen=True)
class PriorConfig:
    """What a prior needs beside its networks' own configs; `prior_config.json`. Defaults are those of SVD and the paper."""

    patch_size: int = 1
    """Side of the pixel blocks that the VAE and the STD take as channels; 2 makes both four times cheaper."""
    extra_condition_channels: int = 0
    """2: the UNet also sees opacity and disparity at latent size. 0: it does not."""
    num_frames: int = LAYOUT_B_FRAMES
    """Longest clip that is enhanced in one window, references included; longer ones go in overlapping windows."""
    window_overlap: int = 6
    """Frames that two neighbouring windows of a long clip share."""
    num_inference_steps: int = 25
    """Sampling steps; time grows with them, 1 gives the mean of what is possible."""
    sigma_min: float = 0.002
    """Lowest noise level that is sampled."""
    sigma_max: float = 700.0
    """Highest noise level, where sampling starts."""
    min_guidance: float = 1.0
    """Classifier-free guidance at the first frame."""
    max_guidance: float = 3.0
    """Classifier-free guidance at the last frame; where both are 1 the unconditional pass is left out."""
    fps: float = 7.0
    """Micro-condition: frames per second."""
    subtract_one_from_fps: bool = True
    """Tell the UNet `fps` - 1, as SVD was trained. False for the authors' pose-conditioned weights: trained on `fps`."""
    motion_bucket: float = 127.0
    """Micro-condition: SVD's amount of motion."""
    noise_augmentation: float = 0.02
    """Standard deviation of the noise added to the condition frames (in [-1, 1]) before they are encoded."""
    unconditional_micro: bool = True
    """Keep micro-conditions and poses in guidance's unconditional pass, as SVD does. False: zeros, as the authors do."""
    misread_quaternions: bool = False
    """Give the pose-conditioned UNet rotations read with the quaternion's parts in the wrong order, see `misread_poses`:
    the authors' weights were trained on such."""
    halved_clip_input: bool = False
    """Show the image encoder colours squeezed into [0.5, 1]: the authors' sampler does, their training does not."""
    frame_height: int = 0
    """Height in pixels of the frames that the prior was trained on; 0 for any."""
    frame_width: int = 0
    """Width in pixels of the frames that the prior was trained on; 0 for any."""
    norm_groups: int = 32
    """Groups of every group norm; 32 is what diffusers builds. Narrow networks need fewer: a group of one channel loses
    that channel's mean over the picture, and with it the picture's brightness."""
    colour_correction: bool = True
    """Match every frame's mean and standard deviation to those of the first reference, as the paper does."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ValueError: naming the field, its rule and the given value.
        """
        if self.patch_size < 1:
            raise ValueError(f"`patch_size` must be at least 1, got {self.patch_size}.")
        if self.extra_condition_channels not in (0, 2):
            raise ValueError(
                f"`extra_condition_channels` must be 0, or 2 for opacity and disparity, "
                f"got {self.extra_condition_channels}."
            )
        if not 0 <= self.window_overlap < self.num_frames - 2:
            raise ValueError(
                f"`window_overlap` must be at least 0 and less than `num_frames` - 2 = {self.num_frames - 2} (each "
                f"window also holds both references), got {self.window_overlap}."
            )

    @property
    def uses_guidance(self) -> bool:
        """Whether sampling needs the unconditional pass."""
        return not self.min_guidance == self.max_guidance == 1.0


PriorModule = (
    AutoencoderKLTemporalDecoder
    | SpatioTemporalUNet
    | CLIPVisionModelWithProjection
    | SpatialTemporalDecoder
    | CoarseRepair
)
"""One of the networks of a prior."""


class VideoPrior:
    """A clip in, an enhanced clip out.

    Not an nn.Module: it holds four of them (`vae`, `unet`, `image_encoder`, `std`), a fifth where there is a `coarse` repair,
    the scheduler's config as it lies in the folder, and our own `config`.
    """

    def __init__(
        self,
        vae: AutoencoderKLTemporalDecoder,
        unet: SpatioTemporalUNet,
        image_encoder: CLIPVisionModelWithProjection,
        std: SpatialTemporalDecoder,
        config: PriorConfig,
        scheduler_config: Mapping[str, Any] | None = None,
        coarse: CoarseRepair | None = None,
    ) -> None:
        self.vae = vae
        self.unet = unet
        self.image_encoder = image_encoder
        self.std = std
        self.coarse = coarse
        self.config = config
        self.scheduler_config = dict(scheduler_config or {})
        self.sampling = SamplingConfig()
        self.preset = PRESETS["all"]
        self._device: torch.device | None = None
        for module in (vae, unet, std):
            self._fit_out(module)
        _check_parts_fit(self)

    @property
    def modules(self) -> dict[str, PriorModule]:
        """The networks by the names of their folders."""
        modules: dict[str, PriorModule] = {
            "vae": self.vae,
            "unet": self.unet,
            "image_encoder": self.image_encoder,
            "std": self.std,
        }
        if self.coarse is not None:
            modules["coarse"] = self.coarse
        return modules

    @property
    def device(self) -> torch.device:
        """Where the networks compute (with offloading they rest on the CPU)."""
        return self._device or next(self.unet.parameters()).device

    @property
    def effective_config(self) -> PriorConfig:
        """`config` with what `sampling` asks for instead."""
        names = {"steps": "num_inference_steps", "num_frames": "num_frames"}
        names |= {name: name for name in ("min_guidance", "max_guidance", "colour_correction")}
        asked = {ours: getattr(self.sampling, theirs) for theirs, ours in names.items()}
        asked = {name: value for name, value in asked.items() if value is not None}
        frames = asked.get("num_frames", self.config.num_frames)
        return replace(self.config, **asked, window_overlap=min(self.config.window_overlap, frames - 3))

    @property
    def frame_size(self) -> tuple[int, int] | None:
        """Height and width that clips are fitted to; None where any size will do."""
        own = (self.config.frame_height, self.config.frame_width)
        return self.sampling.frame_size or (own if min(own) > 0 else None)

    @property
    def fit(self) -> Fit:
        """How clips are fitted, decided."""
        if self.sampling.fit != "auto":
            return self.sampling.fit
        return "as-is" if self.frame_size is None else "tile"

    @property
    def latent_factor(self) -> int:
        """Pixels per latent along each side; clips are padded to a multiple of it."""
        return self.config.patch_size * 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def latent_scale(self) -> float:
        """What latents are multiplied by before noise is added: one over their standard deviation."""
        return self.vae.config["scaling_factor"]

    def set_std(self, std: SpatialTemporalDecoder) -> None:
        """Decode with another spatial-temporal decoder from now on.

        Raises:
            ValueError: where it does not fit the other parts.
        """
        self._fit_out(std)
        self.std = std.eval()
        _check_parts_fit(self)

    def set_coarse(self, coarse: CoarseRepair | None) -> None:
        """Mend the renders with another coarse repair from now on, or with none."""
        self.coarse = None if coarse is None else coarse.eval()
        self.to(self.device)

    def _fit_out(self, module: nn.Module) -> None:
        speed_up(module)
        set_norm_groups(module, self.config.norm_groups)

    def set_latent_scale(self, scale: float) -> None:
        """Record the scale of a newly trained VAE in its config."""
        self.vae.register_to_config(scaling_factor=float(scale))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> VideoPrior:
        """Move and convert all networks, in place; kernels go to the channels-last order, which CPUs convolve fastest.

        A VAE that overflows in float16 (`force_upcast`, SVD's does) stays in float32 then.
        """
        self._device = torch.device(device) if device is not None else self._device
        place = "cpu" if self.preset.offload and device is not None else device
        for name, module in self.modules.items():
            upcast = name == "vae" and dtype is torch.float16 and self.vae.config["force_upcast"]
            upcast = upcast or (name == "coarse" and dtype is not None)  # small, and differences count in it
            # diffusers' own `to` warns of layers that it has not
            nn.Module.to(module, device=place, dtype=torch.float32 if upcast else dtype)
            for parameter in module.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return self

    def eval(self) -> VideoPrior:
        """Set all networks to evaluation."""
        for module in self.modules.values():
            module.eval()
        return self

    def use_memory_preset(self, preset: MemoryPreset) -> VideoPrior:
        """Save memory as a preset says, from now on."""
        self.preset = preset
        set_slicing(self.unet, preset.slices)
        return self.to(self.device)

    @torch.no_grad()
    def enhance(self, clip: ConditionClip, generator: torch.Generator) -> EnhancedClip:
        """Repair a clip of any size and length.

        Args:
            clip: rendered frames between two reference photographs.
            generator: source of all randomness; the same state gives the same frames on the same device.

        Raises:
            ValueError: where a pose-conditioned prior gets a clip without poses or field of view, or one without coarse repair
                is told not to sample.
            OutOfDeviceMemory: naming the ways to need less.
        """
        self.sampling.check_against(has_coarse=self.coarse is not None)
        if self.coarse is None or not self.sampling.coarse:
            return EnhancedClip(rgb=self.sample(clip, generator))
        with self._resident("coarse"):
            clip = self.coarse.repaired(clip)
        if not self.sampling.diffusion:
            return EnhancedClip(rgb=clip.rgb)
        frames = self.sample(clip, generator)
        with self._resident("coarse"):
            return EnhancedClip(rgb=self.coarse.anchored(frames, clip))

    @torch.no_grad()
    def sample(self, clip: ConditionClip, generator: torch.Generator) -> Float[Tensor, "t 3 h w"]:
        """`enhance` without the coarse repair: the frames in [0, 1] that are sampled and decoded for a clip as it is."""
        if self.sampling.seed is not None:
            generator = torch.Generator().manual_seed(self.sampling.seed)
        fitted = fit_clip(clip, self.fit, self.frame_size)
        with explain_exhaustion(self, fitted.clip):
            rgb = fitted.restore(self.decode(self.predict_latents(fitted.clip, generator), fitted.clip))
        if self.effective_config.colour_correction:
            rgb = match_first_reference(rgb, clip.rgb[0].to(rgb)).clamp(0, 1)
        return rgb

    @torch.no_grad()
    def predict_latents(self, clip: ConditionClip, generator: torch.Generator) -> Float[Tensor, "t c h2 w2"]:
        """The latent diffusion model alone: unscaled latents of the enhanced frames, ready for the decoder.

        Their size is that of the clip divided by `latent_factor` and rounded up, at least 2 x 2.
        """
        config = self.effective_config
        condition = self.condition(clip, generator)
        num_frames = clip.num_frames
        height, width = condition.latents.shape[-2:]
        shape = (num_frames, self.unet.config["out_channels"], height, width)
        noise = torch.randn(shape, generator=generator, device=generator.device).to(self.device)
        levels = karras_sigmas if self.sampling.schedule == "karras" else exponential_sigmas
        sigmas = levels(config.num_inference_steps, config.sigma_min, config.sigma_max)
        guidance = frame_guidance(num_frames, config.min_guidance, config.max_guidance)
        windows = self._windows(num_frames, config.num_frames, config.window_overlap)
        tiles = tile_grid(height, width, self._latent_tile)

        def denoise_clip(noisy: Tensor, sigma: Tensor) -> Tensor:
            def denoise_window(index: Tensor) -> Tensor:
                told = condition.frames(index)
                scales = guidance[index.cpu()]
                return blend_tiles(lambda tile: self._guided(tile.of(noisy[index]), sigma, told, scales, tile), tiles)

            return blend_windows(denoise_window, windows, num_frames)

        with self._resident("unet"):
            return SAMPLERS[self.sampling.sampler](denoise_clip, noise, sigmas) / self.latent_scale

    def _guided(
        self,
        noisy: Float[Tensor, "t c h w"],
        sigma: Float[Tensor, ""],
        condition: LatentCondition,
        guidance: Float[Tensor, " t"],
        tile: Tile,
    ) -> Float[Tensor, "t c h w"]:
        """Denoised latents of one window of one tile, with classifier-free guidance where it is asked for."""
        arguments = noisy[None], sigma[None].to(noisy)
        told = crop_condition(condition, tile)
        conditional = denoise(self.unet, *arguments, told)[0]
        if not self.effective_config.uses_guidance:
            return conditional
        return guide(conditional, denoise(self.unet, *arguments, self.unconditional(told))[0], guidance)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "t c h2 w2"], clip: ConditionClip) -> Float[Tensor, "t 3 h w"]:
        """Frames in [0, 1] from the latents of `predict_latents` (or of any other source) and the clip itself."""
        height, width = clip.rgb.shape[-2:]
        rgb, alpha, disparity = self._padded(clip)
        condition = decoder_condition(rgb, alpha, disparity, self._warped(clip))
        factor = self.latent_factor
        size, overlap = self.effective_config.num_frames, self.effective_config.window_overlap
        if self.preset.decode_frames is not None and self.preset.decode_frames < size:
            size, overlap = self.preset.decode_frames, 1 if self.preset.decode_frames > 3 else 0
        windows = self._windows(clip.num_frames, size, overlap)
        side = self.preset.decode_tile_px and max(1, self.preset.decode_tile_px // factor)
        rows, columns = latents.shape[-2:]
        tiles = tile_grid(rows, columns, (side, side) if side else None)

        def decode_window(index: Tensor) -> Tensor:
            def decode_tile(tile: Tile) -> Tensor:
                part = tile.of(latents[index]).to(self.device)
                if not self.sampling.std:
                    return self.decode_stock(part.to(self.vae.dtype))
                told = tile.times(factor).of(condition[index]).to(self.std.dtype)
                return to_unit(self.std(part[None].to(self.std.dtype), told[None])[0].float())

            return blend_tiles(decode_tile, tiles, factor)

        with self._resident("std" if self.sampling.std else "vae"):
            frames = blend_windows(decode_window, windows, clip.num_frames)
        return frames[..., :height, :width].clamp(0, 1)

    def decode_stock(self, latents: Float[Tensor, "t c h2 w2"]) -> Float[Tensor, "t 3 h w"]:
        """Frames in [0, 1] (not clamped) from unscaled latents by the VAE's own decoder, without the STD."""
        decoded = self.vae.decode(latents, num_frames=latents.shape[0], return_dict=False)[0]
        return to_unit(F.pixel_shuffle(decoded.float(), self.config.patch_size))  # type: ignore[union-attr]

    def condition(self, clip: ConditionClip, generator: torch.Generator) -> LatentCondition:
        """What the UNet is told about one clip (batch of 1)."""
        rgb, alpha, disparity = self._padded(clip)
        config = self.config
        noised = rgb
        if config.noise_augmentation > 0:
            noise = torch.randn(rgb.shape, generator=generator, device=generator.device).to(rgb)
            noised = rgb + config.noise_augmentation / 2 * noise  # half of it: [0, 1] is half as wide as [-1, 1]
        poses = None if clip.camera_to_world is None else clip.camera_to_world[None]
        fov = None if clip.fov_x_rad is None else torch.tensor([clip.fov_x_rad])
        micro = self.micro(1, poses, fov)
        with self._resident("vae"):
            latents = encode_frames(self.vae, noised, config.patch_size, at_once=1)
        with self._resident("image_encoder"):
            shown = clip.rgb.to(self.device)
            shown = (shown + 1) / 2 if config.halved_clip_input else shown
            embeddings = embed_frames(self.image_encoder, shown)[None]
        return LatentCondition(
            latents=latents[None],
            extra=self.extras(alpha, disparity)[None],
            embeddings=embeddings,
            micro=micro,
        )

    def micro(
        self,
        count: int,
        camera_to_world: Float[Tensor, "b t 3 4"] | None = None,
        fov_x_rad: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b *f m"]:
        """The numbers that this prior's UNet is told beside the frames: [b 3] in layout B, [b t 22] in layout A.

        Args:
            count: how many clips, b.
            camera_to_world: rigid poses, OpenCV axes; only layout A reads them.
            fov_x_rad: horizontal field of view in radians; only layout A reads it.

        Raises:
            ValueError: layout A without poses or field of view.
        """
        config = self.config
        fps = config.fps if config.subtract_one_from_fps else config.fps + 1  # one is taken off in there
        micro = micro_conditions(fps, config.motion_bucket, config.noise_augmentation, count, self.device)
        if self.unet.layout == "B":
            return micro
        if camera_to_world is None or fov_x_rad is None:
            raise ValueError("this prior is conditioned on poses: give the clip `camera_to_world` and `fov_x_rad`.")
        # bfloat16 has three digits: products of poses are kept out of a training's autocast
        with torch.autocast(self.device.type, enabled=False):
            told = [
                pose_conditions(misread_poses(poses) if config.misread_quaternions else poses, fov, micro[0])
                for poses, fov in zip(camera_to_world.to(micro), fov_x_rad.tolist(), strict=True)
            ]
        return torch.stack(told)

    def unconditional(self, condition: LatentCondition) -> LatentCondition:
        """The other branch of this prior's classifier-free guidance, see `PriorConfig.unconditional_micro`."""
        untold = condition.unconditional()
        return untold if self.config.unconditional_micro else replace(untold, micro=torch.zeros_like(untold.micro))

    def extras(
        self, alpha: Float[Tensor, "*b 1 h w"], disparity: Float[Tensor, "*b 1 h w"]
    ) -> Float[Tensor, "*b e h2 w2"]:
        """The extra condition channels that this prior's UNet takes, at latent size."""
        return latent_extras(alpha, disparity, self.latent_factor)[..., : self.config.extra_condition_channels, :, :]

    def _padded(self, clip: ConditionClip) -> list[Tensor]:
        """Colour, opacity and disparity in float32, padded to what the networks take: at least 2 x 2 latents."""
        factor = self.latent_factor
        images = (clip.rgb, clip.alpha, clip.disparity)
        return [pad_to_multiple(frames.to(self.device, torch.float32), factor, 2 * factor) for frames in images]

    def _warped(self, clip: ConditionClip) -> Tensor:
        """As many warped references as the STD takes, padded like the rest."""
        factor = self.latent_factor
        warped = clip.warps(self.std.config["warped_references"]).to(self.device, torch.float32)
        return pad_to_multiple(warped, factor, 2 * factor)

    def _windows(self, num_frames: int, size: int, overlap: int) -> list[Int[Tensor, " n"]]:
        return [index.to(self.device) for index in frame_windows(num_frames, size, overlap)]

    @property
    def _latent_tile(self) -> tuple[int, int] | None:
        """Height and width of the tiles that are sampled, in latents."""
        if self.fit != "tile" or self.frame_size is None:
            return None
        height, width = self.frame_size
        return -(-height // self.latent_factor), -(-width // self.latent_factor)

    @contextmanager
    def _resident(self, name: str) -> Iterator[None]:
        """Within, the network of this name is where it computes; with offloading it goes back to the CPU afterwards."""
        if not self.preset.offload:
            yield
            return
        module = self.modules[name]
        nn.Module.to(module, device=self.device)
        try:
            yield
        finally:
            nn.Module.to(module, device="cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def denoise(
    unet: SpatioTemporalUNet,
    noisy: Float[Tensor, "b f c h w"],
    sigma: Float[Tensor, " b"],
    condition: LatentCondition,
) -> Float[Tensor, "b f c h w"]:
    """The denoised (scaled) latents D(x; sigma) of EDM eq. 7; differentiable, the same in training and sampling.

    Args:
        unet: the network F.
        noisy: scaled latents plus sigma times noise, float32.
        sigma: noise level of every clip.
        condition: what the UNet is told, for the same frames.
    """
    factors = precondition(sigma)
    told = torch.cat([expand_to(factors.input, noisy) * noisy, condition.latents, condition.extra], dim=2)
    raw = unet(told.to(unet.dtype), factors.noise.to(noisy), condition.embeddings.to(unet.dtype), condition.micro)
    return expand_to(factors.skip, noisy) * noisy + expand_to(factors.out, noisy) * raw.to(noisy.dtype)


def frame_windows(num_frames: int, size: int, overlap: int) -> list[Int[Tensor, " n"]]:
    """Overlapping windows over a clip, each with the clip's first and last frame at its own ends.

    Each window is thus a clip in its own right: it starts and ends with a reference photograph.

    Args:
        num_frames: length of the clip, >= 2.
        size: longest window, both references included.
        overlap: frames that neighbouring windows share at least, beside the references.
    """
    if num_frames <= size:
        return [torch.arange(num_frames)]
    inner, between = num_frames - 2, size - 2
    count = -(-(inner - overlap) // (between - overlap))
    starts = torch.linspace(0, inner - between, count).round().long()
    ends = torch.tensor([0]), torch.tensor([num_frames - 1])
    return [torch.cat([ends[0], 1 + start + torch.arange(between), ends[1]]) for start in starts]


def blend_windows(
    run: Callable[[Int[Tensor, " n"]], Tensor], windows: list[Int[Tensor, " n"]], num_frames: int
) -> Tensor:
    """Run a function on each window and mix the results with weights that fall towards the windows' ends.

    Args:
        run: frame indices -> frames [n ...].
        windows: see `frame_windows`; together they hold every frame.
        num_frames: length of the clip.
    """
    if len(windows) == 1:
        return run(windows[0])
    total, weight_sum = None, None
    for index in windows:
        frames = run(index)
        position = torch.arange(len(index), device=frames.device)
        weight = torch.minimum(position, len(index) - 1 - position).to(frames.dtype)
        weight[[0, -1]] = 1.0  # the references are in every window alike
        if total is None or weight_sum is None:
            total = frames.new_zeros(num_frames, *frames.shape[1:])
            weight_sum = frames.new_zeros(num_frames)
        total.index_add_(0, index, frames * expand_to(weight, frames))
        weight_sum.index_add_(0, index, weight)
    assert total is not None
    assert weight_sum is not None
    return total / expand_to(weight_sum, total)


COMPACT_VAE = {
    "block_out_channels": (32, 64, 128),
    "layers_per_block": 1,
    "latent_channels": 8,
    "scaling_factor": 1.0,
    "force_upcast": False,
}
COMPACT_UNET = {
    "block_out_channels": (64, 128, 192),
    "num_attention_heads": (2, 4, 6),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 32,
}
COMPACT_IMAGE_ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
    "projection_dim": 64,
}
COMPACT_CONFIG = PriorConfig(
    patch_size=2,
    extra_condition_channels=2,
    num_frames=10,
    window_overlap=2,
    num_inference_steps=4,
    sigma_min=0.02,
    sigma_max=80.0,
    max_guidance=1.0,
    noise_augmentation=0.0,
    norm_groups=4,
)


def build_compact_prior(
    seed: int = 0,
    config: PriorConfig = COMPACT_CONFIG,
    vae: Mapping[str, Any] | None = None,
    unet: Mapping[str, Any] | None = None,
    image_encoder: Mapping[str, Any] | None = None,
    condition_widths: Sequence[int] | None = None,
) -> VideoPrior:
    """An untrained prior of the bundled size, random but for its temporal layers, which start as the identity.

    Args:
        seed: of the weights; the global random state is left as it was.
        config: our own settings.
        vae: entries that replace those of `COMPACT_VAE`; channels that depend on `config` are set here.
        unet: the same for `COMPACT_UNET`.
        image_encoder: the same for `COMPACT_IMAGE_ENCODER`.
        condition_widths: of the STD's condition encoder; those of the VAE by default.
    """
    vae_settings = {**COMPACT_VAE, **(vae or {})}
    unet_settings = {**COMPACT_UNET, **(unet or {})}
    encoder_settings = {**COMPACT_IMAGE_ENCODER, **(image_encoder or {})}
    widths, levels = vae_settings["block_out_channels"], len(unet_settings["block_out_channels"])
    pixels, latents = 3 * config.patch_size**2, vae_settings["latent_channels"]
    with seeded(seed):
        vae_module = AutoencoderKLTemporalDecoder(
            in_channels=pixels,
            out_channels=pixels,
            down_block_types=("DownEncoderBlock2D",) * len(widths),  # pyright: ignore[reportArgumentType]
            **vae_settings,
        )
        unet_module = SpatioTemporalUNet(
            in_channels=2 * latents + config.extra_condition_channels,
            out_channels=latents,
            down_block_types=("CrossAttnDownBlockSpatioTemporal",) * (levels - 1) + ("DownBlockSpatioTemporal",),
            up_block_types=("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * (levels - 1),
            projection_class_embeddings_input_dim=3 * unet_settings["addition_time_embed_dim"],
            num_frames=config.num_frames,
            **unet_settings,
        )
        encoder_module = CLIPVisionModelWithProjection(CLIPVisionConfig(**encoder_settings))
        start_temporal_layers_as_identity(vae_module.decoder)
        start_temporal_layers_as_identity(unet_module)
        std_module = SpatialTemporalDecoder.from_vae(vae_module, config.patch_size, condition_widths or tuple(widths))
    return VideoPrior(vae_module, unet_module, encoder_module, std_module, config).to().eval()


def set_norm_groups(module: nn.Module, groups: int) -> None:
    """Set, in place, how many groups the channels of every group norm fall into.

    Raises:
        ValueError: where a norm's channels do not divide by the number of groups.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.GroupNorm):
            if groups < 1 or part.num_channels % groups:
                raise ValueError(
                    f"`norm_groups` must divide the channels of every group norm: {name} has {part.num_channels}, "
                    f"got {groups}."
                )
            part.num_groups = groups


def start_temporal_layers_as_identity(module: nn.Module) -> None:
    """Zero the last convolution of every temporal residual block, and let an output's temporal convolution pass.

    Random temporal taps see nothing while single images are trained on, and are noise as soon as clips come.
    """
    for name, part in module.named_modules():
        if name.endswith("temporal_res_block.conv2"):
            nn.init.zeros_(part.weight)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(part.bias)  # pyright: ignore[reportArgumentType]
        elif name.endswith("time_conv_out"):
            nn.init.dirac_(part.weight)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(part.bias)  # pyright: ignore[reportArgumentType]


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32 on a CPU and float16 on a GPU."""
    device = torch.device(device)
    if device.type == "cpu":
        return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has AVX512_BF16 or AMX and torch tells; older torch does not tell, which counts as no."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        capabilities = torch.cpu.get_capabilities()
    except AttributeError:
        return False
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("amx_tile"))


def _check_parts_fit(prior: VideoPrior) -> None:
    """Raise ValueError where networks and settings do not belong together."""
    latents, config = prior.vae.config["latent_channels"], prior.config
    facts = [
        ("VAE in_channels", prior.vae.config["in_channels"], 3 * config.patch_size**2, "3 * patch_size^2"),
        ("UNet out_channels", prior.unet.config["out_channels"], latents, "the VAE's latent_channels"),
        (
            "UNet in_channels",
            prior.unet.config["in_channels"],
            2 * latents + config.extra_condition_channels,
            "2 * latent_channels + extra_condition_channels",
        ),
        (
            "UNet cross_attention_dim",
            prior.unet.config["cross_attention_dim"],
            prior.image_encoder.config.projection_dim,
            "the image encoder's projection_dim",
        ),
        ("STD latent_channels", prior.std.config["latent_channels"], latents, "the VAE's latent_channels"),
        ("STD patch_size", prior.std.config["patch_size"], config.patch_size, "patch_size of prior_config.json"),
        (
            "STD scales",
            len(prior.std.config["block_out_channels"]),
            len(prior.vae.config["block_out_channels"]),
            "the VAE's number of blocks",
        ),
    ]
    for name, given, wanted, rule in facts:
        if given != wanted:
            raise ValueError(f"the prior's parts do not fit: {name} is {given}, but {rule} is {wanted}.")
