import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import tiny_scene, write_nerfstudio_folder

from nerfstudio_enhancer.depth_training.known_depth import knows_depth, store_known_views
from nerfstudio_enhancer.depth_training.samples import FAR_AWAY, confirmed_by, make_samples
from nerfstudio_enhancer.depth_training.train_depth import TrainDepth, train_depth
from nerfstudio_enhancer.depth_training.whole_splats import WholeScene
from nerfstudio_enhancer.jobs import JobResult
from nerfstudio_enhancer.procedural.layout import UPRIGHT, Light, Scene, View, draw_scene
from nerfstudio_enhancer.procedural.make_scenes import MOST_STEPS, MakeScenes, make_scene, make_scenes
from nerfstudio_enhancer.procedural.render import Renderer
from nerfstudio_enhancer.procedural.shapes import Mesh, ball, box, cylinder, rock, vase
from nerfstudio_enhancer.procedural.textures import TEXTURE_PX, Texture, draw_texture
from nerfstudio_enhancer.stereo.views import StereoView

FORWARD = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
"""Axes of a camera that looks along the world's second axis: right is x, down is -z."""


def meshes() -> dict[str, Mesh]:
    draw = np.random.default_rng(0)
    return {"box": box(), "ball": ball(), "cylinder": cylinder(), "vase": vase(draw), "rock": rock(draw)}


def volume(mesh: Mesh) -> float:
    """Signed: positive if the triangles are counter-clockwise seen from outside."""
    a, b, c = (mesh.vertices[mesh.triangles[:, i]].astype(np.float64) for i in range(3))
    return float((a * np.cross(b, c)).sum() / 6)


def grey_scene() -> Scene:
    """Empty, with light from everywhere alone."""
    scene = Scene(np.random.default_rng(0))
    scene.light = Light(torch.tensor([0.0, 0, 1]), 0.0, 1.0)
    scene.field_of_view = 90.0
    return scene


def plain(colour: tuple[float, float, float]) -> Texture:
    return Texture.of(torch.tensor(colour)[:, None, None].expand(3, TEXTURE_PX, TEXTURE_PX))


# ------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("name", ["box", "ball", "cylinder", "vase", "rock"])
def test_solids_are_closed_and_within_their_box(name: str) -> None:
    mesh = meshes()[name]
    assert np.abs(mesh.vertices).max() <= 1 + 1e-6
    edges = np.concatenate([mesh.triangles[:, [i, (i + 1) % 3]] for i in range(3)]).astype(np.int64)
    forth = set(map(tuple, edges))
    assert len(forth) == len(edges), "an edge is used twice in one direction"
    assert {(b, a) for a, b in forth} == forth, "an edge has no neighbour"


def test_volumes_are_those_of_the_solids() -> None:
    assert volume(box()) == pytest.approx(8)
    # A polygon of 40 corners has 0.4 % less area than its circle.
    assert volume(cylinder()) == pytest.approx(2 * math.pi, rel=0.01)
    assert volume(ball()) == pytest.approx(4 / 3 * math.pi, rel=0.02)
    assert min(volume(mesh) for mesh in meshes().values()) > 0


# ------------------------------------------------------------------------------------------- textures


def test_textures_repeat_mirrored_without_seams() -> None:
    ramp = torch.linspace(0, 1, TEXTURE_PX).expand(3, TEXTURE_PX, TEXTURE_PX)  # from left to right
    texture = Texture.of(ramp)
    place = torch.tensor([[0.25, 0.5], [1.75, 0.5], [-0.25, 0.5], [2.25, 0.5]])
    torch.testing.assert_close(texture.at(place, torch.ones(4)), torch.full((4, 3), 0.25), atol=3e-3, rtol=0)
    across = torch.stack([torch.linspace(0.9, 1.1, 200), torch.full((200,), 0.3)], dim=1)
    assert texture.at(across, torch.ones(200)).diff(dim=0).abs().max() < 0.01


def test_a_distant_texture_is_its_mean() -> None:
    fine = (torch.arange(TEXTURE_PX) % 2).float().expand(3, TEXTURE_PX, TEXTURE_PX)
    place = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    texture = Texture.of(fine)
    torch.testing.assert_close(texture.at(place, torch.full((50,), 16.0)), torch.full((50, 3), 0.5))
    assert texture.at(place, torch.ones(50)).std() > 0.2


