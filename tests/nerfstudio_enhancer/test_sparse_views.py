import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from PIL import Image
from scenes import TinyScene, surface_points, write_colmap_folder, write_nerfstudio_folder

from nerfstudio_enhancer.initial_splats import SeedPointsConfig
from nerfstudio_enhancer.scene.capture import Capture, Frame, natural_key, read_capture
from nerfstudio_enhancer.scene.sparse_views import PHOTOGRAPH_NAMES, SparseViewsDataParserConfig
from nerfstudio_enhancer.scene.splits import split_views

WriteFolder = Callable[..., Path]
FEW_POINTS = SeedPointsConfig(num_random_points=100, min_points=200, min_triangulated=10)


def parse(data: Path, split: str = "train", **options) -> DataparserOutputs:
    options = {"num_views": 3, "seed_points": "random", "initial": FEW_POINTS} | options
    return SparseViewsDataParserConfig(data=data, **options).setup().get_dataparser_outputs(split)


def names(outputs: DataparserOutputs) -> list[str]:
    return [path.name for path in outputs.image_filenames]


def edit_transforms(folder: Path, change: Callable[[dict], None]) -> None:
    meta = json.loads((folder / "transforms.json").read_text())
    change(meta)
    (folder / "transforms.json").write_text(json.dumps(meta))


def assert_bit_identical(a: DataparserOutputs, b: DataparserOutputs) -> None:
    assert a.image_filenames == b.image_filenames
    for name in ("camera_to_worlds", "fx", "fy", "cx", "cy", "width", "height", "distortion_params"):
        assert torch.equal(getattr(a.cameras, name), getattr(b.cameras, name)), name
    assert torch.equal(a.dataparser_transform, b.dataparser_transform)
    assert a.dataparser_scale == b.dataparser_scale
    assert a.metadata.keys() == b.metadata.keys()
    assert torch.equal(a.metadata["points3D_xyz"], b.metadata["points3D_xyz"])
    assert torch.equal(a.metadata["points3D_rgb"], b.metadata["points3D_rgb"])


# ------------------------------------------------------------------------------------------------ splits


def capture_of(count: int, **kwargs) -> Capture:
    frames = [
        Frame(Path(f"images/{i}.png"), f"images/{i}.png", np.eye(4), 8, 8, 8.0, 8.0, 4.0, 4.0, (0.0,) * 6)
        for i in range(count)
    ]
    return Capture(folder=Path(), frames=tuple(frames), camera_model="OPENCV", **kwargs)


def test_references_are_spread_evenly_and_test_views_are_every_eighth_of_the_rest() -> None:
    # linspace(0, 19, 3) = 0, 9.5, 19; 9.5 rounds to the even 10. The rest has 17: tests at 0, 8 and 16 of it.
    split = split_views(capture_of(20), num_views=3, reference_views=None, test_every=8)
    assert split.reference == (0, 10, 19)
    assert split.test == (1, 9, 18)
    assert split.unused == (2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15, 16, 17)


def test_without_a_number_of_views_every_training_view_is_a_reference() -> None:
    split = split_views(capture_of(20), num_views=None, reference_views=None, test_every=8)
    assert split.test == (0, 8, 16)
    assert split.unused == ()
    assert sorted(split.reference + split.test) == list(range(20))


def test_listed_splits_are_respected_without_a_number_of_views() -> None:
    capture = capture_of(6, named_splits={"train": ["images/0.png", "4.png", "images/2"], "test": ["images/5.png"]})
    split = split_views(capture, num_views=None, reference_views=None, test_every=8)
    assert (split.reference, split.test, split.unused) == ((0, 2, 4), (5,), (1, 3))


def test_with_listed_splits_references_come_from_the_training_list_alone() -> None:
    capture = capture_of(6, named_splits={"train": ["0.png", "1.png", "2.png", "3.png"], "val": ["4.png", "5.png"]})
    split = split_views(capture, num_views=2, reference_views=None, test_every=8)
    assert (split.reference, split.test, split.unused) == ((0, 3), (4, 5), (1, 2))


def test_references_can_be_named_with_or_without_folder_and_suffix() -> None:
    split = split_views(capture_of(5), None, ["images/3.png", "1.png", "0"], test_every=8)
    assert (split.reference, split.test, split.unused) == ((0, 1, 3), (2,), (4,))


