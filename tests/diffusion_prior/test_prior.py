import dataclasses
import itertools

import pytest
import torch
from tiny_prior import TINY_CONFIG, random_clip, randomise, tiny_prior

from diffusion_prior import prior as prior_module
from diffusion_prior.colour import match_first_reference
from diffusion_prior.noise import precondition
from diffusion_prior.prior import (
    PriorConfig,
    VideoPrior,
    blend_windows,
    build_compact_prior,
    cpu_multiplies_bfloat16,
    denoise,
    fast_dtype,
    frame_windows,
)
from diffusion_prior.sampling_config import SamplingConfig
from diffusion_prior.types import ConditionClip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("height", "width"), [(16, 24), (13, 17), (4, 4), (1, 3)])
def test_any_size_comes_back_as_it_came(height, width):
    enhanced = tiny_prior().enhance(random_clip(3, height, width), seeded())
    assert enhanced.rgb.shape == (3, 3, height, width)
    assert enhanced.rgb.dtype == torch.float32
    assert enhanced.rgb.min() >= 0
    assert enhanced.rgb.max() <= 1


def test_the_same_generator_state_gives_the_same_frames_and_another_one_others():
    prior, clip = tiny_prior(), random_clip()
    first = prior.enhance(clip, seeded(3)).rgb
    assert torch.equal(prior.enhance(clip, seeded(3)).rgb, first)
    assert not torch.equal(prior.enhance(clip, seeded(4)).rgb, first)


