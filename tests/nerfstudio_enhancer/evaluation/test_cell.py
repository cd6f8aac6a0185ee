"""One real cell of the benchmark on a tiny scene, with nerfstudio's training and evaluation."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from nerfstudio.scripts.eval import ComputePSNR

from nerfstudio_enhancer import haze
from nerfstudio_enhancer.evaluation.benchmark import Cell, CellSettings, Scale
from nerfstudio_enhancer.evaluation.cell import RENDERS_FOLDER, cell_config, run_cell, train_first_stage

STEPS = 9

pytestmark = pytest.mark.slow


@pytest.fixture
def settings(tmp_path) -> CellSettings:
    return CellSettings(tmp_path / "out", Scale(steps=STEPS, max_image_size=48), "none")


@pytest.fixture
def cell(nerfstudio_folder):
    """A cell of the tiny scene by method."""
    data = nerfstudio_folder(num_images=12, width=64, height=48)
    return lambda method: Cell(data, 3, 0, method)


def splats(run: Path) -> dict:
    (checkpoint,) = (run / "nerfstudio_models").glob("*.ckpt")
    return torch.load(checkpoint, weights_only=True)


def test_a_cell_that_continues_the_shared_stage_equals_one_trained_in_one_go(cell, settings):
    whole = cell_config(cell("geometry"), settings)
    whole.timestamp = "whole"
    whole.save_config()
    trainer = whole.setup(local_rank=0, world_size=1)
    torch.manual_seed(0)
    trainer.setup()
    trainer.train()

    train_first_stage(cell("geometry"), settings)
    entry = run_cell(cell("geometry"), settings)
    parts, one_go = splats((settings.output / entry["config"]).parent), splats(whole.get_base_dir())
    assert parts["step"] == one_go["step"] == STEPS - 1
    for name, value in one_go["pipeline"].items():
        torch.testing.assert_close(parts["pipeline"][name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_an_entry_holds_what_ns_eval_says_of_the_run(cell, settings, tmp_path, monkeypatch):
    # What is haze where splats are finished: nearly all in so few steps.
    monkeypatch.setattr(haze, "LEAST_VEIL", 0.0)
    monkeypatch.setattr(haze, "WHOLE_VEIL", 0.1)
    train_first_stage(cell("geometry"), settings)
    shown = run_cell(cell("with-haze"), settings)
    entry = run_cell(cell("geometry"), settings)
    assert abs(entry["psnr"] - shown["psnr"]) > 1e-3
    run = (settings.output / entry["config"]).parent
    ComputePSNR(load_config=run / "config.yml", output_path=tmp_path / "eval.json").main()
    told = json.loads((tmp_path / "eval.json").read_text())["results"]
    for figure in ("psnr", "ssim", "lpips"):
        assert entry[figure] == pytest.approx(told[figure], abs=1e-5)
    # 12 photographs, 3 references, every 8th of the other 9
    assert entry["test_views"] == len(list((run / RENDERS_FOLDER).glob("*.png"))) == 2
    assert (shown["steps"], shown["first_stage_s"]) == (STEPS, 0.0)
    assert entry["steps"] == STEPS


def test_the_oracle_and_the_controls_feed_back_views_from_the_first_round_on(cell, settings):
    train_first_stage(cell("oracle"), settings)
    geometry, oracle = (run_cell(cell(method), settings) for method in ("geometry", "oracle"))
    folders = [(settings.output / entry["config"]).parent / "enhanced_views" for entry in (geometry, oracle)]
    assert [folder.exists() for folder in folders] == [False, True]
    assert oracle["first_stage_s"] == geometry["first_stage_s"] > 0
    assert oracle["depth_share"] == geometry["depth_share"]
    assert all(0 <= entry[share] <= 1 for entry in (geometry, oracle) for share in ("depth_share", "seen_share"))
    assert oracle["wall_s"] > oracle["first_stage_s"]


def test_the_first_stage_is_trained_once(cell, settings):
    train_first_stage(cell("oracle"), settings)
    stage = settings.output / "runs" / cell("oracle").place / "3dgs-enhancer" / "first-stage"
    before = (stage / "config.yml").stat().st_mtime_ns
    train_first_stage(cell("geometry"), settings)
    assert (stage / "config.yml").stat().st_mtime_ns == before
    larger = dataclasses.replace(settings, scale=dataclasses.replace(settings.scale, max_image_size=40))
    train_first_stage(cell("geometry"), larger)
    assert (stage / "config.yml").stat().st_mtime_ns > before