def test_textures_are_cut_out_of_photographs_and_need_none(tmp_path) -> None:
    red = np.zeros((40, 60, 3), dtype=np.uint8)
    red[..., 0] = 200
    Image.fromarray(red).save(tmp_path / "red.png")
    cut = draw_texture(np.random.default_rng(0), [tmp_path / "red.png"], ["photograph"])
    torch.testing.assert_close(cut.levels[0].mean(dim=(1, 2)), torch.tensor([200 / 255, 0, 0]))
    for seed in range(8):
        drawn = draw_texture(np.random.default_rng(seed), [])
        assert drawn.levels[0].shape == (3, TEXTURE_PX, TEXTURE_PX)
        assert bool(drawn.levels[0].isfinite().all())


# ------------------------------------------------------------------------------------------- pictures


def test_depth_is_along_the_optical_axis_and_infinite_in_the_sky() -> None:
    # A wall 4 m ahead, from 1 m left to 1 m right of the axis and as high: half of a field of 90 degrees is 4 m wide there.
    scene = grey_scene()
    scene.add(box(), (0, 5, 0), (1, 1, 1), UPRIGHT, plain((0.5, 0.25, 0.125)), 1.0, gloss=0.0)
    picture = Renderer(scene).render(View(np.zeros(3), FORWARD), 64, 64)
    wall = torch.zeros(64, 64, dtype=torch.bool)
    wall[24:40, 24:40] = True
    torch.testing.assert_close(picture.depth[wall], torch.full((256,), 4.0))
    assert bool(picture.depth[~wall].isinf().all())
    # Its front looks neither up nor sideways, so that it has 0.62 of the light.
    inner = picture.rgb[26:38, 26:38].reshape(-1, 3)
    torch.testing.assert_close(inner, torch.tensor([[0.31, 0.155, 0.0775]]).expand(144, 3), atol=1e-4, rtol=0)


def test_right_is_right_and_down_is_down() -> None:
    scene = grey_scene()
    scene.add(box(), (2, 5, -2), (0.5, 0.5, 0.5), UPRIGHT, plain((1.0, 1, 1)), 1.0, gloss=0.0)
    depth = Renderer(scene).render(View(np.zeros(3), FORWARD), 64, 64).depth
    rows, columns = depth.isfinite().nonzero().T
    assert rows.min() >= 32
    assert columns.min() >= 32


def test_the_sun_throws_shadows() -> None:
    # Seen from above: a plate 1 m above the ground, the sun overhead. Beside the plate the ground is lit, below it not.
    scene = grey_scene()
    scene.light = Light(torch.tensor([0.0, 0, 1]), 0.5, 0.7)
    white = plain((1.0, 1, 1))
    scene.add(box(), (0, 0, -1), (20, 20, 1), UPRIGHT, white, 1.0, gloss=0.0)
    scene.add(box(), (0, 0, 1), (1, 1, 0.1), UPRIGHT, white, 1.0, gloss=0.0)
    below_the_plate = View(np.array([0, 0, 0.5]), np.diag([1.0, -1, -1]))
    rgb = Renderer(scene).render(below_the_plate, 32, 32).rgb
    ambient = 0.7 * (0.62 + 0.27)
    torch.testing.assert_close(rgb[16, 16], torch.full((3,), ambient), atol=1e-4, rtol=0)
    beside = View(np.array([3.0, 0, 0.5]), np.diag([1.0, -1, -1]))
    lit = Renderer(scene).render(beside, 32, 32).rgb[16, 16]
    torch.testing.assert_close(lit, torch.full((3,), ambient + 1.1 * 0.5), atol=1e-4, rtol=0)


def test_a_scene_has_as_many_views_as_asked_for_and_all_kinds_are_drawn() -> None:
    ceilings = set()
    for seed in range(12):
        scene = draw_scene(np.random.default_rng(seed), [], 7)
        assert len(scene.views) == 7
        for view in scene.views:
            np.testing.assert_allclose(view.axes.T @ view.axes, np.eye(3), atol=1e-9)
            assert np.linalg.det(view.axes) == pytest.approx(1)
        ceilings.add(scene.nearest)
    assert ceilings == {0.35, 0.7, 0.6}


