import dataclasses

import numpy as np
import pytest
import torch
from scenes import reference_view, tiny_scene, write_nerfstudio_folder

from nerfstudio_enhancer.depth_training.fit import augmented, fit, plane_cross_entropy
from nerfstudio_enhancer.depth_training.samples import confirmed_by, make_samples
from nerfstudio_enhancer.depth_training.train_depth import TrainDepth, train_depth
from nerfstudio_enhancer.depth_training.whole_splats import WholeScene, store_views
from nerfstudio_enhancer.initial_splats import SeedPointsConfig, random_points_in_frusta
from nerfstudio_enhancer.stereo.depth import StereoDepth
from nerfstudio_enhancer.stereo.depth_network import UNKNOWN_COST, DepthNetwork, DepthNetworkConfig
from nerfstudio_enhancer.stereo.predict import DepthDistribution, costs_of, load_network, predict_depth, save_network
from nerfstudio_enhancer.stereo.seeds import drawn_depth
from nerfstudio_enhancer.stereo.views import StereoView, stereo_view

TINY = DepthNetworkConfig(num_planes=8, widths=(8, 16), picture_features=8)


def blank_view(height: int = 1, width: int = 2) -> StereoView:
    return StereoView(
        rgb=torch.zeros(height, width, 3),
        grey=torch.zeros(height, width),
        usable=torch.ones(height, width, dtype=torch.bool),
        intrinsics=torch.tensor([[1.0, 0, width / 2], [0, 1, height / 2], [0, 0, 1]], dtype=torch.float64),
        world_to_camera=torch.eye(4, dtype=torch.float64),
    )


# ------------------------------------------------------------------------------------------- distribution


def test_quantiles_of_a_distribution_lie_between_its_planes() -> None:
    # Planes at inverse depth 0.1, 0.2, 0.3, each standing for half a step to either side. The first pixel is certain of
    # 0.2; the second is half 0.1, half 0.3: a quarter of its probability ends in the middle of the first plane.
    probability = torch.tensor([[[0.0, 0.5]], [[1.0, 0.0]], [[0.0, 0.5]]])
    distribution = DepthDistribution(blank_view(), torch.tensor([0.1, 0.2, 0.3]), probability)
    torch.testing.assert_close(1 / distribution.quantile(0.5)[0, 0], torch.tensor(0.2))
    torch.testing.assert_close(1 / distribution.quantile(0.25)[0, 1], torch.tensor(0.1))
    torch.testing.assert_close(1 / distribution.quantile(0.75)[0, 1], torch.tensor(0.3))
    # A quarter of the way into the third plane, which reaches from 0.25 to 0.35: 0.275.
    torch.testing.assert_close(1 / distribution.quantile(0.625)[0, 1], torch.tensor(0.275))


def test_depth_is_drawn_as_the_distribution_says() -> None:
    probability = torch.tensor([0.2, 0.7, 0.1])[:, None, None].expand(3, 1, 2)
    distribution = DepthDistribution(blank_view(), torch.tensor([0.1, 0.2, 0.3]), probability)
    straight = np.zeros((10_000, 2))
    share = np.random.default_rng(0).random(10_000)
    inverse = 1 / drawn_depth(distribution, straight, share)
    counts = np.histogram(inverse, [0, 0.15, 0.25, 0.4])[0] / 10_000
    np.testing.assert_allclose(counts, [0.2, 0.7, 0.1], atol=0.02)


def test_rays_are_looked_up_at_their_pixel() -> None:
    # Focal length 1, centre (1, 0.5): x / z = -0.9 is in the left pixel, 0.9 in the right one.
    probability = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    distribution = DepthDistribution(blank_view(), torch.tensor([0.25, 0.5]), probability)
    depth = drawn_depth(distribution, np.array([[-0.9, 0.0], [0.9, 0.0]]), np.array([0.5, 0.5]))
    np.testing.assert_allclose(depth, [4.0, 2.0])


def test_random_points_lie_where_the_network_says() -> None:
    scene = tiny_scene(num_images=3, width=64, height=48)
    views = [reference_view(scene, index) for index in range(3)]
    seen = np.random.default_rng(0).uniform([-0.4, -0.4, 0], [0.4, 0.4, 0.9], (400, 3))
    planes = torch.linspace(0.1, 1.0, 10)
    probability = torch.zeros(10, 48, 64)
    probability[4] = 1.0  # inverse depth 0.5: everything lies in depth 2
    depths = []
    for view in views:
        picture = stereo_view(view, 64)
        nothing = StereoDepth(picture, torch.zeros(48, 64), torch.zeros(48, 64, dtype=torch.bool))
        depths.append(dataclasses.replace(nothing, likely=DepthDistribution(picture, planes, probability)))
    config = SeedPointsConfig()
    points = random_points_in_frusta(views, seen, 300, config, torch.Generator().manual_seed(0), depths)
    xyz = points.xyz.double().numpy()
    depth = np.stack([xyz @ view.world_to_camera[2, :3] + view.world_to_camera[2, 3] for view in views])
    # Half a plane's step to either side of 0.5.
    assert ((depth > 1 / 0.551) & (depth < 1 / 0.449)).any(axis=0).all()
    without = random_points_in_frusta(views, seen, 300, config, torch.Generator().manual_seed(0))
    assert not torch.equal(points.xyz, without.xyz)
    assert torch.equal(points.rgb, without.rgb)


