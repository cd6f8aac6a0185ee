"""The rasteriser's benchmark: every stage is timed, the floor is counted by hand, the cost is fitted by a line."""

from __future__ import annotations

import json

import pytest
import torch

from nerfstudio_enhancer.rasterize import bench
from nerfstudio_enhancer.rasterize.native_library import available_instruction_sets, load_library
from nerfstudio_enhancer.rasterize.native_ops import Frame, Rasterize


def test_the_stages_and_the_rest_add_up_to_the_step():
    step = bench.measure_step(300, 48, 32, repeats=2)
    stages = ("projection", "projection_backward", "binning", "raster_forward", "raster_backward", "reduction")
    assert all(step[stage] > 0 for stage in stages)
    assert sum(step[stage] for stage in stages) + step["torch_glue"] == pytest.approx(step["step"])
    assert step["torch_glue"] > 0


def frame_of(means2d: list[list[float]], depths: list[float], opacities: list[float], size: int) -> Frame:
    """The frame after rasterising round splats of variance 1 pixel into a `size` x `size` image."""
    n = len(depths)
    frame = Frame()
    Rasterize.apply(
        torch.tensor([means2d]),
        torch.tensor([[[1.0, 0.0, 1.0]]]).expand(1, n, 3).contiguous(),
        torch.tensor([opacities]),
        torch.ones(1, n, 1),
        None,
        torch.tensor([depths]),
        torch.full((1, n), 4, dtype=torch.int32),
        frame,
        *(size, size, False, False),
    )
    return frame


def test_blended_pairs_are_the_pixels_that_receive_light():
    # 0.1 exp(-r^2 / 2) >= 1/255 for r^2 <= 2 ln 25.5 = 6.48: offsets (0,0), 4 x (1,0), 4 x (1,1), 4 x (2,0), 8 x (2,1)
    # Around pixel (5, 5) rows and columns 3 to 7 lie in the blocks 0..3 and 4..7; of block (0, 0) only (3, 3) is near, at
    # offset (2, 2), which is dark: 3 blocks are left.
    frame = frame_of([[5.5, 5.5]], [1.0], [0.1], 16)
    assert frame.blended_pairs(1) == (21, 3 * 16)


def test_pairs_behind_a_closed_pixel_are_not_counted():
    # opacity 1 is clamped to 0.999 at the centre only; the second leaves 1e-6 there, so that pixel is closed before it
    front = frame_of([[5.5, 5.5]], [1.0], [1.0], 16).blended_pairs(1)[0]
    both = frame_of([[5.5, 5.5]] * 2, [1.0, 2.0], [1.0, 1.0], 16).blended_pairs(1)[0]
    assert both == 2 * front - 1


@pytest.mark.parametrize(("channels", "absgrad", "operations"), [(3, False, (20, 39)), (7, True, (24, 53))])
def test_the_floor_counts_operations_per_pair(channels, absgrad, operations):
    # forward 5 + 7 + 3 + 2 + channels, backward 5 + 7 + 3 + 9 + 2 channels + 9 (+ 6)
    assert bench.floor_operations(channels, absgrad) == operations


@pytest.mark.parametrize("isa", available_instruction_sets())
def test_a_case_is_measured_with_its_kernels_and_threads_and_leaves_them_as_they_were(isa):
    before = load_library().nse_isa(), torch.get_num_threads()
    row = bench.measure_case(bench.Case(500, 64, 48, True, 2, isa), vector_seconds=1e-9, repeats=1)
    assert (load_library().nse_isa(), torch.get_num_threads()) == before
    width = {"avx512": 16, "avx2": 8, "baseline": 4}[isa]
    # 24 + 53 operations for 7 channels with absgrad, 1 ns each, on 2 threads, in milliseconds
    assert row["raster_floor"] == pytest.approx(row["blended_pairs"] / width * 77 * 1e-6 / 2)
    assert row["raster_over_floor"] == pytest.approx(
        (row["raster_forward"] + row["raster_backward"]) / row["raster_floor"]
    )


def test_wider_vectors_do_more_per_second():
    lanes_per_second = []
    for isa in available_instruction_sets():
        with bench.instruction_set(isa):
            lanes_per_second.append(load_library().nse_vector_width() / bench.measure_vector_seconds(isa))
    assert max(lanes_per_second) < 1e12  # the loop was not optimised away: 16 lanes at 5 GHz twice a cycle are 1.6e11
    assert lanes_per_second[0] > 0.5 * lanes_per_second[-1]


def test_a_line_is_fitted_exactly():
    fit = bench.fit_line([1e6, 2e6, 3e6], [3.0, 5.0, 7.0])  # 1 ms + 2 ns per pair
    assert fit == pytest.approx({"ns_per_pair": 2.0, "fixed_ms": 1.0, "r_squared": 1.0})


def test_the_command_writes_figures_table_and_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "GAUSSIANS", (50_000,))
    monkeypatch.setattr(bench, "SIZES", ((480, 320), (960, 640)))
    monkeypatch.setattr(bench, "PLOT_GAUSSIANS", (400, 800))
    monkeypatch.setattr(bench, "PLOT_SIZES", ((32, 32), (64, 64)))
    monkeypatch.setattr(bench, "REFERENCE_CASE", (50, 32, 32))
    monkeypatch.setattr(bench, "available_instruction_sets", lambda: available_instruction_sets()[:1])
    scene = bench.synthetic_scene
    monkeypatch.setattr(bench, "synthetic_scene", lambda n, width, height: scene(min(n, 500), width, height))
    lines: list[str] = []
    result = bench.bench_rasterizer(tmp_path / "deep" / "bench.json", repeats=1, report=lines.append)
    assert json.loads((tmp_path / "deep" / "bench.json").read_text())["cases"] == result["cases"]
    assert result["step_ms_50k_480x320_7ch_absgrad"] > 0
    assert result["raster_over_floor_960x640"] > 1
    assert (tmp_path / "deep" / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert any("50k 960x640 7 ch absgrad" in line for line in lines)


def test_no_repeats_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`repeats` must be at least 1, got 0"):
        bench.bench_rasterizer(tmp_path / "bench.json", repeats=0)