# ------------------------------------------------------------------------------------------- scenes on disk


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("procedural") / "procedural_00003"
    make_scene(folder, 3, (), 8, 96)
    return folder


def test_views_see_the_same_surface_at_the_same_depth(made, tmp_path) -> None:
    # Of what another camera sees, at least half lies where its depth picture has it; the rest is hidden from it.
    stored = tmp_path / "views.pt"
    store_known_views(WholeScene(made, stored, 40, 0, None, 0))
    views = torch.load(stored, weights_only=True)
    assert 4 <= len(views) <= 8
    stereo = []
    for view in views:
        fx, fy, cx, cy = view["intrinsics"].double().tolist()
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3] = view["camera_to_world"].double()
        pose[:3, 1:3] *= -1
        rgb = view["rgb"].float() / 255
        intrinsics = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)
        stereo.append(StereoView(rgb, rgb.mean(-1), view["alpha"] > 0, intrinsics, torch.linalg.inv(pose)))
    shares = [
        float(confirmed_by(stereo[i], views[i]["depth"], stereo[i + 1], views[i + 1]["depth"]).float().mean())
        for i in range(len(views) - 1)
    ]
    assert np.mean(shares) > 0.5


def test_the_same_number_gives_the_same_scene(made, tmp_path) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    make_scene(again, 3, (), 8, 96)
    make_scene(other, 4, (), 8, 96)
    files = sorted(path.relative_to(made) for path in made.rglob("*.*"))
    assert len(files) == 1 + 2 * len(list((made / "images").iterdir()))
    assert all((made / path).read_bytes() == (again / path).read_bytes() for path in files)
    assert (made / "transforms.json").read_text() != (other / "transforms.json").read_text()
    assert not again.with_name("again.partial").exists()


def test_the_command_goes_on_and_keeps_what_is_there(tmp_path, made) -> None:
    output = tmp_path / "scenes"
    kept = output / "procedural_00000"
    kept.mkdir(parents=True)
    (kept / "transforms.json").write_text("kept")
    folders = make_scenes(MakeScenes(output=output, count=2, views=4, size=48, jobs=1))
    assert [folder.name for folder in folders] == ["procedural_00000", "procedural_00001"]
    assert (kept / "transforms.json").read_text() == "kept"
    capture = json.loads((folders[1] / "transforms.json").read_text())
    assert max(capture["w"], capture["h"]) == 48
    assert all((folders[1] / frame["depth_file_path"]).exists() for frame in capture["frames"])


def test_settings_that_leave_nothing_to_do_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        make_scenes(MakeScenes(output=tmp_path, count=0))
    with pytest.raises(FileNotFoundError, match="no folder of photographs"):
        make_scenes(MakeScenes(output=tmp_path, photographs=(tmp_path / "nowhere",)))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="holds no photograph"):
        make_scenes(MakeScenes(output=tmp_path, photographs=(empty,)))


# ------------------------------------------------------------------------------------------- depth that is known


def with_depth_pictures(folder, scene, sky: int = 0, extra: dict | None = None) -> None:
    """Name a depth picture for every photograph of a folder of the tiny scene, in millimetres."""
    path = folder / "transforms.json"
    capture = json.loads(path.read_text())
    (folder / "depth").mkdir()
    for frame in capture["frames"]:
        index = scene.names.index(frame["file_path"].split("/")[-1])
        depth = np.where(np.isfinite(scene.depth[index]), scene.depth[index] * 1000, sky).round().astype(np.uint16)
        frame["depth_file_path"] = f"depth/{index}.png"
        Image.fromarray(depth).save(folder / frame["depth_file_path"])
    path.write_text(json.dumps({**capture, **(extra or {})}))


def test_known_depth_is_stored_as_the_pictures_have_it(tmp_path) -> None:
    scene = tiny_scene()
    folder = write_nerfstudio_folder(tmp_path / "scene", scene)
    assert not knows_depth(folder)
    with_depth_pictures(folder, scene)
    assert knows_depth(folder)
    store_known_views(WholeScene(folder, tmp_path / "views.pt", 40, 0, None, 0))
    views = torch.load(tmp_path / "views.pt", weights_only=True)
    assert len(views) == len(scene.names)
    for index, view in enumerate(views):
        seen = torch.from_numpy(np.isfinite(scene.depth[index]))
        assert torch.equal(view["alpha"] == 255, seen)
        expected = torch.from_numpy(scene.depth[index]).float()[seen]
        torch.testing.assert_close(view["depth"][seen], expected, atol=6e-4, rtol=0)
        assert torch.equal(view["rgb"], torch.from_numpy(scene.images[index]))
        np.testing.assert_allclose(view["camera_to_world"], scene.camera_to_world[index][:3], atol=1e-6)


