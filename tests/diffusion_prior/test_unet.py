import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from svd_folders import UNET as SETTINGS
from tiny_prior import randomise

from diffusion_prior.cpu_speed import speed_up
from diffusion_prior.unet import SpatioTemporalUNet


def build(**settings):
    unet = SpatioTemporalUNet(**{**SETTINGS, **settings}).eval()
    randomise(unet)
    return unet


def inputs(height=4, width=6, batch=2, frames=3):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, frames, 8, height, width, generator=generator),
        torch.randn(batch, generator=generator),
        torch.randn(batch, frames, 1, 16, generator=generator),
        torch.randn(batch, 3, generator=generator),
    )


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
@torch.no_grad()
def test_with_equal_embeddings_it_is_diffusers_unet(size, fast):
    ours = build()
    stock = UNetSpatioTemporalConditionModel(**SETTINGS).eval()
    stock.load_state_dict(ours.state_dict(), strict=True)
    if fast:
        speed_up(ours)
    sample, noise, embeddings, micro = inputs(*size)
    same = embeddings[:, :1].expand(-1, 3, -1, -1)
    wanted = stock(sample, noise, encoder_hidden_states=embeddings[:, 0], added_time_ids=micro).sample
    torch.testing.assert_close(ours(sample, noise, same, micro), wanted, rtol=1e-4, atol=1e-4 * wanted.std().item())


@torch.no_grad()
def test_the_embedding_of_a_frame_matters_and_most_of_all_to_that_frame():
    unet = build()
    sample, noise, embeddings, micro = inputs()
    changed = embeddings.clone()
    changed[:, 1] += 1
    change = (unet(sample, noise, changed, micro) - unet(sample, noise, embeddings, micro)).abs().mean(dim=(0, 2, 3, 4))
    assert change[1] > 0
    assert change.argmax() == 1


@torch.no_grad()
def test_one_noise_level_per_clip():
    unet = build()
    sample, noise, embeddings, micro = inputs()
    together = unet(sample, noise, embeddings, micro)
    alone = unet(sample[1:], noise[1:], embeddings[1:], micro[1:])
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_layout_a_takes_a_pose_per_frame_and_ignores_add_embedding():
    unet = build(pose_conditions=22)
    assert unet.layout == "A"
    assert unet.pose_embedding.linear_1.weight.shape == (128, 22 * 48)
    sample, noise, embeddings, _ = inputs()
    poses = torch.randn(2, 3, 22, generator=torch.Generator().manual_seed(1))
    before = unet(sample, noise, embeddings, poses)
    randomise(unet.add_embedding, seed=5)
    assert torch.equal(unet(sample, noise, embeddings, poses), before)
    poses[:, 2] += 1
    assert not torch.equal(unet(sample, noise, embeddings, poses), before)


def test_layout_b_has_exactly_the_tensors_of_diffusers():
    stock = UNetSpatioTemporalConditionModel(**SETTINGS).state_dict()
    ours = build().state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: tensor.shape for n, tensor in stock.items()}
    assert build().layout == "B"


def test_the_papers_size_has_the_published_number_of_tensors_and_parameters():
    with torch.device("meta"):
        published = SpatioTemporalUNet(pose_conditions=22).state_dict()
    assert len(published) == 1432
    assert sum(tensor.numel() for tensor in published.values()) == 1_527_615_722


def test_gradients_reach_everything_but_queries_and_keys_of_single_tokens():
    unet = build().train()
    speed_up(unet)
    sample, noise, embeddings, micro = inputs(batch=1, frames=2)
    embeddings.requires_grad_()
    unet(sample, noise, embeddings, micro).square().mean().backward()
    assert embeddings.grad is not None
    assert embeddings.grad.abs().sum() > 0
    without = {name for name, parameter in unet.named_parameters() if parameter.grad is None}
    assert without
    # norm2 feeds the queries alone
    assert {name.split("transformer_blocks.0.")[1].rsplit(".", 1)[0] for name in without} == {
        "norm2",
        "attn2.to_q",
        "attn2.to_k",
    }
