import dataclasses
import math

import pytest
import torch

from diffusion_prior.data.clips import (
    ClipBatch,
    ClipConfig,
    ClipDataset,
    augment,
    crop_size,
    cut,
    find_gaps,
    gaps_of,
    mirror_poses,
    pick_frames,
    read_clip,
    split_scenes,
    spread_frames,
    step_generator,
    thumbnails,
    to_float,
    validation_clips,
    with_good_patches,
)
from diffusion_prior.data.pairs import PairRun, read_header, read_run, run_folder, write_run

PLAIN = ClipConfig(
    num_frames=4,
    batch_size=2,
    crop_px=16,
    size_multiple=8,
    flip=False,
    permute_channels=False,
    swap_references=False,
    good_render_probability=0.0,
)


def write_scene(root, scene: str, before: list[int], height: int = 24, width: int = 32, seed: int = 0):
    """A run whose render i is all 10 + i, whose photograph is a ramp, and whose reference j is all 200 + j."""
    n, k = len(before), max(before) + 2
    ramp = torch.arange(height * width).reshape(1, 1, height, width).expand(n, 3, -1, -1) % 251

    def constant(values, channels):
        levels = torch.tensor(values, dtype=torch.uint8)
        return levels[:, None, None, None].expand(-1, channels, height, width).contiguous()

    run = PairRun(
        scene=scene,
        num_views=k,
        seed=seed,
        steps=300,
        render=constant([10 + i for i in range(n)], 3),
        alpha=constant([100 + i for i in range(n)], 1),
        disparity=constant([50 + i for i in range(n)], 1),
        warped=constant([60 + i for i in range(n)], 8),
        target=ramp.to(torch.uint8).contiguous(),
        references=constant([200 + j for j in range(k)], 3),
        reference_disparity=constant([70 + j for j in range(k)], 1),
        before=torch.tensor(before),
        after=torch.tensor(before) + 1,
        camera_to_world=torch.eye(4)[:3].repeat(n, 1, 1),
        reference_camera_to_world=torch.eye(4)[:3].repeat(k, 1, 1),
        intrinsics=torch.ones(n, 4),
    )
    folder = run_folder(root, scene, k, seed, 300)
    write_run(folder, run)
    return folder


def test_gaps_group_frames_by_their_neighbouring_references(tmp_path):
    header = read_header(write_scene(tmp_path, "beer", [0, 0, 0, 1, 1]))
    assert [(gap.before, gap.after, gap.frames) for gap in gaps_of(header)] == [(0, 1, (0, 1, 2)), (1, 2, (3, 4))]


def test_a_clip_begins_and_ends_with_the_reference_photographs(tmp_path):
    gap = gaps_of(read_header(write_scene(tmp_path, "beer", [0, 0, 1, 1])))[1]
    clip = read_clip(gap, [2, 3], 64)
    assert clip.rgb[0, :, 0, 0, 0].tolist() == [201, 12, 13, 202]
    assert torch.equal(clip.rgb[:, [0, -1]], clip.target[:, [0, -1]])
    assert clip.alpha[0, :, 0, 0, 0].tolist() == [255, 102, 103, 255]
    assert clip.disparity[0, :, 0, 0, 0].tolist() == [71, 52, 53, 72]
    # the first warp's red and how well it is seen, then the second's: a reference is warped onto itself alone
    assert clip.warped[0, :, 0, 0, 0].tolist() == [201, 62, 63, 202]
    assert clip.warped[0, :, 3, 0, 0].tolist() == [255, 62, 63, 255]
    assert clip.warped[0, :, 4, 0, 0].tolist() == [0, 62, 63, 0]


