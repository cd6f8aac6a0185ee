from pathlib import Path

import pytest
import torch
from PIL import Image
from scenes import tiny_scene, write_nerfstudio_folder

from nerfstudio_enhancer.datamanager import KNOWN_DEPTH, EnhancerDataManager, EnhancerDataManagerConfig
from nerfstudio_enhancer.initial_splats import SeedPointsConfig
from nerfstudio_enhancer.rounds import references_of
from nerfstudio_enhancer.scene.sparse_views import SparseViewsDataParserConfig
from nerfstudio_enhancer.stereo.config import StereoConfig

SCENE = tiny_scene(num_images=5, width=160, height=120, arc_deg=40.0)


def data_manager(folder: Path, test_mode: str, **settings) -> EnhancerDataManager:
    write_nerfstudio_folder(folder, SCENE)
    config = EnhancerDataManagerConfig(
        dataparser=SparseViewsDataParserConfig(data=folder, num_views=3, **settings), max_image_size=80
    )
    return config.setup(device="cpu", test_mode=test_mode, world_size=1, local_rank=0)


def test_no_seed_points_are_searched_where_a_finished_model_is_evaluated(tmp_path: Path, monkeypatch) -> None:
    def searched(*args, **kwargs):
        raise AssertionError("searched")

    monkeypatch.setattr("nerfstudio_enhancer.initial_splats.seed_points", searched)
    manager = data_manager(tmp_path / "a", "test")
    assert "points3D_xyz" not in manager.train_dataparser_outputs.metadata
    with pytest.raises(AssertionError, match="searched"):
        data_manager(tmp_path / "b", "val")


def test_another_order_of_photographs_than_that_of_seed_and_step_is_refused(tmp_path: Path) -> None:
    config = EnhancerDataManagerConfig(train_cameras_sampling_strategy="fps")
    with pytest.raises(ValueError, match="sampling-strategy` must be random, got fps"):
        config.setup(device="cpu", test_mode="val", world_size=1, local_rank=0)


@pytest.mark.parametrize("in_data_manager", [False, True])
def test_a_held_out_photograph_is_missed_before_seed_points_are_searched(
    tmp_path: Path, monkeypatch, in_data_manager: bool
) -> None:
    def searched(*args, **kwargs):
        raise AssertionError("searched")

    monkeypatch.setattr("nerfstudio_enhancer.initial_splats.seed_points", searched)
    write_nerfstudio_folder(tmp_path, SCENE)
    (tmp_path / "images" / "view_2.png").unlink()  # the references are the first, the middle and the last of five
    parser = SparseViewsDataParserConfig(data=Path("elsewhere") if in_data_manager else tmp_path, num_views=3)
    config = EnhancerDataManagerConfig(data=tmp_path if in_data_manager else None, dataparser=parser)
    with pytest.raises(FileNotFoundError, match=r"1 posed photograph\(s\) do not exist: .*view_2.png"):
        config.setup(device="cpu", test_mode="val", world_size=1, local_rank=0)


def test_batches_of_references_carry_what_is_known_of_their_depth(tmp_path: Path) -> None:
    initial = SeedPointsConfig(stereo=StereoConfig(sweep_px=80, refine_px=100, depth_network=False))
    manager = data_manager(tmp_path, "val", seed_points="stereo", initial=initial)
    scale = manager.train_dataparser_outputs.dataparser_scale
    camera, batch = manager.next_train(0)
    trusted = batch[KNOWN_DEPTH]
    assert trusted.shape == (60, 80, 2) == (*batch["image"].shape[:2], 2)
    assert torch.equal(trusted[..., 1] > 0, trusted[..., 0] > 0)
    assert 0.3 < float((trusted[..., 0] > 0).float().mean()) < 1
    assert camera.metadata is not None
    index = int(camera.metadata["cam_idx"])
    # References are the first, the middle and the last of five; the scene's own depth at the centres of 2 x 2 pixels.
    truth = torch.from_numpy(SCENE.depth[[0, 2, 4][index]][::2, ::2]).float() * scale
    known = trusted[..., 0] > 0
    assert ((trusted[..., 0] / truth - 1).abs()[known]).median() < 0.01
    manager.gives_depth = False
    assert KNOWN_DEPTH not in manager.next_train(0)[1]


def test_without_stereo_batches_carry_no_depth(tmp_path: Path) -> None:
    manager = data_manager(tmp_path, "val", seed_points="random")
    assert KNOWN_DEPTH not in manager.next_train(0)[1]


def test_references_are_read_as_in_training_where_a_finished_model_is_only_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "scene"
    manager = data_manager(folder, "inference")
    for copy in ("images_2", "images_8"):  # smaller than what the intrinsics were written for
        (folder / copy).mkdir()
        for photograph in (folder / "images").iterdir():
            Image.open(photograph).reduce(int(copy[7:])).save(folder / copy / photograph.name)
    for path in list((folder / "images").iterdir()):
        path.unlink()
    dataset, cached = manager.reference_photographs()
    assert [tuple(item["image"].shape) for item in cached] == [(60, 80, 3)] * 3
    assert dataset.cameras.width.flatten().tolist() == [80] * 3


def test_photographs_can_be_kept_on_the_cpu_where_there_is_no_gpu(tmp_path: Path) -> None:
    manager = data_manager(tmp_path, "test")
    manager.config.cache_images = "cpu"
    assert len(manager.cached_train) == 3


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_masks_and_transparency_leave_parts_of_references_out(tmp_path: Path, mode: str) -> None:
    write_nerfstudio_folder(tmp_path, SCENE, mode=mode, masks=mode == "RGB")
    config = EnhancerDataManagerConfig(
        dataparser=SparseViewsDataParserConfig(data=tmp_path, num_views=3), max_image_size=160
    )
    manager = config.setup(device="cpu", test_mode="test", world_size=1, local_rank=0)
    references = references_of(*manager.reference_photographs())
    assert references.transparent == (mode == "RGBA")
    assert references.usable is not None
    solid = torch.isfinite(torch.from_numpy(SCENE.depth[0]))
    assert torch.equal(references.usable[0][..., 0] > 0.5, solid)
    # the sky, which is left out, has the mean colour of the rest
    photograph = references.photographs[0]
    torch.testing.assert_close(photograph[~solid], photograph[solid].mean(0).expand(int((~solid).sum()), 3))
