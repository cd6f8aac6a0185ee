import math

import pytest
import torch
from tiny_prior import random_clip, tiny_prior

from diffusion_prior.conditioning import (
    LatentCondition,
    decoder_condition,
    embed_frames,
    encode_frames,
    latent_extras,
    micro_conditions,
    normalised_disparity,
    pad_to_multiple,
    pose_conditions,
    to_signed,
    to_unit,
)


def test_signed_and_unit_are_inverse_and_keep_grey():
    assert to_signed(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-1.0, 0.0, 1.0]
    values = torch.rand(5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(to_unit(to_signed(values)), values)


def test_disparity_by_hand():
    # near is the smallest of three solid depths (2 % of 3 values): 2; the last pixel is not seen
    depth = torch.tensor([2.0, 4.0, 8.0, 1.0]).reshape(1, 1, 1, 4)
    alpha = torch.tensor([1.0, 1.0, 0.6, 0.04]).reshape(1, 1, 1, 4)
    assert normalised_disparity(depth, alpha).flatten().tolist() == [1.0, 0.5, 0.25, 0.0]


def test_disparity_near_is_the_two_percent_quantile_of_the_solid_pixels():
    # 101 solid depths 1 .. 101: two values (1, 2) lie below the 2 % quantile 3
    depth = torch.arange(1.0, 102.0).reshape(1, 1, 1, 101)
    disparity = normalised_disparity(depth, torch.ones_like(depth))
    torch.testing.assert_close(disparity, (3 / depth).clamp(max=1))


def test_disparity_does_not_depend_on_the_unit_of_depth_nor_on_other_frames():
    generator = torch.Generator().manual_seed(0)
    depth = torch.rand(3, 1, 6, 5, generator=generator) + 0.5
    alpha = torch.rand(3, 1, 6, 5, generator=generator)
    disparity = normalised_disparity(depth, alpha)
    scale = torch.tensor([2.0, 1.0, 64.0])[:, None, None, None]
    torch.testing.assert_close(normalised_disparity(depth * scale, alpha), disparity)
    assert disparity.min() >= 0
    assert disparity.max() <= 1
    assert (disparity[alpha <= 0.05] == 0).all()


def test_disparity_of_an_empty_frame_is_zero_and_of_a_thin_one_uses_the_whole_frame():
    depth = torch.tensor([0.0, 0.0, 0.0, 0.0]).reshape(1, 1, 2, 2)
    assert (normalised_disparity(depth, torch.zeros_like(depth)) == 0).all()
    thin = torch.tensor([2.0, 4.0]).reshape(1, 1, 1, 2)
    assert normalised_disparity(thin, torch.full_like(thin, 0.3)).flatten().tolist() == [1.0, 0.5]


def test_padding_repeats_the_border_and_leaves_what_fits():
    frames = torch.arange(6.0).reshape(1, 1, 2, 3)
    padded = pad_to_multiple(frames, 4)
    assert padded.shape == (1, 1, 4, 4)
    assert padded[0, 0].tolist() == [[0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5], [3, 4, 5, 5]]
    assert torch.equal(pad_to_multiple(padded, 4), padded)
    assert pad_to_multiple(torch.zeros(1, 1, 1, 1), 8).shape == (1, 1, 8, 8)
    assert pad_to_multiple(torch.zeros(1, 1, 9, 40), 8, at_least=24).shape == (1, 1, 24, 40)


def test_extras_are_the_mean_over_each_latents_pixels():
    alpha = torch.tensor([[0.0, 1.0], [1.0, 1.0]]).reshape(1, 1, 1, 2, 2)
    extras = latent_extras(alpha, torch.full_like(alpha, 0.5), 2)
    assert extras.shape == (1, 1, 2, 1, 1)
    assert extras.flatten().tolist() == [0.75, 0.5]


def test_micro_conditions_enter_as_svd_was_trained():
    assert micro_conditions(7.0, 127.0, 0.02, 2, "cpu").tolist() == [[6.0, 127.0, pytest.approx(0.02)]] * 2


def test_decoder_condition_gives_every_frame_both_references():
    clip = random_clip(frames=4)
    condition = decoder_condition(clip.rgb, clip.alpha, clip.disparity)
    assert condition.shape == (4, 11, 16, 24)
    assert torch.equal(condition[:, :3], clip.rgb * 2 - 1)
    assert torch.equal(condition[:, 3:4], clip.alpha)
    assert torch.equal(condition[:, 4:5], clip.disparity)
    for frame in condition:
        assert torch.equal(frame[5:8], clip.rgb[0] * 2 - 1)
        assert torch.equal(frame[8:11], clip.rgb[-1] * 2 - 1)
    batched = decoder_condition(clip.rgb[None], clip.alpha[None], clip.disparity[None])
    assert torch.equal(batched[0], condition)


def test_decoder_condition_appends_warped_references_grey_where_they_are_not_seen():
    clip = random_clip(frames=4)
    warped = torch.zeros(4, 8, 16, 24)
    warped[:, :3], warped[:, 3] = 0.75, 1.0  # the first is seen everywhere, the second nowhere
    condition = decoder_condition(clip.rgb, clip.alpha, clip.disparity, warped)
    assert condition.shape == (4, 19, 16, 24)
    assert torch.equal(condition[:, :11], decoder_condition(clip.rgb, clip.alpha, clip.disparity))
    assert condition[0, 11:, 0, 0].tolist() == [0.5, 0.5, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_frames_are_encoded_one_by_one_whatever_the_batch_axes():
    prior, clip = tiny_prior(), random_clip()
    with torch.no_grad():
        latents = encode_frames(prior.vae, clip.rgb, 2)
        again = encode_frames(prior.vae, clip.rgb[None, 1:2], 2)
    assert latents.shape == (3, 4, 4, 6)
    torch.testing.assert_close(again[0, 0], latents[1])


def test_frames_encoded_a_few_at_once_have_the_same_latents(monkeypatch):
    prior, rgb = tiny_prior(), random_clip(6).rgb.unflatten(0, (2, 3))
    counts, encoder = [], prior.vae.encoder.forward
    monkeypatch.setattr(prior.vae.encoder, "forward", lambda pixels: [counts.append(len(pixels)), encoder(pixels)][1])
    with torch.no_grad():
        latents = encode_frames(prior.vae, rgb, 2)
        in_parts = encode_frames(prior.vae, rgb, 2, at_once=4)
    assert counts == [6, 4, 2]
    torch.testing.assert_close(in_parts, latents)


def test_embeddings_differ_between_frames_and_pass_gradients_to_the_encoder():
    prior, clip = tiny_prior(), random_clip()
    embeddings = embed_frames(prior.image_encoder, clip.rgb)
    assert embeddings.shape == (3, 1, 16)
    assert not torch.allclose(embeddings[0], embeddings[1])
    embeddings.sum().backward()
    assert prior.image_encoder.visual_projection.weight.grad is not None


def test_unconditional_is_zero_but_for_the_micro_conditions():
    condition = LatentCondition(
        latents=torch.ones(1, 2, 4, 2, 2),
        extra=torch.ones(1, 2, 2, 2, 2),
        embeddings=torch.ones(1, 2, 1, 8),
        micro=torch.ones(1, 3),
    )
    empty = condition.unconditional()
    assert empty.latents.sum() == empty.extra.sum() == empty.embeddings.sum() == 0
    assert torch.equal(empty.micro, condition.micro)


def test_pose_conditions_by_hand():
    # camera 1 sits 2 along x of camera 0, unrotated: inv(c2w_1) @ c2w_0 translates by -2, divided by 2
    poses = torch.eye(4)[:3].repeat(2, 1, 1)
    poses[1, 0, 3] = 2.0
    told = pose_conditions(poses, math.pi / 2, torch.tensor([6.0, 127.0, 0.02]))
    assert told.shape == (2, 22)
    torch.testing.assert_close(told[:, :3], torch.tensor([[6.0, 127.0, 0.02]] * 2))
    torch.testing.assert_close(told[0, 3:19].reshape(4, 4), torch.eye(4))
    torch.testing.assert_close(told[1, 3:19].reshape(4, 4)[:3, 3], torch.tensor([-1.0, 0.0, 0.0]))
    torch.testing.assert_close(told[:, 19:], torch.tensor([[math.pi / 2, 1.0, 0.0]] * 2), atol=1e-6, rtol=0)


def test_pose_conditions_of_standing_cameras_are_finite():
    poses = torch.eye(4)[:3].repeat(3, 1, 1)
    assert torch.isfinite(pose_conditions(poses, 1.0, torch.zeros(3))).all()
