"""Splatfacto with rounds of enhancement. With the prior `none` and every addition off it is plain splatfacto."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
from gsplat.strategy import DefaultStrategy
from gsplat.strategy.ops import remove
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.model_components.lib_bilagrid import BilateralGrid
from nerfstudio.models.splatfacto import (
    RGB2SH,
    SplatfactoModel,
    SplatfactoModelConfig,
    num_sh_bases,
    random_quat_tensor,
)
from nerfstudio.utils.colors import get_color
from torch import Tensor

from diffusion_prior.perceptual import MIN_SIZE_PX
from nerfstudio_enhancer.confidence import relative_pixel_scale
from nerfstudio_enhancer.conventions import to_channels_first, world_to_camera_opencv
from nerfstudio_enhancer.datamanager import KNOWN_DEPTH
from nerfstudio_enhancer.enhance_step import EnhanceConfig
from nerfstudio_enhancer.enhanced_views import SHOWN_ALPHA
from nerfstudio_enhancer.haze import SeenFrom, veil_share
from nerfstudio_enhancer.losses import (
    confidence_weighted_photometric,
    depth_loss,
    disparity_smoothness,
    ray_spread,
)
from nerfstudio_enhancer.names import REPAIRED
from nerfstudio_enhancer.random_state import step_generator, step_seed
from nerfstudio_enhancer.rasterize import fused_ssim, rasterization
from nerfstudio_enhancer.render_repair import RenderRepair, RepairableOutputs
from nerfstudio_enhancer.scene.sparse_views import NUM_SEEN_POINTS
from nerfstudio_enhancer.schedule import whole_length
from nerfstudio_enhancer.viewer import EnhancerControls

if TYPE_CHECKING:
    from nerfstudio_enhancer.datamanager import EnhancerDataManager

_numpy_scalar = cast(Callable, np.float64(0).__reduce__()[0])

# nerfstudio's schedulers put numpy scalars into its checkpoints, and its commands call torch.load with weights_only on.
# Exactly the types that such a scalar needs are allowed, wherever our classes are imported, by numpy 1's name and by numpy 2's.
torch.serialization.add_safe_globals(
    [
        np.dtype,
        np.dtypes.Float64DType,
        *((_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    ]
)

VISER_BACKGROUND = (0.1490, 0.1647, 0.2157)
"""The colour on which splatfacto evaluates when it trains on random backgrounds."""

NEAR_PLANE = 0.01
"""Splats nearer than this are not drawn, world units (splatfacto's)."""

DISPARITY_MOMENTS = "disparity_moments"
"""Training output: disparity and its square, composited like colours over nothing. [h w 2]"""

SPLATFACTO_OPACITY = 0.1
"""Opacity at which splatfacto's splats start."""


@dataclass
class EnhancerModelConfig(SplatfactoModelConfig):
    """Splatfacto's settings and ours."""

    _target: type = field(default_factory=lambda: EnhancerModel)
    enhance: EnhanceConfig = field(default_factory=EnhanceConfig)
    """Rounds of enhancement."""
    fill_background: Literal["reference-mean", "splatfacto"] = "reference-mean"
    """Colour behind the splats in evaluation and in the prior's input: the mean colour of the reference photographs, or
    splatfacto's own fixed colour. Training composites on random colours either way."""
    depth_weight: float = 0.0
    """Weight of the depth loss: on reference views the rendered depth is pulled to the stereo depth where that is consistent,
    and to what the depth network says elsewhere, as far as it is certain. 0 is splatfacto."""
    depth_smoothness: float = 0.2
    """Weight of the change of rendered disparity between neighbouring pixels that look alike, on reference views. 0 is
    splatfacto."""
    ray_spread: float = 0.03
    """Weight of the spread of disparity among the splats of one ray: it draws them to one surface. 0 is splatfacto."""
    lpips_weight: float = 0.1
    """Weight of LPIPS between splats and reference photographs beside splatfacto's loss: sharper textures, also where nobody
    took a photograph. It costs time, and PSNR where many photographs were taken: see `few_views`. 0 is splatfacto."""
    lpips_start: int | None = None
    """Training step from which on LPIPS counts on reference photographs: before, splats are far from any detail. None: after a
    third of the training."""
    lpips_every: int = 4
    """LPIPS counts on references in one of so many steps, so many times as much: it takes about as long as a step of splats."""
    few_views: int = 12
    """Up to so many reference views opacity decay, dropout, smoothness and spread hold in full, and LPIPS on references; with
    more, which keep splats in place themselves, those weaken with the square of the number and LPIPS with the number."""
    seen_opacity: float = 0.1
    """Opacity at which splats start from seed points that photographs agree on, in (0, 1); random ones start at 0.1."""
    opacity_decay: float = 0.99
    """What every training step leaves of each Gaussian's opacity (Binocular-Guided 3DGS, section 3.3). What several
    photographs agree on is made opaque again by their gradients; floaters that few of them see fade. 1 is splatfacto."""
    fade_haze: bool = True
    """Whether finished splats fade where they are seen from behind (from more than 60 degrees away from every reference that
    sees them), and where they are so near and large that they would cover the view. Trainings and exports do not know of it.
    False is splatfacto."""
    gaussian_dropout: float = 0.1
    """Share of the Gaussians left out of a training step once `warmup_length` steps have passed, rising to this value by
    the end of densification; the others become more opaque to make up for it. 0 is splatfacto."""

    def fit_to(self, steps: int) -> None:
        """Decide, in place, what is left open (None) of when rounds run and LPIPS counts, for a training of so many steps.

        Each of `num_downscales` ends after a tenth of it at the latest.
        """
        third, sixth = max(1, steps // 3), max(1, steps // 6)
        self.lpips_start = third if self.lpips_start is None else self.lpips_start
        self.enhance.start = third if self.enhance.start is None else self.enhance.start
        self.enhance.every = sixth if self.enhance.every is None else self.enhance.every
        self.resolution_schedule = min(self.resolution_schedule, max(1, steps // 10))


class EnhancerModel(SplatfactoModel):
    """Gaussian splats trained on reference photographs and enhanced views."""

    config: EnhancerModelConfig  # pyright: ignore[reportIncompatibleVariableOverride]  # as nerfstudio's models do
    reference_mean: Tensor
    """Mean colour of the reference photographs, sRGB in [0, 1]; NaN until a training has read them. [3]"""
    seed = 0
    repair: RenderRepair | None = None
    """Repairs renders; given by the pipeline where the settings ask for it."""
    offers_repair = False
    """Whether repaired renders are an output by name, for viewer and `ns-render`."""
    references: Callable[[], Cameras] | None = None
    """Cameras of the references [k]; given by the pipeline where splats are finished and their haze fades."""
    _seen_from: tuple[int, SeenFrom] | None = None

    def populate_modules(self) -> None:
        """Splatfacto's modules on any device, with metrics that need no download.

        Raises:
            ValueError: for settings that cannot work.
        """
        if self.config.lpips_every < 1:
            raise ValueError(f"`lpips-every` must be at least 1 step, got {self.config.lpips_every}.")
        self.gauss_params = torch.nn.ParameterDict(self._initial_splats())
        self.camera_optimizer = self.config.camera_optimizer.setup(num_cameras=self.num_train_data, device="cpu")
        self._set_metrics()
        self.step = 0
        self.crop_box = None
        self.background_color = (
            torch.tensor(VISER_BACKGROUND)
            if self.config.background_color == "random"
            else get_color(self.config.background_color)
        )
        self.register_buffer("reference_mean", torch.full((3,), float("nan")))
        if self.config.use_bilateral_grid:
            x, y, w = self.config.grid_shape
            self.bil_grids = BilateralGrid(num=self.num_train_data, grid_X=x, grid_Y=y, grid_W=w)
        self.strategy = self._densification()
        self.strategy_state = self.strategy.initialize_state(scene_scale=1.0)
        self.enhancer_controls = EnhancerControls(self.config.enhance.ratio)

    def _initial_splats(self) -> dict[str, torch.nn.Parameter]:
        config = self.config
        seeds = None if config.random_init else self.seed_points
        if seeds is None:
            means = (torch.rand(config.num_random, 3) - 0.5) * config.random_scale
        else:
            means = seeds[0].float()
        count, num_sh = means.shape[0], num_sh_bases(config.sh_degree)
        if count < 4:
            raise ValueError(f"Splats need at least 4 seed points, got {count}. Use `--seed-points random`.")
        distances, _ = self.k_nearest_sklearn(means, 3)
        mean_distance = torch.from_numpy(distances).mean(dim=-1, keepdim=True).clamp(min=1e-7)
        rest = torch.zeros(count, num_sh - 1, 3)
        if seeds is not None and seeds[1].shape[0] > 0:
            rgb = seeds[1].float() / 255
            dc = RGB2SH(rgb) if config.sh_degree > 0 else torch.logit(rgb, eps=1e-10)
        else:
            dc = torch.rand(count, 3)
        values = {
            "means": means,
            "scales": torch.log(mean_distance.repeat(1, 3)),
            "quats": random_quat_tensor(count),
            "features_dc": dc,
            "features_rest": rest,
            "opacities": torch.logit(self._initial_opacities(count)),
        }
        return {name: torch.nn.Parameter(value) for name, value in values.items()}

    def _initial_opacities(self, count: int) -> Tensor:
        """Opacity of the first splats [n 1]: seed points where photographs agree may start more solid than random ones."""
        opacities = torch.full((count, 1), SPLATFACTO_OPACITY)
        num_seen = (self.kwargs.get("metadata") or {}).get(NUM_SEEN_POINTS, 0)
        opacities[:num_seen] = self.config.seen_opacity
        return opacities

    def _set_metrics(self) -> None:
        from torchmetrics.image import PeakSignalNoiseRatio

        self.psnr = PeakSignalNoiseRatio(data_range=1.0)
        self.ssim = _ssim_as_splatfacto_calls_it
        self.lpips = _lpips_as_splatfacto_calls_it

    def _densification(self) -> DefaultStrategy:
        config = self.config
        return DefaultStrategy(
            prune_opa=config.cull_alpha_thresh,
            grow_grad2d=config.densify_grad_thresh,
            grow_scale3d=config.densify_size_thresh,
            grow_scale2d=config.split_screen_size,
            prune_scale3d=config.cull_scale_thresh,
            prune_scale2d=config.cull_screen_size,
            refine_scale2d_stop_iter=config.stop_screen_size_at,
            refine_start_iter=config.warmup_length,
            refine_stop_iter=config.stop_split_at,
            reset_every=config.reset_alpha_every * config.refine_every,
            refine_every=config.refine_every,
            pause_refine_after_reset=self.num_train_data + config.refine_every,
            absgrad=config.use_absgrad,
            revised_opacity=False,
            verbose=False,
        )

    def load_state_dict(self, dict, **kwargs):  # type: ignore[override]
        """Also takes plain splatfacto's checkpoints, which carry no mean colour of the references."""
        state = {**dict}
        state.setdefault("reference_mean", self.reference_mean)
        # Splatfacto's checkpoints hold the weights of torchmetrics' LPIPS; ours are bundled and never in a checkpoint.
        state = {key: value for key, value in state.items() if not key.startswith("lpips.")}
        if "gauss_params.means" not in state and "means" not in state:
            raise ValueError(
                "The checkpoint holds no Gaussian splats (no `gauss_params.means`): it belongs to another method. "
                "Give `--load-dir` the nerfstudio_models folder of a 3dgs-enhancer or splatfacto run."
            )
        optimised = [*self.gauss_params.items()]
        super().load_state_dict(state, **kwargs)
        # Splatfacto puts new parameters in the place of those that the optimizers hold, so that a resumed run would
        # stand still until its next densification.
        for name, parameter in optimised:
            parameter.data, parameter.grad = self.gauss_params[name].data, None
            self.gauss_params[name] = parameter

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """Splatfacto's callbacks, and the round before the step at which it is due."""
        callbacks = super().get_training_callbacks(training_callback_attributes)
        trainer, pipeline = training_callback_attributes.trainer, training_callback_attributes.pipeline
        if trainer is None or pipeline is None:
            return callbacks
        from nerfstudio_enhancer.rounds import Rounds, take_up_schedule

        begin = getattr(trainer, "_start_step", 0)  # of a resumed training, whose number of steps counts from there
        if begin > 0:
            take_up_schedule(self.config.enhance, trainer, begin)
        self.config.fit_to(whole_length(trainer))
        rounds = Rounds(self, cast("EnhancerDataManager", pipeline.datamanager), trainer)
        before = TrainingCallbackLocation.BEFORE_TRAIN_ITERATION
        return [TrainingCallback([before], rounds.run_if_due), *callbacks]

    @property
    def regularisation(self) -> float:
        """Share of opacity decay, dropout and smoothness that the number of reference views asks for, in (0, 1]."""
        return self.fewness**2

    @property
    def fewness(self) -> float:
        """1 up to `few_views` reference views, then inversely proportional to their number."""
        return min(1.0, self.config.few_views / self.num_train_data)

    def step_post_backward(self, step: int) -> None:
        """Splatfacto's densification, then opacities decay; after its end, Gaussians that nothing shows any more go."""
        # gsplat splits Gaussians at random. By a round nothing of that may change: one that is not trained on leaves the splats
        # as a run without it has them.
        may_split = step % self.strategy.refine_every == 0
        with step_seed(self.seed, step, "densification", self.device) if may_split else nullcontext():
            super().step_post_backward(step)
        lost = (1 - self.config.opacity_decay) * self.regularisation
        if lost > 0:
            decay_opacities(self.gauss_params["opacities"], 1 - lost)
            if step >= self.strategy.refine_stop_iter and step % self.strategy.refine_every == 0:
                self._remove_faded()

    def _remove_faded(self) -> None:
        """Remove Gaussians too transparent to be drawn: they change no picture, get no gradient, and would stay for ever."""
        faded = torch.sigmoid(self.gauss_params["opacities"].detach()).squeeze(-1) < FADED_OPACITY
        if faded.any() and not faded.all():
            remove(params=self.gauss_params, optimizers=self.optimizers, state=self.strategy_state, mask=faded)

    @torch.no_grad()
    def learnt_cameras(self, references: Cameras) -> Cameras:
        """The reference cameras [k] at the poses that the camera optimiser has learnt; as they are where it is off."""
        if self.config.camera_optimizer.mode == "off":
            return references
        learnt = references[:]
        poses = []
        for index in range(len(references)):
            camera = references[index : index + 1].to(self.device)
            camera.metadata = {"cam_idx": index}
            poses.append(self.camera_optimizer.apply_to_camera(camera))
        learnt.camera_to_worlds = torch.cat(poses).to(references.camera_to_worlds)
        return learnt

    def set_reference_mean(self, colour: Tensor) -> None:
        """Mean colour of the reference photographs, sRGB in [0, 1]; kept in the checkpoint."""
        self.reference_mean.copy_(colour.to(self.reference_mean))

    def _get_background_color(self) -> Tensor:
        if self.config.background_color == "random" and self.training:
            return torch.rand(3, generator=step_generator(self.seed, self.step, "background")).to(self.device)
        return self._background_of_renders()

    def _background_of_renders(self) -> Tensor:
        """What evaluation, and so a round, composites the splats on."""
        if self.config.background_color != "random":
            return super()._get_background_color()
        if self.config.fill_background == "reference-mean" and not torch.isnan(self.reference_mean).any():
            return self.reference_mean
        return self.background_color.to(self.device)

    def get_outputs(self, camera: Cameras) -> dict[str, Tensor | list]:
        """Render one camera (shape [1]) on any device.

        Returns:
            rgb [h w 3], depth [h w 1] (None in training unless asked for), accumulation [h w 1], background, and in
            evaluation scale_map [h w 3] (world units) and confidence [h w 1] (its geometric mean over its 95 % quantile).
        """
        if not isinstance(camera, Cameras):
            raise TypeError(f"get_outputs takes nerfstudio Cameras, got {type(camera).__name__}.")
        chosen = self._cropped()
        if chosen is not None and chosen.sum() == 0:
            empty = self.get_empty_outputs(
                int(camera.width.item()), int(camera.height.item()), self.background_color.to(self.device)
            )
            return {**empty, **_empty_scale_maps(cast(Tensor, empty["accumulation"]))}
        params = {name: value if chosen is None else value[chosen] for name, value in self.gauss_params.items()}
        viewmat, _, size = view = self._view(camera)
        opacities = self._opacities(params)
        if self.references is not None and not self.training:
            opacities = opacities * self._share_without_haze(viewmat, chosen)
        self.last_size = size
        supervised = max(self.config.depth_weight, self.config.depth_smoothness) > 0
        with_spread = self.training and self.config.ray_spread > 0
        if with_spread:
            extra = _disparity_moments(params["means"], viewmat)
        else:
            extra = None if self.training else torch.exp(params["scales"])
        with_depth = self.config.output_depth_during_training or supervised or not self.training
        render, alpha, self.info = self._rasterize(
            params,
            opacities,
            self._colors(params),
            view,
            render_mode="RGB+ED" if with_depth else "RGB",
            absgrad=self.strategy.absgrad,
            extra_features=extra,
        )
        if self.training:
            self.strategy.step_pre_backward(
                self.gauss_params, self.optimizers, self.strategy_state, self.step, self.info
            )
        outputs = self._compose(render, alpha, camera, with_depth)
        if with_spread:
            outputs[DISPARITY_MOMENTS] = render[0, ..., 3:5]
        return outputs

    def _rasterize(
        self,
        params: dict[str, Tensor],
        opacities: Float[Tensor, " n"],
        colours: tuple[Tensor, int | None],
        view: tuple[Tensor, Tensor, tuple[int, int]],
        **how,
    ) -> tuple[Tensor, Tensor, dict]:
        """Render, accumulation and what gsplat says about it.

        Args:
            params: of the Gaussians.
            opacities: theirs in this picture.
            colours: and the degree of their spherical harmonics, None for plain colours.
            view: world-to-camera [1 4 4], intrinsics [1 3 3] and (height, width).
            how: further arguments of `rasterization`.
        """
        colors, sh_degree = colours
        viewmat, intrinsics, (height, width) = view
        return rasterization(
            means=params["means"],
            quats=params["quats"],
            scales=torch.exp(params["scales"]),
            opacities=opacities,
            colors=colors,
            viewmats=viewmat,
            Ks=intrinsics,
            width=width,
            height=height,
            packed=False,
            near_plane=NEAR_PLANE,
            far_plane=1e10,
            sh_degree=sh_degree,
            sparse_grad=False,
            rasterize_mode=self.config.rasterize_mode,
            **how,
        )

    def _share_without_haze(self, viewmat: Tensor, chosen: Tensor | None) -> Float[Tensor, " n"]:
        """What the camera of a world-to-camera matrix [1 4 4] leaves of the opacities of all Gaussians, or of the chosen ones."""
        assert self.references is not None
        if self._seen_from is None or self._seen_from[0] != self.step:
            self._seen_from = self.step, SeenFrom.of(self, self.learnt_cameras(self.references()))
        rotation, translation = viewmat[0, :3, :3], viewmat[0, :3, 3]
        means, centre = self.means.detach(), -rotation.T @ translation
        share = self._seen_from[1].share(means, centre)
        share = share * veil_share(torch.exp(self.scales.detach()), (means - centre).norm(dim=-1))
        return share if chosen is None else share[chosen]

    def pixels_of_each(self, camera: Cameras) -> Float[Tensor, " n"]:
        """How many pixels each Gaussian makes up in what a camera (shape [1]) sees, from all sides alike."""
        with torch.enable_grad():
            colours = torch.zeros_like(self.means, requires_grad=True)
            params = {name: value.detach() for name, value in self.gauss_params.items()}
            opacities = torch.sigmoid(params["opacities"]).squeeze(-1)
            render, _, _ = self._rasterize(params, opacities, (colours, None), self._view(camera.to(self.device)))
            # Every pixel is the sum of the colours, each times what its Gaussian makes up of it.
            (pixels,) = torch.autograd.grad(render[..., 0].sum(), colours)
        return pixels[:, 0]

    def get_outputs_for_camera(self, camera: Cameras, obb_box: OrientedBox | None = None) -> dict[str, Tensor]:
        """Render one camera (shape [1]), within a box if one is given; see `get_outputs`.

        Where the model repairs renders and `offers_repair`, `repaired` [h w 3] is an output of the whole scene, made when it
        is asked for.
        """
        outputs = super().get_outputs_for_camera(camera, obb_box)
        repair = self.repair
        if repair is None or self.training:
            return outputs
        return RepairableOutputs(outputs, lambda: repair(self, camera), self.offers_repair)

    def get_image_metrics_and_images(self, outputs, batch) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Splatfacto's figures and picture of the splats and, where renders are repaired, `repaired_*` of the repair."""
        metrics, images = super().get_image_metrics_and_images(outputs, batch)
        if isinstance(outputs, RepairableOutputs):
            repaired = {"rgb": outputs.repaired, "background": outputs["background"]}
            of_repaired, pictures = super().get_image_metrics_and_images(repaired, batch)
            metrics |= {f"{REPAIRED}_{name}": value for name, value in of_repaired.items()}
            images[REPAIRED] = pictures["img"]
        return metrics, images

    def _compose(self, render: Tensor, alpha: Tensor, camera: Cameras, with_depth: bool) -> dict:
        background = self._get_background_color()
        rgb = torch.clamp(render[..., :3] + (1 - alpha) * background, 0.0, 1.0)
        cam_idx = (camera.metadata or {}).get("cam_idx")
        height, width = rgb.shape[1:3]
        if self.config.use_bilateral_grid and self.training and cam_idx is not None:
            rgb = self._apply_bilateral_grid(rgb, cam_idx, height, width)
        outputs = {"rgb": rgb.squeeze(0), "depth": None, "accumulation": alpha.squeeze(0), "background": background}
        if with_depth:
            depth = render[..., -1:]
            outputs["depth"] = torch.where(alpha > 0, depth, depth.detach().max()).squeeze(0)
        if not self.training:
            scale_map = render[0, ..., 3:6]
            outputs["scale_map"] = scale_map
            outputs["confidence"] = relative_pixel_scale(scale_map)
            outputs["background"] = background.expand(height, width, 3)
        return outputs

    def _cropped(self) -> Tensor | None:
        if self.crop_box is None or self.training:
            return None
        return self.crop_box.within(self.means).reshape(-1)

    def _view(self, camera: Cameras) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """World-to-camera [1 4 4], intrinsics [1 3 3] and (height, width) at the step's resolution."""
        enhanced = bool((camera.metadata or {}).get("enhanced"))
        if self.training and not enhanced:
            camera_to_world = self.camera_optimizer.apply_to_camera(camera)
        else:
            camera_to_world = camera.camera_to_worlds
        factor = self._get_downscale_factor()
        camera.rescale_output_resolution(1 / factor)
        intrinsics = camera.get_intrinsics_matrices().to(self.device)
        size = int(camera.height.item()), int(camera.width.item())
        camera.rescale_output_resolution(factor)
        return world_to_camera_opencv(camera_to_world).to(self.device), intrinsics, size

    def _colors(self, params: dict[str, Tensor]) -> tuple[Tensor, int | None]:
        if self.config.sh_degree == 0:
            return torch.sigmoid(params["features_dc"]), None
        degree = min(self.step // self.config.sh_degree_interval, self.config.sh_degree)
        bases = num_sh_bases(degree)
        rest = params["features_rest"][:, : bases - 1]
        return torch.cat((params["features_dc"][:, None, :], rest), dim=1), degree

    def _opacities(self, params: dict[str, Tensor]) -> Tensor:
        opacities = torch.sigmoid(params["opacities"]).squeeze(-1)
        rate = self._dropout_rate()
        if rate == 0.0:
            return opacities
        generator = step_generator(self.seed, self.step, "dropout")
        kept = torch.rand(opacities.shape[0], generator=generator).to(opacities.device) >= rate
        return torch.clamp(opacities * kept / (1 - rate), max=1.0)

    def _dropout_rate(self) -> float:
        if not self.training or self.config.gaussian_dropout == 0.0:
            return 0.0
        start, end = self.config.warmup_length, max(self.config.stop_split_at, self.config.warmup_length + 1)
        return (
            self.config.gaussian_dropout * self.regularisation * min(max((self.step - start) / (end - start), 0.0), 1.0)
        )

    def get_loss_dict(self, outputs, batch, metrics_dict=None) -> dict[str, Tensor]:
        """Splatfacto's loss on references, the confidence-weighted one on enhanced views, and what regularises depth."""
        if "pixel_confidence" in batch:
            losses = self._enhanced_losses(outputs, batch)
        else:
            losses = super().get_loss_dict(outputs, batch, metrics_dict)
            if self.config.depth_weight > 0 and KNOWN_DEPTH in batch:
                depth = outputs["depth"]
                known, certainty = _nearest(batch[KNOWN_DEPTH].to(depth), *depth.shape[:2]).split(1, dim=-1)
                loss = depth_loss(depth, outputs["accumulation"], known, certainty)
                losses["depth_loss"] = self.config.depth_weight * loss
            if self._lpips_is_due():
                weight = self.config.lpips_weight * self.config.lpips_every * self.fewness
                losses |= self._perceptual_losses(weight, *self._compared(outputs, batch))
        if self.config.ray_spread > 0 and DISPARITY_MOMENTS in outputs:  # not in evaluation
            spread = ray_spread(outputs[DISPARITY_MOMENTS], outputs["accumulation"])
            losses["ray_spread"] = self.config.ray_spread * self.regularisation * spread
        if self.config.depth_smoothness > 0:
            smoothness = disparity_smoothness(outputs["depth"], self.get_gt_img(batch["image"])[..., :3])
            losses["depth_smoothness"] = self.config.depth_smoothness * self.regularisation * smoothness
        return losses

    def _enhanced_losses(self, outputs, batch) -> dict[str, Tensor]:
        rendered, target = outputs["rgb"], self.get_gt_img(batch["image"])
        if SHOWN_ALPHA in batch:
            # Where references are transparent splats must stay so: what shines through them is the step's background.
            clear = 1 - self._downscale_if_required(batch[SHOWN_ALPHA]).to(self.device)
            target = (target + clear * (outputs["background"] - self._background_of_renders())).clamp(0, 1)
        confidence = self._downscale_if_required(batch["pixel_confidence"]).to(self.device)
        losses = {
            "main_loss": confidence_weighted_photometric(
                rendered, target, confidence, batch["image_confidence"], self.config.ssim_lambda
            )
        }
        weight = self.config.enhance.lpips_weight * batch["image_confidence"]
        return losses | self._perceptual_losses(weight, rendered, target)

    def _lpips_is_due(self) -> bool:
        """Whether LPIPS counts in this step, where it is one of a reference photograph."""
        config = self.config
        start = config.lpips_start or 0
        return config.lpips_weight > 0 and self.step >= start and self.step % config.lpips_every == 0

    def _perceptual_losses(self, weight: float, rendered: Tensor, target: Tensor) -> dict[str, Tensor]:
        """LPIPS of [h w 3] pictures, but of none that early steps of `num_downscales` show too small for AlexNet."""
        if weight == 0 or min(rendered.shape[:2]) < MIN_SIZE_PX:
            return {}
        return {"perceptual_loss": weight * _lpips(rendered, target)}

    def _compared(self, outputs, batch) -> tuple[Float[Tensor, "h w 3"], Float[Tensor, "h w 3"]]:
        """Render and reference photograph as splatfacto's loss compares them: on one background, masked parts black in both."""
        rendered = outputs["rgb"]
        target = self.composite_with_background(self.get_gt_img(batch["image"]), outputs["background"])
        if "mask" in batch:
            mask = self._downscale_if_required(batch["mask"]).to(self.device)
            return rendered * mask, target * mask
        return rendered, target


def _disparity_moments(means: Tensor, viewmat: Tensor) -> Tensor:
    """Disparity of every splat and its square, [n 2], per world unit."""
    depth = means @ viewmat[0, 2, :3] + viewmat[0, 2, 3]
    disparity = 1 / depth.clamp(min=NEAR_PLANE)
    return torch.stack([disparity, disparity**2], dim=-1)


@torch.no_grad()
def decay_opacities(logits: Tensor, kept: float) -> None:
    """Multiply opacities by `kept` in place; they are stored as logits [n 1]."""
    opacities = torch.sigmoid(logits) * kept
    logits.copy_(torch.logit(opacities, eps=LEAST_OPACITY))


LEAST_OPACITY = 1e-6
"""Opacities do not decay below this; splats are removed long before."""

FADED_OPACITY = 0.5 / 255
"""Gaussians less opaque than this are removed after densification: gsplat draws none below 1/255, nor would they be drawn in a
step whose dropout makes those that are left up to twice as opaque."""


def _nearest(image: Tensor, height: int, width: int) -> Tensor:
    """An image [h w c] at another size without mixing its values: beside known depth may lie none (0)."""
    if tuple(image.shape[:2]) == (height, width):
        return image
    resized = torch.nn.functional.interpolate(image.permute(2, 0, 1)[None], (height, width), mode="nearest-exact")
    return resized[0].permute(1, 2, 0)


def _ssim_as_splatfacto_calls_it(target: Tensor, rendered: Tensor) -> Tensor:
    return fused_ssim(rendered, target)


def _lpips(rendered: Float[Tensor, "h w 3"], target: Float[Tensor, "h w 3"]) -> Float[Tensor, ""]:
    return _lpips_as_splatfacto_calls_it(*(to_channels_first(image[None]) for image in (target, rendered)))


def _lpips_as_splatfacto_calls_it(target: Tensor, rendered: Tensor) -> Tensor:
    from diffusion_prior.perceptual import lpips_alex

    return lpips_alex(rendered, target).mean()


def _empty_scale_maps(accumulation: Tensor) -> dict[str, Tensor]:
    return {"scale_map": accumulation.expand(*accumulation.shape[:2], 3), "confidence": accumulation}
