"""From where splats are shown, and which references see them."""

import math

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import SceneBox
from torch.testing import assert_close

from nerfstudio_enhancer.enhance_step import EnhanceConfig
from nerfstudio_enhancer.haze import SeenFrom, veil_share
from nerfstudio_enhancer.model import EnhancerModel, EnhancerModelConfig

SIZE = 32


def looking_at_the_origin(*degrees: float, distance: float = 4.0) -> Cameras:
    """Cameras on a circle about the y axis, seen from above; 0 stands on the z axis. Shape [k]."""
    poses = []
    for angle in (math.radians(value) for value in degrees):
        sine, cosine = math.sin(angle), math.cos(angle)
        rotation = torch.tensor([[cosine, 0.0, sine], [0.0, 1.0, 0.0], [-sine, 0.0, cosine]])
        poses.append(torch.cat([rotation, distance * rotation[:, 2:]], dim=1))
    return Cameras(torch.stack(poses), fx=40.0, fy=40.0, cx=SIZE / 2, cy=SIZE / 2, width=SIZE, height=SIZE)


def splats(*z: float) -> EnhancerModel:
    """Opaque balls on the z axis, the first red, then green, blue and black, before a white background."""
    means = torch.tensor([[0.0, 0.0, value] for value in z])
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]])[: len(z)]
    config = EnhancerModelConfig(
        sh_degree=0, num_downscales=0, background_color="white", enhance=EnhanceConfig(prior="none")
    )
    model = config.setup(
        scene_box=SceneBox(aabb=torch.tensor([[-1.0, -1, -1], [1, 1, 1]])),
        num_train_data=2,
        metadata={},
        device="cpu",
        grad_scaler=None,
        seed_points=(means, colours),
    )
    with torch.no_grad():
        model.scales.fill_(math.log(0.3))
        model.opacities.fill_(8.0)
    return model.eval()


