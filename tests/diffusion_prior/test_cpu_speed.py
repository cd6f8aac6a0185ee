import copy

import pytest
import torch
from tiny_prior import random_clip, tiny_prior

from diffusion_prior.cpu_speed import GroupNorm, TemporalConv3d, speed_up


@pytest.mark.parametrize("shape", [(2, 32, 5, 6), (2, 64, 4, 3), (1, 32, 3, 4, 5)])
def test_group_norm_equals_torch_forward_and_backward(shape):
    generator = torch.Generator().manual_seed(0)
    order = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = torch.randn(shape, generator=generator).contiguous(memory_format=order)
    grad = torch.randn(shape, generator=generator)
    results = []
    for norm_class in (torch.nn.GroupNorm, GroupNorm):
        norm = norm_class(32, shape[1])
        torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        out = norm(leaf)
        out.backward(grad)
        results.append((out, leaf.grad, norm.weight.grad, norm.bias.grad))
    assert torch.equal(results[0][0], results[1][0])
    for stock, ours in zip(results[0][1:], results[1][1:]):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def test_group_norm_passes_gradcheck():
    norm = GroupNorm(2, 4).double()
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(norm, (x,))


@pytest.mark.parametrize(("kernel", "order"), [(3, torch.channels_last_3d), (5, torch.contiguous_format)])
def test_a_convolution_over_frames_equals_torch_forward_and_backward(kernel, order):
    generator = torch.Generator().manual_seed(0)
    stock = torch.nn.Conv3d(4, 6, (kernel, 1, 1), padding=(kernel // 2, 0, 0)).double()
    ours = copy.deepcopy(stock)
    holder = torch.nn.Sequential(ours)
    speed_up(holder)
    assert type(holder[0]) is TemporalConv3d
    x = torch.randn(2, 4, 5, 3, 2, dtype=torch.float64, generator=generator).contiguous(memory_format=order)
    grad = torch.randn(2, 6, 5, 3, 2, dtype=torch.float64, generator=generator)
    results = []
    for conv in (stock, ours):
        leaf = x.detach().clone().requires_grad_()
        out = conv(leaf)
        out.backward(grad)
        results.append((out.detach(), leaf.grad, conv.weight.grad, conv.bias.grad))
    for expected, got in zip(*results):
        torch.testing.assert_close(got, expected)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x))
        assert ours(x).stride() == ours(x.requires_grad_()).stride()


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 1, 1)},
        {"kernel_size": (3, 1, 1), "padding": (1, 0, 0), "stride": (2, 1, 1)},
        {"kernel_size": (3, 1, 1), "padding": (1, 0, 0), "groups": 2},
        {"kernel_size": (2, 1, 1), "padding": (1, 0, 0)},
    ],
)
def test_other_convolutions_are_left_alone(settings):
    holder = torch.nn.Sequential(torch.nn.Conv3d(4, 4, **settings))
    speed_up(holder)
    assert type(holder[0]) is torch.nn.Conv3d


def test_speed_up_keeps_names_parameters_and_results():
    from diffusers import AutoencoderKLTemporalDecoder

    torch.manual_seed(0)
    stock = AutoencoderKLTemporalDecoder(block_out_channels=(32,), latent_channels=4).eval()
    fast = copy.deepcopy(stock)
    parameters = dict(fast.named_parameters())
    speed_up(fast)
    assert all(fast.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert list(fast.state_dict()) == list(stock.state_dict())
    assert any(isinstance(part, GroupNorm) for part in fast.modules())
    x = random_clip().rgb
    with torch.no_grad():
        torch.testing.assert_close(fast(x, num_frames=3).sample, stock(x, num_frames=3).sample, rtol=1e-5, atol=1e-5)


def test_priors_are_sped_up_wherever_they_come_from():
    prior = tiny_prior()
    for module in (prior.vae, prior.unet, prior.std):
        kinds = {type(part) for part in module.modules()}
        assert GroupNorm in kinds
        assert torch.nn.GroupNorm not in kinds


def test_group_norm_learns_under_autocast_as_torch_does():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 32, 6, 5, generator=generator).contiguous(memory_format=torch.channels_last)
    results = []
    for norm_class in (torch.nn.GroupNorm, GroupNorm):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3), norm_class(32, 32), torch.nn.Conv2d(32, 1, 1))
        with torch.autocast("cpu", torch.bfloat16):
            net(x).float().square().mean().backward()
        results.append([parameter.grad for parameter in net.parameters()])
    for stock, ours in zip(*results):
        assert ours.dtype == stock.dtype == torch.float32
        # bfloat16 rounds each product to 8 bits
        torch.testing.assert_close(ours, stock, rtol=2e-2, atol=2e-2 * stock.abs().max().item() + 1e-6)
