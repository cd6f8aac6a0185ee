"""The torch reference against loops, against gsplat's own PyTorch code and against finite differences."""

from __future__ import annotations

import pytest
import torch
from references import blend_by_loops, gsplat_projection, gsplat_spherical_harmonics

from nerfstudio_enhancer.rasterize import reference
from nerfstudio_enhancer.rasterize.dispatch import rasterize_reference


def scene(num: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "means": torch.cat([normal(num, 2), 1 + 3 * uniform(num, 1)], dim=1),
        "quats": normal(num, 4),
        "scales": torch.exp(0.5 * normal(num, 3) - 2),
        "opacities": uniform(num),
        "colors": uniform(num, 3),
        "viewmats": torch.eye(4, dtype=torch.float64)[None],
        "Ks": torch.tensor([[[30.0, 0.0, 10.0], [0.0, 28.0, 9.0], [0.0, 0.0, 1.0]]], dtype=torch.float64),
    }


def test_blending_equals_a_loop_over_pixels_and_gaussians():
    s, width, height = scene(25), 20, 18
    # Two opaque splats meet the centre of pixel (10, 9) before all others: the second one closes it.
    for i, z in ((0, 0.5), (1, 0.6)):
        s["means"][i] = z * torch.tensor([0.5 / 30, 0.5 / 28, 1.0])
        s["opacities"][i] = 1.0
    radii, means2d, depths, conics, _ = reference.project_gaussians(
        s["means"], s["quats"], s["scales"], s["viewmats"], s["Ks"], width, height
    )
    background = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    render, alpha = reference.rasterize_gaussians(
        *(means2d, conics, s["opacities"][None], s["colors"][None], depths, radii, width, height, background[None])
    )
    expected, expected_alpha = blend_by_loops(
        *(means2d[0], conics[0], s["opacities"], s["colors"], depths[0], radii[0], width, height, background)
    )
    torch.testing.assert_close(render[0], expected)
    torch.testing.assert_close(alpha[0, ..., 0].float(), expected_alpha)
    torch.testing.assert_close(expected_alpha[9, 10], torch.tensor(0.999))


def test_projection_equals_gsplats_torch_code():
    s = scene(200)
    viewmats = s["viewmats"].repeat(2, 1, 1)
    viewmats[1, :3, 3] = torch.tensor([0.3, -0.2, 0.5])
    intrinsics = s["Ks"].repeat(2, 1, 1)
    ours = reference.project_gaussians(s["means"], s["quats"], s["scales"], viewmats, intrinsics, 20, 18)
    theirs = gsplat_projection(s["means"], s["quats"], s["scales"], viewmats, intrinsics, 20, 18)
    visible = ours[0] > 0
    assert 20 < visible.sum() < 400
    torch.testing.assert_close(ours[0], theirs[0])
    for mine, other in zip(ours[1:], theirs[1:]):
        torch.testing.assert_close(mine[visible], other[visible])


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_spherical_harmonics_equal_gsplats_torch_code(degree):
    generator = torch.Generator().manual_seed(degree)
    directions = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    coefficients = torch.randn(50, 16, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        reference.spherical_harmonics(degree, directions, coefficients),
        gsplat_spherical_harmonics(degree, directions, coefficients),
    )


@pytest.mark.parametrize(
    ("render_mode", "rasterize_mode", "sh_degree"),
    [("RGB+ED", "classic", None), ("RGB+D", "antialiased", 1)],
)
def test_gradients_equal_finite_differences(render_mode, rasterize_mode, sh_degree):
    # Wide Gaussians: no pixel of the image comes near the jump of alpha at 1/255.
    generator = torch.Generator().manual_seed(3)
    n = 2
    s = scene(n)
    s["means"] = s["means"] * torch.tensor([0.1, 0.1, 1.0], dtype=torch.float64)
    s["scales"] = 0.5 + 0.5 * torch.rand(n, 3, generator=generator, dtype=torch.float64)
    s["opacities"] = torch.tensor([0.5, 0.7], dtype=torch.float64)
    if sh_degree is not None:
        s["colors"] = 0.2 * torch.randn(n, 4, 3, generator=generator, dtype=torch.float64)
    s["extra_features"] = torch.rand(n, 1, generator=generator, dtype=torch.float64)
    s["backgrounds"] = torch.rand(1, 3, generator=generator, dtype=torch.float64)
    names = [name for name in s if name != "Ks"]

    def render(*values):
        image, alpha, _ = rasterize_reference(
            **dict(zip(names, values)),
            Ks=s["Ks"],
            width=17,
            height=1,
            sh_degree=sh_degree,
            render_mode=render_mode,
            rasterize_mode=rasterize_mode,
        )
        return image, alpha

    assert torch.autograd.gradcheck(render, [s[name].requires_grad_() for name in names])


def test_absgrad_sums_the_absolute_gradients_of_single_pixels():
    s, width, height = scene(6), 5, 4
    s["Ks"][:, :2] /= 4
    _, _, info = rasterize_reference(**s, width=width, height=height)
    shapes = info["means2d"].shape
    expected = torch.zeros(shapes, dtype=torch.float64)
    for pixel in range(width * height):
        s["means"] = s["means"].detach().requires_grad_()
        render, _, info = rasterize_reference(**s, width=width, height=height)
        info["means2d"].retain_grad()
        render[0].reshape(-1, 3)[pixel].sum().backward()
        expected += info["means2d"].grad.abs()
    render, _, info = rasterize_reference(**s, width=width, height=height, absgrad=True)
    render.sum().backward()
    torch.testing.assert_close(info["means2d"].absgrad, expected)
    assert (expected > 0).any()
