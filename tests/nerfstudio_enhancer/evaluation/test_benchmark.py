import dataclasses
import shutil
from pathlib import Path

import pytest
from PIL import Image

from nerfstudio_enhancer.evaluation import benchmark as benchmark_module
from nerfstudio_enhancer.evaluation.benchmark import (
    Benchmark,
    Cell,
    CellSettings,
    Protocol,
    Scale,
    plan_cells,
    plan_jobs,
    run_benchmark,
)
from nerfstudio_enhancer.evaluation.cell import cell_config
from nerfstudio_enhancer.evaluation.methods import dataparser_of
from nerfstudio_enhancer.evaluation.results import load_results
from nerfstudio_enhancer.jobs import JobResult

PSNR = {"splatfacto": 9.0, "geometry": 10.0, "3dgs-enhancer": 11.0, "oracle": 14.0}


@pytest.fixture
def scene(tmp_path):
    folder = tmp_path / "garden"
    folder.mkdir()
    return folder


@pytest.fixture
def machine(monkeypatch):
    """Runs jobs without training: writes the pictures of an evaluation and returns figures by method."""
    started = []

    def run(jobs, workers, threads, preload):
        for job in jobs:
            started.append(job.key)
            if job.key.endswith("first-stage"):
                yield JobResult(job.key, wall_s=20.0, peak_rss_mb=500.0)
                continue
            cell, settings = job.arguments
            if cell.method in run.broken:
                yield JobResult(job.key, error="ValueError: no splats")
                continue
            renders = settings.output / "runs" / cell.place / cell.method / "renders"
            renders.mkdir(parents=True, exist_ok=True)
            for index in range(6):
                Image.new("RGB", (20, 8)).save(renders / f"eval_img_{index:04d}.png")
            value = {
                "scene": cell.scene,
                "views": cell.views,
                "seed": cell.seed,
                "method": cell.method,
                "psnr": PSNR[cell.method],
                "ssim": 0.5,
                "lpips": 0.4,
                "wall_s": 30.0,
                "renders": renders.relative_to(settings.output).as_posix(),
                "first_stage_peak_rss_mb": 1500.0,
            }
            yield JobResult(job.key, value, wall_s=12.0, peak_rss_mb=900.0)

    run.broken = set()
    run.started = started
    monkeypatch.setattr(benchmark_module, "run_jobs", run)
    return run


def test_cells_of_one_place_stay_together_and_methods_keep_their_order(scene):
    cells = plan_cells(Benchmark((scene,), Path("out"), views=(3, 6), methods=("oracle", "geometry"), seeds=(0, 1)))
    assert [cell.key[1:] for cell in cells] == [
        (3, 0, "geometry"),
        (3, 0, "oracle"),
        (6, 0, "geometry"),
        (6, 0, "oracle"),
        (3, 1, "geometry"),
        (3, 1, "oracle"),
        (6, 1, "geometry"),
        (6, 1, "oracle"),
    ]


def test_a_published_protocol_reaches_every_cell_and_is_told_with_the_results(scene, tmp_path, machine):
    lists = tmp_path / "lists"
    lists.mkdir()
    benchmark = Benchmark(
        (scene,),
        tmp_path / "out",
        views=(6,),
        methods=("splatfacto",),
        split_files=f"{lists}/{{scene}}_{{views}}.json",
        image_folder="images_4",
    )
    with pytest.raises(FileNotFoundError, match=r"no list of views at .*garden_6\.json"):
        run_benchmark(benchmark)
    (lists / "garden_6.json").write_text("{}")
    results = run_benchmark(benchmark)
    assert results.settings["image_folder"] == "images_4"
    protocol = Protocol("references-first", benchmark.split_files, "images_4")
    settings = CellSettings(tmp_path / "out", Scale(30, 32), "none", protocol)
    dataparser = dataparser_of(cell_config(Cell(scene, 6, 0, "splatfacto"), settings))
    assert (dataparser.split_file, dataparser.num_views) == (lists / "garden_6.json", None)
    assert dataparser.image_folder == "images_4"


def test_cells_of_another_protocol_are_not_mixed_in(scene, tmp_path, machine):
    usual = Benchmark((scene,), tmp_path / "out", views=(3,), methods=("splatfacto",))
    other = dataclasses.replace(usual, split_rule="test-first")
    run_benchmark(other)
    with pytest.raises(ValueError, match="split_rule = 'test-first' there and None now"):
        run_benchmark(usual)


def test_methods_that_differ_from_the_first_round_on_share_one_first_stage():
    cells = [Cell(Path("garden"), 3, 0, method) for method in ("splatfacto-random", "splatfacto", "geometry", "oracle")]
    jobs = plan_jobs(cells, CellSettings(Path("out"), Scale(30, 32), "bundled"))
    assert [(job.key.rsplit("/", 1)[1], job.after and job.after.rsplit("/", 1)[1]) for job in jobs] == [
        ("splatfacto-random", None),
        ("splatfacto", None),
        ("first-stage", None),
        ("geometry", "first-stage"),
        ("oracle", "first-stage"),
    ]


