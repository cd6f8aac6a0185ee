"""The methods of the benchmark, as settings of the one training command that they all share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from nerfstudio.engine.trainer import TrainerConfig

    from nerfstudio_enhancer.datamanager import EnhancerDataManagerConfig
    from nerfstudio_enhancer.enhance_step import Feed
    from nerfstudio_enhancer.initial_splats import SeedSource
    from nerfstudio_enhancer.model import EnhancerModelConfig
    from nerfstudio_enhancer.scene.sparse_views import SparseViewsDataParserConfig

Addition = Literal["background", "depth", "regularisation", "perceptual", "haze"]
ADDITIONS: tuple[Addition, ...] = ("background", "depth", "regularisation", "perceptual", "haze")
"""What the method adds to splatfacto beside seed points and prior."""

METHOD_NAME = "3dgs-enhancer"


@dataclass(frozen=True)
class Method:
    """One row of the benchmark."""

    title: str
    """What it is, in words for the table."""
    additions: tuple[Addition, ...] = ADDITIONS
    """Which of the method's own additions to splatfacto it has, beside seed points and prior."""
    seed_points: SeedSource = "auto"
    """Where its first splats lie; `auto`: the best seed points that can be had."""
    depth_network: bool = True
    """Whether its random points lie where the depth network says."""
    feed: Feed | None = None
    """What its rounds feed back; None: no rounds."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else of the model's settings is different, by dotted name; `enhance.*` matters from the first round on."""

    @property
    def shares_first_stage(self) -> bool:
        """Whether its training up to the first round is the same as that of `geometry`."""
        own = all(name.startswith("enhance.") for name in self.settings)
        return self.additions == ADDITIONS and self.seed_points == "auto" and self.depth_network and own


METHODS = {
    "splatfacto-random": Method("plain splatfacto from random points", additions=(), seed_points="random"),
    "triangulated": Method("plain splatfacto from triangulated points", additions=(), seed_points="triangulated"),
    "stereo": Method("plain splatfacto from stereo points", additions=(), depth_network=False),
    "splatfacto": Method("plain splatfacto from our seed points (stereo and depth network)", additions=()),
    "background": Method("the same with a sensible background", additions=("background",)),
    "depth-loss": Method(
        "with background and a depth loss of weight 0.1", additions=("background",), settings={"depth_weight": 0.1}
    ),
    "regularised": Method("with the regularisation, without the background", additions=("regularisation",)),
    "geometry-depth-loss": Method("every addition and a depth loss of weight 0.1", settings={"depth_weight": 0.1}),
    "no-depth-network": Method("every addition but the prior and the depth network", depth_network=False),
    "geometry": Method("every addition but the prior"),
    "geometry-no-lpips": Method(
        "every addition but the prior and LPIPS on references",
        additions=("background", "depth", "regularisation", "haze"),
    ),
    "with-haze": Method("every addition but the prior, haze shown as it is", settings={"fade_haze": False}),
    "feed-renders": Method("control: un-enhanced renders fed back", feed="renders"),
    "feed-mean-filled": Method("control: renders with mean-filled holes fed back", feed="mean-filled"),
    "feed-blurred": Method("control: blurred renders fed back", feed="blurred"),
    "3dgs-enhancer": Method("the whole method", feed="enhanced"),
    "no-warps": Method(
        "the whole without warped references", feed="enhanced", settings={"enhance.warp_references": False}
    ),
    "no-image-confidence": Method(
        "the whole without image confidence", feed="enhanced", settings={"enhance.image_confidence": False}
    ),
    "no-pixel-confidence": Method(
        "the whole without pixel confidence", feed="enhanced", settings={"enhance.pixel_confidence": False}
    ),
    "no-agreement": Method(
        "the whole whatever the references say against it",
        feed="enhanced",
        settings={"enhance.reference_agreement": False},
    ),
    "no-coarse": Method(
        "the whole without the coarse repair", feed="enhanced", settings={"enhance.sampling.coarse": False}
    ),
    "no-diffusion": Method(
        "the whole without diffusion and decoder: the coarse repair alone",
        feed="enhanced",
        settings={"enhance.sampling.diffusion": False},
    ),
    "late-diffusion": Method(
        "the whole with diffusion and decoder in its last two rounds alone",
        feed="enhanced",
        settings={"enhance.diffusion_rounds": 2},
    ),
    "no-std": Method(
        "the whole without the spatial-temporal decoder", feed="enhanced", settings={"enhance.sampling.std": False}
    ),
    "colour-correction": Method(
        "the whole with the paper's colour correction",
        feed="enhanced",
        settings={"enhance.sampling.colour_correction": True},
    ),
    "no-refresh": Method(
        "the whole with its first round alone, whose views are never made anew",
        feed="enhanced",
        settings={"enhance.rounds": 1},
    ),
    "faultless": Method(
        "ceiling of a prior: what splats of all views but the test views show on the same paths", feed="faultless"
    ),
    "faultless-all": Method(
        "the same, every frame needed in full", feed="faultless", settings={"enhance.unseen_range": (0.0, 0.0)}
    ),
    "oracle": Method("ceiling: real photographs of unused views fed back", feed="photographs"),
}

