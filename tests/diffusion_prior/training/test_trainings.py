"""Each training on tiny networks: a few real steps, then the prior that it leaves behind."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from svd_folders import write_svd_folder

from diffusion_prior.checkpoints import load_prior
from diffusion_prior.coarse import CoarseRepair
from diffusion_prior.conditioning import encode_frames
from diffusion_prior.data.clips import ClipConfig, ClipDataset, collate, find_gaps, step_generator, to_float
from diffusion_prior.prior import build_compact_prior
from diffusion_prior.training import train_all, train_coarse, train_ldm, train_std, train_vae
from diffusion_prior.training.config import ScaleConfig
from diffusion_prior.training.setup import fit_to_prior, fixed_clips
from diffusion_prior.training.train_coarse import CoarseConfig, CoarseLosses, FoldedClips, jittered, zoom_in
from diffusion_prior.training.train_ldm import LdmConfig, batch_condition, draw_sigmas
from diffusion_prior.training.train_std import StdConfig, StdLosses, sample_batch
from diffusion_prior.training.train_vae import VaeConfig
from diffusion_prior.training.validation import condition_clip, contact_sheet, judge

CLIPS = ClipConfig(num_frames=4, batch_size=2, crop_px=32, size_multiple=8)


def settings(kind, pairs, tiny_prior, output, **changes):
    values = {
        "steps": 3,
        "log_every": 1,
        "warmup_steps": 0,
        "precision": "fp32",
        "validation_clips": 1,
        "clips": CLIPS,
        "prior": tiny_prior,
    }
    return kind(pairs=pairs, output=output, **{**values, **changes})


def log(output) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def changed_parts(before, after) -> set[str]:
    return {
        name
        for name, module in after.modules.items()
        if any(
            not torch.equal(tensor, before.modules[name].state_dict()[key].half())
            for key, tensor in module.state_dict().items()
            if tensor.is_floating_point()
        )
    }


@pytest.fixture
def another_precision():
    """Lets the next training choose its arithmetic: accelerate keeps the first one of a process."""
    yield AcceleratorState._reset_state
    AcceleratorState._reset_state()


@pytest.fixture(scope="module")
def before(tiny_prior):
    return load_prior(str(tiny_prior), "cpu", torch.float32)


def test_vae_training_changes_the_vae_and_gives_std_its_decoder(pairs, tiny_prior, before, tmp_path):
    train_vae.run(settings(VaeConfig, pairs, tiny_prior, tmp_path))
    trained = load_prior(str(tmp_path / "prior"), "cpu", torch.float16)
    assert changed_parts(before, trained) == {"vae", "std"}
    for name, tensor in trained.vae.decoder.state_dict().items():
        assert torch.equal(trained.std.decoder.state_dict()[name], tensor)
    lines = log(tmp_path)
    assert {"loss", "l1", "lpips", "kl", "gradient_norm", "learning_rate"} <= set(lines[0])
    assert {"render/psnr", "reconstruction/psnr", "reconstruction/lpips", "latent_std"} <= set(lines[-1])


def test_vae_training_records_the_scale_that_gives_latents_unit_spread(pairs, tiny_prior, tmp_path):
    config = settings(VaeConfig, pairs, tiny_prior, tmp_path)
    train_vae.run(config)
    trained = load_prior(str(tmp_path / "prior"), "cpu", torch.float32)
    (clip,) = fixed_clips(config, train_vae.VALIDATION_FRAMES, 8)
    frames = to_float(torch.cat([clip.target[0], clip.rgb[0]]))
    with torch.no_grad():
        latents = encode_frames(trained.vae, frames, 2) * trained.latent_scale
    # weights were rounded to float16 after the scale was measured
    assert float(latents.std()) == pytest.approx(1.0, abs=0.01)


def test_ldm_training_changes_unet_and_image_encoder_alone(pairs, tiny_prior, before, tmp_path):
    train_ldm.run(settings(LdmConfig, pairs, tiny_prior, tmp_path))
    trained = load_prior(str(tmp_path / "prior"), "cpu", torch.float16)
    assert changed_parts(before, trained) == {"unet", "image_encoder"}
    assert {"render/psnr", "sampled/psnr", "ceiling/psnr"} <= set(log(tmp_path)[-1])


def test_std_training_changes_the_std_alone(pairs, tiny_prior, before, tmp_path):
    train_std.run(settings(StdConfig, pairs, tiny_prior, tmp_path))
    trained = load_prior(str(tmp_path / "prior"), "cpu", torch.float16)
    assert changed_parts(before, trained) == {"std"}
    assert {"render/psnr", "stock/psnr", "enhanced/lpips", "corrected/psnr"} <= set(log(tmp_path)[-1])


def test_std_training_with_a_discriminator_trains_both(pairs, tiny_prior, before, tmp_path):
    config = settings(StdConfig, pairs, tiny_prior, tmp_path, adversarial_weight=0.1, adversarial_start=0.0)
    train_std.run(config)
    line = log(tmp_path)[0]
    assert {"std/loss", "std/adversarial", "discriminator/loss"} <= set(line)
    weights = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["losses"]
    assert any(name.startswith("discriminator") for name in weights)
    assert changed_parts(before, load_prior(str(tmp_path / "prior"), "cpu", torch.float16)) == {"std"}


def test_a_decoder_s_new_layers_and_its_discriminator_follow_from_the_seed(pairs, tiny_prior, tmp_path):
    def losses(output, seed: int) -> list[float]:
        changes = {"seed": seed, "context_widths": (32, 32), "adversarial_weight": 0.1, "adversarial_start": 0.0}
        train_std.run(settings(StdConfig, pairs, tiny_prior, tmp_path / output, steps=2, **changes))
        return [line["std/loss"] for line in log(tmp_path / output) if "std/loss" in line]

    torch.manual_seed(1)
    first = losses("first", seed=3)
    torch.manual_seed(2)
    assert losses("again", seed=3) == first
    assert losses("other", seed=4) != first


def test_std_learns_to_brighten_renders(pairs, tiny_prior, tmp_path):
    config = settings(StdConfig, pairs, tiny_prior, tmp_path, steps=60, learning_rate=5e-3, lpips_weight=0.0)
    train_std.run(config)
    losses = [line["l1"] for line in log(tmp_path) if "l1" in line]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


WHOLE_CLIPS = ClipConfig(num_frames=4, batch_size=2, crop_px=None, size_multiple=8, permute_channels=False)


def coarse_settings(pairs, tiny_prior, output, **changes):
    values = {"clips": WHOLE_CLIPS, "folds": 2, "gate_every": 1, **changes}
    return settings(CoarseConfig, pairs, tiny_prior, output, **values)


def test_coarse_training_gives_the_prior_a_coarse_repair_and_leaves_the_rest(other_pairs, tiny_prior, before, tmp_path):
    train_coarse.run(coarse_settings(other_pairs, tiny_prior, tmp_path))
    trained = load_prior(str(tmp_path / "prior"), "cpu", torch.float16)
    coarse = trained.coarse
    assert coarse is not None
    assert coarse.folds == 2
    trained.set_coarse(None)
    assert changed_parts(before, trained) == set()
    assert {"l1", "l2", "gated_l2", "new_l2", "render_l2"} <= set(log(tmp_path)[0])
    assert {"render/psnr", "coarse/psnr", "without/psnr", "enhanced/lpips"} <= set(log(tmp_path)[-1])


def test_coarse_training_goes_on_from_the_priors_own_and_refuses_other_folds(other_pairs, tiny_prior, tmp_path):
    train_coarse.run(coarse_settings(other_pairs, tiny_prior, tmp_path / "first"))
    trained = tmp_path / "first" / "prior"
    train_coarse.run(coarse_settings(other_pairs, trained, tmp_path / "again", learning_rate=0.0))
    states = [load_prior(str(path), "cpu").coarse.state_dict() for path in (trained, tmp_path / "again" / "prior")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    with pytest.raises(ValueError, match="has 2 folds, got folds=3"):
        train_coarse.run(coarse_settings(other_pairs, trained, tmp_path / "other", folds=3))


def test_a_network_never_learns_from_the_scenes_that_it_leaves_out(other_pairs, tiny_prior, tmp_path):
    config = coarse_settings(other_pairs, tiny_prior, tmp_path, folds=3)
    folded = FoldedClips(find_gaps(other_pairs), config.clips, 0, 3)
    losses = CoarseLosses(CoarseRepair(side=16, folds=3, widths=(4, 8)), config, torch.device("cpu"))
    learning = {fold: set() for fold in range(3)}
    for step in range(24):
        batch = folded[step]
        losses.zero_grad()
        losses(batch, step_generator(0, step), 0.0, "main")["loss"].backward()
        touched = [m for m, net in enumerate(losses.coarse.members) if net.conv_out.bias.grad is not None]
        learning[batch.fold].update(touched)
        assert losses.coarse.gate.conv_out.bias.grad is not None
    assert learning == {0: {1, 2}, 1: {0, 2}, 2: {0, 1}}


def test_the_gate_learns_in_some_of_the_rounds_through_the_folds(other_pairs, tiny_prior, tmp_path):
    config = coarse_settings(other_pairs, tiny_prior, tmp_path, folds=2, gate_every=3)
    folded = FoldedClips(find_gaps(other_pairs), config.clips, 0, 2, config.gate_every)
    losses = CoarseLosses(CoarseRepair(side=16, folds=2, widths=(4, 8)), config, torch.device("cpu"))
    learnt = []
    for step in range(8):
        losses.zero_grad()
        parts = losses(folded[step], step_generator(0, step), 0.0, "main")
        parts["loss"].backward()
        learnt.append(losses.coarse.gate.conv_out.bias.grad is not None)
        assert ("gated_l2" in parts) == learnt[-1]
    assert learnt == [True, True, False, False, False, False, True, True]
    with pytest.raises(ValueError, match="gate_every must be at least 1, got 0"):
        coarse_settings(other_pairs, tiny_prior, tmp_path, gate_every=0)


def test_every_fold_draws_from_scenes_of_its_own(other_pairs):
    folded = FoldedClips(find_gaps(other_pairs), WHOLE_CLIPS, 0, 3)
    scenes = [{gap.header.scene for gaps in part._by_size.values() for gap in gaps} for part in folded._folds]
    assert scenes == [{"ale"}, {"juice"}, {"water"}]
    assert [folded[step].fold for step in range(4)] == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="4 folds need as many training scenes at least, got 3"):
        FoldedClips(find_gaps(other_pairs), WHOLE_CLIPS, 0, 4)


def test_the_coarse_repair_learns_to_brighten_renders_of_scenes_that_are_new_to_it(other_pairs, tiny_prior, tmp_path):
    train_coarse.run(coarse_settings(other_pairs, tiny_prior, tmp_path, steps=120))
    lines = [line for line in log(tmp_path) if "gated_l2" in line]
    shares = [
        sum(line["gated_l2"] for line in part) / sum(line["render_l2"] for line in part)
        for part in (lines[:8], lines[-8:])
    ]
    assert shares[0] > 0.8
    assert shares[1] < 0.5


def test_a_whole_prior_is_trained_stage_by_stage_and_a_finished_stage_is_not_trained_again(
    other_pairs, tmp_path, monkeypatch, another_precision
):
    another_precision()  # this machine's own, which may be bfloat16
    minutes = {f"{stage}_minutes": 1e-3 for stage in ("vae", "ldm", "std", "coarse")}
    plan = train_all.PlanConfig(pairs=other_pairs, output=tmp_path, coarse_folds=2, **minutes)
    train_all.run(plan)
    prior = load_prior(str(tmp_path / "prior"), "cpu")
    assert prior.coarse is not None
    card = (tmp_path / "prior" / "MODEL_CARD.md").read_text()
    for title in ("VAE", "latent diffusion model", "spatial-temporal decoder", "coarse repair"):
        assert f"## Training: {title}" in card
    for stage in (train_vae, train_ldm, train_std, train_coarse):
        monkeypatch.setattr(stage, "run", lambda _: pytest.fail("trained again"))
    train_all.run(plan)


def test_colour_jitter_multiplies_every_colour_and_nothing_else():
    told, factors = torch.ones(1, 2, 25, 2, 2), torch.tensor([[0.5, 2.0, 3.0]])
    changed = jittered(told, factors)[0, 1, :, 0, 0].tolist()
    colour, rest = [0.5, 2.0, 3.0], [1.0, 1.0]
    assert changed == colour + rest + 4 * colour + 2 * [*colour, 1.0]


def test_a_zoomed_clip_shows_one_window_in_all_that_lies_in_the_frame_and_whole_references():
    places = torch.arange(80.0).view(8, 10)
    told, target = places.repeat(2, 25, 1, 1), places.repeat(2, 3, 1, 1)
    zoom_in(told, target, 0.5, torch.Generator().manual_seed(3))
    window = target[0, 0]
    assert window.min() > 0 or window.max() < 79  # less than the whole
    assert window.diff(dim=1).min() >= 0  # in their order
    assert window.diff(dim=0).min() >= 0
    assert float((window[0, -1] - window[0, 0]).round()) < 9
    whole = range(5, 14)
    for channel in range(25):
        torch.testing.assert_close(told[1, channel], places if channel in whole else window)


def test_a_window_of_the_whole_size_changes_nothing():
    told, target = torch.rand(2, 25, 6, 8), torch.rand(2, 3, 6, 8)
    before = told.clone(), target.clone()
    zoom_in(told, target, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close((told, target), before)


def test_the_first_phase_trains_at_the_highest_noise_alone():
    config = LdmConfig(pairs=None, output=None, regression_share=0.5, highest_noise_share=0.25)
    generator = torch.Generator().manual_seed(0)
    assert draw_sigmas(100, 0.49, config, 80.0, generator).unique().tolist() == [80.0]
    later = draw_sigmas(4000, 0.5, config, 80.0, generator)
    highest = float((later == 80.0).float().mean())
    # a quarter stays; of the others P(ln sigma > ln 80) = P(z > (4.382 - 0.7) / 1.6) = 0.0107 is clamped
    assert highest == pytest.approx(0.25 + 0.75 * 0.0107, abs=0.025)
    assert float(later[later < 80].log().median()) == pytest.approx(0.7, abs=0.15)


def test_condition_of_a_batch_is_that_of_the_clip_alone(pairs, tiny_prior, before, tmp_path):
    clip = fixed_clips(settings(LdmConfig, pairs, tiny_prior, tmp_path), 5, 8)[0]
    with torch.no_grad():
        batched = batch_condition(before, clip, None)
        alone = before.condition(condition_clip(clip), torch.Generator().manual_seed(0))
    torch.testing.assert_close(batched.latents, alone.latents)
    torch.testing.assert_close(batched.extra, alone.extra)
    torch.testing.assert_close(batched.micro, alone.micro)
    # thumbnails are stored as bytes
    torch.testing.assert_close(batched.embeddings, alone.embeddings, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("image_size", [64, 96])
def test_the_image_encoder_sees_of_whole_frames_in_training_what_it_sees_afterwards(fine_pairs, image_size):
    prior = build_compact_prior(image_encoder={"image_size": image_size})
    whole_frames = ClipConfig(
        num_frames=4,
        batch_size=1,
        crop_px=None,
        size_multiple=8,
        flip=False,
        permute_channels=False,
        swap_references=False,
        good_render_probability=0.0,
    )
    config = fit_to_prior(settings(LdmConfig, fine_pairs, None, None, clips=whole_frames), prior)
    assert config.clips.thumbnail_px == image_size
    batch = ClipDataset(find_gaps(fine_pairs), config.clips)[0]
    assert batch.thumbnail.shape[-2:] == (image_size, image_size)
    with torch.no_grad():
        trained = batch_condition(prior, batch, None).embeddings
        afterwards = prior.condition(condition_clip(batch), torch.Generator()).embeddings
    # Thumbnails are stored as bytes: measured 1.3e-3 and 9e-4; 5e-2 with thumbnails of 64 px for 96.
    assert float((trained - afterwards).norm() / afterwards.norm()) < 0.01


def test_the_bundled_prior_s_thumbnails_are_the_default():
    bundled = load_prior("bundled", "cpu")
    assert fit_to_prior(LdmConfig(pairs=None, output=None), bundled).clips.thumbnail_px == ClipConfig().thumbnail_px


def test_a_pose_conditioned_prior_learns_from_poses(pairs, tmp_path):
    folder = write_svd_folder(tmp_path / "svd", "A")
    scale = ScaleConfig(trainable="temporal")
    config = settings(LdmConfig, pairs, folder, tmp_path / "out", steps=2, sampling_steps=1, scale=scale)
    train_ldm.run(config)
    before, after = (load_prior(str(path), "cpu", torch.float16).unet for path in (folder, tmp_path / "out" / "prior"))
    states = before.state_dict(), after.state_dict()
    changed = {name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])}
    assert any("temporal_transformer_block" in name for name in changed)
    assert {name for name in changed if "temporal_transformer_block" not in name} == {
        f"pose_embedding.linear_{number}.{part}" for number in (1, 2) for part in ("weight", "bias")
    }


def test_a_batch_tells_a_pose_conditioned_prior_what_a_clip_alone_would(pairs, tmp_path):
    prior = load_prior(str(write_svd_folder(tmp_path, "A")), "cpu", torch.float32)
    prior.config = dataclasses.replace(prior.config, noise_augmentation=0.0)
    clip = fixed_clips(settings(LdmConfig, pairs, None, tmp_path), 5, 8)[0]
    camera_to_world = clip.camera_to_world.clone()
    camera_to_world[0, :, 0, 3] = torch.arange(5.0)
    other = dataclasses.replace(clip, camera_to_world=camera_to_world, fov_x_rad=torch.tensor([1.5]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        both = batch_condition(prior, collate([clip, other]), None).micro
    assert both.shape == (2, 5, 22)
    for told, one in zip(both, (clip, other)):
        assert torch.equal(told, prior.condition(condition_clip(one), torch.Generator()).micro[0])


def test_sampled_batch_equals_the_prior_s_own_sample_of_a_clip(pairs, tiny_prior, before, tmp_path):
    clip = fixed_clips(settings(LdmConfig, pairs, tiny_prior, tmp_path), 5, 8)[0]
    batched = sample_batch(before, clip, torch.Generator().manual_seed(3))[0]
    alone = before.predict_latents(condition_clip(clip), torch.Generator().manual_seed(3))
    torch.testing.assert_close(batched, alone, atol=0.02, rtol=0.02)


def test_sampled_batch_of_a_pose_conditioned_prior_is_guided_as_its_own_sample_is(pairs, tmp_path):
    prior = load_prior(str(write_svd_folder(tmp_path, "A")), "cpu", torch.float32)
    prior.config = dataclasses.replace(prior.config, noise_augmentation=0.0, num_inference_steps=2)
    assert prior.config.uses_guidance
    assert not prior.config.unconditional_micro
    clip = fixed_clips(settings(LdmConfig, pairs, None, tmp_path), 5, 8)[0]
    batched = sample_batch(prior, clip, torch.Generator().manual_seed(3))[0]
    alone = prior.predict_latents(condition_clip(clip), torch.Generator().manual_seed(3))
    # thumbnails are stored as bytes: measured 1e-3; 0.26 with the micro-conditions kept in the unconditional pass
    torch.testing.assert_close(batched, alone, atol=0.02, rtol=0.02)


@pytest.fixture
def latents_of(pairs, tiny_prior, before, tmp_path):
    """`latents_of(probability, number)`: what the STD's training decodes of four clips, and the clips."""
    config = settings(StdConfig, pairs, tiny_prior, tmp_path, scale=ScaleConfig(encode_frames=3))
    clip = fixed_clips(config, 5, 8)[0]
    batch = collate([clip, *(dataclasses.replace(clip, target=clip.target // part) for part in (2, 3, 4))])

    def latents(probability: float, number: int):
        losses = StdLosses(before, dataclasses.replace(config, photograph_latent_probability=probability))
        return losses._latents(batch, step_generator(0, number)), batch

    return latents


def test_clips_that_take_the_photographs_latents_are_not_sampled(latents_of, before, monkeypatch):
    monkeypatch.setattr(train_std, "sample_batch", None)
    latents, batch = latents_of(1.0, 0)
    with torch.no_grad():
        torch.testing.assert_close(latents, encode_frames(before.vae, to_float(batch.target), 2))


def test_every_clip_gets_its_own_latents_and_only_the_others_are_sampled(latents_of, before, monkeypatch):
    asked = []

    def sample(prior, batch, generator, at_once):
        asked.append((len(batch.rgb), at_once))
        return -encode_frames(prior.vae, to_float(batch.target), 2)

    monkeypatch.setattr(train_std, "sample_batch", sample)
    latents, batch = latents_of(0.5, 1)
    with torch.no_grad():
        encoded = encode_frames(before.vae, to_float(batch.target), 2)
    from_photographs = [torch.allclose(got, own, atol=1e-4) for got, own in zip(latents, encoded)]
    sampled = [torch.allclose(got, -own, atol=1e-4) for got, own in zip(latents, encoded)]
    assert sorted(map(sum, zip(from_photographs, sampled))) == [1, 1, 1, 1]
    assert 0 < sum(sampled) < 4  # so that both kinds are among them
    assert asked == [(sum(sampled), 3)]


def test_latents_of_a_step_follow_from_its_number(latents_of):
    one, other = latents_of(0.5, 1)[0], latents_of(0.5, 1)[0]
    assert torch.equal(one, other)
    assert not torch.equal(one, latents_of(0.5, 2)[0])


def test_crops_are_made_to_fit_the_latents(pairs, tiny_prior, tmp_path):
    clips = dataclasses.replace(CLIPS, crop_px=38, size_multiple=3)
    train_vae.run(settings(VaeConfig, pairs, tiny_prior, tmp_path, clips=clips, steps=1))
    assert (tmp_path / "prior" / "model_index.json").is_file()


def test_judging_leaves_the_references_out(pairs, tiny_prior, tmp_path):
    clip = fixed_clips(settings(LdmConfig, pairs, tiny_prior, tmp_path), 4, 8)[0]

    def spoil_references(clip, number):
        frames = to_float(clip.target[0]).clone()
        frames[[0, -1]] = 0
        return frames

    metrics, sheet = judge([clip], {"perfect": spoil_references})
    assert metrics["perfect/psnr"] == 100
    assert metrics["perfect/lpips"] == 0
    assert metrics["render/psnr"] < 30
    # one row: render, prediction, photograph, each 200 px wide and 32 x 200 / 40 = 160 px high
    assert sheet.shape == (3, 160, 600)


def test_contact_sheet_stacks_rows_of_different_shapes():
    tall, wide = torch.zeros(3, 20, 10), torch.ones(3, 10, 20)
    sheet = contact_sheet([[tall, tall], [wide, wide]])
    assert sheet.shape == (3, 400 + 100, 400)
    assert sheet[:, :400].max() == 0
    assert sheet[:, 400:].min() == 1


@pytest.mark.slow
def test_two_processes_train_together(pairs, tiny_prior, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command += ["diffusion_prior.training.train_ldm", "--pairs", str(pairs), "--output", str(tmp_path)]
    command += ["--prior", str(tiny_prior), "--steps", "2", "--log-every", "1", "--validation-clips", "1"]
    command += ["--clips.crop-px", "32", "--clips.batch-size", "1", "--clips.num-frames", "3", "--precision", "fp32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in log(tmp_path) if "loss" in line] == [1, 2]
    assert (tmp_path / "prior" / "model_index.json").is_file()


@pytest.mark.parametrize(("task", "kind"), [(train_vae, VaeConfig), (train_ldm, LdmConfig), (train_std, StdConfig)])
def test_bfloat16_trains_like_float32(task, kind, pairs, tiny_prior, tmp_path, another_precision):
    losses = {}
    for precision in ("fp32", "bf16"):
        another_precision()
        task.run(settings(kind, pairs, tiny_prior, tmp_path / precision, precision=precision, steps=2))
        losses[precision] = [line["loss"] for line in log(tmp_path / precision) if "loss" in line]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)