def test_enhancing_leaves_the_global_random_state_alone():
    prior, clip = tiny_prior(noise_augmentation=0.1), random_clip()
    before = torch.get_rng_state()
    prior.enhance(clip, seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_enhance_is_predict_then_decode_then_colour_correction():
    clip = random_clip()
    plain, corrected = tiny_prior(colour_correction=False), tiny_prior(colour_correction=True)
    decoded = plain.decode(plain.predict_latents(clip, seeded()), clip)
    assert torch.equal(plain.enhance(clip, seeded()).rgb, decoded)
    wanted = match_first_reference(decoded, clip.rgb[0]).clamp(0, 1)
    assert torch.equal(corrected.enhance(clip, seeded()).rgb, wanted)


def test_latents_of_a_perfect_unet_come_out_unscaled(monkeypatch):
    prior, clip = tiny_prior(), random_clip(3, 13, 17)
    prior.set_latent_scale(4.0)
    clean = torch.randn(3, 4, 4, 5, generator=seeded())  # 13 x 17 padded to 16 x 20, over factor 4
    monkeypatch.setattr(prior_module, "denoise", lambda unet, noisy, sigma, condition: clean[None])
    torch.testing.assert_close(prior.predict_latents(clip, seeded()), clean / 4)


@torch.no_grad()
def test_denoise_is_edm_preconditioning_around_the_network():
    prior, clip = tiny_prior(), random_clip(2, 8, 8)
    randomise(prior.unet, std=0.05)
    condition = prior.condition(clip, seeded())
    noisy, sigma = torch.randn(1, 2, 4, 2, 2, generator=seeded()), torch.tensor([0.75])
    told = torch.cat([0.8 * noisy, condition.latents, condition.extra], dim=2)  # numbers: test_noise.py
    raw = prior.unet(told, precondition(sigma).noise, condition.embeddings, condition.micro)
    wanted = 0.64 * noisy - 0.6 * raw
    torch.testing.assert_close(denoise(prior.unet, noisy, sigma, condition), wanted)


def test_guidance_of_one_never_runs_the_unconditional_pass(monkeypatch):
    calls = []
    real = prior_module.denoise

    def counting(unet, noisy, sigma, condition):
        calls.append(bool((condition.embeddings == 0).all()))
        return real(unet, noisy, sigma, condition)

    monkeypatch.setattr(prior_module, "denoise", counting)
    tiny_prior(max_guidance=1.0).enhance(random_clip(), seeded())
    assert calls == [False, False]
    calls.clear()
    tiny_prior(max_guidance=3.0).enhance(random_clip(), seeded())
    assert calls == [False, True, False, True]


def test_the_condition_holds_what_the_configuration_asks_for():
    clip = random_clip()
    for extra in (0, 2):
        prior = tiny_prior(extra_condition_channels=extra)
        condition = prior.condition(clip, seeded())
        assert condition.latents.shape == (1, 3, 4, 4, 6)
        assert condition.extra.shape == (1, 3, extra, 4, 6)
        assert condition.embeddings.shape == (1, 3, 1, 16)
        assert condition.micro.tolist() == [[6.0, 127.0, 0.0]]


def test_noise_augmentation_changes_the_condition_latents_and_nothing_at_zero():
    clip = random_clip()
    still = tiny_prior(noise_augmentation=0.0)
    assert torch.equal(still.condition(clip, seeded(1)).latents, still.condition(clip, seeded(2)).latents)
    shaken = tiny_prior(noise_augmentation=0.2)
    assert not torch.equal(shaken.condition(clip, seeded(1)).latents, shaken.condition(clip, seeded(2)).latents)


def test_a_pose_conditioned_prior_asks_for_poses():
    parts = tiny_prior()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = type(parts.unet)(**{**_settings(parts.unet), "pose_conditions": 22})
    prior = VideoPrior(parts.vae, unet, parts.image_encoder, parts.std, parts.config)
    clip = random_clip()
    with pytest.raises(ValueError, match="give the clip `camera_to_world` and `fov_x_rad`"):
        prior.enhance(clip, seeded())
    posed = dataclasses.replace(clip, camera_to_world=torch.eye(4)[:3].repeat(3, 1, 1), fov_x_rad=1.0)
    assert prior.enhance(posed, seeded()).rgb.shape == clip.rgb.shape


def _settings(module):
    return {name: value for name, value in module.config.items() if not name.startswith("_")}


def test_a_clip_that_fits_is_one_window():
    assert [window.tolist() for window in frame_windows(5, 5, 1)] == [[0, 1, 2, 3, 4]]


def test_windows_by_hand():
    # 8 frames: 6 between the references; windows of 3 of them that share 1 need (6 - 1) / (3 - 1) -> 3 windows
    windows = [window.tolist() for window in frame_windows(8, 5, 1)]
    assert windows == [[0, 1, 2, 3, 7], [0, 3, 4, 5, 7], [0, 4, 5, 6, 7]]


@pytest.mark.parametrize(("size", "overlap"), [(5, 0), (5, 1), (5, 2), (10, 2), (25, 6)])
def test_windows_hold_every_frame_start_and_end_with_references_and_overlap(size, overlap):
    for frames in range(size + 1, 4 * size):
        windows = frame_windows(frames, size, overlap)
        assert set(torch.cat(windows).tolist()) == set(range(frames))
        for window in windows:
            assert len(window) == size
            assert window[0] == 0
            assert window[-1] == frames - 1
            assert (window.diff() > 0).all()
        for one, other in itertools.pairwise(windows):
            assert len(set(one[1:-1].tolist()) & set(other[1:-1].tolist())) >= overlap


def test_blending_windows_of_a_function_of_the_frame_alone_changes_nothing():
    frames = torch.randn(11, 3, 2, 2, generator=seeded())
    blended = blend_windows(lambda index: frames[index], frame_windows(11, 5, 1), 11)
    torch.testing.assert_close(blended, frames)


def test_a_frame_near_the_end_of_a_window_counts_less():
    # windows 0 1 2 3 7 and 0 3 4 5 7: frame 3 has weight min(3, 1) = 1 in the first, min(1, 3) = 1 in the second
    # windows 0 1 2 3 6 and 0 2 3 4 6 and ..: give window k the value k and read the mean of frame 2: weights 2 and 1
    windows = [torch.tensor([0, 1, 2, 3, 5]), torch.tensor([0, 2, 3, 4, 5])]
    values = iter([torch.zeros(5, 1), torch.ones(5, 1)])
    blended = blend_windows(lambda index: next(values), windows, 6)
    torch.testing.assert_close(blended.flatten(), torch.tensor([0.5, 0.0, 1 / 3, 2 / 3, 1.0, 0.5]))


def test_long_clips_go_in_windows_and_no_window_is_longer_than_the_prior_can(monkeypatch):
    prior, lengths = tiny_prior(), []
    real = prior_module.denoise

    def watching(unet, noisy, sigma, condition):
        lengths.append(noisy.shape[1])
        return real(unet, noisy, sigma, condition)

    monkeypatch.setattr(prior_module, "denoise", watching)
    assert prior.enhance(random_clip(9, 8, 8), seeded()).rgb.shape == (9, 3, 8, 8)
    assert set(lengths) == {5}


@pytest.mark.parametrize("frames", [2, 3, 4, 5])
def test_short_clips_need_no_padding(frames):
    assert tiny_prior().enhance(random_clip(frames, 8, 8), seeded()).rgb.shape[0] == frames


def test_the_same_seed_builds_the_same_weights_without_touching_the_global_state():
    before = torch.get_rng_state()
    one, again, other = tiny_prior(1), tiny_prior(1), tiny_prior(2)
    assert torch.equal(torch.get_rng_state(), before)
    for name, module in one.modules.items():
        states = [prior.modules[name].state_dict() for prior in (again, other)]
        assert all(torch.equal(tensor, states[0][key]) for key, tensor in module.state_dict().items())
        assert not all(torch.equal(tensor, states[1][key]) for key, tensor in module.state_dict().items())


@torch.no_grad()
def test_temporal_layers_of_a_new_vae_start_as_the_identity():
    vae, clip = tiny_prior().vae, random_clip()
    latents = vae.encode(torch.nn.functional.pixel_unshuffle(clip.rgb, 2)).latent_dist.mode()
    together = vae.decode(latents, num_frames=3).sample
    alone = torch.cat([vae.decode(latent[None], num_frames=1).sample for latent in latents])
    torch.testing.assert_close(together, alone)


def test_the_bundled_size_stays_within_60_mb_of_half_precision():
    with torch.device("meta"):
        prior = build_compact_prior()
    count = sum(parameter.numel() for module in prior.modules.values() for parameter in module.parameters())
    assert 2 * count <= 60e6
    assert prior.latent_factor == 8


# Measured on average over two steps and the decoder: 0.005 with the 8 bits of bfloat16, 0.0006 with the 11 of float16.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_enhances_like_float32(dtype, tolerance):
    clip = random_clip()
    full, half = tiny_prior(), tiny_prior().to(dtype=dtype)
    assert half.std.dtype == half.unet.dtype == half.vae.dtype == dtype
    exact, rounded = full.enhance(clip, seeded()).rgb, half.enhance(clip, seeded()).rgb
    assert (exact - rounded).abs().mean() < tolerance


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, True),
        ({"amx_tile": True, "amx_bf16": True}, True),
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({}, False),
    ],
)
def test_bfloat16_is_chosen_only_where_the_cpu_multiplies_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert cpu_multiplies_bfloat16() is expected
    assert fast_dtype("cpu") == (torch.bfloat16 if expected else torch.float32)