@pytest.mark.parametrize("num_views", [0, 1, 6])
def test_too_few_or_too_many_reference_views_are_refused(num_views: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 reference views and at most the 5.* got {num_views}"):
        split_views(capture_of(5), num_views, None, 8)


def test_a_single_training_view_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"At least 2 reference views are needed, got 1 .*--num-views 2"):
        split_views(capture_of(2), None, None, 8)


def test_an_unknown_reference_view_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'9.png', which is no posed photograph; there are images/0.png"):
        split_views(capture_of(5), None, ["0.png", "9.png"], 8)


def test_a_name_in_two_folders_is_refused() -> None:
    capture = capture_of(2)
    twin = Frame(Path("other/0.png"), "other/0.png", np.eye(4), 8, 8, 8.0, 8.0, 4.0, 4.0, (0.0,) * 6)
    capture = Capture(folder=Path(), frames=(*capture.frames, twin), camera_model="OPENCV")
    with pytest.raises(ValueError, match="add the folder"):
        split_views(capture, None, ["0.png", "1.png"], 8)


def test_number_and_names_of_views_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="either `num_views` or `reference_views`"):
        split_views(capture_of(5), 2, ["0", "1"], 8)


def test_names_sort_by_the_value_of_their_numbers() -> None:
    assert sorted(["IMG_10.jpg", "IMG_2.jpg", "IMG_1_b.jpg", "IMG_1.jpg"], key=natural_key) == [
        "IMG_1.jpg",
        "IMG_1_b.jpg",
        "IMG_2.jpg",
        "IMG_10.jpg",
    ]


# --------------------------------------------------------------------------------------- reading folders


@pytest.mark.parametrize("per_frame_intrinsics", [False, True])
def test_a_nerfstudio_folder_is_split_in_capture_order(
    nerfstudio_folder: WriteFolder, per_frame_intrinsics: bool
) -> None:
    folder = nerfstudio_folder(per_frame_intrinsics=per_frame_intrinsics)
    # linspace(0, 9, 3) = 0, 4.5, 9; 4.5 rounds to the even 4.
    assert names(parse(folder)) == ["view_1.png", "view_5.png", "view_10.png"]
    assert names(parse(folder, "test")) == ["view_2.png"]
    assert names(parse(folder, "val")) == ["view_2.png"]
    assert names(parse(folder, "unused")) == [f"view_{i}.png" for i in (3, 4, 6, 7, 8, 9)]


def test_text_and_binary_models_give_the_same_cameras_as_the_nerfstudio_folder(
    nerfstudio_folder: WriteFolder, colmap_folder: WriteFolder
) -> None:
    expected = parse(nerfstudio_folder())
    for folder in (colmap_folder(binary=True), colmap_folder(name="text", binary=False, model="colmap/sparse/0")):
        outputs = parse(folder)
        assert names(outputs) == names(expected)
        torch.testing.assert_close(outputs.cameras.fx, expected.cameras.fx)
        assert outputs.cameras.width.tolist() == expected.cameras.width.tolist()
        # Worlds differ by nerfstudio's turn of COLMAP's world: distances and angles between the cameras do not.
        torch.testing.assert_close(gram(outputs), gram(expected), rtol=1e-4, atol=1e-4)


def gram(outputs: DataparserOutputs) -> torch.Tensor:
    """Inner products of all camera axes and centres about their mean; they do not change when the world is turned."""
    columns = outputs.cameras.camera_to_worlds.clone()
    columns[..., 3] -= columns[..., 3].mean(dim=0)
    columns[..., 3] /= columns[..., 3].norm(dim=1).mean()
    columns = torch.cat(list(columns), dim=1)
    return columns.T @ columns


