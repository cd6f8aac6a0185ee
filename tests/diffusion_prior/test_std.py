import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder
from tiny_prior import random_clip, randomise, tiny_prior

from diffusion_prior.conditioning import decoder_condition
from diffusion_prior.std import ConditionEncoder, SpatialTemporalDecoder, widened


def video_vae(patch_size=1, layers=1):
    torch.manual_seed(0)
    vae = AutoencoderKLTemporalDecoder(
        in_channels=3 * patch_size**2,
        out_channels=3 * patch_size**2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=layers,
        latent_channels=4,
    )
    randomise(vae)
    return vae.eval()


def std_inputs(patch_size, batch=1, frames=3, warped_references=0):
    clip = random_clip(frames, height=8 * patch_size, width=12 * patch_size)
    shape = (frames, 4 * warped_references, 8 * patch_size, 12 * patch_size)
    warped = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    condition = decoder_condition(clip.rgb, clip.alpha, clip.disparity, warped).expand(batch, -1, -1, -1, -1)
    return torch.randn(batch, frames, 4, 4, 6, generator=torch.Generator().manual_seed(1)), condition


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("patch_size", [1, 2])
@torch.no_grad()
def test_an_untrained_std_is_the_stock_decoder_bit_for_bit(patch_size, layers):
    vae = video_vae(patch_size, layers)
    std = SpatialTemporalDecoder.from_vae(vae, patch_size, warped_references=1).eval()
    latents, condition = std_inputs(patch_size, warped_references=1)
    stock = vae.decode(latents[0].contiguous(memory_format=torch.channels_last), num_frames=3).sample
    assert torch.equal(std(latents, condition)[0], torch.nn.functional.pixel_shuffle(stock, patch_size))


@torch.no_grad()
def test_on_a_vae_as_deep_as_svds_an_untrained_std_is_the_stock_decoder_bit_for_bit_too():
    torch.manual_seed(0)
    vae = AutoencoderKLTemporalDecoder(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),  # SVD's (128, 256, 512, 512), a quarter as wide
        layers_per_block=2,
        latent_channels=4,
    ).eval()
    randomise(vae, std=0.05)
    clip = random_clip(3, height=32, width=40)
    condition = decoder_condition(clip.rgb, clip.alpha, clip.disparity)
    latents = torch.randn(3, 4, 4, 5, generator=torch.Generator().manual_seed(1))
    stock = vae.decode(latents.contiguous(memory_format=torch.channels_last), num_frames=3).sample
    assert torch.equal(SpatialTemporalDecoder.from_vae(vae).eval()(latents[None], condition[None])[0], stock)


@torch.no_grad()
def test_the_copy_of_the_decoder_is_a_copy():
    vae = video_vae()
    std = SpatialTemporalDecoder.from_vae(vae)
    before = std.decoder.conv_in.weight.clone()
    randomise(vae, seed=9)
    assert torch.equal(std.decoder.conv_in.weight, before)


@pytest.mark.parametrize("channel", [0, 3, 4, 5, 10, 11, 14, 18])
@torch.no_grad()
def test_once_trained_every_part_of_the_condition_matters(channel):
    std = SpatialTemporalDecoder.from_vae(video_vae(2), 2, warped_references=2).eval()
    randomise(std)
    latents, condition = std_inputs(2, warped_references=2)
    changed = condition.clone()
    changed[:, :, channel] += 0.5
    assert not torch.allclose(std(latents, changed), std(latents, condition))


@torch.no_grad()
def test_temporal_convolutions_tie_neighbouring_frames():
    std = SpatialTemporalDecoder.from_vae(tiny_prior().vae, 2).eval()  # identity temporal layers in the decoder
    latents, condition = std_inputs(2)
    changed = latents.clone()
    changed[:, 2] += 1
    assert torch.equal(std(latents, condition)[:, 0], std(changed, condition)[:, 0])
    randomise(std.temporal)
    assert not torch.allclose(std(latents, condition)[:, 0], std(changed, condition)[:, 0])


