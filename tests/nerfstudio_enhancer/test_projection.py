import torch

from nerfstudio_enhancer.projection import back_project, pixel_centres, project

INTRINSICS = torch.tensor([[2.0, 0.0, 1.0], [0.0, 4.0, 1.0], [0.0, 0.0, 1.0]])


def test_a_pixel_by_hand():
    depth = torch.full((2, 2), 3.0)
    pose = torch.eye(4)
    pose[:3, 3] = torch.tensor([10.0, 20.0, 30.0])
    points = back_project(depth, INTRINSICS, pose)
    # pixel (column 1, row 0) is centred at (1.5, 0.5): ((1.5 - 1) / 2, (0.5 - 1) / 4, 1) times 3, moved to the camera
    torch.testing.assert_close(points[0, 1], torch.tensor([10.75, 19.625, 33.0]))


def test_points_come_back_to_their_pixels_and_depths():
    generator = torch.Generator().manual_seed(0)
    depth = torch.rand(5, 7, generator=generator, dtype=torch.float64) + 1
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    pose[:3, 3] = torch.randn(3, generator=generator, dtype=torch.float64)
    pixel, returned = project(back_project(depth, INTRINSICS, pose), INTRINSICS, torch.linalg.inv(pose))
    torch.testing.assert_close(pixel.movedim(-1, 0), pixel_centres(5, 7, like=depth)[:2])
    torch.testing.assert_close(returned, depth)


def test_points_behind_the_camera_have_no_positive_depth():
    _, depth = project(torch.tensor([[[0.0, 0.0, -2.0]]]), INTRINSICS, torch.eye(4))
    assert depth.tolist() == [[-2.0]]
