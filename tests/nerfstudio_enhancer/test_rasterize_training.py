"""What training does with the rasteriser on a CPU: gsplat's strategies, camera optimisation, memory."""

from __future__ import annotations

import math

import pytest
import torch
from gsplat import MCMCStrategy
from gsplat.strategy import ops
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.cameras.cameras import Cameras

from nerfstudio_enhancer.conventions import camera_to_world_opengl, world_to_camera_opencv
from nerfstudio_enhancer.rasterize import rasterization
from nerfstudio_enhancer.rasterize.bench import synthetic_scene
from nerfstudio_enhancer.rasterize.gsplat_on_cpu import compute_relocation, quat_scale_to_covar_preci
from nerfstudio_enhancer.rasterize.native_ops import Frame


def binomials(n_max: int = 51) -> torch.Tensor:
    return torch.tensor([[float(math.comb(n, k)) for k in range(n_max)] for n in range(n_max)])


def test_two_gaussians_in_the_place_of_one_by_hand():
    # 1 - sqrt(1 - 0.75) = 0.5; eq. 9 with n = 2: 0.5 (i = 1) + 0.5 - 0.25 / sqrt(2) (i = 2)
    opacities, scales = compute_relocation(torch.tensor([0.75]), torch.ones(1, 3), torch.tensor([2]), binomials())
    torch.testing.assert_close(opacities, torch.tensor([0.5]))
    torch.testing.assert_close(scales, torch.full((1, 3), 0.75 / (1 - 0.25 / math.sqrt(2))))


def test_relocation_equals_the_double_sum_of_the_paper():
    binoms = binomials()
    opacities = torch.rand(60, generator=torch.Generator().manual_seed(0)) * 0.98 + 0.01
    ratios = torch.arange(60)  # 0 counts as 1, above 51 as 51
    new, scales = compute_relocation(opacities, torch.ones(60, 3), ratios.clone(), binoms)
    for index in range(60):
        n, opacity = min(max(index, 1), 51), opacities[index].item()
        alpha = 1 - (1 - opacity) ** (1 / n)
        terms = [
            math.comb(i - 1, k) * (-1) ** k / math.sqrt(k + 1) * alpha ** (k + 1)
            for i in range(1, n + 1)
            for k in range(i)
        ]
        assert new[index].item() == pytest.approx(alpha, rel=1e-5)
        assert scales[index, 0].item() == pytest.approx(opacity / math.fsum(terms), rel=1e-5)


def test_covariances_and_precisions_by_hand():
    # a quarter turn about z swaps the first two axes
    quats = torch.tensor([[math.sqrt(0.5), 0.0, 0.0, math.sqrt(0.5)]])
    covariance, precision = quat_scale_to_covar_preci(quats, torch.tensor([[2.0, 1.0, 0.5]]))
    torch.testing.assert_close(covariance, torch.diag(torch.tensor([1.0, 4.0, 0.25]))[None])
    torch.testing.assert_close(precision, torch.diag(torch.tensor([1.0, 0.25, 4.0]))[None])
    upper, none = quat_scale_to_covar_preci(quats, torch.tensor([[2.0, 1.0, 0.5]]), compute_preci=False, triu=True)
    torch.testing.assert_close(upper, torch.tensor([[1.0, 0.0, 0.0, 4.0, 0.0, 0.25]]))
    assert none is None


def trainable_scene(n: int) -> tuple[torch.nn.ParameterDict, dict]:
    """Parameters as gsplat's strategies expect them, and the camera."""
    scene = synthetic_scene(n, 64, 48)
    params = torch.nn.ParameterDict(
        {
            "means": scene["means"],
            "quats": scene["quats"],
            "scales": scene["scales"].log() + 1.5,
            "opacities": torch.logit(scene["opacities"]),
            "colors": scene["colors"][:, 0],
        }
    )
    return params, {"viewmats": scene["viewmats"], "Ks": scene["Ks"], "width": 64, "height": 48}


def render(params: torch.nn.ParameterDict, camera: dict, **options) -> tuple[torch.Tensor, dict]:
    image, _, info = rasterization(
        means=params["means"],
        quats=params["quats"],
        scales=params["scales"].exp(),
        opacities=params["opacities"].sigmoid(),
        colors=params["colors"],
        **camera,
        packed=False,
        **options,
    )
    return image, info


def test_gsplats_mcmc_strategy_relocates_and_grows_on_a_cpu():
    torch.manual_seed(0)
    params, camera = trainable_scene(300)
    params["opacities"].data[:30] = -9.0  # dead: opacity 1e-4 is below 0.005
    optimizers = {name: torch.optim.Adam([params[name]], lr=1e-3) for name in params}
    strategy = MCMCStrategy(refine_start_iter=0, refine_every=1, cap_max=400, noise_lr=1.0)
    strategy.check_sanity(params, optimizers)
    state = strategy.initialize_state()
    target = torch.rand(1, 48, 64, 3)
    counts = []
    for step in range(1, 9):
        image, info = render(params, camera)
        (image - target).abs().mean().backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        strategy.step_post_backward(params, optimizers, state, step, info, lr=1e-3)
        counts.append(len(params["means"]))
    assert counts[:2] == [315, 330]  # 5 % each time
    assert counts[-1] == 400
    assert params["opacities"].sigmoid().min() >= 0.0049  # nothing is dead any more
    assert all(torch.isfinite(value).all() for value in params.values())


