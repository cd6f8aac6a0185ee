"""Three layers of diffusers that are needlessly slow, most of all on a CPU, replaced by equal ones.

Parameters, their names and results (to rounding) stay; only the way of computing changes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from jaxtyping import Float
from torch import Tensor, nn

MAX_SLICES = 32
"""Attention is cut into so many slices at most: a temporal layer has a batch of thousands of pixels."""


def speed_up(module: nn.Module) -> None:
    """Exchange, in place, group norms, temporal convolutions and diffusers' attention processors for the ones below."""
    for part in module.modules():
        for name, child in part.named_children():
            if type(child) is nn.GroupNorm:
                setattr(part, name, _converted(child))
            if type(child) is nn.Conv3d and TemporalConv3d.fits(child):
                child.__class__ = TemporalConv3d
        if isinstance(part, Attention) and isinstance(part.processor, AttnProcessor2_0):
            part.set_processor(SingleTokenProcessor())  # pyright: ignore[reportArgumentType]  # a closed union


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm with a backward pass in contiguous memory on CPUs.

    torch 2.14's backward for channels-last tensors with one or two channels a group takes 50 times as long: 53 ms
    against 1 ms for bfloat16 [6, 32, 80, 80] on one thread. It was half of the STD's training time.
    """

    def forward(self, input: Float[Tensor, "b c *hw"]) -> Float[Tensor, "b c *hw"]:
        slow = input.device.type == "cpu" and not input.is_contiguous() and torch.is_grad_enabled()
        if not slow or self.weight is None or self.bias is None:
            return super().forward(input)
        return _ContiguousBackward.apply(input, self.weight, self.bias, self.num_groups, self.eps)  # pyright: ignore


class _ContiguousBackward(torch.autograd.Function):
    """Group norm whose forward is torch's, and whose backward is torch's on contiguous copies."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        batch, channels = input.shape[:2]
        pixels = input[0, 0].numel()
        output, mean, rstd = torch.native_group_norm(input, weight, bias, batch, channels, pixels, groups, eps)
        ctx.save_for_backward(input, weight, mean, rstd)
        ctx.sizes = batch, channels, pixels, groups
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        input, weight, mean, rstd = ctx.saved_tensors
        grad = grads[0].contiguous().to(input.dtype)
        gradients = torch.ops.aten.native_group_norm_backward(
            grad, input.contiguous(), mean, rstd, weight, *ctx.sizes, list(ctx.needs_input_grad[:3])
        )
        return *gradients, None, None


class TemporalConv3d(nn.Conv3d):
    """A convolution over frames alone, on CPUs as one matrix product or as one of pictures: torch 2.14 has no fast kernel for it.

    As one of pictures as wide as a frame has pixels and as high as there are frames it needs no copies; on one thread, for 32
    channels and 10 frames of 240 x 180, 0.08 s where the matrix product takes 0.30 s. Forward and backward, where gradients are
    asked for, the latter is faster: 0.10 s for 0.21 s of torch's own with 32 channels and 15 frames of 80 x 80, 0.028 s for 0.045 s
    with 128 channels of 20 x 20. Sums are rounded in another order.
    """

    @staticmethod
    def fits(conv: nn.Conv3d) -> bool:
        """Whether it convolves nothing but frames, and gives as many as it gets."""
        frames = conv.kernel_size[0]
        sides = conv.kernel_size[1:] == (1, 1) and conv.stride == (1, 1, 1) and conv.dilation == (1, 1, 1)
        whole = conv.padding == (frames // 2, 0, 0) and frames % 2 == 1 and conv.padding_mode == "zeros"
        return sides and whole and conv.groups == 1

    def forward(self, input: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b d f h w"]:
        if input.device.type != "cpu" or input.ndim != 5:
            return super().forward(input)
        beside, frames = self.kernel_size[0] // 2, input.shape[2]
        if not torch.is_grad_enabled():
            wide = input.permute(0, 2, 3, 4, 1).flatten(2, 3).permute(0, 3, 1, 2)
            wide = F.conv2d(wide, self.weight[..., 0], self.bias, padding=(beside, 0))
            return wide.unflatten(3, input.shape[3:])
        pixels = F.pad(input.permute(0, 2, 3, 4, 1), (0, 0, 0, 0, 0, 0, beside, beside))
        neighbours = torch.cat([pixels[:, i : i + frames] for i in range(2 * beside + 1)], dim=-1)
        weight = self.weight[..., 0, 0].transpose(1, 2).flatten(1)
        return F.linear(neighbours, weight, self.bias).permute(0, 4, 1, 2, 3)


class SingleTokenProcessor(AttnProcessor2_0):
    """Attention to a context of one token, as SVD has everywhere, without queries and keys.

    The softmax over one key is 1 whatever the query: the output is that token's value. `to_q` and `to_k` get no
    gradient (in diffusers' own processor it is zero).
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        plain = hidden_states.ndim == 3 and attention_mask is None and not attn.residual_connection
        if encoder_hidden_states is None or encoder_hidden_states.shape[1] != 1 or not plain:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        project, dropout = attn.to_out  # pyright: ignore[reportGeneralTypeIssues]  # never None with `plain`
        assert attn.to_v is not None
        value = project(attn.to_v(encoder_hidden_states)) / attn.rescale_output_factor
        return dropout(value.expand(-1, hidden_states.shape[1], -1))


class SlicedProcessor(SingleTokenProcessor):
    """The same attention, a few elements of the batch (frames; pixels over time) after the other."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        count = max(1, hidden_states.shape[0] // MAX_SLICES)
        contexts = (
            [None] * -(-hidden_states.shape[0] // count)
            if encoder_hidden_states is None
            else encoder_hidden_states.split(count)
        )
        slices = zip(hidden_states.split(count), contexts)
        return torch.cat([super(SlicedProcessor, self).__call__(attn, *pair, *args, **kwargs) for pair in slices])


def _converted(norm: nn.GroupNorm) -> GroupNorm:
    """The same norm, with the same parameters, as our class."""
    ours = GroupNorm(norm.num_groups, norm.num_channels, norm.eps, affine=False)
    ours.affine = norm.affine
    ours.weight, ours.bias = norm.weight, norm.bias
    return ours.train(norm.training)