@torch.no_grad()
def test_a_blend_of_one_gives_the_render_back():
    std = SpatialTemporalDecoder.from_vae(video_vae(2), 2).eval()
    torch.nn.init.ones_(std.blend.bias)
    latents, condition = std_inputs(2)
    torch.testing.assert_close(std(latents, condition), condition[:, :, :3], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_blend_of_one_gives_a_warped_reference_back_where_it_is_seen_and_changes_nothing_elsewhere():
    std = SpatialTemporalDecoder.from_vae(video_vae(2), 2, warped_references=1).eval()
    latents, condition = std_inputs(2, warped_references=1)
    condition = condition.clone()
    condition[:, :, 14, :8], condition[:, :, 11:, 8:] = 1.0, 0.0  # seen in the upper half
    before = std(latents, condition)
    torch.nn.init.ones_(std.blend.bias[4:])
    after = std(latents, condition)
    torch.testing.assert_close(after[..., :8, :], condition[:, :, 11:14, :8], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after[..., 8:, :], before[..., 8:, :])


@torch.no_grad()
def test_a_decoder_widened_for_warped_references_gives_what_it_gave():
    std = SpatialTemporalDecoder.from_vae(video_vae(2), 2, warped_references=1).eval()
    randomise(std)
    wider = widened(std, 3).eval()
    latents, condition = std_inputs(2, warped_references=3)
    torch.testing.assert_close(wider(latents, condition), std(latents, condition[:, :, :15]))
    with pytest.raises(ValueError, match="takes 3 warped references, more than 2"):
        widened(wider, 2)


@torch.no_grad()
def test_a_decoder_widened_for_context_gives_what_it_gave_until_it_is_trained():
    std = SpatialTemporalDecoder.from_vae(video_vae(2), 2).eval()
    randomise(std)
    wider = widened(std, 0, (8, 8)).eval()
    latents, condition = std_inputs(2)
    torch.testing.assert_close(wider(latents, condition), std(latents, condition))
    randomise(wider.condition_encoder.context)
    assert not torch.allclose(wider(latents, condition), std(latents, condition))
    with pytest.raises(ValueError, match=r"has the widths \(8, 8\), not \(8,\)"):
        widened(wider, 0, (8,))


@torch.no_grad()
def test_clips_of_a_batch_do_not_mix():
    std = SpatialTemporalDecoder.from_vae(video_vae(), 1).eval()
    randomise(std)
    latents, condition = std_inputs(1, batch=2)
    latents = torch.cat([latents[:1], latents[:1] + 1])
    together = std(latents, condition)
    torch.testing.assert_close(together[:1], std(latents[:1], condition[:1]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1])


def test_gradients_reach_every_parameter_after_the_first_step():
    std = SpatialTemporalDecoder.from_vae(video_vae(2, layers=2), 2).train()
    randomise(std)
    latents, condition = std_inputs(2)
    std(latents, condition).square().mean().backward()
    assert [name for name, parameter in std.named_parameters() if parameter.grad is None] == []


def test_zero_initialised_layers_learn_from_the_first_step():
    std = SpatialTemporalDecoder.from_vae(video_vae(2), 2).train()
    latents, condition = std_inputs(2)
    std(latents, condition).square().mean().backward()
    for layer in (std.blend, std.warps[0].scale_shift, std.temporal[1].conv):
        assert layer.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_context_brings_the_far_corner_of_the_picture_into_the_coarsest_features():
    pictures = torch.zeros(2, 3, 64, 64)
    pictures[1, :, 0, 0] = 1.0

    def reach(*context_widths):
        encoder = ConditionEncoder(3, (8, 8), context_widths)
        randomise(encoder)
        return [(level[1, :, -1, -1] - level[0, :, -1, -1]).abs().max() for level in encoder(pictures)]

    # far: 5 halvings below 64 leave 2 pixels, and each convolution sees its neighbours
    assert [*reach(), *reach(8, 8, 8, 8)[:1]] == [0, 0, 0]
    assert reach(8, 8, 8, 8)[1] > 0


def test_a_vae_for_other_pixel_blocks_is_refused():
    with pytest.raises(ValueError, match="patch_size 2 has 12 output channels, this one has 3"):
        SpatialTemporalDecoder.from_vae(video_vae(1), 2)


def test_widths_must_match_the_scales():
    with pytest.raises(ValueError, match=r"one width per decoder block: \(16,\) against \(32, 64\)"):
        SpatialTemporalDecoder(block_out_channels=(32, 64), condition_widths=(16,))
