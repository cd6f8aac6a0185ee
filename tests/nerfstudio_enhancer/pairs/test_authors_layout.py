"""Paired data in the layout of 3DGS-Enhancer's authors, written and read back."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_prior.data.pairs import PairRun, find_runs, read_run, verify_run, write_run
from nerfstudio_enhancer.pairs.authors_layout import (
    convert_pairs,
    numbers_of_views,
    read_authors_scene,
)
from nerfstudio_enhancer.scene.colmap_folder import read_colmap_folder

HEIGHT, WIDTH = 6, 8
KEPT = ("render", "target", "references", "before", "after")


def poses(count: int, seed: int) -> torch.Tensor:
    """Rotations and places of no order."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator, dtype=torch.float64)).Q
    rotation *= torch.linalg.det(rotation)[:, None, None]
    return torch.cat([rotation, torch.randn(count, 3, 1, generator=generator, dtype=torch.float64)], dim=-1).float()


@pytest.fixture
def run() -> PairRun:
    """3 references and 4 other cameras: two between the first references, two between the last."""
    generator = torch.Generator().manual_seed(0)

    def picture(count: int, channels: int) -> torch.Tensor:
        return torch.randint(0, 256, (count, channels, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)

    return PairRun(
        scene="beer",
        num_views=3,
        seed=7,
        steps=300,
        render=picture(4, 3),
        alpha=picture(4, 1),
        disparity=picture(4, 1),
        warped=picture(4, 8),
        target=picture(4, 3),
        references=picture(3, 3),
        reference_disparity=picture(3, 1),
        before=torch.tensor([0, 0, 1, 1]),
        after=torch.tensor([1, 1, 2, 2]),
        camera_to_world=poses(4, 1),
        reference_camera_to_world=poses(3, 2),
        intrinsics=torch.tensor([[10.0, 11.0, 4.5, 3.25]]).repeat(4, 1),
    )


@pytest.fixture
def scene(run, tmp_path):
    """The run in the authors' layout."""
    write_run(tmp_path / "ours" / "beer" / "k03_s7_n300", run)
    (scene,) = convert_pairs(tmp_path / "ours", tmp_path / "theirs", "authors")
    return scene


def test_a_scene_has_the_files_of_the_layout_in_capture_order(scene, run):
    assert sorted(path.name for path in (scene / "lr" / "3" / "train_3").iterdir()) == [
        "frame_00000_ref.png",
        "frame_00001.png",
        "frame_00002.png",
        "frame_00003_ref.png",
        "frame_00004.png",
        "frame_00005.png",
        "frame_00006_ref.png",
    ]
    photograph = np.array(Image.open(scene / "images_4" / "frame_00002.png"))
    np.testing.assert_array_equal(photograph, run.target[1].movedim(0, -1).numpy())
    capture = read_colmap_folder(scene)  # as DL3DV's and any other COLMAP folder is read
    assert len(capture.frames) == 7
    for model in ("0", "0_render"):
        assert (scene / "sparse" / model / "images.txt").is_file()


def test_a_run_comes_back_save_for_what_the_layout_does_not_hold(scene, run, tmp_path):
    convert_pairs(tmp_path / "theirs", tmp_path / "again", "ours")
    (folder,) = find_runs(tmp_path / "again")
    verify_run(folder)
    again = read_run(folder)
    for name in KEPT:
        assert torch.equal(getattr(again, name), getattr(run, name)), name
    for name in ("camera_to_world", "reference_camera_to_world", "intrinsics"):
        torch.testing.assert_close(getattr(again, name), getattr(run, name), rtol=1e-5, atol=1e-5)
    assert bool((again.alpha == 255).all())
    assert not again.disparity.any()
    assert not again.warped.any()


def test_renders_of_several_numbers_of_views_become_several_runs(scene):
    (scene / "lr" / "6").mkdir()
    (scene / "lr" / "3" / "train_3").rename(scene / "lr" / "6" / "train_6")
    assert numbers_of_views(scene) == [6]
    with pytest.raises(FileNotFoundError, match="no renders for 3 reference views"):
        read_authors_scene(scene, 3)


def test_cameras_without_render_or_photograph_are_left_out(scene):
    (scene / "lr" / "3" / "train_3" / "frame_00001.png").unlink()
    (scene / "images_4" / "frame_00005.png").unlink()
    assert len(read_authors_scene(scene, 3).render) == 2
    for number in (0, 3):
        (scene / "lr" / "3" / "train_3" / f"frame_{number:05d}_ref.png").unlink()
    with pytest.raises(ValueError, match=r"at least 2 reference views .* got 1 and 2"):
        read_authors_scene(scene, 3)


def test_pictures_of_different_sizes_are_refused(scene):
    Image.new("RGB", (4, 4)).save(scene / "images_4" / "frame_00001.png")
    with pytest.raises(ValueError, match=r"frame_00001.png has \(4, 4\) pixels"):
        read_authors_scene(scene, 3)


def test_nothing_is_overwritten_and_an_empty_folder_is_told(scene, tmp_path):
    with pytest.raises(ValueError, match="is there already"):
        convert_pairs(tmp_path / "ours", tmp_path / "theirs", "authors")
    with pytest.raises(FileNotFoundError, match="lr/<k>/train_<k>"):
        convert_pairs(tmp_path / "ours", tmp_path / "out", "ours")