MAIN_METHODS = (
    "splatfacto-random",
    "triangulated",
    "splatfacto",
    "geometry",
    "feed-renders",
    "feed-mean-filled",
    "feed-blurred",
    "3dgs-enhancer",
    "oracle",
)
"""Those that are compared unless others are asked for; the rest are ablations."""


def method_config() -> TrainerConfig:
    """A fresh copy of the settings that `ns-train 3dgs-enhancer` starts from, without viewer and logger.

    Raises:
        ImportError: if nerfstudio does not know the method.
    """
    import copy

    from nerfstudio.configs.method_configs import all_methods

    if METHOD_NAME not in all_methods:
        raise ImportError(f"nerfstudio does not know `{METHOD_NAME}`; install this package with `pip install -e .`.")
    config = copy.deepcopy(all_methods[METHOD_NAME])
    # No viewer and no logger. Nerfstudio compares this string with the names of those it knows.
    config.vis = "none"  # pyright: ignore[reportAttributeAccessIssue]
    config.viewer.quit_on_train_completion = True
    return config


def model_of(config: TrainerConfig) -> EnhancerModelConfig:
    """The method's model settings."""
    return cast("EnhancerModelConfig", config.pipeline.model)


def datamanager_of(config: TrainerConfig) -> EnhancerDataManagerConfig:
    """The method's data manager settings."""
    return cast("EnhancerDataManagerConfig", config.pipeline.datamanager)


def dataparser_of(config: TrainerConfig) -> SparseViewsDataParserConfig:
    """The method's dataparser settings."""
    return cast("SparseViewsDataParserConfig", datamanager_of(config).dataparser)


def with_additions(config: TrainerConfig, additions: Sequence[Addition]) -> None:
    """Switch off, in place, those of the method's additions to splatfacto that are not named."""
    model = model_of(config)
    if "background" not in additions:
        model.fill_background = "splatfacto"
    if "depth" not in additions:
        model.depth_weight = 0.0
    if "regularisation" not in additions:
        model.gaussian_dropout = 0.0
        model.opacity_decay = 1.0
        model.depth_smoothness = 0.0
        model.ray_spread = 0.0
    if "perceptual" not in additions:
        model.lpips_weight = 0.0
    if "haze" not in additions:
        model.fade_haze = False


def with_seed_points(config: TrainerConfig, source: SeedSource, depth_network: bool = True) -> None:
    """Choose, in place, where the first splats lie."""
    dataparser = dataparser_of(config)
    dataparser.seed_points = source
    dataparser.initial.stereo.depth_network = depth_network


def with_settings(config: TrainerConfig, settings: Mapping[str, Any]) -> None:
    """Change, in place, settings of the model by dotted name.

    Raises:
        AttributeError: for a name that the model's settings do not have.
    """
    for name, value in settings.items():
        owner = model_of(config)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        getattr(owner, last)  # a misspelt name must not become a new field
        setattr(owner, last, value)


def set_prior(config: TrainerConfig, prior: str, feed: Feed = "enhanced") -> None:
    """Choose, in place, the prior and what its rounds feed back; `none` means no rounds."""
    enhance = model_of(config).enhance
    enhance.prior, enhance.feed = prior, feed
