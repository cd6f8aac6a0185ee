"""`rasterization` on a CPU: hand-worked splats, every mode against the reference, culling, densification, bad input."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from gsplat import DefaultStrategy
from gsplat.rendering import rasterization as gsplat_rasterization

from nerfstudio_enhancer.rasterize import backend_name, dispatch, native_library, rasterization
from nerfstudio_enhancer.rasterize.dispatch import rasterize_reference

GAUSSIAN_TENSORS = ("means", "quats", "scales", "opacities", "colors", "extra_features")


@pytest.fixture(params=native_library.available_instruction_sets())
def instruction_set(request, monkeypatch):
    monkeypatch.setenv(native_library.ISA_VARIABLE, request.param)
    native_library.load_library.cache_clear()
    yield request.param
    monkeypatch.undo()
    native_library.load_library.cache_clear()
    native_library.load_library()


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def splats(depths: list[float], opacities: list[float], colors: list[list[float]], scale: float = 0.25) -> dict:
    """Isotropic splats on the optical axis, which meets the centre of pixel (8, 8) of a 16 x 16 image; focal length 16."""
    n = len(depths)
    return {
        "means": torch.tensor([[0.0, 0.0, z] for z in depths]),
        "quats": torch.tensor([[1.0, 0.0, 0.0, 0.0]] * n),
        "scales": torch.full((n, 3), scale),
        "opacities": torch.tensor(opacities),
        "colors": torch.tensor(colors),
        "viewmats": torch.eye(4)[None],
        "Ks": torch.tensor([[[16.0, 0.0, 8.5], [0.0, 16.0, 8.5], [0.0, 0.0, 1.0]]]),
        "width": 16,
        "height": 16,
    }


def random_scene(
    num: int, cameras: int = 1, sh: bool = False, extra: int = 0, seed: int = 0, channels: int = 3
) -> dict:
    """Random splats in float64, some outside the view, some in front of the near plane."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    viewmats = torch.eye(4, dtype=torch.float64).repeat(cameras, 1, 1)
    for c in range(1, cameras):
        angle = torch.tensor(0.2 * c)
        viewmats[c, 0, 0] = viewmats[c, 2, 2] = torch.cos(angle)
        viewmats[c, 0, 2], viewmats[c, 2, 0] = torch.sin(angle), -torch.sin(angle)
        viewmats[c, 0, 3] = 0.3 * c
    out = {
        "means": torch.cat([normal(num, 2), 4.5 * uniform(num, 1) - 0.2], dim=1),
        "quats": normal(num, 4),
        "scales": torch.exp(0.6 * normal(num, 3) - 2),
        "opacities": uniform(num),
        "colors": 0.4 * normal(num, 16, 3) if sh else uniform(num, channels),
        "viewmats": viewmats,
        "Ks": torch.tensor([[[40.0, 0.0, 21.0], [0.0, 42.0, 13.0], [0.0, 0.0, 1.0]]]).double().repeat(cameras, 1, 1),
        "width": 43,
        "height": 27,
    }
    if extra:
        out["extra_features"] = uniform(num, extra)
    return out