def test_picked_frames_keep_capture_order_and_spread_over_the_gap(tmp_path):
    gap = gaps_of(read_header(write_scene(tmp_path, "beer", [0] * 12)))[0]
    for seed in range(20):
        frames = pick_frames(gap, 5, torch.Generator().manual_seed(seed))
        assert [frame // 4 for frame in frames] == [0, 1, 2]
    assert spread_frames(gap, 5) == [2, 6, 10]


def test_a_short_gap_repeats_its_frames(tmp_path):
    gap = gaps_of(read_header(write_scene(tmp_path, "beer", [0])))[0]
    assert pick_frames(gap, 6, torch.Generator().manual_seed(0)) == [0, 0, 0, 0]


def test_the_same_step_gives_the_same_batch_and_another_step_another(tmp_path):
    write_scene(tmp_path, "beer", [0] * 8)
    config = dataclasses.replace(PLAIN, flip=True, good_render_probability=0.5)
    first, again = (ClipDataset(find_gaps(tmp_path), config, seed=3) for _ in range(2))
    assert torch.equal(first[5].rgb, again[5].rgb)
    assert not torch.equal(first[5].rgb, first[6].rgb)


def test_processes_draw_different_clips_which_together_are_those_of_one(tmp_path):
    write_scene(tmp_path, "beer", [0] * 8)
    gaps = find_gaps(tmp_path)
    alone = ClipDataset(gaps, PLAIN)
    ranks = [ClipDataset(gaps, PLAIN, rank=rank, world_size=2) for rank in range(2)]
    for step in range(3):
        for rank in range(2):
            assert torch.equal(ranks[rank][step].target, alone[2 * step + rank].target)


def test_clips_of_a_batch_share_one_size_though_scenes_do_not(tmp_path):
    write_scene(tmp_path, "tall", [0] * 3, height=32, width=24)
    write_scene(tmp_path, "wide", [0] * 3, height=24, width=32)
    dataset = ClipDataset(find_gaps(tmp_path), dataclasses.replace(PLAIN, crop_px=None))
    sizes = {tuple(dataset[step].rgb.shape) for step in range(20)}
    assert sizes == {(2, 4, 3, 32, 24), (2, 4, 3, 24, 32)}


def test_crops_are_multiples_and_never_larger_than_the_picture(tmp_path):
    header = read_header(write_scene(tmp_path, "beer", [0], height=30, width=45))
    assert crop_size(header, dataclasses.replace(PLAIN, crop_px=40)) == (24, 40)
    assert crop_size(header, dataclasses.replace(PLAIN, crop_px=None)) == (24, 40)


def test_pictures_below_the_multiple_are_refused(tmp_path):
    header = read_header(write_scene(tmp_path, "beer", [0], height=6, width=45))
    with pytest.raises(ValueError, match="smaller than the multiple of 8"):
        crop_size(header, PLAIN)


def ramp_clip() -> ClipBatch:
    """Two clips of 4 frames whose every byte differs from its neighbours."""
    rgb = (torch.arange(2 * 4 * 3 * 16 * 16) % 241).to(torch.uint8).reshape(2, 4, 3, 16, 16)
    alpha, disparity, warped = rgb[:, :, :1].contiguous(), rgb[:, :, 1:2].contiguous(), rgb[:, :, [0, 1, 2, 0]]
    poses, fov = turning_poses(2, 4), torch.full((2,), 1.0)
    return ClipBatch(rgb, alpha, disparity, warped, rgb.clone(), thumbnails(rgb, 64), poses, fov)


def turning_poses(batch: int, frames: int) -> torch.Tensor:
    """Rigid poses of cameras that are all different [b t 3 4]."""
    generator = torch.Generator().manual_seed(1)
    turns = torch.linalg.qr(torch.randn(batch, frames, 3, 3, generator=generator)).Q
    turns = turns * torch.linalg.det(turns)[..., None, None]
    return torch.cat([turns, torch.randn(batch, frames, 3, 1, generator=generator)], dim=-1)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("flip", lambda frames: frames.flip(-1)),
        ("swap_references", lambda frames: frames.flip(1)),
    ],
)
def test_an_augmentation_does_the_same_to_every_field_or_nothing(setting, expected):
    clip = ramp_clip()
    seen = set()
    for seed in range(12):
        config = dataclasses.replace(PLAIN, **{setting: True})
        varied = augment(clip, (16, 16), config, torch.Generator().manual_seed(seed))
        changed = not torch.equal(varied.rgb, clip.rgb)
        seen.add(changed)
        for name in ("rgb", "alpha", "disparity", "warped", "target", "thumbnail"):
            frames = getattr(clip, name)
            assert torch.equal(getattr(varied, name), expected(frames) if changed else frames)
    assert seen == {True, False}