def test_with_all_views_as_references_cameras_equal_those_of_nerfstudio(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder(per_frame_intrinsics=True)
    edit_transforms(folder, lambda meta: [frame.update(k1=0.01, p2=0.02) for frame in meta["frames"]])
    edit_transforms(folder, lambda meta: meta.update(applied_transform=[[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0.5]]))
    ours = parse(folder, num_views=10)
    theirs = NerfstudioDataParserConfig(data=folder, eval_mode="all").setup().get_dataparser_outputs("train")
    order = [theirs.image_filenames.index(path) for path in ours.image_filenames]
    torch.testing.assert_close(ours.cameras.camera_to_worlds, theirs.cameras.camera_to_worlds[order])
    torch.testing.assert_close(ours.cameras.get_intrinsics_matrices(), theirs.cameras.get_intrinsics_matrices()[order])
    torch.testing.assert_close(ours.cameras.distortion_params, theirs.cameras.distortion_params[order])
    torch.testing.assert_close(ours.dataparser_transform, theirs.dataparser_transform)
    assert ours.dataparser_scale == pytest.approx(theirs.dataparser_scale, rel=1e-6)


def test_with_all_views_as_references_colmap_cameras_equal_those_of_nerfstudio(colmap_folder: WriteFolder) -> None:
    folder = colmap_folder()
    ours = parse(folder, num_views=10)
    theirs = ColmapDataParserConfig(data=folder, colmap_path=Path("sparse/0"), eval_mode="all").setup()
    theirs = theirs.get_dataparser_outputs("train")
    assert ours.image_filenames == theirs.image_filenames
    torch.testing.assert_close(ours.cameras.camera_to_worlds, theirs.cameras.camera_to_worlds)
    torch.testing.assert_close(ours.dataparser_transform, theirs.dataparser_transform)


def test_without_a_number_of_views_the_whole_point_cloud_is_used_as_in_splatfacto(colmap_folder: WriteFolder) -> None:
    folder = colmap_folder()
    (folder / "train_list.txt").write_text("\n".join(f"view_{i}.png" for i in range(1, 11)))
    ours = parse(folder, num_views=None, seed_points="auto")
    theirs = ColmapDataParserConfig(data=folder, colmap_path=Path("sparse/0"), eval_mode="all").setup()
    theirs = theirs.get_dataparser_outputs("train")
    torch.testing.assert_close(ours.metadata["points3D_xyz"], theirs.metadata["points3D_xyz"])
    assert torch.equal(ours.metadata["points3D_rgb"], theirs.metadata["points3D_rgb"])


def test_without_a_number_of_views_a_ply_file_gives_the_seed_points(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder(extra={"ply_file_path": "points.ply"})
    header = "ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\n"
    header += "property uchar red\nproperty uchar green\nproperty uchar blue\nend_header\n"
    (folder / "points.ply").write_text(header + "1 2 3 10 20 30\n-1 0 0.5 40 50 60\n")
    outputs = parse(folder, num_views=None, seed_points="auto")
    original = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 0.5]])
    transform = outputs.dataparser_transform
    expected = (original @ transform[:, :3].T + transform[:, 3]) * outputs.dataparser_scale
    torch.testing.assert_close(outputs.metadata["points3D_xyz"], expected)
    assert outputs.metadata["points3D_rgb"].tolist() == [[10, 20, 30], [40, 50, 60]]


