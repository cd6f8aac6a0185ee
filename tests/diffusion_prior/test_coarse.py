import json
import shutil

import pytest
import torch
from tiny_prior import random_clip, randomise, tiny_prior

from diffusion_prior.checkpoints import load_prior, save_prior
from diffusion_prior.coarse import COARSE_CHANNELS, STEP, CoarseRepair, coarse_condition, coarse_size, shrunk
from diffusion_prior.sampling_config import SamplingConfig


def small(**changes) -> CoarseRepair:
    settings = {"side": 8, "folds": 2, "widths": (4, 8), "gate_widths": (4, 8)}
    return CoarseRepair(**{**settings, **changes}).eval()


def saying(*colours: float, believed: float) -> CoarseRepair:
    """Networks which each say one colour for every pixel, and a gate which always believes as much."""
    coarse = small(folds=len(colours))
    for member, colour in zip(coarse.members, colours):
        torch.nn.init.constant_(member.conv_out.bias, colour / STEP)
    torch.nn.init.constant_(coarse.gate.conv_out.bias, float(torch.logit(torch.tensor(believed))))
    return coarse


def seeded():
    return torch.Generator().manual_seed(0)


def test_an_untrained_repair_changes_nothing():
    clip = random_clip(4, 24, 32)
    assert torch.equal(small().repaired(clip).rgb, clip.rgb)


def test_what_is_added_is_the_mean_of_what_the_networks_say_times_what_is_believed():
    clip = random_clip(4, 24, 32)
    dark = type(clip)(rgb=clip.rgb * 0.4, alpha=clip.alpha, disparity=clip.disparity)
    repaired = saying(0.1, 0.3, believed=0.25).repaired(dark)
    # (0.1 + 0.3) / 2 * 0.25 = 0.05
    torch.testing.assert_close(repaired.rgb[1:-1], dark.rgb[1:-1] + 0.05)


def test_the_references_at_the_ends_stay_bit_for_bit_and_colours_stay_in_range():
    clip = random_clip(4, 24, 32)
    coarse = small()
    randomise(coarse, std=2.0)
    repaired = coarse.repaired(clip).rgb
    assert torch.equal(repaired[[0, -1]], clip.rgb[[0, -1]])
    assert not torch.equal(repaired[1:-1], clip.rgb[1:-1])
    assert repaired.min() >= 0
    assert repaired.max() <= 1


def test_the_gate_is_told_where_a_reference_sees_what_is_shown():
    coarse = small()
    torch.nn.init.constant_(coarse.members[0].conv_out.bias, 0.2 / STEP)
    torch.nn.init.constant_(coarse.members[1].conv_out.bias, 0.2 / STEP)
    randomise(coarse.gate, std=1.0)
    clip = random_clip(4, 24, 32)
    dark, warped = clip.rgb * 0.4, torch.zeros(4, 8, 24, 32)
    blind = coarse.repaired(type(clip)(dark, clip.alpha, clip.disparity, warped=warped)).rgb
    warped[:, 3] = 1.0
    seeing = coarse.repaired(type(clip)(dark, clip.alpha, clip.disparity, warped=warped)).rgb
    assert not torch.allclose(blind[1:-1], seeing[1:-1], atol=1e-3)


def test_only_colours_change():
    clip = random_clip(4, 24, 32)
    repaired = saying(0.1, 0.1, believed=0.5).repaired(clip)
    assert torch.equal(repaired.alpha, clip.alpha)
    assert torch.equal(repaired.disparity, clip.disparity)


@pytest.mark.parametrize(
    ("height", "width", "wanted"),
    [(240, 320, (30, 40)), (320, 240, (40, 30)), (213, 320, (27, 40)), (20, 30, (20, 30))],
)
def test_small_pictures_keep_their_shape_and_are_never_enlarged(height, width, wanted):
    assert coarse_size(height, width, 40) == wanted


def test_shrinking_keeps_the_mean():
    pictures = torch.rand(2, 3, 4, 24, 32, generator=seeded())
    small_ones = shrunk(pictures, 8)
    assert small_ones.shape == (2, 3, 4, 6, 8)
    torch.testing.assert_close(small_ones.mean(dim=(-2, -1)), pictures.mean(dim=(-2, -1)))


def test_the_condition_holds_both_references_their_mean_colour_and_that_of_every_row():
    rgb = torch.zeros(1, 3, 3, 2, 2)
    rgb[0, 0] = torch.tensor([[0.2, 0.4], [0.6, 0.8]])
    rgb[0, 1] = 0.5
    rgb[0, 2] = 0.1
    alpha, disparity = torch.full((1, 3, 1, 2, 2), 0.9), torch.full((1, 3, 1, 2, 2), 0.3)
    warped = torch.full((1, 3, 4, 2, 2), 0.7)
    told = coarse_condition(rgb, alpha, disparity, warped, 40)
    assert told.shape == (1, 3, COARSE_CHANNELS + 4, 2, 2)
    middle = told[0, 1]
    assert torch.equal(middle[:3], rgb[0, 1])
    assert middle[3].unique() == 0.9
    assert middle[4].unique() == 0.3
    assert torch.equal(middle[5:8], rgb[0, 0])
    assert torch.equal(middle[8:11], rgb[0, 2])
    torch.testing.assert_close(middle[11:14], torch.full((3, 2, 2), (0.5 + 0.1) / 2))
    # rows of the first reference: 0.3 and 0.7; of the last: 0.1
    rows = torch.tensor([[0.2, 0.2], [0.4, 0.4]]).expand(3, 2, 2)
    torch.testing.assert_close(middle[14:17], rows)
    assert middle[17:].unique() == 0.7