def test_a_torch_which_does_not_tell_gets_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert fast_dtype("cpu") == torch.float32


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"patch_size": 0}, "`patch_size` must be at least 1, got 0"),
        ({"extra_condition_channels": 1}, "must be 0, or 2 for opacity and disparity, got 1"),
        ({"num_frames": 5, "window_overlap": 3}, r"less than `num_frames` - 2 = 3 .* got 3"),
    ],
)
def test_settings_that_cannot_work_are_refused(entries, match):
    with pytest.raises(ValueError, match=match):
        PriorConfig(**{**TINY_CONFIG, **entries})


def test_parts_of_different_priors_are_refused():
    small, other = tiny_prior(), tiny_prior(vae={"latent_channels": 6})
    with pytest.raises(ValueError, match="UNet out_channels is 6, but the VAE's latent_channels is 4"):
        VideoPrior(small.vae, other.unet, small.image_encoder, small.std, small.config)


def test_a_clip_of_two_references_only_is_enough():
    clip = random_clip(5, 8, 8)
    ends = ConditionClip(rgb=clip.rgb[[0, -1]], alpha=clip.alpha[[0, -1]], disparity=clip.disparity[[0, -1]])
    assert tiny_prior().enhance(ends, seeded()).rgb.shape == (2, 3, 8, 8)


def counted(prior, monkeypatch):
    """Shapes and micro-conditions that the UNet was run with."""
    seen = []
    real = prior_module.denoise

    def counting(unet, noisy, sigma, condition):
        seen.append((tuple(noisy.shape[1:]), condition))
        return real(unet, noisy, sigma, condition)

    monkeypatch.setattr(prior_module, "denoise", counting)
    return seen


def test_steps_frames_and_guidance_can_be_asked_for(monkeypatch):
    prior = tiny_prior()
    prior.sampling = SamplingConfig(steps=3, num_frames=4, max_guidance=2.0)
    seen = counted(prior, monkeypatch)
    prior.enhance(random_clip(5, 8, 8), seeded())
    # 3 steps, windows of 4 over 5 frames: 2, both branches
    assert len(seen) == 3 * 2 * 2
    assert {shape[0] for shape, _ in seen} == {4}


