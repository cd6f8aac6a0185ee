import itertools

import pytest
import torch

from diffusion_prior.conditioning import LatentCondition
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
