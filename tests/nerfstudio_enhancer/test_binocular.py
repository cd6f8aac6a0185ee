"""What a camera beside a reference shows, brought back to it."""

import pytest
import torch
from torch.testing import assert_close

from nerfstudio_enhancer.binocular import binocular_loss, brought_back, moved_sideways
from nerfstudio_enhancer.rasterize import rasterization

WIDTH, HEIGHT, FOCAL = 48, 32, 40.0


def test_a_picture_moves_by_focal_length_times_shift_over_depth_and_what_was_out_of_view_does_not_count() -> None:
    beside = torch.arange(8.0).expand(2, 8)[..., None].repeat(1, 1, 3)  # each column shows its own number
    depth = torch.full((2, 8, 1), 4.0)
    back = brought_back(beside, depth, torch.tensor(10.0), torch.tensor(0.8))  # disparity of 2 px
    # Seen from 0.8 to the right, column 5 stood at column 3.
    assert_close(back[0, 2:, 0], torch.arange(0.0, 6.0))
    assert back[0, :, 3].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    photograph = back[..., :3] + torch.tensor([0.3, 0.0, 0.0])
    photograph[:, :2] = 77.0
    assert_close(binocular_loss(back, photograph), torch.tensor(0.1))


def wall(viewmat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Colours and depth of a speckled wall at depth 2."""
    generator = torch.Generator().manual_seed(0)
    means = (torch.rand(3000, 3, generator=generator) - 0.5) * torch.tensor([6.0, 5.0, 0.0])
    means[:, 2] = 2.0
    intrinsics = torch.tensor([[[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]]])
    render, _, _ = rasterization(
        means=means,
        quats=torch.tensor([[1.0, 0, 0, 0]]).repeat(3000, 1),
        scales=torch.full((3000, 3), 0.06),
        opacities=torch.full((3000,), 0.95),
        colors=torch.rand(3000, 3, generator=generator),
        viewmats=viewmat,
        Ks=intrinsics,
        width=WIDTH,
        height=HEIGHT,
        render_mode="RGB+ED",
        packed=False,
    )
    return render[0, ..., :3], render[0, ..., 3:]


@pytest.mark.parametrize("shift", [-0.2, 0.15])
def test_true_depth_explains_what_a_camera_to_either_side_sees_and_wrong_depth_does_not(shift: float) -> None:
    here, moved = torch.eye(4)[None], moved_sideways(torch.eye(4)[None], torch.tensor(shift))
    photograph, depth = wall(here)
    beside, _ = wall(moved)

    def loss(depth: torch.Tensor) -> torch.Tensor:
        return binocular_loss(brought_back(beside, depth, torch.tensor(FOCAL), torch.tensor(shift)), photograph)

    assert loss(depth) < 0.3 * loss(1.5 * depth)
    scale = torch.tensor(1.1, requires_grad=True)  # a little too far: the loss pulls it nearer
    (gradient,) = torch.autograd.grad(loss(scale * depth), scale)
    assert gradient > 0