def test_done_cells_are_skipped_and_failed_ones_are_tried_again(scene, machine, tmp_path):
    command = Benchmark((scene,), tmp_path / "out", views=(3,), methods=("splatfacto", "3dgs-enhancer"))
    machine.broken = {"3dgs-enhancer"}
    with pytest.raises(
        RuntimeError, match="1 of 2 cells failed; the first, garden/k03_s0/3dgs-enhancer: ValueError: no splats"
    ):
        run_benchmark(command)
    assert (tmp_path / "out/table.md").read_text().count("splatfacto") > 0

    machine.broken, machine.started[:] = set(), []
    results = run_benchmark(command)
    assert machine.started == ["garden/k03_s0/first-stage", "garden/k03_s0/3dgs-enhancer"]
    assert [entry["method"] for entry in results.cells] == ["3dgs-enhancer", "splatfacto"]
    assert results.failures == []

    machine.started[:] = []
    run_benchmark(command)
    assert machine.started == []


def test_redo_runs_the_cells_of_a_method_again(scene, machine, tmp_path):
    methods = ("splatfacto", "geometry")
    run_benchmark(Benchmark((scene,), tmp_path / "out", views=(3,), methods=methods))
    machine.started[:] = []
    run_benchmark(Benchmark((scene,), tmp_path / "out", views=(3,), methods=methods, redo=("splatfacto",)))
    assert machine.started == ["garden/k03_s0/splatfacto"]


def test_a_scene_of_the_same_name_from_elsewhere_is_refused(scene, machine, tmp_path):
    run_benchmark(Benchmark((scene,), tmp_path / "out", views=(3,), methods=("splatfacto",)))
    other = tmp_path / "elsewhere" / scene.name
    other.mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"scene 'garden' at .*garden, which is now to be read from .*elsewhere/garden"
    ):
        run_benchmark(Benchmark((other,), tmp_path / "out", views=(6,), methods=("splatfacto",)))


def test_one_scene_may_be_spelled_in_several_ways_and_named_by_the_folder_one_is_in(
    scene, machine, tmp_path, monkeypatch
):
    first = run_benchmark(Benchmark((scene,), tmp_path / "out", views=(3,), methods=("splatfacto",)))
    monkeypatch.chdir(scene)
    for spelling in (Path(), scene / "sub" / ".."):
        again = run_benchmark(Benchmark((spelling,), tmp_path / "out", views=(3,), methods=("splatfacto",)))
        assert again.cells == first.cells


def test_renders_that_were_deleted_are_left_out_of_the_sheet(scene, machine, tmp_path):
    run_benchmark(Benchmark((scene,), tmp_path / "out", views=(3,), methods=("splatfacto",)))
    shutil.rmtree(tmp_path / "out/runs")
    run_benchmark(Benchmark((scene,), tmp_path / "out", views=(3,), methods=("splatfacto", "geometry")))
    with Image.open(tmp_path / "out/sheets/garden_k03_s0.png") as sheet:
        assert sheet.width == 2 * 10  # the photograph and one method


def test_other_settings_are_refused_before_any_cell_is_done(scene, machine, tmp_path):
    machine.broken = {"splatfacto"}
    command = Benchmark((scene,), tmp_path / "out", views=(3,), methods=("splatfacto",), steps=30)
    with pytest.raises(RuntimeError, match="no splats"):
        run_benchmark(command)
    with pytest.raises(ValueError, match="steps = 30 there and 60 now"):
        run_benchmark(dataclasses.replace(command, steps=60))


def test_an_entry_states_the_larger_peak_memory_of_both_stages(scene, machine, tmp_path):
    run_benchmark(Benchmark((scene,), tmp_path / "out", views=(3,), methods=("geometry",), preset="quick"))
    settings = {"preset": "quick", "steps": 1200, "max_image_size": 320, "prior": "bundled"}
    (entry,) = load_results(tmp_path / "out", settings).cells
    assert entry["peak_rss_mb"] == 1500.0
    assert {"scene", "views", "seed", "method", "psnr", "ssim", "lpips", "wall_s", "commit", "threads"} <= set(entry)


def test_a_sheet_shows_the_photograph_and_every_method(scene, machine, tmp_path):
    run_benchmark(Benchmark((scene,), tmp_path / "out", views=(3,), methods=("splatfacto", "geometry", "oracle")))
    with Image.open(tmp_path / "out/sheets/garden_k03_s0.png") as sheet:
        # four rows of 8 px below the labels, four columns of half an evaluation picture's 20 px
        assert sheet.size == (4 * 10, 18 + 4 * 8)


def test_bad_commands_are_refused(scene, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=r"unknown methods \['nerfacto'\]; there are splatfacto-random"):
        run_benchmark(Benchmark((scene,), output, methods=("nerfacto",)))
    with pytest.raises(ValueError, match="told apart by folder name"):
        run_benchmark(Benchmark((scene, tmp_path / "other/garden"), output))
    with pytest.raises(FileNotFoundError, match="there is no scene at"):
        run_benchmark(Benchmark((tmp_path / "nowhere",), output))
    assert not output.exists()
