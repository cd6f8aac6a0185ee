import pytest

from nerfstudio_enhancer.evaluation.methods import (
    METHODS,
    method_config,
    set_prior,
    with_additions,
    with_seed_points,
    with_settings,
)


def test_settings_of_one_method_leave_the_registered_ones_alone():
    config = method_config()
    with_additions(config, ())
    with_seed_points(config, "random")
    set_prior(config, "none", "renders")
    fresh = method_config()
    assert config.pipeline.model.fill_background == "splatfacto"
    assert fresh.pipeline.model.fill_background != "splatfacto"
    assert fresh.pipeline.datamanager.dataparser.seed_points != "random"
    assert fresh.pipeline.model.enhance.feed == "enhanced"


def test_each_addition_can_be_left_out_by_itself():
    for kept, fields in (
        ("background", ("depth_weight", "gaussian_dropout", "opacity_decay", "fade_haze")),
        ("depth", ("fill_background", "gaussian_dropout", "opacity_decay", "fade_haze")),
        ("regularisation", ("fill_background", "depth_weight", "fade_haze")),
        ("haze", ("fill_background", "depth_weight", "gaussian_dropout", "opacity_decay")),
    ):
        config, whole = method_config(), method_config()
        for settings in (config, whole):
            settings.pipeline.model.depth_weight = settings.pipeline.model.gaussian_dropout = 0.5
        with_additions(config, (kept,))
        model, all_on = config.pipeline.model, whole.pipeline.model
        changed = {
            name
            for name in ("fill_background", "depth_weight", "gaussian_dropout", "opacity_decay", "fade_haze")
            if getattr(model, name) != getattr(all_on, name)
        }
        assert changed == set(fields)


def test_only_methods_with_all_additions_share_the_first_stage():
    assert [name for name, method in METHODS.items() if not method.shares_first_stage] == [
        "splatfacto-random",
        "triangulated",
        "stereo",
        "splatfacto",
        "background",
        "depth-loss",
        "regularised",
        "geometry-depth-loss",
        "no-depth-network",
        "geometry-no-lpips",
        "with-haze",
    ]


def test_settings_are_changed_by_dotted_name_and_misspelt_ones_refused():
    config = method_config()
    with_settings(config, {"depth_weight": 0.3, "enhance.pixel_confidence": False})
    assert config.pipeline.model.depth_weight == 0.3
    assert config.pipeline.model.enhance.pixel_confidence is False
    with pytest.raises(AttributeError, match="pixel_confidense"):
        with_settings(config, {"enhance.pixel_confidense": False})


def test_settings_of_every_method_exist():
    for method in METHODS.values():
        with_settings(method_config(), method.settings)