def render_with_gradients(function, scene: dict, dtype: torch.dtype, **options) -> dict[str, torch.Tensor]:
    """Image, opacity, intermediate results and all gradients for a fixed random loss."""
    scene = {k: v.detach().to(dtype) if isinstance(v, torch.Tensor) else v for k, v in scene.items()}
    wanted = [k for k, v in scene.items() if isinstance(v, torch.Tensor) and k != "Ks"]
    for name in wanted:
        scene[name].requires_grad_()
    image, alpha, info = function(**scene, **options)
    info["means2d"].retain_grad()
    generator = torch.Generator().manual_seed(1)
    weights, alpha_weights = (torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (image, alpha))
    ((image * weights.to(dtype)).sum() + (alpha * alpha_weights.to(dtype)).sum()).backward()
    out = {"image": image, "alpha": alpha, "radii": info["radii"], "means2d.grad": info["means2d"].grad}
    out |= {k: info[k] for k in ("means2d", "depths", "conics", "opacities")}
    if options.get("absgrad"):
        out["means2d.absgrad"] = info["means2d"].absgrad
    for name in wanted:
        grad = scene[name].grad
        out[f"{name}.grad"] = torch.zeros_like(scene[name]) if grad is None else grad
    return {k: v.detach().double() for k, v in out.items()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Relative to the largest entry: float32 sums over hundreds of pixels lose digits in the small entries."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-6)
        error = ((actual[name] - value).abs().max() / scale).item()
        assert error < tolerance, f"{name}: {error}"


# Measured over all modes and instruction sets: image 5e-6, gradients at most 7e-5.
TOLERANCE = 3e-4


def test_names_order_and_defaults_of_the_parameters_are_those_of_gsplat():
    ours = list(inspect.signature(rasterization).parameters.values())
    theirs = list(inspect.signature(gsplat_rasterization).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[:-1]] == [(p.name, p.default, p.kind) for p in theirs]
    assert (ours[-1].name, ours[-1].default) == ("extra_features", None)


def test_one_splat_by_hand():
    image, alpha, info = rasterization(**splats([2.0], [0.5], [[1.0, 0.5, 0.25]]), render_mode="RGB+D")
    # standard deviation on the image: 16 / 2 * 0.25 = 2 px, variance 4 + eps2d 0.3; radius ceil(3 sqrt(4.3 + 0.1))
    assert info["radii"].tolist() == [[7]]
    torch.testing.assert_close(info["conics"], torch.tensor([[[1 / 4.3, 0.0, 1 / 4.3]]]))
    torch.testing.assert_close(info["means2d"], torch.tensor([[[8.5, 8.5]]]))
    # pixel (8, 8) is the centre, pixel (10, 8) is 2 px away
    away = 0.5 * math.exp(-0.5 * 4 / 4.3)
    for x, expected in ((8, 0.5), (10, away)):
        torch.testing.assert_close(alpha[0, 8, x], torch.tensor([expected]))
        torch.testing.assert_close(image[0, 8, x], expected * torch.tensor([1.0, 0.5, 0.25, 2.0]))
    # 4 px away in both axes: 0.5 exp(-16 / 4.3) = 0.0121 >= 1/255; 5 px: 0.5 exp(-25 / 4.3) = 0.0015 < 1/255
    assert alpha[0, 12, 12, 0] > 0
    assert alpha[0, 13, 13, 0] == 0


def test_antialiasing_scales_the_opacity_by_the_area_that_blur_adds():
    _, alpha, info = rasterization(**splats([2.0], [0.5], [[1.0]]), rasterize_mode="antialiased")
    # sqrt(det(4 I) / det(4.3 I)) = 4 / 4.3
    torch.testing.assert_close(info["opacities"], torch.tensor([[0.5 * 4 / 4.3]]))
    torch.testing.assert_close(alpha[0, 8, 8], torch.tensor([0.5 * 4 / 4.3]))


def test_two_splats_and_their_gradients_by_hand():
    scene = splats([3.0, 2.0], [0.5, 0.6], [[0.5], [1.0]])  # the second one is in front
    background = torch.tensor([[0.25]], requires_grad=True)
    scene["opacities"].requires_grad_()
    scene["colors"].requires_grad_()
    image, alpha, _ = rasterization(**scene, backgrounds=background)
    # 0.6 * 1 + 0.4 * 0.5 * 0.5 + 0.4 * 0.5 * 0.25
    torch.testing.assert_close(image[0, 8, 8], torch.tensor([0.75]))
    torch.testing.assert_close(alpha[0, 8, 8], torch.tensor([0.8]))
    image[0, 8, 8, 0].backward()
    # d/d o_front = 1 - (0.5 * 0.5 + 0.5 * 0.25); d/d o_back = 0.4 * (0.5 - 0.25)
    torch.testing.assert_close(scene["opacities"].grad, torch.tensor([0.1, 0.625]))
    torch.testing.assert_close(scene["colors"].grad, torch.tensor([[0.2], [0.6]]))
    torch.testing.assert_close(background.grad, torch.tensor([[0.2]]))


def test_expected_depth_is_the_depth_divided_by_the_opacity_and_zero_where_nothing_is_seen():
    image, alpha, _ = rasterization(**splats([3.0, 2.0], [0.5, 0.6], [[0.5], [1.0]]), render_mode="ED")
    # (0.6 * 2 + 0.2 * 3) / 0.8
    torch.testing.assert_close(image[0, 8, 8], torch.tensor([2.25]))
    assert alpha[0, 0, 0, 0] == 0
    assert image[0, 0, 0, 0] == 0


def test_a_pixel_is_closed_by_the_splat_that_would_leave_less_than_a_ten_thousandth():
    # alpha is clamped to 0.999: transmittance 1e-3 after one, 1e-6 <= 1e-4 after two, so the second is not drawn
    scene = splats([2.0, 3.0], [1.0, 1.0], [[1.0], [5.0]])
    scene["opacities"].requires_grad_()
    image, alpha, _ = rasterization(**scene)
    torch.testing.assert_close(alpha[0, 8, 8], torch.tensor([0.999]))
    torch.testing.assert_close(image[0, 8, 8], torch.tensor([0.999]))
    image[0, 8, 8, 0].backward()
    assert scene["opacities"].grad.tolist() == [0.0, 0.0]  # clamped; not drawn


@pytest.mark.parametrize(("opacity", "drawn"), [(0.0039, False), (0.0040, True)])
def test_less_than_one_255th_is_not_drawn(opacity, drawn):
    _, alpha, _ = rasterization(**splats([2.0], [opacity], [[1.0]]))
    assert (alpha[0, 8, 8, 0] > 0) == drawn


@pytest.mark.parametrize(
    ("mean", "options", "visible"),
    [
        ([0.0, 0.0, 2.0], {}, True),
        ([0.0, 0.0, -2.0], {}, False),
        ([0.0, 0.0, 0.0], {"near_plane": 0.0}, False),
        ([0.0, 0.0, 2.0], {"near_plane": 2.5}, False),
        ([0.0, 0.0, 2.0], {"far_plane": 1.5}, False),
        ([0.0, 0.0, 2.0], {"radius_clip": 7.0}, False),  # its radius is 7, see test_one_splat_by_hand
        ([0.0, 0.0, 2.0], {"radius_clip": 6.5}, True),
        # Out there the radius is 8 (variances 5.8 and 4.3): drawn while 16 * x / 2 + 8.5 is above -8 and below 16 + 8.
        ([1.9, 0.0, 2.0], {}, True),
        ([2.0, 0.0, 2.0], {}, False),
        ([-2.0, 0.0, 2.0], {}, True),
        ([-2.1, 0.0, 2.0], {}, False),
        ([0.0, 1.9, 2.0], {}, True),
        ([0.0, 2.0, 2.0], {}, False),
        ([0.0, -2.1, 2.0], {}, False),
    ],
)
def test_culling(mean, options, visible):
    scene = splats([2.0], [0.5], [[1.0]])
    scene["means"] = torch.tensor([mean], requires_grad=True)
    image, alpha, info = rasterization(**scene, **options)
    assert (info["radii"] > 0).item() == visible
    (image.sum() + alpha.sum()).backward()
    if not visible:
        assert alpha.abs().max() == 0
        assert scene["means"].grad.abs().max() == 0


@pytest.mark.parametrize("render_mode", dispatch.RENDER_MODES)
@pytest.mark.parametrize("rasterize_mode", dispatch.RASTERIZE_MODES)
@pytest.mark.parametrize("sh_degree", [None, 0, 1, 2, 3])
def test_every_mode_equals_the_reference(render_mode, rasterize_mode, sh_degree):
    options = {"render_mode": render_mode, "rasterize_mode": rasterize_mode, "sh_degree": sh_degree, "absgrad": True}
    for cameras, extra, background in ((1, 0, False), (2, 3, True)):
        scene = random_scene(40, cameras, sh_degree is not None, extra)
        if background:
            scene["backgrounds"] = torch.linspace(0, 1, 3 * cameras, dtype=torch.float64).reshape(cameras, 3)
        expected = render_with_gradients(rasterize_reference, scene, torch.float64, **options)
        actual = render_with_gradients(rasterization, scene, torch.float32, **options)
        assert_same(actual, expected, TOLERANCE)
        assert expected["alpha"].max() > 0.5


def test_every_instruction_set_equals_the_reference(instruction_set):
    assert backend_name() == f"native ({instruction_set})"
    options = {"render_mode": "RGB+ED", "rasterize_mode": "antialiased", "sh_degree": 3, "absgrad": True}
    scene = random_scene(60, cameras=2, sh=True, extra=3)
    expected = render_with_gradients(rasterize_reference, scene, torch.float64, **options)
    assert_same(render_with_gradients(rasterization, scene, torch.float32, **options), expected, TOLERANCE)


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 6, 8, 9, 23])
def test_any_number_of_channels_equals_the_reference(channels, instruction_set):
    scene = random_scene(40, channels=channels, seed=channels)
    scene["backgrounds"] = torch.linspace(-1, 1, channels, dtype=torch.float64)[None]
    options = {"absgrad": True, "render_mode": "RGB"}
    expected = render_with_gradients(rasterize_reference, scene, torch.float64, **options)
    assert_same(render_with_gradients(rasterization, scene, torch.float32, **options), expected, TOLERANCE)