def centre_colour(model: EnhancerModel, camera: Cameras) -> torch.Tensor:
    return model.get_outputs_for_camera(camera)["rgb"][SIZE // 2, SIZE // 2]


@pytest.mark.parametrize(("degrees", "share"), [(0, 1.0), (60, 1.0), (90, 0.5), (120, 0.0), (180, 0.0)])
def test_splats_fade_between_60_and_120_degrees_from_the_reference_that_sees_them(degrees: float, share: float) -> None:
    seen_from = SeenFrom(torch.tensor([[True]]), looking_at_the_origin(0).camera_to_worlds[:, :3, 3])
    centre = looking_at_the_origin(degrees, distance=7).camera_to_worlds[0, :3, 3]
    assert_close(seen_from.share(torch.zeros(1, 3), centre), torch.tensor([share]), atol=1e-6, rtol=0)


def test_the_nearest_reference_that_sees_a_splat_counts_and_none_leaves_it_as_it_is() -> None:
    seen = torch.tensor([[True, True, False], [True, False, False]])
    seen_from = SeenFrom(seen, looking_at_the_origin(0, 150).camera_to_worlds[:, :3, 3])
    share = seen_from.share(torch.zeros(3, 3), looking_at_the_origin(180).camera_to_worlds[0, :3, 3])
    assert_close(share, torch.tensor([1.0, 0.0, 1.0]), atol=1e-6, rtol=0)


def test_the_pixels_of_all_splats_together_are_the_opacity_of_the_picture() -> None:
    model = splats(0.0, -0.5, -1.0, 0.5)
    with torch.no_grad():
        model.opacities.copy_(torch.tensor([[0.0], [-1.0], [1.0], [0.5]]))
    camera = looking_at_the_origin(20)
    pixels = model.pixels_of_each(camera)
    assert (pixels > 0).all()
    assert_close(pixels.sum(), model.get_outputs_for_camera(camera)["accumulation"].sum())


def test_what_hides_behind_other_splats_is_not_seen() -> None:
    seen_from = SeenFrom.of(splats(1.0, 0.0, 0.0, -1.0), looking_at_the_origin(0, 180))
    assert seen_from.seen[:, 0].tolist() == [True, False]
    assert seen_from.seen[:, 3].tolist() == [False, True]
    assert_close(seen_from.centres, torch.tensor([[0.0, 0.0, 4.0], [0.0, 0.0, -4.0]]), atol=1e-6, rtol=0)


def test_haze_that_one_reference_sees_as_background_does_not_stand_before_a_camera_on_the_other_side() -> None:
    model = splats(0.0, -2.0, -2.2, -2.4)  # red in the middle; behind it, seen from the first reference, green and blue
    with torch.no_grad():
        model.means[1:, 0] = 0.4
        model.scales[0] = math.log(0.2)
        model.scales[1:] = math.log(0.6)
    before, behind = looking_at_the_origin(0), looking_at_the_origin(180)
    hazed = centre_colour(model, behind)
    assert hazed[0] < 0.3
    model.references = lambda: before
    # Red, which is seen from the front alone, fades too.
    assert_close(centre_colour(model, behind), torch.ones(3), atol=1e-3, rtol=0)
    assert_close(centre_colour(model, before), torch.tensor([1.0, 0.0, 0.0]), atol=0.08, rtol=0)
    model.references = lambda: looking_at_the_origin(0, 100)  # red is seen from the side as well
    shown = centre_colour(model, looking_at_the_origin(160))
    assert shown[0] > 0.9


def test_sheets_fade_as_they_come_to_cover_the_view_and_needles_do_not() -> None:
    scales = torch.tensor([[0.3, 0.3, 0.01], [0.5, 0.6, 0.01], [0.01, 0.7, 0.9], [0.01, 0.01, 5.0]])
    # a third of the distance and less in full, half of it half, two thirds and more not at all
    assert_close(veil_share(scales, torch.ones(4)), torch.tensor([1.0, 0.5, 0.0, 1.0]))
    assert_close(veil_share(scales, torch.full((4,), 3.0)), torch.ones(4))
    assert veil_share(scales, torch.zeros(4)).tolist() == [0.0, 0.0, 0.0, 0.0]


def test_a_sheet_before_the_camera_does_not_cover_what_is_behind_it() -> None:
    model = splats(0.0, 3.5, -5.0, -5.0)
    with torch.no_grad():
        model.scales[1] = math.log(1.0)
    camera = looking_at_the_origin(0)
    assert centre_colour(model, camera)[1] > 0.9
    model.references = lambda: looking_at_the_origin(0, distance=8)
    assert_close(centre_colour(model, camera), torch.tensor([1.0, 0.0, 0.0]), atol=0.05, rtol=0)


def test_a_training_renders_all_sides_and_the_references_are_rendered_once_for_each_step() -> None:
    model, calls = splats(0.0, -0.5, -1.0, 0.5), []
    model.references = lambda: calls.append(1) or looking_at_the_origin(0)
    behind = looking_at_the_origin(180)
    for _ in range(2):
        model.get_outputs_for_camera(behind)
    assert len(calls) == 1
    model.step += 1
    model.get_outputs_for_camera(behind)
    assert len(calls) == 2
    model.train().optimizers = {}
    assert model.get_outputs(behind)["accumulation"][SIZE // 2, SIZE // 2] > 0.9
    assert len(calls) == 2


def test_a_crop_leaves_the_shares_with_their_splats() -> None:
    from nerfstudio.data.scene_box import OrientedBox

    model = splats(0.0, -0.5, -1.0, 1.0)
    model.references = lambda: looking_at_the_origin(0)
    box = OrientedBox(R=torch.eye(3), T=torch.tensor([0.0, 0.0, 1.0]), S=torch.full((3,), 0.2))
    front = model.get_outputs_for_camera(looking_at_the_origin(0), box)
    back = model.get_outputs_for_camera(looking_at_the_origin(180), box)
    assert front["accumulation"].max() > 0.9
    assert back["accumulation"].max() < 1e-3