def test_a_seed_of_its_own_makes_the_generator_irrelevant():
    prior, clip = tiny_prior(), random_clip()
    prior.sampling = SamplingConfig(seed=3)
    first = prior.enhance(clip, seeded(0)).rgb
    assert torch.equal(prior.enhance(clip, seeded(1)).rgb, first)
    prior.sampling = SamplingConfig(seed=4)
    assert not torch.equal(prior.enhance(clip, seeded(0)).rgb, first)


@torch.no_grad()
def test_without_std_the_vaes_own_decoder_decodes():
    prior, clip = tiny_prior(), random_clip(4, 16, 16)
    randomise(prior.std)
    latents = prior.predict_latents(clip, seeded())
    prior.sampling = SamplingConfig(std=False)
    torch.testing.assert_close(prior.enhance(clip, seeded()).rgb, prior.decode_stock(latents).clamp(0, 1))


@pytest.mark.parametrize("own", [False, True])
def test_colour_correction_can_be_asked_for_and_declined(own):
    prior, other, clip = tiny_prior(colour_correction=own), tiny_prior(colour_correction=not own), random_clip()
    prior.sampling = SamplingConfig(colour_correction=not own)
    assert torch.equal(prior.enhance(clip, seeded()).rgb, other.enhance(clip, seeded()).rgb)


@pytest.mark.parametrize("sampler", ["heun", "dpm++2m"])
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_other_samplers_and_schedules_give_other_frames(sampler, schedule):
    prior, clip = tiny_prior(), random_clip()
    randomise(prior.unet, std=0.05)
    prior.sampling = SamplingConfig(steps=3)
    plain = prior.enhance(clip, seeded()).rgb
    prior.sampling = SamplingConfig(steps=3, sampler=sampler, schedule=schedule)
    assert not torch.equal(prior.enhance(clip, seeded()).rgb, plain)


@pytest.mark.parametrize("fit", ["pad", "tile"])
@pytest.mark.parametrize(("height", "width"), [(24, 40), (40, 24), (13, 90), (8, 8)])
def test_clips_of_any_camera_come_back_at_its_size_and_no_tile_is_larger_than_the_frame(
    fit, height, width, monkeypatch
):
    prior = tiny_prior(frame_height=16, frame_width=16)
    prior.sampling = SamplingConfig(fit=fit)
    seen = counted(prior, monkeypatch)
    assert prior.enhance(random_clip(3, height, width), seeded()).rgb.shape == (3, 3, height, width)
    assert max(max(shape[-2:]) for shape, _ in seen) <= 4  # 16 pixels, factor 4


def test_a_prior_with_a_size_of_its_own_tiles_by_itself_and_one_without_takes_clips_as_they_are():
    assert (tiny_prior(frame_height=16, frame_width=24).fit, tiny_prior().fit) == ("tile", "as-is")
    assert tiny_prior(frame_height=16, frame_width=24).frame_size == (16, 24)


def test_micro_conditions_of_the_unconditional_branch_are_kept_or_zeroed(monkeypatch):
    for kept in (True, False):
        prior = tiny_prior(max_guidance=2.0, unconditional_micro=kept)
        seen = counted(prior, monkeypatch)
        prior.enhance(random_clip(), seeded())
        assert seen[0][1].micro.tolist() == [[6.0, 127.0, 0.0]]
        assert seen[1][1].micro.tolist() == ([[6.0, 127.0, 0.0]] if kept else [[0.0, 0.0, 0.0]])
        monkeypatch.undo()


def test_frames_per_second_enter_less_one_or_as_they_are():
    clip = random_clip()
    assert tiny_prior().condition(clip, seeded()).micro[0, 0] == 6
    assert tiny_prior(subtract_one_from_fps=False).condition(clip, seeded()).micro[0, 0] == 7


def test_the_image_encoder_can_be_shown_squeezed_colours():
    clip = random_clip()
    squeezed = dataclasses.replace(clip, rgb=(clip.rgb + 1) / 2)
    given = tiny_prior(halved_clip_input=True).condition(clip, seeded()).embeddings
    torch.testing.assert_close(given, tiny_prior().condition(squeezed, seeded()).embeddings)


def test_settings_of_sampling_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        SamplingConfig(steps=0)
    with pytest.raises(ValueError, match="`num_frames` must be at least 3"):
        SamplingConfig(num_frames=2)
    with pytest.raises(ValueError, match="`frame_size` must be positive"):
        SamplingConfig(frame_size=(0, 512))