def test_colours_may_differ_by_camera():
    for sh_degree in (None, 2):
        scene = random_scene(30, cameras=2, sh=sh_degree is not None)
        generator = torch.Generator().manual_seed(9)
        scene["colors"] = torch.rand(2, *scene["colors"].shape, generator=generator, dtype=torch.float64)
        expected = render_with_gradients(rasterize_reference, scene, torch.float64, sh_degree=sh_degree)
        assert_same(
            render_with_gradients(rasterization, scene, torch.float32, sh_degree=sh_degree), expected, TOLERANCE
        )


def test_crowded_tiles_equal_the_reference():
    # hundreds of splats in one tile: more than one chunk of the tile's list, and closed pixels
    scene = random_scene(900, seed=2)
    scene["opacities"] = 0.05 + 0.6 * scene["opacities"]
    scene["scales"] = scene["scales"] * 0.5
    scene["width"], scene["height"] = 16, 16
    expected = render_with_gradients(rasterize_reference, scene, torch.float64, absgrad=True)
    actual = render_with_gradients(rasterization, scene, torch.float32, absgrad=True)
    # A few splats lie at the jump of alpha at 1/255, which moves one pixel by 0.4 %.
    assert_same(actual, expected, 5e-3)


def test_a_needle_is_drawn_without_holes():
    # 400 times longer than wide: the quadratic form of its pixels cancels to rounding noise on the axis
    scene = splats([2.0], [0.5], [[1.0]])
    scene["scales"] = torch.tensor([[20.0, 0.05, 0.05]])
    scene["quats"] = torch.tensor([[math.cos(0.35), 0.0, 0.0, math.sin(0.35)]])
    scene["Ks"][0, 0, 0] = scene["Ks"][0, 1, 1] = 100.0
    _, alpha, _ = rasterization(**scene)
    expected = rasterize_reference(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in scene.items()})[1]
    torch.testing.assert_close(alpha.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("scales", 0.0), ("scales", 1e20), ("quats", 0.0), ("opacities", 0.0), ("means", 1e30), ("colors", 1e30)],
)
def test_extreme_values_give_finite_images_and_gradients(name, value):
    scene = random_scene(50)
    scene[name] = torch.full_like(scene[name], value)
    result = render_with_gradients(rasterization, scene, torch.float32, rasterize_mode="antialiased", absgrad=True)
    if name != "colors":
        for key, tensor in result.items():
            assert torch.isfinite(tensor).all(), key
    assert torch.isfinite(result["alpha"]).all()


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 50), (17, 16), (16, 33)])
def test_odd_sizes_equal_the_reference(width, height):
    scene = random_scene(40)
    scene["width"], scene["height"] = width, height
    expected = render_with_gradients(rasterize_reference, scene, torch.float64)
    assert_same(render_with_gradients(rasterization, scene, torch.float32), expected, TOLERANCE)