def test_cuda_tensors_still_reach_gsplats_own_relocation(monkeypatch):
    params, camera = trainable_scene(3)
    render(params, camera)  # the first rasterisation makes gsplat's strategies ready for the CPU
    assert ops.compute_relocation.on_cuda.__module__ == "gsplat.relocation"
    before = ops.compute_relocation
    render(params, camera)
    assert ops.compute_relocation is before


def test_nerfstudios_camera_optimiser_finds_a_shifted_camera_again():
    params, camera = trainable_scene(400)
    camera["width"], camera["height"] = 64, 48
    with torch.no_grad():
        target, _ = render(params, camera)
    shifted = torch.eye(4)[None].clone()
    shifted[0, 0, 3] = 0.02  # about 0.5 pixels at the mean depth
    to_world = camera_to_world_opengl(shifted)[:, :3]
    view = Cameras(to_world, 64.0, 64.0, 32.0, 24.0, 64, 48)
    view.metadata = {"cam_idx": 0}
    optimiser = CameraOptimizerConfig(mode="SO3xR3", trans_l2_penalty=0.0, rot_l2_penalty=0.0).setup(
        num_cameras=1, device="cpu"
    )
    adam = torch.optim.Adam(optimiser.parameters(), lr=1e-3)
    errors = []
    for _ in range(80):
        camera["viewmats"] = world_to_camera_opencv(optimiser.apply_to_camera(view))
        image, _ = render(params, camera)
        loss = (image - target).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        errors.append(loss.item())
    assert errors[-1] < 0.05 * errors[0]


@pytest.mark.parametrize("opacity", [0.9, 0.004])  # the tile is full after a few; every one is blended
def test_a_million_gaussians_in_one_tile_are_drawn(opacity):
    n = 1_000_000
    means = torch.zeros(n, 3)
    means[:, 2] = torch.linspace(1, 2, n)
    means.requires_grad_()
    image, alpha, _ = rasterization(
        means,
        torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(n, 4),
        torch.full((n, 3), 50.0),
        torch.full((n,), opacity),
        torch.ones(n, 1),
        viewmats=torch.eye(4)[None],
        Ks=torch.tensor([[[16.0, 0.0, 8.0], [0.0, 16.0, 8.0], [0.0, 0.0, 1.0]]]),
        width=16,
        height=16,
    )
    # closed as soon as less than 1e-4 would be left
    assert alpha.min() > 0.998
    assert alpha.max() < 1
    image.sum().backward()
    assert torch.isfinite(means.grad).all()


def test_memory_per_intersection_is_what_is_documented():
    recycled = [Frame(), Frame()]  # two are kept for reuse, with the memory that they needed: the next one is new
    scene = synthetic_scene(30_000, 480, 320)
    scene["means"].requires_grad_()
    image, _, info = rasterization(**scene, sh_degree=3, width=480, height=320, render_mode="RGB+ED", absgrad=True)
    image.sum().backward()
    frame = image.grad_fn.frame
    intersections, drawn = frame.intersections(), int((info["radii"] > 0).sum())
    # 11 bytes in the forward pass (rank, slot, mask, used), 2 a candidate tile, 64 for the gradients of up to 8 channels;
    # per drawn Gaussian a record of 64 and 36 for order and tiles; per pixel 8; a quarter more, for later images.
    bound = 1.25 * (77 * intersections + 2 * intersections + 110 * drawn + 4 * 30_000 + 8 * 480 * 320) + 16 * 2**21
    assert intersections > 50_000
    assert frame.bytes() < bound
    assert len(recycled) == 2


def test_a_scene_that_needs_more_than_the_machine_has_is_refused():
    n = 200_000  # each covers all 128 x 128 tiles: 3.3e9 intersections
    means = torch.tensor([[0.0, 0.0, 1.0]]).expand(n, 3)
    arguments = {
        "quats": torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(n, 4),
        "scales": torch.full((n, 3), 100.0),
        "opacities": torch.full((n,), 0.5),
        "colors": torch.ones(n, 1),
        "viewmats": torch.eye(4)[None],
        "Ks": torch.tensor([[[2048.0, 0.0, 1024.0], [0.0, 2048.0, 1024.0], [0.0, 0.0, 1.0]]]),
    }
    with pytest.raises(ValueError, match="more than 2\\^31 tiles"):
        rasterization(means, **arguments, width=2048, height=2048)