# ------------------------------------------------------------------------------------------------ network


def test_the_network_takes_any_size_and_starts_from_matching() -> None:
    network = DepthNetwork(TINY)
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.zero_()
    cost = torch.rand(1, 8, 23, 37, generator=torch.Generator().manual_seed(0))
    logits = network(cost, torch.rand(1, 3, 46, 74), torch.zeros(1, 3, 23, 37))
    assert logits.shape == cost.shape
    # Without its head it is the matching alone: the cheapest plane is the likeliest.
    assert torch.equal(logits.argmax(1), cost.argmin(1))


def test_costs_are_lowest_at_the_true_depth_and_unknown_without_sources() -> None:
    scene = tiny_scene(num_images=5, width=160, height=120, arc_deg=40.0)
    views = [stereo_view(reference_view(scene, index), 160) for index in range(5)]
    planes = torch.linspace(0.2, 0.8, 32)
    cost = costs_of(views[2], [views[1], views[3]], planes)
    true = torch.from_numpy(scene.depth[2])
    inside = torch.isfinite(true) & (1 / true > 0.25) & (1 / true < 0.75)
    off = (planes[cost.argmin(0)] - 1 / true).abs()[inside]
    assert float((off < 0.04).float().mean()) > 0.6
    assert (costs_of(views[2], [], planes) == UNKNOWN_COST).all()


def test_weights_come_back_from_their_file(tmp_path) -> None:
    network = DepthNetwork(TINY)
    save_network(network, tmp_path / "weights.safetensors")
    again = load_network(tmp_path / "weights.safetensors")
    assert again.config == TINY
    for name, value in network.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-3, rtol=1e-3)