def test_the_sky_of_procedural_scenes_is_far_away_and_stretches_no_range(tmp_path) -> None:
    scene = tiny_scene()
    folder = write_nerfstudio_folder(tmp_path / "scene", scene)
    with_depth_pictures(folder, scene, sky=MOST_STEPS, extra={"depth_clipped": True})
    store_known_views(WholeScene(folder, tmp_path / "views.pt", 40, 0, None, 0))
    views = torch.load(tmp_path / "views.pt", weights_only=True)
    for index, view in enumerate(views):
        sky = torch.from_numpy(~np.isfinite(scene.depth[index]))
        assert torch.equal(view["depth"] == FAR_AWAY, sky)
        assert bool((view["alpha"] == 255).all())
    make_samples(tmp_path / "views.pt", tmp_path / "samples.pt", 0, ((3, 2),))
    samples = torch.load(tmp_path / "samples.pt", weights_only=True)["samples"]
    # Below 0 is beyond the farthest plane, which is right for what is farther still.
    far = torch.cat([sample["inverse_depth"][sample["trusted"]] for sample in samples]) < 0
    assert 0.02 < float(far.float().mean()) < 0.6
    near = torch.cat([sample["inverse_depth"][sample["trusted"]] for sample in samples])[~far]
    assert float(near.float().median()) > 0.1, (
        "the range reaches to the sky, so that all else is near the farthest plane"
    )


def test_smaller_views_keep_the_camera(tmp_path) -> None:
    scene = tiny_scene()
    folder = write_nerfstudio_folder(tmp_path / "scene", scene)
    with_depth_pictures(folder, scene)
    store_known_views(WholeScene(folder, tmp_path / "views.pt", 2, 0, max(scene.width, scene.height) // 2, 0))
    views = torch.load(tmp_path / "views.pt", weights_only=True)
    assert len(views) == 2
    assert views[0]["depth"].shape == (round(scene.height / 2), round(scene.width / 2))
    assert float(views[0]["intrinsics"][0]) == pytest.approx(scene.focal_px / 2)


def test_a_missing_or_foreign_depth_picture_is_named(tmp_path) -> None:
    scene = tiny_scene()
    folder = write_nerfstudio_folder(tmp_path / "scene", scene)
    with_depth_pictures(folder, scene)
    first = folder / "depth" / "0.png"
    Image.fromarray(np.ones((5, 50), dtype=np.uint16)).save(first)
    with pytest.raises(ValueError, match="shape of its photograph"):
        store_known_views(WholeScene(folder, tmp_path / "views.pt", 40, 0, None, 0))
    first.unlink()
    with pytest.raises(FileNotFoundError, match=r"0\.png of images/view_1\.png is missing"):
        store_known_views(WholeScene(folder, tmp_path / "views.pt", 40, 0, None, 0))


def test_the_depth_network_learns_from_procedural_scenes_without_splats(made, tmp_path, monkeypatch) -> None:
    def here(jobs, *_):
        for job in jobs:
            job.function(*job.arguments)
            yield JobResult(job.key)

    fitted = []
    monkeypatch.setattr("nerfstudio_enhancer.depth_training.train_depth.run_jobs", here)
    monkeypatch.setattr(
        "nerfstudio_enhancer.depth_training.whole_splats.store_views", lambda scene: pytest.fail("splats are trained")
    )
    monkeypatch.setattr(
        "nerfstudio_enhancer.depth_training.fit.fit", lambda settings, files: fitted.extend(files) or tmp_path
    )
    train_depth(TrainDepth(output=tmp_path, data=(made,)))
    assert fitted == [tmp_path / "samples" / f"{made.name}.pt"]
    stored = torch.load(fitted[0], weights_only=True)
    # Eight views or fewer: two sets of three, one of four, one of six if there are more than six, none of nine.
    assert len(stored["samples"]) in (10, 16)
    assert np.mean([float(sample["trusted"].float().mean()) for sample in stored["samples"]]) > 0.3
