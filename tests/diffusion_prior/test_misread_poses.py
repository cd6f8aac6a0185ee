import torch
from scipy.spatial.transform import Rotation

from diffusion_prior.misread_poses import misread_poses, quaternions, rotations


def random_poses(count=20):
    rotation = torch.from_numpy(Rotation.random(count, random_state=0).as_matrix())
    centre = torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.cat([rotation, centre[..., None]], dim=-1)


def test_quaternions_are_scipys_up_to_their_sign():
    poses = random_poses()
    wanted = torch.from_numpy(Rotation.from_matrix(poses[..., :3].numpy()).as_quat())[:, [3, 0, 1, 2]]
    given = quaternions(poses[..., :3])
    torch.testing.assert_close((given * wanted).sum(-1).abs(), torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(rotations(given), poses[..., :3])


def test_a_half_turn_has_a_quaternion_too():
    # turn by pi about y: the trace is -1, where the textbook formula divides by zero
    turn = torch.diag(torch.tensor([-1.0, 1.0, -1.0]))[None]
    torch.testing.assert_close(quaternions(turn).abs(), torch.tensor([[0.0, 0.0, 1.0, 0.0]]))


def test_poses_are_misread_as_by_scipy_with_the_real_part_in_the_wrong_place():
    poses = random_poses()
    for pose, misread in zip(poses.numpy(), misread_poses(poses).numpy()):
        world_to_camera = pose[:, :3].T
        translation = -world_to_camera @ pose[:, 3]
        x, y, z, w = Rotation.from_matrix(world_to_camera).as_quat()
        wrong = Rotation.from_quat([w, x, y, z]).as_matrix()
        torch.testing.assert_close(torch.from_numpy(misread[:, :3]), torch.from_numpy(wrong.T))
        torch.testing.assert_close(torch.from_numpy(misread[:, 3]), torch.from_numpy(-wrong.T @ translation))
