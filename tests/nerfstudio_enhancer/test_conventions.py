import pytest
import torch

from nerfstudio_enhancer.conventions import (
    as_4x4,
    camera_to_world_opencv,
    camera_to_world_opengl,
    to_channels_first,
    to_channels_last,
    world_to_camera_opencv,
)


def random_rigid(*batch: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(*batch, 3, 3, generator=generator, dtype=torch.float64)).Q
    rotation = rotation * torch.linalg.det(rotation)[..., None, None]
    translation = torch.randn(*batch, 3, 1, generator=generator, dtype=torch.float64)
    return torch.cat([rotation, translation], dim=-1)


def test_a_point_before_an_opengl_camera_has_positive_opencv_depth() -> None:
    # Camera at (0, 0, 5), OpenGL axes equal to the world's: it looks along -z, y is up.
    camera_to_world = torch.eye(4)[:3]
    camera_to_world[2, 3] = 5.0
    # The point (1, 2, 0) lies 5 before it, 1 to the right, 2 above; OpenCV's y points down.
    point = world_to_camera_opencv(camera_to_world) @ torch.tensor([1.0, 2.0, 0.0, 1.0])
    torch.testing.assert_close(point, torch.tensor([1.0, -2.0, 5.0, 1.0]))


def test_world_to_camera_and_back_is_the_identity() -> None:
    camera_to_world = random_rigid(2, 5)
    back = camera_to_world_opengl(world_to_camera_opencv(camera_to_world))
    torch.testing.assert_close(back, as_4x4(camera_to_world))


def test_world_to_camera_is_the_inverse_of_the_opencv_camera_to_world() -> None:
    camera_to_world = random_rigid(7)
    product = world_to_camera_opencv(camera_to_world) @ camera_to_world_opencv(camera_to_world)
    torch.testing.assert_close(product, torch.eye(4, dtype=torch.float64).expand(7, 4, 4))


def test_3x4_and_4x4_matrices_give_the_same_camera() -> None:
    camera_to_world = random_rigid(3)
    assert torch.equal(world_to_camera_opencv(camera_to_world), world_to_camera_opencv(as_4x4(camera_to_world)))


def test_a_matrix_with_two_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="3x4 or 4x4"):
        as_4x4(torch.zeros(2, 4))


def test_channels_move_and_come_back() -> None:
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    first = to_channels_first(images)
    assert first.shape == (2, 5, 3, 4)
    assert first[1, 4, 2, 3] == images[1, 2, 3, 4]
    assert torch.equal(to_channels_last(first), images)


def test_gradients_flow_through_the_axis_flip() -> None:
    camera_to_world = as_4x4(random_rigid(2)).requires_grad_()
    world_to_camera_opencv(camera_to_world).sum().backward()
    assert camera_to_world.grad is not None
    assert camera_to_world.grad[..., :3, :].abs().sum() > 0