def test_no_gaussians_give_the_background():
    scene = {k: v[:0] if k in GAUSSIAN_TENSORS else v for k, v in splats([2.0], [0.5], [[1.0, 0.0, 0.0]]).items()}
    scene["means"].requires_grad_()
    background = torch.tensor([[0.1, 0.2, 0.3]])
    image, alpha, info = rasterization(**scene, backgrounds=background)
    assert torch.equal(image, background.expand(1, 16, 16, 3))
    assert alpha.max() == 0
    image.sum().backward()
    assert info["radii"].shape == (1, 0)
    assert scene["means"].grad.shape == (0, 3)


def test_results_do_not_depend_on_the_number_of_threads(restore_threads):
    scene = random_scene(3000, cameras=2, sh=True, extra=2, seed=4)
    scene["scales"] = 0.3 * scene["scales"]
    scene["width"], scene["height"] = 150, 130
    scene["Ks"][:, :2] *= 3
    scene["backgrounds"] = torch.full((2, 3), 0.5, dtype=torch.float64)
    options = {"render_mode": "RGB+ED", "sh_degree": 2, "absgrad": True}
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(render_with_gradients(rasterization, scene, torch.float32, **options))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def test_a_second_backward_pass_through_the_same_image_gives_the_same_gradient():
    scene = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in random_scene(50).items()}
    scene["means"].requires_grad_()
    image, _, _ = rasterization(**scene)
    # another image in between must not touch what the first one kept
    (first,) = torch.autograd.grad(image.sum(), scene["means"], retain_graph=True)
    rasterization(**{**scene, "means": scene["means"].detach() * 0.5})
    (second,) = torch.autograd.grad(image.sum(), scene["means"])
    assert torch.equal(first, second)