def test_a_clip_without_warped_references_is_one_that_no_reference_sees():
    clip = random_clip(3, 24, 32)
    coarse = small()
    randomise(coarse, std=0.3)
    seen_nowhere = type(clip)(clip.rgb, clip.alpha, clip.disparity, warped=torch.zeros(3, 8, 24, 32))
    assert torch.equal(coarse.repaired(clip).rgb, coarse.repaired(seen_nowhere).rgb)


def test_frames_keep_their_detail_and_take_the_large_shapes_of_the_repaired_clip_where_nothing_is_seen():
    clip = random_clip(4, 24, 32)
    warped = torch.zeros(4, 8, 24, 32)
    warped[:, 3, :, :16] = 1.0
    repaired = type(clip)(torch.full_like(clip.rgb, 0.6), clip.alpha, clip.disparity, warped=warped)
    detail = torch.tensor([-0.1, 0.1]).repeat(16)  # gone in small pictures, whose pixels are 4 wide
    frames = 0.5 + detail.expand(4, 3, 24, 32)
    anchored = small().anchored(frames, repaired)
    torch.testing.assert_close(anchored[..., :8], frames[..., :8], atol=1e-6, rtol=0)
    torch.testing.assert_close(anchored[..., 24:], frames[..., 24:] + 0.1, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("changes", "text"), [({"folds": 1}, "folds"), ({"side": 4}, "side")])
def test_settings_that_cannot_work_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        small(**changes)


def test_a_prior_mends_the_renders_before_it_samples_unless_told_not_to():
    prior, clip = tiny_prior(), random_clip()
    plain = prior.enhance(clip, seeded()).rgb
    prior.set_coarse(saying(-0.2, -0.2, believed=0.5))
    assert prior.coarse is not None
    mended = prior.enhance(clip, seeded()).rgb
    repaired = prior.coarse.repaired(clip)
    assert torch.equal(mended, prior.coarse.anchored(prior.sample(repaired, seeded()), repaired))
    assert not torch.equal(mended, plain)
    prior.sampling = SamplingConfig(coarse=False)
    assert torch.equal(prior.enhance(clip, seeded()).rgb, plain)


def test_the_coarse_repair_alone_samples_nothing(monkeypatch):
    prior, clip = tiny_prior(), random_clip()
    prior.sampling = SamplingConfig(diffusion=False)
    with pytest.raises(ValueError, match="`diffusion` must be True for a prior without coarse repair"):
        prior.enhance(clip, seeded())
    prior.set_coarse(saying(-0.2, -0.2, believed=0.5))
    assert prior.coarse is not None
    monkeypatch.setattr(prior, "sample", None)
    assert torch.equal(prior.enhance(clip, seeded()).rgb, prior.coarse.repaired(clip).rgb)
    with pytest.raises(ValueError, match="`diffusion` and `coarse` must not both be False"):
        SamplingConfig(diffusion=False, coarse=False)


@pytest.fixture
def folder(tmp_path):
    prior = tiny_prior()
    coarse = small(side=12)
    randomise(coarse, std=0.3)
    prior.set_coarse(coarse)
    save_prior(prior, tmp_path / "prior", torch.float16)
    return tmp_path / "prior"


def test_it_is_saved_and_loaded_with_the_prior_and_computes_in_full_precision(folder):
    loaded = load_prior(str(folder), "cpu", torch.bfloat16)
    assert loaded.coarse is not None
    assert loaded.coarse.config["side"] == 12
    assert {parameter.dtype for parameter in loaded.coarse.parameters()} == {torch.float32}
    assert json.loads((folder / "model_index.json").read_text())["coarse"] == ["diffusion_prior.coarse", "CoarseRepair"]
    clip = random_clip()
    assert not torch.equal(loaded.coarse.repaired(clip).rgb, clip.rgb)


def test_a_prior_without_it_is_whole_and_one_with_half_of_it_is_not(folder):
    (folder / "coarse" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="lacks coarse/"):
        load_prior(str(folder), "cpu")
    shutil.rmtree(folder / "coarse")
    assert load_prior(str(folder), "cpu").coarse is None


def test_broken_weights_are_named(folder):
    weights = folder / "coarse" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"coarse.*broken or cut short"):
        load_prior(str(folder), "cpu")
