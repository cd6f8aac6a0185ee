"""The model against nerfstudio's own splatfacto, and what it adds."""

from collections.abc import Iterator

import pytest
import torch
from gsplat.strategy import DefaultStrategy
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.engine.optimizers import AdamOptimizerConfig, Optimizers
from nerfstudio.models import splatfacto
from nerfstudio.models.splatfacto import SplatfactoModel, SplatfactoModelConfig
from torch.testing import assert_close

from diffusion_prior.perceptual import lpips_alex
from nerfstudio_enhancer.enhance_step import EnhanceConfig
from nerfstudio_enhancer.enhanced_views import SHOWN_ALPHA
from nerfstudio_enhancer.losses import ray_spread
from nerfstudio_enhancer.model import DISPARITY_MOMENTS, EnhancerModel, EnhancerModelConfig, decay_opacities
from nerfstudio_enhancer.random_state import step_seed
from nerfstudio_enhancer.rasterize import rasterization

STEPS = 12
SIZE = 32
SETTINGS = {
    "warmup_length": 2,
    "refine_every": 4,
    "num_downscales": 1,
    "resolution_schedule": 6,
    "sh_degree": 1,
    "sh_degree_interval": 3,
    "background_color": "black",
    "densify_grad_thresh": 1e-5,
}
RATES = {
    "means": 1.6e-4,
    "scales": 0.005,
    "quats": 0.001,
    "features_dc": 0.0025,
    "features_rest": 1e-4,
    "opacities": 0.05,
}


class NoMetric:
    """Stands in for torchmetrics' LPIPS, whose constructor downloads 233 MB."""

    def __init__(self, *_args, **_kwargs) -> None: ...


