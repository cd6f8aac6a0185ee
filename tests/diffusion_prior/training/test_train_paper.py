"""The paper's recipe: its values, flags over it, and a few of its steps on tiny networks."""

import json

import pytest
import torch
from svd_folders import write_svd_folder

from diffusion_prior.data.clips import ClipConfig
from diffusion_prior.training import train_paper
from diffusion_prior.training.train_ldm import LdmConfig, draw_sigmas
from diffusion_prior.training.train_paper import main, paper_recipe, shortcomings


def settings_of(monkeypatch, *flags: str) -> LdmConfig:
    """What the command would train with."""
    seen: list[LdmConfig] = []
    monkeypatch.setattr(train_paper, "run", seen.append)
    monkeypatch.setattr(train_paper, "shortcomings", lambda pairs, clips: [])
    main(["--pairs", "pairs", "--output", "output", *flags])
    return seen[0]


def test_the_recipe_is_the_paper_s(monkeypatch):
    config = settings_of(monkeypatch)
    assert str(config.prior) == "stabilityai/stable-video-diffusion-img2vid-xt"
    assert (config.clips.num_frames, config.clips.crop_px) == (25, 512)
    assert (config.steps, config.learning_rate, config.warmup_steps) == (80_000, 1e-4, 500)
    assert (config.loss, config.condition_dropout, config.scale.trainable) == ("authors", 0.1, "temporal")
    varied = (config.clips.flip, config.clips.permute_channels, config.clips.swap_references)
    assert varied == (False, False, False)
    assert config.clips.good_render_probability == 0


def test_single_flags_override_the_recipe_and_leave_the_rest(monkeypatch):
    flags = ("--learning-rate", "3e-5", "--clips.num-frames", "26", "--clips.flip", "--scale.trainable", "unet")
    config = settings_of(monkeypatch, *flags)
    assert (config.learning_rate, config.clips.num_frames, config.clips.flip) == (3e-5, 26, True)
    assert (config.scale.trainable, config.scale.gradient_checkpointing) == ("unet", True)
    assert (config.steps, config.clips.crop_px, config.loss) == (80_000, 512, "authors")


def test_pairs_too_small_for_the_recipe_are_told(pairs):
    small, short = shortcomings(pairs, paper_recipe().clips)
    assert "have a side below 512 pixels" in small
    assert "fewer than 23 frames" in short
    assert shortcomings(pairs, ClipConfig(num_frames=3, crop_px=8)) == []


def test_pairs_and_output_have_to_be_given(monkeypatch, capsys):
    monkeypatch.setattr(train_paper, "run", lambda config: None)
    with pytest.raises(SystemExit):
        main(["--pairs", "pairs"])
    assert "--output" in capsys.readouterr().err


def test_noise_levels_are_lognormal_from_the_first_step_on():
    sigma_max = 700.0
    levels = draw_sigmas(4000, 0.0, paper_recipe(), sigma_max, torch.Generator().manual_seed(0))
    # P(ln sigma > ln 700 = 6.55) = P(z > 3.66) = 1.3e-4: one clip in 4000 is clamped, where a share stays at the top 1000 are
    assert int((levels == sigma_max).sum()) < 5
    # three standard errors of 4000 draws: 3 * 1.6 / sqrt(4000) and 3 * 1.6 / sqrt(8000)
    assert float(levels.log().mean()) == pytest.approx(0.7, abs=0.076)
    assert float(levels.log().std()) == pytest.approx(1.6, abs=0.054)


def test_the_recipe_trains_an_svd_folder(pairs, tmp_path):
    folder, output = write_svd_folder(tmp_path / "svd", "B"), tmp_path / "out"
    flags = ["--pairs", str(pairs), "--output", str(output), "--prior", str(folder), "--steps", "2", "--log-every", "1"]
    flags += ["--clips.crop-px", "16", "--clips.num-frames", "3", "--clips.size-multiple", "8", "--sampling-steps", "1"]
    main([*flags, "--validation-clips", "1", "--precision", "fp32"])
    first = json.loads((output / "log.jsonl").read_text().splitlines()[0])
    # the first of 500 steps of warm-up: 1e-4 / 501
    assert first["learning_rate"] == pytest.approx(1e-4 / 501, rel=1e-3)
    assert (output / "prior" / "model_index.json").is_file()
