import pytest

from nerfstudio_enhancer.evaluation.tables import benchmark_tables, mean_of, share_of_ceiling, shared_cells


def cell(method, psnr, scene="garden", views=3, seed=0, ssim=0.5, lpips=0.4):
    return {
        "scene": scene,
        "views": views,
        "seed": seed,
        "method": method,
        "psnr": psnr,
        "ssim": ssim,
        "lpips": lpips,
        "wall_s": 30.0,
        "peak_rss_mb": 900.0,
        "commit": "abc",
    }


def rows(table, start=""):
    return [
        [part.strip() for part in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith(f"| {start}".rstrip() + " ")
    ]


def gains_of(table):
    return rows(table.split("## Gains")[1].split("\n## ")[0])


def test_a_scene_with_more_seeds_weighs_no_more_than_another():
    # garden: (10 + 14) / 2 = 12; plush: 16; mean of scenes 14, mean of cells 13.33
    cells = [cell("geometry", 10.0), cell("geometry", 14.0, seed=1), cell("geometry", 16.0, scene="plush")]
    assert mean_of(cells, "psnr") == pytest.approx(14.0)


def test_means_compare_only_places_that_all_methods_have():
    cells = [cell("geometry", 10.0), cell("oracle", 13.0), cell("geometry", 20.0, scene="plush")]
    assert {entry["scene"] for entry in shared_cells(cells, ["geometry", "oracle"])} == {"garden"}


def test_share_of_the_ceiling_is_a_part_of_its_gain():
    assert share_of_ceiling(11.0, baseline=10.0, ceiling=14.0) == pytest.approx(0.25)
    assert share_of_ceiling(9.0, baseline=10.0, ceiling=14.0) == pytest.approx(-0.25)
    assert share_of_ceiling(11.0, baseline=10.0, ceiling=10.0) is None


def test_tables_state_gains_over_both_baselines_and_the_share_of_the_oracle():
    cells = [
        cell("splatfacto", 9.0, lpips=0.6),
        cell("geometry", 10.0, lpips=0.5),
        cell("3dgs-enhancer", 11.0, ssim=0.6),
        cell("oracle", 14.0),
    ]
    table = benchmark_tables(cells, {"preset": "quick"})
    assert rows(table, "garden") == [
        [
            "garden",
            "3",
            "9.00 / 0.500 / 0.600",
            "10.00 / 0.500 / 0.500",
            "11.00 / 0.600 / 0.400",
            "14.00 / 0.500 / 0.400",
        ]
    ]
    method_row = next(row for row in rows(table, "3") if row[1] == "3dgs-enhancer")
    extremes = "+1.00 (garden 3) to +1.00 (garden 3)"
    assert method_row == ["3", "3dgs-enhancer", "+2.00 / +0.100 / -0.200", "+1.00 / +0.100 / -0.100", extremes, "25 %"]
    assert "preset quick" in table
    assert "commit abc" in table


def test_a_missing_cell_is_a_dash_and_several_seeds_show_their_spread():
    cells = [cell("geometry", 10.0), cell("geometry", 12.0, seed=1), cell("oracle", 14.0, views=6)]
    table = benchmark_tables(cells, {})
    # sample standard deviation of 10 and 12: sqrt(2) = 1.41
    assert rows(table, "garden")[0] == ["garden", "3", "11.00 ± 1.41 / 0.500 / 0.400", "-"]


def test_tables_of_no_cell_say_so():
    assert benchmark_tables([], {}) == "No cell is done yet.\n"


def test_what_is_seen_is_told_by_method_and_number_of_views():
    shares = [(0.25, 0.5, 3, "garden"), (0.35, 0.7, 3, "plush"), (0.5, 0.9, 6, "garden")]
    cells = [
        cell("geometry", 10.0, views=views, scene=scene) | {"depth_share": depth, "seen_share": seen}
        for depth, seen, views, scene in shares
    ]
    table = benchmark_tables(cells, {}).split("## What is seen")[1]
    assert rows(table, "geometry")[0] == ["geometry", "30 %", "50 %", "60 %", "90 %", "-", "-"]


def test_repaired_renders_stand_beside_those_of_the_same_splats():
    repaired = {"repaired_psnr": 11.5, "repaired_ssim": 0.45, "repaired_lpips": 0.35}
    cells = [cell("geometry", 10.0), {**cell("3dgs-enhancer", 11.0), **repaired}, cell("3dgs-enhancer", 12.0, seed=1)]
    table = benchmark_tables(cells, {"preset": "quick"})
    assert rows(table, "3dgs-enhancer | garden") == [
        ["3dgs-enhancer", "garden", "3", "11.00 / 0.500 / 0.400", "11.50 / 0.450 / 0.350", "-"]
    ]
    assert rows(table, r"3dgs-enhancer | **mean**")[0][-1] == "+0.50 / -0.050 / -0.050"
    assert "repaired" not in benchmark_tables(cells[:1], {"preset": "quick"})


def test_gains_name_the_worst_and_the_best_scene_in_the_mean_of_their_seeds():
    # garden gains 1 and 3 in two seeds, 2 in the mean; plush loses half a dB; garden with 6 views gains 5
    cells = [
        cell("geometry", 10.0),
        cell("geometry", 11.0, seed=1),
        cell("geometry", 20.0, scene="plush"),
        cell("geometry", 12.0, views=6),
        cell("3dgs-enhancer", 11.0),
        cell("3dgs-enhancer", 14.0, seed=1),
        cell("3dgs-enhancer", 19.5, scene="plush"),
        cell("3dgs-enhancer", 17.0, views=6),
    ]
    table = benchmark_tables(cells, {})
    of_three, of_six, of_all = (row for row in gains_of(table) if row[1] == "3dgs-enhancer")
    assert of_three[-1] == "-0.50 (plush 3) to +2.00 (garden 3)"
    assert of_six[-1] == "+5.00 (garden 6) to +5.00 (garden 6)"
    assert of_all[-1] == "-0.50 (plush 3) to +5.00 (garden 6)"


def test_gains_of_repaired_renders_are_over_the_places_that_have_them():
    # the baseline of seed 1 must not count: its renders were not repaired
    repaired = {"repaired_psnr": 12.0, "repaired_ssim": 0.5, "repaired_lpips": 0.3}
    cells = [
        cell("geometry", 10.0),
        cell("geometry", 4.0, seed=1),
        {**cell("3dgs-enhancer", 11.0), **repaired},
        cell("3dgs-enhancer", 5.0, seed=1),
        cell("oracle", 14.0),
        cell("oracle", 8.0, seed=1),
    ]
    table = benchmark_tables(cells, {})
    row = next(row for row in gains_of(table) if row[1] == "3dgs-enhancer, repaired")
    assert row == ["3", row[1], "+2.00 / +0.000 / -0.100", "+2.00 (garden 3) to +2.00 (garden 3)", "50 %"]