def test_a_named_point_cloud_that_is_missing_is_an_error(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder(extra={"ply_file_path": "points.ply"})
    with pytest.raises(FileNotFoundError, match=r"points\.ply named by transforms\.json"):
        parse(folder, num_views=None, seed_points="auto")


def test_the_saved_transform_leads_from_the_capture_to_the_model(
    nerfstudio_folder: WriteFolder, scene: TinyScene
) -> None:
    outputs = parse(nerfstudio_folder())
    back = outputs.transform_poses_to_original_space(outputs.cameras.camera_to_worlds, "opengl")
    np.testing.assert_allclose(back.numpy(), scene.camera_to_world[[0, 4, 9], :3], atol=1e-5)


def test_reference_cameras_fill_the_unit_cube_and_look_up_along_z(nerfstudio_folder: WriteFolder) -> None:
    cameras = parse(nerfstudio_folder()).cameras.camera_to_worlds
    assert float(cameras[:, :, 3].abs().max()) == pytest.approx(1.0, abs=1e-6)
    up = cameras[:, :, 1].mean(dim=0)
    torch.testing.assert_close(up / up.norm(), torch.tensor([0.0, 0.0, 1.0]), atol=1e-5, rtol=0)


def test_large_photographs_are_read_from_downscaled_copies_with_scaled_intrinsics(colmap_folder: WriteFolder) -> None:
    folder = colmap_folder()
    expected = parse(folder)
    (folder / "images_2").mkdir()
    for path in (folder / "images").iterdir():
        with Image.open(path) as image:
            image.resize((32, 24)).save(folder / "images_2" / path.name)
    shutil.rmtree(folder / "images")
    outputs = parse(folder)
    assert all(path.parent.name == "images_2" for path in outputs.image_filenames)
    torch.testing.assert_close(outputs.cameras.fx, expected.cameras.fx / 2)
    torch.testing.assert_close(outputs.cameras.cy, expected.cameras.cy / 2)
    assert outputs.cameras.width.flatten().tolist() == [32, 32, 32]


def test_copies_of_half_the_size_are_preferred_above_1600_pixels(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder()
    (folder / "images_2").mkdir()
    for path in list((folder / "images").iterdir()):
        Image.new("RGB", (1000, 750)).save(folder / "images_2" / path.name)
        Image.new("RGB", (2000, 1500)).save(path)
    edit_transforms(folder, lambda meta: meta.update(w=2000, h=1500))
    outputs = parse(folder)
    assert all(path.parent.name == "images_2" for path in outputs.image_filenames)
    assert outputs.cameras.height.flatten().tolist() == [750, 750, 750]
    # by which a measurement tells them apart
    assert outputs.metadata[PHOTOGRAPH_NAMES] == [f"images/{path.name}" for path in outputs.image_filenames]


def test_downscaled_masks_are_found_in_the_sub_folders_of_their_photographs(colmap_folder: WriteFolder) -> None:
    folder = colmap_folder(binary=False)
    model = folder / "sparse/0"
    (model / "images.txt").write_text((model / "images.txt").read_text().replace(" view_", " cam0/view_"))
    (folder / "images").rename(folder / "cam0")
    (folder / "images").mkdir()
    (folder / "cam0").rename(folder / "images/cam0")
    for size, suffix in (((64, 48), ""), ((32, 24), "_2")):
        for kind in ("images", "masks"):
            (folder / f"{kind}{suffix}/cam0").mkdir(parents=True, exist_ok=True)
        for path in (folder / "images/cam0").iterdir():
            Image.new("L", size, 255).save(folder / f"masks{suffix}/cam0" / path.name)
            with Image.open(path) as image:
                image.resize(size).save(folder / f"images{suffix}/cam0" / path.name)
    shutil.rmtree(folder / "images")  # so that the copies are read
    outputs = parse(folder)
    assert {path.parent for path in outputs.image_filenames} == {folder / "images_2/cam0"}
    assert {path.parent for path in outputs.mask_filenames or ()} == {folder / "masks_2/cam0"}
    shutil.rmtree(folder / "masks_2")
    with pytest.raises(ValueError, match=r"need masks of their size in masks_2; .*--image-folder images"):
        parse(folder)


def test_names_with_spaces_are_read_whole_from_a_text_model(colmap_folder: WriteFolder) -> None:
    folder = colmap_folder(binary=False)
    text = (folder / "sparse/0/images.txt").read_text()
    (folder / "sparse/0/images.txt").write_text(text.replace(" view_", " a view_"))
    for path in list((folder / "images").iterdir()):
        path.rename(path.with_name(f"a {path.name}"))
    outputs = parse(folder, seed_points="sfm")
    assert all(path.name.startswith("a view_") for path in outputs.image_filenames)


def test_a_byte_order_mark_is_no_part_of_a_file(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder()
    path = folder / "transforms.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert len(parse(folder).image_filenames) == 3


def test_fisheye_cameras_stay_fisheye(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder()
    edit_transforms(folder, lambda meta: meta.update(camera_model="OPENCV_FISHEYE", k1=0.1, k4=0.01))
    cameras = parse(folder).cameras
    assert cameras.camera_type.flatten().tolist() == [CameraType.FISHEYE.value] * 3
    torch.testing.assert_close(cameras.distortion_params[0], torch.tensor([0.1, 0.0, 0.0, 0.01, 0.0, 0.0]))


def test_a_fisheye_without_coefficients_is_undistorted_too(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder()
    edit_transforms(folder, lambda meta: meta.update(camera_model="OPENCV_FISHEYE"))
    fisheye = parse(folder).cameras
    # Nerfstudio leaves photographs as they are where all coefficients are 0.
    assert (fisheye.distortion_params != 0).any(dim=1).all()
    torch.testing.assert_close(fisheye.distortion_params, torch.zeros(3, 6), atol=1e-9, rtol=0)
    edit_transforms(folder, lambda meta: meta.update(camera_model="OPENCV"))
    assert (parse(folder).cameras.distortion_params == 0).all()


def test_a_finished_model_can_be_looked_at_without_its_photographs(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder()
    expected = parse(folder)
    shutil.rmtree(folder / "images")
    parser = SparseViewsDataParserConfig(data=folder, num_views=3).setup()
    parser.downscale_factor = 1  # as nerfstudio's data manager does for ns-render, ns-export and ns-viewer
    outputs = parser.get_dataparser_outputs("train")
    assert torch.equal(outputs.cameras.camera_to_worlds, expected.cameras.camera_to_worlds)
    assert "points3D_xyz" not in outputs.metadata


def test_when_no_photograph_is_left_the_references_are_evaluated(
    nerfstudio_folder: WriteFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = nerfstudio_folder()
    assert names(parse(folder, "test", num_views=10)) == [f"view_{i}.png" for i in range(1, 11)]
    assert "No photograph is left to test on" in capsys.readouterr().out


# -------------------------------------------------------------------------- test views stay out of training


def test_spoiling_every_other_photograph_and_pose_changes_nothing_of_the_train_split(
    nerfstudio_folder: WriteFolder,
) -> None:
    folder = nerfstudio_folder(width=160, height=120, num_images=7)
    before = parse(folder, seed_points="auto")
    references = names(before)

    def spoil(meta: dict) -> None:
        rng = np.random.default_rng(0)
        for frame in meta["frames"]:
            if Path(frame["file_path"]).name not in references:
                frame["transform_matrix"] = rng.normal(size=(4, 4)).tolist()
                Image.fromarray(rng.integers(0, 255, (9, 5, 3), dtype=np.uint8)).save(folder / frame["file_path"])

    edit_transforms(folder, spoil)
    assert_bit_identical(parse(folder, seed_points="auto"), before)


def test_removing_every_other_photograph_and_pose_changes_nothing_of_the_train_split(
    nerfstudio_folder: WriteFolder,
) -> None:
    folder = nerfstudio_folder(width=160, height=120, num_images=7)
    before = parse(folder, seed_points="auto")
    references = names(before)

    def remove(meta: dict) -> None:
        meta["frames"] = [frame for frame in meta["frames"] if Path(frame["file_path"]).name in references]

    edit_transforms(folder, remove)
    for path in (folder / "images").iterdir():
        if path.name not in references:
            path.unlink()
    after = parse(folder, num_views=None, reference_views=tuple(references), seed_points="auto")
    assert_bit_identical(after, before)


def test_sfm_seed_points_do_not_depend_on_what_other_views_observed(colmap_folder: WriteFolder) -> None:
    folder = colmap_folder(binary=False, num_points=300)
    before = parse(folder, seed_points="sfm")
    references = names(before)
    lines = (folder / "sparse/0/images.txt").read_text().splitlines()
    for position in range(1, len(lines), 2):
        if lines[position].split()[-1] not in references:
            words = lines[position].split()
            lines[position] = " ".join([words[0], "0.6 0.8 0 0 1 2 3", *words[8:]])
            lines[position + 1] = " ".join("7.0 7.0 " + word for word in lines[position + 1].split()[2::3])
    (folder / "sparse/0/images.txt").write_text("\n".join(lines) + "\n")
    (folder / "sparse/0/points3D.txt").write_text("# points\n0 9 9 9 1 2 3 0.5 1 0\n")
    assert_bit_identical(parse(folder, seed_points="sfm"), before)


def test_sfm_seed_points_lie_on_the_true_surface(colmap_folder: WriteFolder, scene: TinyScene) -> None:
    folder = colmap_folder(num_points=300)
    outputs = parse(folder, seed_points="sfm", initial=SeedPointsConfig(num_random_points=0, min_points=0))
    # Back to the capture's world, in which COLMAP's points are given.
    transform = outputs.dataparser_transform.double()
    xyz = outputs.metadata["points3D_xyz"].double() / outputs.dataparser_scale
    original = (xyz - transform[:, 3]) @ transform[:, :3]
    assert len(original) > 50
    assert float(np.max(scene.distance_to_surface(original.numpy()))) < 1e-3
    true_points, _ = surface_points(scene, 300)
    nearest = torch.cdist(original, torch.from_numpy(true_points)).min(dim=1).values
    assert float(nearest.max()) < 1e-3


def test_sfm_seed_points_of_a_processed_folder_follow_the_poses_of_transforms_json(
    tmp_path: Path, scene: TinyScene
) -> None:
    """ns-process-data leaves transforms.json and the COLMAP model, in another world, in one folder."""
    folder = write_colmap_folder(tmp_path, scene, model="colmap/sparse/0", num_points=300)
    applied = np.array([[0.0, 0, 1, 5], [1, 0, 0, 6], [0, 1, 0, 7]])
    write_nerfstudio_folder(folder, scene, extra={"applied_transform": applied.tolist()})
    outputs = parse(folder, seed_points="sfm", initial=SeedPointsConfig(num_random_points=0, min_points=0))
    xyz = outputs.metadata["points3D_xyz"].double().numpy() / outputs.dataparser_scale
    from_original = outputs.dataparser_transform.double().numpy()
    original = (xyz - from_original[:, 3]) @ from_original[:, :3]
    of_the_poses = original @ applied[:, :3].T + applied[:, 3]
    assert len(of_the_poses) > 50
    assert float(scene.distance_to_surface(of_the_poses).max()) < 1e-3


# ------------------------------------------------------------------------------------------------ bad input


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not exist\. In training give an existing one by `--data`"):
        parse(tmp_path / "nowhere")


def test_photographs_without_poses_are_refused_with_the_way_out(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder()
    (folder / "transforms.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no poses.*ns-process-data images"):
        parse(folder)


def test_a_frame_without_a_pose_is_refused_with_the_way_out(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder()
    edit_transforms(folder, lambda meta: meta["frames"][3].pop("transform_matrix"))
    with pytest.raises(ValueError, match=r"view_4.png .*no `transform_matrix`.*ns-process-data"):
        parse(folder)


def test_missing_intrinsics_are_named(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder()
    edit_transforms(folder, lambda meta: meta.pop("fl_x"))
    with pytest.raises(ValueError, match="`fl_x` neither for the scene nor for the frame"):
        parse(folder)


def test_broken_json_is_an_error(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder()
    (folder / "transforms.json").write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        parse(folder)


def test_a_broken_colmap_model_is_an_error(colmap_folder: WriteFolder) -> None:
    folder = colmap_folder()
    (folder / "sparse/0/images.bin").write_bytes(b"\x05\0\0\0\0\0\0\0\x01")
    with pytest.raises(ValueError, match="cannot be read"):
        parse(folder)


def test_a_colmap_model_without_photographs_is_an_error(colmap_folder: WriteFolder) -> None:
    folder = colmap_folder()
    shutil.rmtree(folder / "images")
    with pytest.raises(FileNotFoundError, match="no folder `images`"):
        parse(folder)


def test_a_missing_photograph_is_an_error(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder()
    (folder / "images/view_5.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 posed photograph\(s\) do not exist: .*view_5.png"):
        parse(folder)


@pytest.mark.parametrize("content", [b"", b"no picture"])
def test_an_unreadable_photograph_is_an_error(nerfstudio_folder: WriteFolder, content: bytes) -> None:
    folder = nerfstudio_folder()
    (folder / "images/view_5.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"view_5.png cannot be read"):
        parse(folder)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_photograph_is_an_error(nerfstudio_folder: WriteFolder, scene: TinyScene, suffix: str) -> None:
    folder = nerfstudio_folder()
    path = folder / f"images/view_5.{suffix}"
    Image.fromarray(scene.images[4]).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    edit_transforms(folder, lambda meta: meta["frames"][4].update(file_path=f"images/view_5.{suffix}"))
    with pytest.raises(ValueError, match=f"view_5.{suffix} cannot be read"):
        parse(folder)


@pytest.mark.parametrize("mode", ["P", "LA", "CMYK", "I;16"])
def test_pixel_formats_that_nerfstudio_would_misread_are_refused(nerfstudio_folder: WriteFolder, mode: str) -> None:
    folder = nerfstudio_folder()
    path = folder / ("images/view_5.tif" if mode == "CMYK" else "images/view_5.png")
    Image.new(mode, (64, 48)).save(path)
    edit_transforms(folder, lambda meta: meta["frames"][4].update(file_path=f"images/{path.name}"))
    with pytest.raises(ValueError, match=f"pixel format {mode}.*Convert it"):
        parse(folder)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 3), ("RGBA", 4)])
def test_grey_and_alpha_photographs_are_read(nerfstudio_folder: WriteFolder, mode: str, channels: int) -> None:
    outputs = parse(nerfstudio_folder(mode=mode, width=160, height=120, num_images=7), seed_points="triangulated")
    dataset = InputDataset(outputs)
    assert dataset.get_image_float32(0).shape == (120, 160, channels)
    assert len(outputs.metadata["points3D_xyz"]) >= FEW_POINTS.min_points


@pytest.mark.parametrize(("row", "column"), [(0, 0), (2, 3)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_poses_with_entries_that_are_no_numbers_are_refused(
    nerfstudio_folder: WriteFolder, row: int, column: int, value: float
) -> None:
    folder = nerfstudio_folder()
    edit_transforms(folder, lambda meta: meta["frames"][4]["transform_matrix"][row].__setitem__(column, value))
    with pytest.raises(ValueError, match=r"pose of images/view_5.png .*not finite"):
        parse(folder)


def change_rotation(folder: Path, factor: np.ndarray) -> None:
    def change(meta: dict) -> None:
        pose = np.array(meta["frames"][4]["transform_matrix"])
        pose[:3, :3] = pose[:3, :3] @ factor
        meta["frames"][4]["transform_matrix"] = pose.tolist()

    edit_transforms(folder, change)


def test_a_scaled_rotation_is_refused(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder()
    change_rotation(folder, 2 * np.eye(3))
    # R^T R = 4, so that it deviates from the identity by 3.
    with pytest.raises(ValueError, match=r"view_5.png is not rigid: .* up to 3, at most 0.001"):
        parse(folder)


def test_a_mirrored_pose_is_refused(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder()
    change_rotation(folder, np.diag([1.0, 1.0, -1.0]))
    with pytest.raises(ValueError, match=r"view_5.png mirrors the world"):
        parse(folder)


def test_a_bad_pose_of_a_test_view_is_refused_when_it_is_asked_for(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder()
    edit_transforms(folder, lambda meta: meta["frames"][1]["transform_matrix"][0].__setitem__(0, float("nan")))
    assert len(parse(folder).image_filenames) == 3
    with pytest.raises(ValueError, match=r"pose of images/view_2.png"):
        parse(folder, "test")


def test_references_at_one_point_are_refused(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder()

    def gather(meta: dict) -> None:
        for frame in meta["frames"]:
            for row, value in zip(frame["transform_matrix"], (5.0, 6.0, 7.0)):
                row[3] = value

    edit_transforms(folder, gather)
    with pytest.raises(ValueError, match="All 3 reference cameras stand at one point"):
        parse(folder)


def test_two_photographs_with_one_pose_are_used(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder(width=160, height=120, num_images=7)

    def copy_pose(meta: dict) -> None:
        meta["frames"][3]["transform_matrix"] = meta["frames"][0]["transform_matrix"]

    edit_transforms(folder, copy_pose)
    outputs = parse(folder, num_views=None, reference_views=("view_1", "view_4", "view_7"), seed_points="auto")
    assert torch.isfinite(outputs.metadata["points3D_xyz"]).all()
    assert torch.equal(outputs.cameras.camera_to_worlds[0], outputs.cameras.camera_to_worlds[1])


def test_a_photograph_listed_twice_is_refused(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder()
    edit_transforms(folder, lambda meta: meta["frames"].append(meta["frames"][2]))
    with pytest.raises(ValueError, match=r"images/view_3.png is listed twice"):
        parse(folder)


def test_a_photograph_of_another_shape_than_its_intrinsics_is_refused(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder()
    Image.new("RGB", (48, 64)).save(folder / "images/view_5.png")
    with pytest.raises(ValueError, match=r"48x64 pixels, its intrinsics are for 64x48.*sides look swapped"):
        parse(folder)


def test_a_scaled_photograph_gets_scaled_intrinsics(nerfstudio_folder: WriteFolder, scene: TinyScene) -> None:
    folder = nerfstudio_folder()
    Image.fromarray(scene.images[4]).resize((32, 24)).save(folder / "images/view_5.png")
    cameras = parse(folder).cameras
    assert cameras.width.flatten().tolist() == [64, 32, 64]
    assert cameras.fx.flatten().tolist() == pytest.approx([60.8, 30.4, 60.8])  # focal length: 0.95 widths


def test_masks_are_handed_on_and_keep_seed_points_out_of_the_sky(
    nerfstudio_folder: WriteFolder, scene: TinyScene
) -> None:
    folder = nerfstudio_folder(masks=True)
    outputs = parse(folder)
    assert outputs.mask_filenames is not None
    assert [path.name for path in outputs.mask_filenames] == names(outputs)
    mask = InputDataset(outputs)[0]["mask"]
    np.testing.assert_array_equal(mask[..., 0].numpy(), np.isfinite(scene.depth[0]))


def test_half_a_colmap_model_is_named(colmap_folder: WriteFolder) -> None:
    folder = colmap_folder(binary=False)
    (folder / "sparse/0/cameras.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"sparse/0 holds images.txt but no cameras.txt"):
        parse(folder)


def test_a_reference_that_is_transparent_everywhere_is_refused(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder(mode="RGBA")
    Image.new("RGBA", (64, 48)).save(folder / "images/view_5.png")
    with pytest.raises(ValueError, match=r"images/view_5.png is transparent everywhere"):
        parse(folder)


def test_an_empty_mask_of_a_reference_is_refused(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder(masks=True)
    Image.new("L", (64, 48)).save(folder / "masks/view_5.png")
    with pytest.raises(ValueError, match=r"masks/view_5.png keeps no pixel of images/view_5.png"):
        parse(folder)


def test_an_empty_mask_of_a_test_view_is_no_error(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder(masks=True)
    Image.new("L", (64, 48)).save(folder / "masks/view_2.png")
    assert names(parse(folder, "test")) == ["view_2.png"]


def test_a_mask_of_another_size_or_with_colours_is_refused(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder(masks=True)
    Image.new("L", (32, 24), 255).save(folder / "masks/view_5.png")
    with pytest.raises(ValueError, match="another size than its photograph"):
        parse(folder)
    Image.new("RGB", (64, 48), (255, 255, 255)).save(folder / "masks/view_5.png")
    with pytest.raises(ValueError, match="a mask has one channel"):
        parse(folder)
    (folder / "masks/view_5.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"masks/view_5.png of images/view_5.png does not exist"):
        parse(folder)


def test_masks_for_some_references_only_are_refused(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder(masks=True)
    edit_transforms(folder, lambda meta: meta["frames"][4].pop("mask_path"))
    with pytest.raises(
        ValueError, match=r"Either every photograph has a mask or none: 1 of 3 have none, images/view_5.png the first"
    ):
        parse(folder)


def test_distortion_that_nerfstudio_cannot_undistort_is_refused(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder(extra={"k4": 0.1})
    with pytest.raises(ValueError, match="k4 must be 0 for perspective cameras"):
        parse(folder)


def test_a_panorama_is_refused(nerfstudio_folder: WriteFolder) -> None:
    folder = nerfstudio_folder(extra={"camera_model": "EQUIRECTANGULAR"})
    with pytest.raises(ValueError, match="EQUIRECTANGULAR cannot be undistorted"):
        parse(folder)


def test_sfm_seed_points_without_a_model_are_refused(nerfstudio_folder: WriteFolder) -> None:
    with pytest.raises(ValueError, match=r"--seed-points sfm` needs a COLMAP model"):
        parse(nerfstudio_folder(), seed_points="sfm")


def test_an_unknown_split_is_refused(nerfstudio_folder: WriteFolder) -> None:
    with pytest.raises(ValueError, match="Unknown split 'validation'"):
        parse(nerfstudio_folder(), "validation")


def test_reading_changes_nothing_in_the_folder_of_the_user(colmap_folder: WriteFolder) -> None:
    folder = colmap_folder(width=160, height=120, num_images=5)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    parse(folder, seed_points="auto")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_capture_knows_its_model_and_its_point_cloud(colmap_folder: WriteFolder) -> None:
    folder = colmap_folder()
    assert read_capture(folder).colmap_model == folder / "sparse/0"


@pytest.mark.slow
def test_the_dataparser_registers_without_an_import_circle() -> None:
    code = (
        "import method_configs.sparse_views as ours\n"
        "import nerfstudio.configs.dataparser_configs as theirs\n"
        "print(type(ours.sparse_views_dataparser.config).__name__, 'nerfstudio-data' in theirs.dataparsers)\n"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert out.stdout.strip().splitlines()[-1] == "SparseViewsDataParserConfig True"