def project(camera_to_world: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Where points [n 3] appear in each camera [b t 3 4], OpenCV axes: (x / z, y / z) [b t n 2]."""
    seen = (points - camera_to_world[..., None, :, 3]) @ camera_to_world[..., :3]
    return seen[..., :2] / seen[..., 2:]


def test_mirrored_poses_see_of_the_mirrored_world_what_mirrored_pictures_show():
    poses = turning_poses(2, 4).double()
    mirrored = mirror_poses(poses)
    points = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    left_right = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    world = torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(project(mirrored, points * world), project(poses, points) * left_right)
    # still rotations: no camera is left-handed
    torch.testing.assert_close(torch.linalg.det(mirrored[..., :3]), torch.linalg.det(poses[..., :3]))
    assert torch.equal(mirror_poses(mirrored), poses)


def test_mirrored_poses_by_hand():
    # 0.5 to the right of the origin, turned by 90 degrees about y (down): what was z (forward) is x
    pose = torch.tensor([[0.0, 0.0, 1.0, 0.5], [0.0, 1.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 2.0]])
    # mirrored: 0.5 to the left, turned to -x
    expected = torch.tensor([[0.0, 0.0, -1.0, -0.5], [0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 2.0]])
    torch.testing.assert_close(mirror_poses(pose), expected)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("flip", mirror_poses),
        ("swap_references", lambda poses: poses.flip(1)),
        ("permute_channels", lambda poses: poses),
    ],
)
def test_poses_follow_what_happens_to_their_pictures(setting, expected):
    clip = ramp_clip()
    seen = set()
    for seed in range(12):
        config = dataclasses.replace(PLAIN, **{setting: True})
        varied = augment(clip, (16, 16), config, torch.Generator().manual_seed(seed))
        changed = not torch.equal(varied.rgb, clip.rgb)
        seen.add(changed)
        assert torch.equal(varied.camera_to_world, expected(clip.camera_to_world) if changed else clip.camera_to_world)
        torch.testing.assert_close(varied.fov_x_rad, clip.fov_x_rad)
    assert seen == {True, False}


def test_a_crop_narrows_the_field_of_view_and_leaves_the_poses():
    clip = dataclasses.replace(ramp_clip(), fov_x_rad=torch.full((2,), torch.pi / 2))
    # 16 columns at 90 degrees: fx = 8. Of 8 columns, 2 atan(8 / (2 * 8)) = 2 atan(1 / 2), wherever they lie; rows do not matter
    for left in (0, 5):
        narrow = cut(clip, (16, 8), 0, left)
        torch.testing.assert_close(narrow.fov_x_rad, torch.full((2,), 2 * math.atan(0.5)))
        assert torch.equal(narrow.camera_to_world, clip.camera_to_world)
    torch.testing.assert_close(cut(clip, (8, 16), 3, 0).fov_x_rad, clip.fov_x_rad)


def test_poses_are_read_in_opencv_axes_from_reference_to_reference(tmp_path):
    folder = write_scene(tmp_path, "beer", [0, 0, 1, 1])
    run = read_run(folder)
    cameras = torch.eye(4)[:3].repeat(7, 1, 1)  # OpenGL: as the world, looking along -z
    cameras[:, 0, 3] = torch.arange(7.0)
    intrinsics = torch.tensor([[16.0, 16.0, 16.0, 12.0]]).repeat(4, 1)
    posed = dataclasses.replace(
        run, camera_to_world=cameras[:4], reference_camera_to_world=cameras[4:], intrinsics=intrinsics
    )
    write_run(folder, posed)
    clip = read_clip(gaps_of(read_header(folder))[1], [2, 3], 64)
    assert clip.camera_to_world[0, :, 0, 3].tolist() == [5, 2, 3, 6]
    # OpenCV: y down, z forward
    assert torch.equal(clip.camera_to_world[..., :3], torch.diag(torch.tensor([1.0, -1.0, -1.0])).expand(1, 4, 3, 3))
    # 32 columns, fx = 16
    torch.testing.assert_close(clip.fov_x_rad, torch.tensor([math.pi / 2]))


def test_channels_are_permuted_alike_in_render_and_photograph():
    clip = ramp_clip()
    config = dataclasses.replace(PLAIN, permute_channels=True)
    varied = [augment(clip, (16, 16), config, torch.Generator().manual_seed(seed)) for seed in range(12)]
    assert all(torch.equal(one.rgb, one.target) for one in varied)
    assert any(not torch.equal(one.rgb, clip.rgb) for one in varied)
    assert all(torch.equal(one.rgb.sort(dim=2).values, clip.rgb.sort(dim=2).values) for one in varied)


def test_channels_of_warped_references_are_permuted_with_the_photograph_and_how_well_they_are_seen_stays():
    clip = ramp_clip()
    clip = dataclasses.replace(clip, warped=torch.cat([clip.target, clip.alpha, clip.target, clip.alpha], dim=2))
    config = dataclasses.replace(PLAIN, permute_channels=True)
    varied = [augment(clip, (16, 16), config, torch.Generator().manual_seed(seed)) for seed in range(12)]
    assert any(not torch.equal(one.target, clip.target) for one in varied)
    for one in varied:
        assert torch.equal(one.warped, torch.cat([one.target, clip.alpha, one.target, clip.alpha], dim=2))


def test_crop_takes_the_same_rectangle_from_every_field():
    clip = ramp_clip()
    varied = augment(clip, (8, 8), PLAIN, torch.Generator().manual_seed(4))
    assert varied.rgb.shape == (2, 4, 3, 8, 8)
    assert torch.equal(varied.rgb, varied.target)
    assert torch.equal(varied.alpha, varied.rgb[:, :, :1])


def test_thumbnails_show_the_whole_frame_though_the_crop_does_not():
    clip = ramp_clip()
    varied = augment(clip, (8, 8), PLAIN, torch.Generator().manual_seed(4))
    assert torch.equal(varied.thumbnail, clip.thumbnail)
    assert varied.thumbnail.shape == (2, 4, 3, 64, 64)


@pytest.mark.parametrize("good_render_probability", [0.0, 1.0])
def test_thumbnails_are_as_large_as_asked(tmp_path, good_render_probability):
    write_scene(tmp_path, "beer", [0] * 4)
    config = dataclasses.replace(PLAIN, thumbnail_px=20, good_render_probability=good_render_probability)
    assert ClipDataset(find_gaps(tmp_path), config)[0].thumbnail.shape == (2, 4, 3, 20, 20)
    with pytest.raises(ValueError, match="thumbnail_px must be at least 1, got 0"):
        ClipConfig(thumbnail_px=0)


def test_good_patches_lie_between_render_and_photograph_and_raise_alpha():
    shape = (1, 3, 3, 32, 32)
    clip = ClipBatch(
        torch.zeros(shape, dtype=torch.uint8),
        torch.zeros(1, 3, 1, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 3, 1, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 3, 8, 32, 32, dtype=torch.uint8),
        torch.full(shape, 200, dtype=torch.uint8),
        torch.zeros(1, 3, 3, 64, 64, dtype=torch.uint8),
        turning_poses(1, 3),
        torch.ones(1),
    )
    varied = with_good_patches(clip, torch.Generator().manual_seed(0))
    assert varied.rgb.max() == 200
    assert varied.rgb.min() == 0
    # share s gives rgb 200 s and alpha 255 s: alpha = 1.275 rgb, both rounded
    torch.testing.assert_close(varied.alpha.float(), varied.rgb[:, :, :1].float() * 1.275, atol=1.2, rtol=0)
    assert torch.equal(varied.thumbnail, thumbnails(varied.rgb, 64))


def test_good_patches_leave_the_references_as_they_are():
    clip = ramp_clip()
    assert torch.equal(with_good_patches(clip, torch.Generator().manual_seed(0)).rgb, clip.rgb)


def test_validation_clips_are_fixed_and_whole(tmp_path):
    write_scene(tmp_path, "beer", [0] * 4 + [1] * 4 + [2] * 4)
    gaps = find_gaps(tmp_path)
    first, again = (validation_clips(gaps, 2, num_frames=4, size_multiple=8, thumbnail_px=48) for _ in range(2))
    assert [clip.rgb.shape for clip in first] == [(1, 4, 3, 24, 32)] * 2
    assert [clip.thumbnail.shape for clip in first] == [(1, 4, 3, 48, 48)] * 2
    assert all(torch.equal(a.rgb, b.rgb) for a, b in zip(first, again, strict=True))


def test_held_out_scenes_do_not_train(tmp_path):
    for number in range(13):
        write_scene(tmp_path, f"scene{number:02d}", [0])
    training, validation = split_scenes(tmp_path)
    assert validation == ["scene06"]
    assert len(training) == 12
    assert {gap.header.scene for gap in find_gaps(tmp_path, training)} == set(training)


def test_validation_scenes_can_be_named_and_must_exist(tmp_path):
    write_scene(tmp_path, "beer", [0])
    write_scene(tmp_path, "coke", [0])
    assert split_scenes(tmp_path, ["beer"]) == (["coke"], ["beer"])
    with pytest.raises(ValueError, match=r"\['cola'\] are not in"):
        split_scenes(tmp_path, ["cola"])
    with pytest.raises(ValueError, match="leave at least one"):
        split_scenes(tmp_path, ["beer", "coke"])
    assert split_scenes(tmp_path, ["beer", "coke"], train_elsewhere=True) == ([], ["beer", "coke"])


def test_scenes_count_by_the_square_root_of_their_frames_however_many_runs_they_have(tmp_path):
    write_scene(tmp_path, "long", [0] * 16, seed=0)
    write_scene(tmp_path, "short", [0] * 4, seed=0)
    write_scene(tmp_path, "short", [0] * 4, seed=1)
    gaps = find_gaps(tmp_path)
    dataset = ClipDataset(gaps, PLAIN)
    (weights,) = dataset._weights.values()
    share = {gap.header.folder.parent.name + str(gap.header.seed): float(weight) for gap, weight in zip(gaps, weights)}
    assert share == pytest.approx({"long0": 4.0, "short0": 1.0, "short1": 1.0})


def test_steps_of_one_seed_have_unlike_generators():
    draws = {
        int(torch.randint(1 << 60, (), generator=step_generator(seed, step))) for seed in range(3) for step in range(50)
    }
    assert len(draws) == 150


def test_bytes_become_unit_range():
    assert to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0.0, 0.2, 1.0])


def test_clips_without_a_render_are_refused():
    with pytest.raises(ValueError, match="at least 3"):
        ClipConfig(num_frames=2)


def test_no_gaps_are_refused():
    with pytest.raises(ValueError, match="no clips to draw"):
        ClipDataset([], PLAIN)