def test_inputs_may_lie_in_memory_in_any_order():
    scene = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in random_scene(50).items()}
    expected = rasterization(**scene)[0]
    for name in ("means", "quats", "scales", "colors"):
        scene[name] = scene[name].T.contiguous().T
    scene["opacities"] = torch.stack([scene["opacities"]] * 2, dim=1)[:, 0]
    assert torch.equal(rasterization(**scene)[0], expected)


def with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every second one in memory."""
    return torch.stack([tensor, torch.full_like(tensor, float("nan"))], dim=-1)[..., 0]


def test_no_input_has_to_be_contiguous():
    scene = random_scene(50, cameras=2, sh=True, extra=2)
    scene["backgrounds"] = torch.full((2, 3), 0.5, dtype=torch.float64)

    def apart(**arguments):
        gaps = {k: with_gaps(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        assert not any(v.is_contiguous() for v in gaps.values() if isinstance(v, torch.Tensor))
        return rasterization(**gaps)

    options = {"render_mode": "RGB+ED", "rasterize_mode": "antialiased", "sh_degree": 3, "absgrad": True}
    expected = render_with_gradients(rasterization, scene, torch.float32, **options)
    for name, value in render_with_gradients(apart, scene, torch.float32, **options).items():
        assert torch.equal(value, expected[name]), name


def test_gradients_that_come_in_need_not_be_contiguous():
    scene = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in random_scene(50).items()}
    scene["means"].requires_grad_()
    image, alpha, _ = rasterization(**scene)
    weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(2)) for t in (image, alpha)]
    gaps = [with_gaps(weight) for weight in weights]
    (expected,) = torch.autograd.grad([image, alpha], scene["means"], weights, retain_graph=True)
    (actual,) = torch.autograd.grad([image, alpha], scene["means"], gaps)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
@pytest.mark.parametrize("name", [*GAUSSIAN_TENSORS, "viewmats", "Ks", "backgrounds"])
def test_other_types_than_float32_are_refused(name, dtype):
    scene = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in random_scene(5, extra=2).items()}
    scene["backgrounds"] = torch.zeros(1, 3)
    scene[name] = scene[name].to(dtype)
    with pytest.raises(ValueError, match=rf"`{name}` must be float32, got {dtype}; convert it with"):
        rasterization(**scene)


def test_the_intersection_lists_have_gsplats_form():
    scene = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in random_scene(60, cameras=2).items()}
    _, _, info = rasterization(**scene)
    tiles_x, tiles_y = info["tile_width"], info["tile_height"]
    assert (tiles_x, tiles_y, info["tile_size"]) == (3, 2, 16)
    assert (info["width"], info["height"], info["n_cameras"]) == (43, 27, 2)
    assert info["gaussian_ids"] is None
    assert info["camera_ids"] is None
    ids, flat = info["isect_ids"], info["flatten_ids"].long()
    assert torch.equal(ids, ids.sort().values)
    bits = (tiles_x * tiles_y).bit_length()
    tile = (ids >> 32) & ((1 << bits) - 1)
    camera = ids >> (32 + bits)
    assert torch.equal(camera, flat // 60)
    depth_bits = info["depths"].detach().flatten()[flat].contiguous().view(torch.int32)
    assert torch.equal(ids & 0xFFFFFFFF, depth_bits.long())
    counts = torch.bincount(camera * tiles_x * tiles_y + tile, minlength=2 * tiles_x * tiles_y)
    assert torch.equal(info["isect_offsets"].flatten().long(), counts.cumsum(0) - counts)
    assert torch.equal(info["tiles_per_gauss"].flatten().long(), torch.bincount(flat, minlength=120))


def test_gsplats_default_strategy_densifies_on_a_cpu():
    generator = torch.Generator().manual_seed(0)
    n = 200
    scene = random_scene(n)
    params = torch.nn.ParameterDict(
        {
            "means": scene["means"].float(),
            "quats": scene["quats"].float(),
            "scales": scene["scales"].float().log(),
            "opacities": torch.logit(scene["opacities"].float() * 0.9 + 0.05),
            "colors": scene["colors"].float(),
        }
    )
    optimizers = {name: torch.optim.Adam([params[name]], lr=1e-3) for name in params}
    strategy = DefaultStrategy(refine_start_iter=0, refine_every=1, absgrad=True, grow_grad2d=1e-6)
    strategy.check_sanity(params, optimizers)
    state = strategy.initialize_state(scene_scale=1.0)
    target = torch.rand(1, 27, 43, 3, generator=generator)
    for step in (1, 2):
        image, _, info = rasterization(
            means=params["means"],
            quats=params["quats"],
            scales=params["scales"].exp(),
            opacities=params["opacities"].sigmoid(),
            colors=params["colors"],
            viewmats=scene["viewmats"].float(),
            Ks=scene["Ks"].float(),
            width=43,
            height=27,
            packed=False,
            absgrad=True,
        )
        strategy.step_pre_backward(params, optimizers, state, step, info)
        (image - target).abs().mean().backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        strategy.step_post_backward(params, optimizers, state, step, info, packed=False)
    assert len(params["means"]) > n


def test_without_the_library_the_reference_is_used_and_said_once(monkeypatch):
    scene = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in random_scene(30).items()}
    expected = rasterization(**scene)[0]
    monkeypatch.setattr(dispatch, "load_library", lambda: None)
    dispatch._warn_slow.cache_clear()
    with pytest.warns(UserWarning, match="100 times slower") as warned:
        image, _ = (rasterization(**scene)[0] for _ in range(2))
    assert len(warned) == 1
    assert backend_name() == "torch reference"
    torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-5)
    scene["means"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="`means` must be finite"):
        rasterization(**scene)


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv(native_library.ISA_VARIABLE, "sse9")
    native_library.load_library.cache_clear()
    with pytest.raises(ValueError, match="sse9"):
        backend_name()
    monkeypatch.undo()
    native_library.load_library.cache_clear()
    assert backend_name().startswith("native")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [*GAUSSIAN_TENSORS, "viewmats", "Ks", "backgrounds"])
def test_values_that_are_not_finite_are_refused(name, value):
    scene = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in random_scene(37, extra=2).items()}
    scene["backgrounds"] = torch.zeros(1, 3)
    scene["means"][-1] = torch.tensor([0.0, 0.0, 2.0])  # visible, so that its colours are read
    scene[name][-1, ...] = value
    with pytest.raises(ValueError, match=f"`{name}`.* must be finite"):
        rasterization(**scene)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"means": torch.zeros(5, 2)}, r"`means` must have shape \[5, 3\], got \[5, 2\]"),
        ({"means": torch.zeros(3)}, r"`means` must have shape \[N, 3\]"),
        ({"quats": torch.zeros(4, 4)}, r"`quats` must have shape \[5, 4\], got \[4, 4\]"),
        ({"scales": torch.zeros(5)}, r"`scales` must have shape"),
        ({"opacities": torch.zeros(5, 1)}, r"`opacities` must have shape \[5\], got \[5, 1\]"),
        ({"colors": torch.zeros(4, 3)}, r"`colors` must have shape \[5, D\] or \[1, 5, D\], got \[4, 3\]"),
        ({"colors": torch.zeros(5, 0)}, "at least one channel"),
        ({"colors": torch.zeros(5, 4, 3), "sh_degree": 2}, "at least 9 SH coefficients for degree 2, got 4"),
        ({"colors": torch.zeros(5, 25, 3), "sh_degree": 4}, "`sh_degree` must be 0 to 3"),
        ({"extra_features": torch.zeros(4, 1)}, r"`extra_features` must have shape \[5, E\], got \[4, 1\]"),
        ({"backgrounds": torch.zeros(3)}, r"`backgrounds` must have shape \[1, 3\]"),
        ({"viewmats": torch.eye(4)}, r"`viewmats` must have shape \[C, 4, 4\]"),
        ({"viewmats": torch.zeros(0, 4, 4)}, "at least one camera"),
        ({"Ks": torch.eye(3)}, r"`Ks` must have shape"),
        ({"Ks": torch.zeros(1, 3)}, r"`Ks` must have shape \[1, 3, 3\], got \[1, 3\]"),
        ({"Ks": torch.zeros(2, 3, 3)}, r"`Ks` must have shape \[1, 3, 3\], got \[2, 3, 3\]"),
        ({"viewmats": torch.eye(3)[None]}, r"`viewmats` must have shape \[1, 4, 4\], got \[1, 3, 3\]"),
        ({"colors": torch.zeros(2, 5, 3)}, r"`colors` must have shape \[5, D\] or \[1, 5, D\], got \[2, 5, 3\]"),
        (
            {"colors": torch.zeros(5, 3), "sh_degree": 0},
            r"`colors` must have shape \[5, K, 3\] or \[1, 5, K, 3\], got \[5, 3\]",
        ),
        ({"colors": torch.tensor(1.0)}, r"`colors` must have shape \[5, D\] .* got \[\]"),
        ({"extra_features": torch.zeros(5)}, r"`extra_features` must have shape \[5, E\], got \[5\]"),
        ({"backgrounds": torch.zeros(1, 4)}, r"`backgrounds` must have shape \[1, 3\], got \[1, 4\]"),
        ({"Ks": torch.zeros(1, 3, 3)}, "positive focal lengths"),
        ({"means": torch.zeros(5, 3, dtype=torch.float64)}, "`means` must be float32, got torch.float64"),
        ({"width": 0}, "at least 1 x 1 .* got 0 x 16"),
        ({"height": 1 << 19}, "at most 262144 x 262144 pixels, got 16 x 524288"),
        ({"eps2d": -1.0}, "`eps2d` must be a number of at least 0, got -1.0"),
        ({"near_plane": float("nan")}, "`near_plane` must be a number"),
        ({"tile_size": 8}, "`tile_size` must be 16 on a CPU, got 8"),
        ({"sparse_grad": True}, "`sparse_grad` must be False on a CPU"),
        ({"distributed": True}, "`distributed` must be False on a CPU"),
        ({"camera_model": "fisheye"}, "`camera_model` must be 'pinhole' on a CPU, got 'fisheye'"),
        ({"covars": torch.zeros(5, 3, 3)}, "`covars` must be None on a CPU"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    scene = splats([2.0] * 5, [0.5] * 5, [[1.0, 0.0, 0.0]] * 5)
    with pytest.raises(ValueError, match=message):
        rasterization(**{**scene, **change})


@pytest.mark.parametrize(("name", "value"), [("render_mode", "RGBD"), ("rasterize_mode", "sharp")])
def test_unknown_modes_are_refused(name, value):
    scene = splats([2.0], [0.5], [[1.0]])
    options = {
        "near_plane": 0.01,
        "far_plane": 1e10,
        "radius_clip": 0.0,
        "eps2d": 0.3,
        "sh_degree": None,
        "backgrounds": None,
        "render_mode": "RGB",
        "absgrad": False,
        "rasterize_mode": "classic",
        "extra_features": None,
    }
    dispatch.check_inputs(**scene, **options)
    with pytest.raises(ValueError, match=f"`{name}` must be one of .*{value}"):
        dispatch.check_inputs(**scene, **{**options, name: value})


def test_the_modes_are_those_of_gsplats_signature():
    parameters = inspect.signature(gsplat_rasterization).parameters
    assert get_args(parameters["render_mode"].annotation) == dispatch.RENDER_MODES
    assert get_args(parameters["rasterize_mode"].annotation) == dispatch.RASTERIZE_MODES


@pytest.mark.gpu
@pytest.mark.parametrize("render_mode", dispatch.RENDER_MODES)
@pytest.mark.parametrize("rasterize_mode", dispatch.RASTERIZE_MODES)
@pytest.mark.parametrize("sh_degree", [None, 3])
@pytest.mark.parametrize("extra", [0, 3])
def test_the_cpu_rasteriser_equals_gsplat_on_cuda(render_mode, rasterize_mode, sh_degree, extra):
    if extra and "RGB" not in render_mode:
        extra = 0
    scene = random_scene(400, cameras=2, sh=sh_degree is not None, extra=extra)
    scene["backgrounds"] = torch.full((2, 3), 0.3, dtype=torch.float64)
    options = {"render_mode": render_mode, "rasterize_mode": rasterize_mode, "sh_degree": sh_degree, "packed": False}
    expected = render_on_cuda(scene, **options, absgrad=True)
    actual = render_with_gradients(rasterization, scene, torch.float32, **options, absgrad=True)
    # gsplat leaves the entries of Gaussians that are not drawn uninitialised
    visible = actual["radii"] > 0
    for name in ("means2d", "depths", "conics", "opacities"):
        expected[name], actual[name] = expected[name][visible], actual[name][visible]
    assert_same(actual, expected, 2e-3)


def render_on_cuda(scene: dict, **options) -> dict[str, torch.Tensor]:
    def on_cuda(**arguments):
        moved = {k: v.to("cuda") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        image, alpha, info = rasterization(**moved)
        return image.cpu(), alpha.cpu(), info

    return {k: v.cpu() for k, v in render_with_gradients(on_cuda, scene, torch.float32, **options).items()}


def test_missing_cuda_kernels_are_told_with_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "import_module", lambda name: SimpleNamespace(_C=None))
    with pytest.raises(RuntimeError, match=r"`nvcc`, which is not on the PATH.*--machine.device-type cpu"):
        dispatch.check_cuda_kernels()