@pytest.fixture
def splatfacto_on_cpu(monkeypatch) -> Iterator[None]:
    """Nerfstudio's splatfacto as it is, made to run without CUDA on our rasteriser."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_args, **_kwargs: self)
    monkeypatch.setattr("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", NoMetric)
    monkeypatch.setattr(splatfacto, "rasterization", rasterization)
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def camera(step: int) -> Cameras:
    camera_to_world = torch.eye(4)[:3].clone()
    camera_to_world[:, 3] = torch.tensor([0.2 * (step % 3 - 1), 0.1, 3.0])
    return Cameras(camera_to_world[None], fx=30.0, fy=30.0, cx=16.0, cy=16.0, width=SIZE, height=SIZE)


def batch(step: int) -> dict:
    return {"image": torch.rand(SIZE, SIZE, 3, generator=torch.Generator().manual_seed(step % 3))}


def seed_points() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(60, 3, generator=generator) - 0.5, torch.randint(0, 256, (60, 3), generator=generator)


def build(config: SplatfactoModelConfig) -> SplatfactoModel:
    torch.manual_seed(0)
    box = SceneBox(aabb=torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))
    return config.setup(
        scene_box=box, num_train_data=3, metadata={}, device="cpu", grad_scaler=None, seed_points=seed_points()
    )


def train(model: SplatfactoModel, steps: int = STEPS) -> SplatfactoModel:
    model.train()
    groups = model.get_gaussian_param_groups()
    # Not the fused Adam: splatfacto's colours are strided views, which torch's fused kernel does not step through. And a
    # large eps: with splatfacto's 1e-15 the first steps have the size of the rate whatever the gradient, so that the last
    # bits in which the two D-SSIM differ would decide their signs.
    optimizers = Optimizers(
        {name: {"optimizer": AdamOptimizerConfig(lr=RATES[name], eps=1e-4), "scheduler": None} for name in groups},
        groups,
    )
    torch.manual_seed(1)  # densification splits draw from the global generator
    for step in range(steps):
        model.step_cb(optimizers, step)
        optimizers.zero_grad_all()
        outputs = model.get_outputs(camera(step))
        sum(model.get_loss_dict(outputs, batch(step)).values()).backward()
        optimizers.optimizer_step_all()
        model.step_post_backward(step)
    return model


def plain() -> EnhancerModelConfig:
    return EnhancerModelConfig(
        **SETTINGS,
        enhance=EnhanceConfig(prior="none"),
        fill_background="splatfacto",
        opacity_decay=1.0,
        gaussian_dropout=0.0,
        depth_smoothness=0.0,
        ray_spread=0.0,
        lpips_weight=0.0,
    )


@pytest.mark.usefixtures("splatfacto_on_cpu")
def test_without_prior_and_additions_training_equals_splatfacto(monkeypatch) -> None:
    densify = DefaultStrategy.step_post_backward

    def densify_with_fixed_draws(*args, **kwargs) -> None:  # ours draw by seed and step, splatfacto's go on from before
        with step_seed(0, 0, "densification", "cpu"):
            densify(*args, **kwargs)

    monkeypatch.setattr(DefaultStrategy, "step_post_backward", densify_with_fixed_draws)
    theirs = train(build(SplatfactoModelConfig(**SETTINGS)))
    ours = train(build(plain()))
    assert theirs.num_points != 60, "the test should cover densification"
    assert ours.num_points == theirs.num_points
    for name, value in theirs.gauss_params.items():
        assert_close(ours.gauss_params[name], value, rtol=1e-4, atol=1e-5)


def test_lpips_counts_on_references_from_its_start_on_and_not_where_they_are_masked() -> None:
    config = plain()
    config.lpips_weight, config.lpips_start, config.lpips_every = 0.25, 3, 2
    model = build(config).eval()
    outputs = model.get_outputs(camera(0))
    for step in (2, 3):  # before its start; between two of its steps
        model.step = step
        assert "perceptual_loss" not in model.get_loss_dict(outputs, batch(0))
    model.step = 4
    on_background = model.composite_with_background(batch(0)["image"], outputs["background"])
    expected = 0.5 * lpips_alex(*(image.movedim(-1, 0)[None] for image in (outputs["rgb"], on_background))).mean()
    assert_close(model.get_loss_dict(outputs, batch(0))["perceptual_loss"], expected)
    config.few_views = 1  # of 3 references
    assert_close(model.get_loss_dict(outputs, batch(0))["perceptual_loss"], expected / 3)
    masked = {**batch(0), "mask": torch.zeros(SIZE, SIZE, 1)}
    assert model.get_loss_dict(outputs, masked)["perceptual_loss"] == 0
    enhanced = {**batch(0), "pixel_confidence": torch.ones(SIZE, SIZE, 1), "image_confidence": 1.0}
    shown = (image.movedim(-1, 0)[None] for image in (outputs["rgb"], batch(0)["image"]))
    expected = config.enhance.lpips_weight * lpips_alex(*shown).mean()  # enhanced views have a weight of their own
    for step in (4, 5):  # in every step
        model.step = step
        assert_close(model.get_loss_dict(outputs, enhanced)["perceptual_loss"], expected)


def test_an_interval_of_no_step_is_refused() -> None:
    config = plain()
    config.lpips_every = 0
    with pytest.raises(ValueError, match="`lpips-every` must be at least 1 step, got 0"):
        build(config)


@pytest.mark.usefixtures("splatfacto_on_cpu")
def test_evaluation_renders_what_splatfacto_renders() -> None:
    theirs, ours = build(SplatfactoModelConfig(**SETTINGS)).eval(), build(plain()).eval()
    expected, outputs = theirs.get_outputs(camera(0)), ours.get_outputs(camera(0))
    for name in ("rgb", "depth", "accumulation", "background"):
        assert_close(outputs[name], expected[name], rtol=1e-5, atol=1e-5)


def test_confidence_output_is_the_normalised_size_of_the_gaussians() -> None:
    model = build(plain()).eval()
    with torch.no_grad():
        model.scales.copy_(torch.log(torch.tensor([0.1, 0.2, 0.4])).expand_as(model.scales))
        model.opacities.fill_(20.0)
    outputs = model.get_outputs(camera(0))
    # every Gaussian has the scales .1 .2 .4, so the composited map is alpha times them and its cube root alpha * .2
    assert_close(outputs["scale_map"], outputs["accumulation"] * torch.tensor([0.1, 0.2, 0.4]), rtol=1e-4, atol=1e-5)
    assert outputs["confidence"].max() == 1.0


def test_a_checkpoint_holds_splats_and_neither_prior_nor_metric() -> None:
    names = {key.split(".")[0] for key in build(plain()).state_dict()}
    assert names <= {"gauss_params", "reference_mean", "device_indicator_param", "camera_optimizer"}


def test_a_plain_splatfacto_checkpoint_is_taken() -> None:
    ours = build(plain())
    state = {key: value for key, value in ours.state_dict().items() if key != "reference_mean"}
    state["lpips.net.weight"] = torch.zeros(3)
    other = build(plain())
    other.load_state_dict(state)
    assert_close(other.means, ours.means)


def test_a_checkpoint_of_another_method_is_refused() -> None:
    with pytest.raises(ValueError, match="no Gaussian splats"):
        build(plain()).load_state_dict({"field.weight": torch.zeros(3)})


def test_training_background_depends_on_seed_and_step_alone() -> None:
    model = build(EnhancerModelConfig(enhance=EnhanceConfig(prior="none"))).train()
    model.step = 7
    first, again = model._get_background_color(), model._get_background_color()
    model.step = 8
    assert torch.equal(first, again)
    assert not torch.equal(first, model._get_background_color())


def test_evaluation_fills_holes_with_the_references_mean_colour() -> None:
    model = build(EnhancerModelConfig(enhance=EnhanceConfig(prior="none"))).eval()
    model.set_reference_mean(torch.tensor([0.1, 0.5, 0.9]))
    away = camera(0)
    away.camera_to_worlds[..., 3] = 100.0
    away.camera_to_worlds[..., :3] = -torch.eye(3)
    assert_close(model.get_outputs(away)["rgb"][0, 0], torch.tensor([0.1, 0.5, 0.9]))


def test_dropout_keeps_the_expected_opacity() -> None:
    model = build(EnhancerModelConfig(gaussian_dropout=0.5, warmup_length=0, stop_split_at=1)).train()
    model.step = 1
    params = {"opacities": torch.zeros(20000, 1)}  # sigmoid(0) = .5; kept ones become 1, the mean stays .5
    opacities = model._opacities(params)
    assert set(opacities.unique().tolist()) == {0.0, 1.0}
    assert float(opacities.mean()) == pytest.approx(0.5, abs=0.02)
    model.eval()
    assert torch.all(model._opacities(params) == 0.5)


def test_enhanced_batches_are_weighted_and_references_are_not() -> None:
    model = build(plain()).train()
    model.step = 6  # past the reduced resolution
    outputs = {"rgb": torch.zeros(SIZE, SIZE, 3), "background": torch.zeros(3)}
    weights = {"pixel_confidence": torch.ones(SIZE, SIZE, 1), "image_confidence": 0.5}
    enhanced = model.get_loss_dict(outputs, {**batch(0), **weights})["main_loss"]
    assert_close(enhanced, 0.5 * model.get_loss_dict(outputs, batch(0))["main_loss"])


def test_what_shines_through_an_enhanced_view_is_the_background_of_the_step() -> None:
    model = build(plain()).train()
    model.step = 6  # past the reduced resolution
    background, shown = torch.tensor([0.1, 0.9, 0.4]), torch.rand(SIZE, SIZE, 1)
    colour = torch.rand(SIZE, SIZE, 3)
    over = {
        what: shown * colour + (1 - shown) * what_rgb
        for what, what_rgb in (("step", background), ("round", model._background_of_renders()))
    }
    weights = {"pixel_confidence": torch.ones(SIZE, SIZE, 1), "image_confidence": 1.0, SHOWN_ALPHA: shown}
    losses = model.get_loss_dict({"rgb": over["step"], "background": background}, {"image": over["round"], **weights})
    # the same splats in round and step: nothing to learn
    assert float(losses["main_loss"]) == pytest.approx(0, abs=1e-5)


def test_the_loss_can_be_told_in_evaluation_too() -> None:
    config = plain()
    config.ray_spread = 0.5
    model = train(build(config), 1)
    model.eval()
    assert "ray_spread" not in model.get_loss_dict(model.get_outputs(camera(0)), batch(0))


def test_what_is_left_open_follows_the_length_of_the_training() -> None:
    config = EnhancerModelConfig()
    config.enhance.every = 7
    config.fit_to(3000)
    assert (config.lpips_start, config.enhance.start, config.enhance.every) == (1000, 1000, 7)
    config.fit_to(6000)  # nothing is open any more
    assert (config.lpips_start, config.enhance.start) == (1000, 1000)
    assert config.resolution_schedule == 300  # splatfacto's 3,000 would be the whole of the first


def test_lpips_leaves_out_pictures_that_are_too_small_for_it() -> None:
    config = plain()
    config.lpips_weight, config.lpips_every = 0.25, 1
    model = build(config).eval()
    small = {"rgb": torch.rand(30, 40, 3), "background": torch.zeros(3)}
    assert "perceptual_loss" not in model.get_loss_dict(small, {"image": torch.rand(30, 40, 3)})


def test_too_few_seed_points_are_refused() -> None:
    box = SceneBox(aabb=torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))
    points = torch.zeros(2, 3), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="at least 4 seed points, got 2"):
        plain().setup(scene_box=box, num_train_data=1, metadata={}, device="cpu", grad_scaler=None, seed_points=points)


def test_get_outputs_takes_cameras_only() -> None:
    model = build(plain())
    assert isinstance(model, EnhancerModel)
    assert camera(0).camera_type.flatten()[0] == CameraType.PERSPECTIVE.value
    with pytest.raises(TypeError, match=r"[Cc]amera"):  # ours, or that of the type checker which tests switch on
        model.get_outputs(torch.zeros(3))  # type: ignore[arg-type]


def test_opacities_decay_by_their_share_and_stop_above_zero() -> None:
    logits = torch.logit(torch.tensor([[0.8], [0.1], [1e-9]]))
    decay_opacities(logits, 0.5)
    # 0.8 / 2, 0.1 / 2; what is as good as gone goes no further
    torch.testing.assert_close(torch.sigmoid(logits), torch.tensor([[0.4], [0.05], [1e-6]]))


@pytest.mark.usefixtures("splatfacto_on_cpu")
def test_gaussians_that_nothing_shows_any_more_go_after_densification_and_take_their_optimiser_state_along() -> None:
    config = plain()
    config.opacity_decay = 0.999
    model = train(build(config), 7)
    end, every = model.strategy.refine_stop_iter, model.strategy.refine_every
    count = model.num_points
    with torch.no_grad():
        model.opacities[:20] = torch.logit(torch.tensor(0.0015))
        model.opacities[20:] = torch.logit(torch.tensor(0.5))
    kept = {name: value.detach()[20:].clone() for name, value in model.gauss_params.items()}
    moments = model.optimizers["means"].state[model.gauss_params["means"]]["exp_avg"][20:].clone()
    shown = model.eval().get_outputs(camera(0))["rgb"]
    model.step = every * (end // every + 1) + 1  # between two of densification's steps
    model.step_post_backward(model.step)
    assert model.num_points == count
    model.step -= 1
    model.step_post_backward(model.step)
    assert model.num_points == count - 20
    for name, value in kept.items():
        if name != "opacities":  # these have decayed twice
            assert_close(model.gauss_params[name], value, rtol=0, atol=0)
    assert_close(model.optimizers["means"].state[model.gauss_params["means"]]["exp_avg"], moments, rtol=0, atol=0)
    assert_close(model.get_outputs(camera(0))["rgb"], shown, atol=5e-3, rtol=0)


@pytest.mark.usefixtures("splatfacto_on_cpu")
def test_without_decay_nothing_is_removed_after_densification() -> None:
    model = train(build(plain()), 7)
    with torch.no_grad():
        model.opacities[:20] = torch.logit(torch.tensor(0.0015))
    count, every = model.num_points, model.strategy.refine_every
    model.step = every * (model.strategy.refine_stop_iter // every + 1)
    model.step_post_backward(model.step)
    assert model.num_points == count


@pytest.mark.parametrize(("few", "share"), [(3, 1.0), (12, 1.0), (1, 1 / 9)])
def test_regularisation_weakens_with_the_square_of_the_number_of_references(few: int, share: float) -> None:
    model = build(EnhancerModelConfig(few_views=few))  # of 3 references
    assert model.regularisation == pytest.approx(share)


def test_the_spread_of_a_ray_enters_the_loss_with_its_weight() -> None:
    config = plain()
    config.ray_spread = 0.5
    model = train(build(config), 1)
    assert "ray_spread" not in train(build(plain()), 1).get_loss_dict(model.get_outputs(camera(0)), batch(0))
    outputs = model.get_outputs(camera(0))
    moments, alpha = outputs[DISPARITY_MOMENTS], outputs["accumulation"]
    losses = model.get_loss_dict(outputs, batch(0))
    assert_close(losses["ray_spread"], 0.5 * ray_spread(moments, alpha))

    disparity = 1 / (camera(0).camera_to_worlds[0, 2, 3] - model.means[:, 2]).detach()  # it looks down -z
    composited = (moments[..., 0] / alpha[..., 0])[alpha[..., 0] > 0.05]
    assert disparity.min() <= composited.min() * 1.001
    assert composited.max() <= disparity.max() * 1.001

    model.zero_grad()
    losses["ray_spread"].backward()
    assert model.means.grad is not None
    assert model.means.grad[:, 2].abs().sum() > 0