def test_missing_weights_are_told_with_the_way_out(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors; install the package again"):
        load_network(tmp_path / "gone.safetensors")


def test_damaged_or_foreign_weights_are_named(tmp_path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"damaged\.safetensors"):
        load_network(damaged)
    foreign = DepthNetwork(TINY)
    foreign.config = DepthNetworkConfig(num_planes=9)
    save_network(foreign, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="stem"):
        load_network(tmp_path / "foreign.safetensors")


def test_the_bundled_network_knows_a_scene_that_it_has_never_seen() -> None:
    scene = tiny_scene(num_images=5, width=160, height=120, arc_deg=40.0)
    views = [stereo_view(reference_view(scene, index), 160) for index in range(5)]
    finite = [depth[np.isfinite(depth)] for depth in scene.depth]
    ranges = [(float(np.quantile(depth, 0.02)) * 0.8, float(np.quantile(depth, 0.98)) * 1.5) for depth in finite]
    predicted = predict_depth(views, ranges, max_sources=4)
    torch.testing.assert_close(predicted[2].probability.sum(0), torch.ones(120, 160))
    off, guessed = [], []
    for distribution, depth, (near, far) in zip(predicted, scene.depth, ranges):
        true = torch.from_numpy(depth)
        known = torch.isfinite(true)
        off.append((distribution.quantile(0.5) / true).log().abs()[known])
        guessed.append((np.sqrt(near * far) / true).log().abs()[known])
    assert float(torch.cat(off).median()) < 0.06
    assert float(torch.cat(off).mean()) < 0.5 * float(torch.cat(guessed).mean())


# ----------------------------------------------------------------------------------------------- training


def test_cross_entropy_by_hand() -> None:
    # Three planes with probabilities 1/2, 1/4, 1/4; the true place 0.25 lies halfway between the first two.
    logits = torch.log(torch.tensor([0.5, 0.25, 0.25])).reshape(1, 3, 1, 1).expand(1, 3, 1, 2)
    place, trusted = torch.tensor([[[0.25, 0.9]]]), torch.tensor([[[True, False]]])
    expected = -0.5 * (np.log(0.5) + np.log(0.25))
    assert float(plane_cross_entropy(logits, place, trusted)) == pytest.approx(expected)
    beyond = plane_cross_entropy(logits, torch.tensor([[[1.7, 0.0]]]), trusted)
    assert float(beyond) == pytest.approx(-np.log(0.25))
    assert float(plane_cross_entropy(logits, place, torch.zeros(1, 1, 2, dtype=torch.bool))) == 0.0


def test_depth_is_confirmed_only_where_the_other_view_has_the_same() -> None:
    # Two cameras 1 apart before the wall z = 5: the left one sees 1 / 5 of its picture's width (focal length = width)
    # that the right one does not.
    left = dataclasses.replace(
        blank_view(10, 100),
        intrinsics=torch.tensor([[100.0, 0, 50], [0, 100, 5], [0, 0, 1]], dtype=torch.float64),
    )
    pose = torch.eye(4, dtype=torch.float64)
    pose[0, 3] = -1
    right = dataclasses.replace(left, world_to_camera=pose)
    depth = torch.full((10, 100), 5.0)
    confirmed = confirmed_by(left, depth, right, depth)
    assert confirmed[:, 20:].all()
    assert not confirmed[:, :20].any()
    assert not confirmed_by(left, depth, right, depth * 1.1).any()


def test_a_mirrored_sample_is_a_mirrored_scene() -> None:
    generator = torch.Generator().manual_seed(0)
    sample = {
        "cost": torch.randint(256, (8, 6, 10), generator=generator).to(torch.uint8),
        "rgb": torch.randint(256, (12, 20, 3), generator=generator).to(torch.uint8),
        "rays": torch.rand(3, 6, 10, generator=generator),
        "inverse_depth": torch.rand(6, 10, generator=generator),
        "trusted": torch.rand(6, 10, generator=generator) > 0.5,
    }
    seen = set()
    for seed in range(20):
        batch = augmented([sample], np.random.default_rng(seed))
        mirrored = torch.equal(batch.inverse_depth[0], sample["inverse_depth"].flip(-1))
        assert mirrored or torch.equal(batch.inverse_depth[0], sample["inverse_depth"])
        signs = torch.tensor([-1.0 if mirrored else 1.0, 1.0, 1.0])[:, None, None]
        rays = sample["rays"].flip(-1) if mirrored else sample["rays"]
        assert torch.equal(batch.rays[0], rays * signs)
        blind = bool((batch.cost == UNKNOWN_COST).all())
        cost = sample["cost"].flip(-1) if mirrored else sample["cost"]
        assert blind or torch.allclose(batch.cost[0], cost / 255)
        seen.add((mirrored, blind))
    assert {(True, False), (False, False)} <= seen
    assert any(blind for _, blind in seen)


@pytest.fixture(scope="module")
def sample_file(tmp_path_factory) -> object:
    folder = tmp_path_factory.mktemp("depth")
    scene = tiny_scene(num_images=5, width=64, height=48)
    views = [
        {
            "rgb": torch.from_numpy(scene.images[i].copy()),
            "depth": torch.from_numpy(np.where(np.isfinite(scene.depth[i]), scene.depth[i], 100.0)).float(),
            "alpha": torch.full((48, 64), 255, dtype=torch.uint8),
            "camera_to_world": torch.from_numpy(scene.camera_to_world[i][:3]).float(),
            "intrinsics": torch.tensor([scene.focal_px, scene.focal_px, 32.0, 24.0]),
        }
        for i in range(5)
    ]
    torch.save(views, folder / "depth.pt")
    make_samples(folder / "depth.pt", folder / "tiny.pt", seed=0)
    return folder / "tiny.pt"


def test_samples_hold_the_true_depth_of_every_reference_of_every_set(sample_file) -> None:
    stored = torch.load(sample_file, weights_only=True)
    # Of 5 photographs: 5 sets of 3 and 3 of 4 (an uneven draw may hit a photograph twice, which counts once).
    assert 20 <= len(stored["samples"]) <= 5 * 3 + 3 * 4
    for sample in stored["samples"]:
        assert sample["cost"].shape == (64, 48, 64)
        assert sample["cost"].shape[1:] == sample["trusted"].shape == sample["inverse_depth"].shape
        inside = sample["inverse_depth"][sample["trusted"]].float()
        assert float(((inside > -0.05) & (inside < 1.05)).float().mean()) > 0.9


def test_a_fit_that_was_interrupted_ends_with_the_same_weights(sample_file, tmp_path) -> None:
    def weights(output, *steps):
        for upto in steps:
            settings = TrainDepth(output=output, steps=4, batch=2)
            path = fit(settings, [sample_file], stop_after=upto)
        return load_network(path).state_dict()

    whole, resumed = weights(tmp_path / "whole", 4), weights(tmp_path / "resumed", 2, 4)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    torch.manual_seed(0)
    first = DepthNetwork().state_dict()
    assert any(not torch.equal(value, first[name].half().float()) for name, value in whole.items())


def test_the_command_refuses_nothing_doubles_and_missing_folders(tmp_path) -> None:
    with pytest.raises(ValueError, match="--data"):
        train_depth(TrainDepth(output=tmp_path))
    with pytest.raises(ValueError, match="rename"):
        train_depth(TrainDepth(output=tmp_path, data=(tmp_path / "a", tmp_path / "b" / "a")))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train_depth(TrainDepth(output=tmp_path, data=(tmp_path / "nowhere",)))


@pytest.mark.slow
def test_depth_of_all_photographs_is_stored_with_their_cameras(tmp_path) -> None:
    scene = tiny_scene(num_images=8, width=64, height=48)
    write_nerfstudio_folder(tmp_path / "tiny", scene)
    store_views(WholeScene(tmp_path / "tiny", tmp_path / "depth.pt", max_views=40, steps=6, size=64, seed=0))
    views = torch.load(tmp_path / "depth.pt", weights_only=True)
    assert len(views) == 7
    for view in views:
        assert view["rgb"].shape == (48, 64, 3)
        assert view["depth"].shape == view["alpha"].shape == (48, 64)
        assert view["intrinsics"].tolist() == pytest.approx([scene.focal_px, scene.focal_px, 32.0, 24.0], rel=1e-4)
