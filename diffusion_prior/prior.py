"""The video prior: a latent diffusion model over clips, then the spatial-temporal decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

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
from diffusion_prior.noise import expand_to, karras_sigmas, precondition
from diffusion_prior.sampler import frame_guidance, guide, sample_euler
from diffusion_prior.std import SpatialTemporalDecoder
from diffusion_prior.types import ConditionClip, EnhancedClip
from diffusion_prior.unet import SpatioTemporalUNet


@dataclass(frozen=True)
class PriorConfig:
    """What a prior needs beside its networks' own configs; `prior_config.json`. Defaults are those of SVD and the paper."""

    patch_size: int = 1
    """Side of the pixel blocks that the VAE and the STD take as channels; 2 makes both four times cheaper."""
    extra_condition_channels: int = 0
    """2: the UNet also sees opacity and disparity at latent size. 0: it does not."""
    num_frames: int = 25
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
    motion_bucket: float = 127.0
    """Micro-condition: SVD's amount of motion."""
    noise_augmentation: float = 0.02
    """Standard deviation of the noise added to the condition frames (in [-1, 1]) before they are encoded."""
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


class VideoPrior:
    """A clip in, an enhanced clip out.

    Not an nn.Module: it holds four of them (`vae`, `unet`, `image_encoder`, `std`), the scheduler's config as it lies
    in the folder, and our own `config`.
    """

    def __init__(
        self,
        vae: AutoencoderKLTemporalDecoder,
        unet: SpatioTemporalUNet,
        image_encoder: CLIPVisionModelWithProjection,
        std: SpatialTemporalDecoder,
        config: PriorConfig,
        scheduler_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.vae = vae
        self.unet = unet
        self.image_encoder = image_encoder
        self.std = std
        self.config = config
        self.scheduler_config = dict(scheduler_config or {})
        for module in (vae, unet, std):
            speed_up(module)
            set_norm_groups(module, config.norm_groups)
        _check_parts_fit(self)

    @property
    def modules(
        self,
    ) -> dict[
        str, AutoencoderKLTemporalDecoder | SpatioTemporalUNet | CLIPVisionModelWithProjection | SpatialTemporalDecoder
    ]:
        """The networks by the names of their folders."""
        return {"vae": self.vae, "unet": self.unet, "image_encoder": self.image_encoder, "std": self.std}

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.unet.parameters()).device

    @property
    def latent_factor(self) -> int:
        """Pixels per latent along each side; clips are padded to a multiple of it."""
        return self.config.patch_size * 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def latent_scale(self) -> float:
        """What latents are multiplied by before noise is added: one over their standard deviation."""
        return self.vae.config["scaling_factor"]

    def set_latent_scale(self, scale: float) -> None:
        """Record the scale of a newly trained VAE in its config."""
        self.vae.register_to_config(scaling_factor=float(scale))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> VideoPrior:
        """Move and convert all networks, in place; kernels go to the channels-last order, which CPUs convolve fastest."""
        for module in self.modules.values():
            nn.Module.to(module, device=device, dtype=dtype)  # diffusers' own `to` warns of layers that it has not
            for parameter in module.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return self

    def eval(self) -> VideoPrior:
        """Set all networks to evaluation."""
        for module in self.modules.values():
            module.eval()
        return self

    @torch.no_grad()
    def enhance(self, clip: ConditionClip, generator: torch.Generator) -> EnhancedClip:
        """Repair a clip of any size and length.

        Args:
            clip: rendered frames between two reference photographs.
            generator: source of all randomness; the same state gives the same frames on the same device.

        Raises:
            ValueError: where a pose-conditioned prior gets a clip without poses or field of view.
        """
        rgb = self.decode(self.predict_latents(clip, generator), clip)
        if self.config.colour_correction:
            rgb = match_first_reference(rgb, clip.rgb[0].to(rgb)).clamp(0, 1)
        return EnhancedClip(rgb=rgb)

    @torch.no_grad()
    def predict_latents(self, clip: ConditionClip, generator: torch.Generator) -> Float[Tensor, "t c h2 w2"]:
        """The latent diffusion model alone: unscaled latents of the enhanced frames, ready for the decoder.

        Their size is that of the clip divided by `latent_factor` and rounded up, at least 2 x 2.
        """
        condition = self.condition(clip, generator)
        num_frames = clip.num_frames
        shape = (num_frames, self.unet.config["out_channels"], *condition.latents.shape[-2:])
        noise = torch.randn(shape, generator=generator, device=generator.device).to(self.device)
        sigmas = karras_sigmas(self.config.num_inference_steps, self.config.sigma_min, self.config.sigma_max)
        guidance = frame_guidance(num_frames, self.config.min_guidance, self.config.max_guidance)
        windows = self._windows(num_frames)

        def denoise_clip(noisy: Tensor, sigma: Tensor) -> Tensor:
            def denoise_window(index: Tensor) -> Tensor:
                arguments = noisy[None, index], sigma[None].to(noisy)
                told = condition.frames(index)
                conditional = denoise(self.unet, *arguments, told)[0]
                if not self.config.uses_guidance:
                    return conditional
                unconditional = denoise(self.unet, *arguments, told.unconditional())[0]
                return guide(conditional, unconditional, guidance[index.cpu()])

            return blend_windows(denoise_window, windows, num_frames)

        return sample_euler(denoise_clip, noise, sigmas) / self.latent_scale

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "t c h2 w2"], clip: ConditionClip) -> Float[Tensor, "t 3 h w"]:
        """Frames in [0, 1] from the latents of `predict_latents` (or of any other source) and the clip itself."""
        height, width = clip.rgb.shape[-2:]
        condition = decoder_condition(*self._padded(clip))
        dtype = self.std.dtype

        def decode_window(index: Tensor) -> Tensor:
            frames = self.std(latents[None, index].to(self.device, dtype), condition[None, index].to(dtype))
            return to_unit(frames[0].float())

        frames = blend_windows(decode_window, self._windows(clip.num_frames), clip.num_frames)
        return frames[..., :height, :width].clamp(0, 1)

    def condition(self, clip: ConditionClip, generator: torch.Generator) -> LatentCondition:
        """What the UNet is told about one clip (batch of 1)."""
        rgb, alpha, disparity = self._padded(clip)
        config = self.config
        noised = rgb
        if config.noise_augmentation > 0:
            noise = torch.randn(rgb.shape, generator=generator, device=generator.device).to(rgb)
            noised = rgb + config.noise_augmentation / 2 * noise  # half of it: [0, 1] is half as wide as [-1, 1]
        micro = micro_conditions(config.fps, config.motion_bucket, config.noise_augmentation, 1, self.device)
        if self.unet.layout == "A":
            if clip.camera_to_world is None or clip.fov_x_rad is None:
                raise ValueError("this prior is conditioned on poses: give the clip `camera_to_world` and `fov_x_rad`.")
            micro = pose_conditions(clip.camera_to_world.to(micro), clip.fov_x_rad, micro[0])[None]
        latents = torch.cat([encode_frames(self.vae, frame[None], config.patch_size) for frame in noised])
        return LatentCondition(
            latents=latents[None],
            extra=self.extras(alpha, disparity)[None],
            embeddings=embed_frames(self.image_encoder, clip.rgb.to(self.device))[None],
            micro=micro,
        )

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

    def _windows(self, num_frames: int) -> list[Int[Tensor, " n"]]:
        return [
            index.to(self.device)
            for index in frame_windows(num_frames, self.config.num_frames, self.config.window_overlap)
        ]


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
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
