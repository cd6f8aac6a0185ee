import dataclasses
import itertools
import math

import pytest
import torch
from svd_folders import write_svd_folder
from tiny_prior import random_clip

import diffusion_prior.prior as prior_module
from diffusion_prior.checkpoints import load_prior
from diffusion_prior.conditioning import LatentCondition, pose_conditions
from diffusion_prior.data.clips import ClipBatch, cut
from diffusion_prior.sampling_config import SamplingConfig
from diffusion_prior.tiles import Tile, blend_tiles, crop_condition, tile_grid


def test_a_picture_that_fits_is_one_tile():
    assert tile_grid(64, 120, None) == [Tile(0, 0, 64, 120)]
    assert tile_grid(64, 64, (64, 100)) == [Tile(0, 0, 64, 64)]


def test_tiles_by_hand():
    # 100 columns in tiles of 64: a step of at most 64 - 16 = 48 takes two, at 0 and 36
    assert tile_grid(64, 100, (64, 64)) == [Tile(0, 0, 64, 64), Tile(0, 36, 64, 64)]


@pytest.mark.parametrize("size", [(64, 65), (65, 64), (100, 200), (300, 67)])
def test_tiles_cover_everything_stay_inside_and_overlap_by_a_quarter(size):
    tiles = tile_grid(*size, (64, 64))
    seen = torch.zeros(size)
    for tile in tiles:
        assert tile.of(seen).shape == (64, 64)
        tile.of(seen).add_(1)
    assert seen.min() >= 1
    lefts = sorted({tile.left for tile in tiles})
    assert all(b - a <= 48 for a, b in itertools.pairwise(lefts))


@pytest.mark.parametrize("factor", [1, 3])
def test_mixing_tiles_of_a_function_of_the_place_alone_changes_nothing(factor):
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(2, 3, 20 * factor, 31 * factor, generator=generator)
    blended = blend_tiles(lambda tile: tile.times(factor).of(picture), tile_grid(20, 31, (8, 12)), factor)
    torch.testing.assert_close(blended, picture)


def test_where_tiles_disagree_there_is_a_slope_and_no_step():
    tiles = tile_grid(4, 12, (4, 8))
    values = iter([0.0, 1.0])
    row = blend_tiles(lambda tile: torch.full((4, 8), next(values)), tiles)[0]
    assert row[0] == 0
    assert row[-1] == 1
    # columns 4 to 7 are in both tiles: weights 4 3 2 1 against 1 2 3 4
    torch.testing.assert_close(row[4:8], torch.tensor([0.2, 0.4, 0.6, 0.8]))


def test_a_condition_is_cut_where_it_has_a_place_in_the_picture():
    condition = LatentCondition(
        latents=torch.arange(24.0).reshape(1, 1, 1, 4, 6),
        extra=torch.zeros(1, 1, 0, 4, 6),
        embeddings=torch.ones(1, 1, 1, 5),
        micro=torch.ones(1, 3),
    )
    cut = crop_condition(condition, Tile(1, 2, 2, 3))
    assert cut.latents.flatten().tolist() == [8, 9, 10, 14, 15, 16]
    assert cut.extra.shape == (1, 1, 0, 2, 3)
    assert cut.embeddings is condition.embeddings
    assert cut.micro is condition.micro


def posed_condition(fov_x_rad: float, columns: int) -> LatentCondition:
    """A clip of two frames, 4 rows high, told as layout A is."""
    poses = torch.eye(4)[:3].repeat(2, 1, 1)
    poses[1, 0, 3] = 0.5
    return LatentCondition(
        latents=torch.zeros(1, 2, 1, 4, columns),
        extra=torch.zeros(1, 2, 0, 4, columns),
        embeddings=torch.ones(1, 2, 1, 5),
        micro=pose_conditions(poses, fov_x_rad, torch.tensor([7.0, 127.0, 0.02]))[None],
    )


def test_a_tile_has_a_narrower_field_of_view_and_the_same_poses():
    condition = posed_condition(math.pi / 2, 8)
    for left in (0, 4):
        told = crop_condition(condition, Tile(0, left, 4, 4)).micro
        # 8 columns at 90 degrees: focal length 4. Of 4 columns, f = 2 atan(2 / 4), sin f = 2 * 0.5 / 1.25, cos f = 0.75 / 1.25
        lens = torch.tensor([2 * math.atan(0.5), 0.8, 0.6]).expand(1, 2, 3)
        torch.testing.assert_close(told[..., -3:], lens)
        assert torch.equal(told[..., :-3], condition.micro[..., :-3])


def test_tiles_as_wide_as_the_picture_are_told_what_the_picture_is():
    condition = posed_condition(1.0, 8)
    assert crop_condition(condition, Tile(2, 0, 2, 8)).micro is condition.micro


def test_a_tile_is_told_the_field_of_view_that_training_tells_a_crop():
    bytes_of = [torch.zeros(1, 2, channels, 64, 64, dtype=torch.uint8) for channels in (3, 1, 1, 4, 3, 3)]
    clip = ClipBatch(*bytes_of, torch.eye(4)[:3].expand(1, 2, 3, 4), torch.tensor([1.2]))
    crop = cut(clip, (64, 24), 0, 16)
    # latents of 8 pixels: 8 columns, of which the crop has 3
    told = crop_condition(posed_condition(1.2, 8), Tile(0, 2, 4, 3)).micro
    torch.testing.assert_close(told[..., -3], crop.fov_x_rad.expand(1, 2))


@torch.no_grad()
def test_a_pose_conditioned_prior_is_told_of_every_tile_what_it_shows(tmp_path, monkeypatch):
    prior = load_prior(str(write_svd_folder(tmp_path, "A")), "cpu", torch.float32)
    prior.sampling = SamplingConfig(steps=1, min_guidance=1.0, max_guidance=1.0, fit="tile", frame_size=(16, 16))
    poses = torch.eye(4)[:3].repeat(3, 1, 1)
    clip = dataclasses.replace(random_clip(3, 16, 24), camera_to_world=poses, fov_x_rad=math.pi / 2)
    seen, denoise = [], prior_module.denoise

    def spy(unet, noisy, sigma, condition):
        seen.append(condition.micro)
        return denoise(unet, noisy, sigma, condition)

    monkeypatch.setattr(prior_module, "denoise", spy)
    prior.predict_latents(clip, torch.Generator())
    # 16 of 24 columns at 90 degrees: tan(f / 2) = 16 / 24; two tiles
    assert [told.shape for told in seen] == [(1, 3, 22)] * 2
    for told in seen:
        torch.testing.assert_close(told[..., -3], torch.full((1, 3), 2 * math.atan(2 / 3)))
