"""The whole way on a tiny scene: train, a round, kill, resume, and nerfstudio's commands on the result."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gsplat.strategy.ops import split
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.scripts.eval import ComputePSNR
from nerfstudio.scripts.exporter import ExportGaussianSplat
from nerfstudio.scripts.render import DatasetRender, RenderInterpolated
from plyfile import PlyData
from tiny_prior import tiny_prior
from tiny_training import START, STEPS, train

from diffusion_prior.checkpoints import save_prior
from diffusion_prior.coarse import CoarseRepair
from nerfstudio_enhancer.enhance_step import enhance_step
from nerfstudio_enhancer.enhanced_views import EnhancedViewStore, round_folder_name

pytestmark = pytest.mark.slow


def views_of(run: Path, step: int = START) -> EnhancedViewStore:
    store = EnhancedViewStore()
    store.load_rounds(run / "enhanced_views", up_to_step=step)
    return store


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "nerfstudio_models").glob("*"))


def splats_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "nerfstudio_models" / checkpoints(run)[0], weights_only=True)["pipeline"]


def assert_same_splats(first: Path, second: Path) -> None:
    a, b = splats_of(first), splats_of(second)
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_a_run_makes_its_round_and_nerfstudios_commands_work_on_it(
    config: TrainerConfig, tmp_path: Path, monkeypatch
) -> None:
    # ns-render asks for ffmpeg even where it writes images only.
    monkeypatch.setattr("nerfstudio.scripts.render.install_checks.check_ffmpeg_installed", lambda: None)
    run = train(config)
    folder = run / "enhanced_views" / round_folder_name(START)
    assert (folder / "contact_sheet.png").is_file()
    # the clips between three references, three frames each
    assert views_of(run).num_views == len(list((folder / "frames").glob("*.png"))) >= 6
    assert checkpoints(run) == [f"step-{STEPS - 1:09d}.ckpt"]

    ComputePSNR(load_config=run / "config.yml", output_path=tmp_path / "eval.json").main()
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    assert {"psnr", "ssim", "lpips"} <= results.keys()
    assert np.isfinite([results["psnr"], results["ssim"], results["lpips"]]).all()
    assert results["repaired_psnr"] != results["psnr"]

    ExportGaussianSplat(load_config=run / "config.yml", output_dir=tmp_path / "export").main()
    vertices = PlyData.read(tmp_path / "export" / "splat.ply")["vertex"]
    means = splats_of(run)["_model.gauss_params.means"]
    assert len(vertices) == len(means)
    assert np.allclose(np.stack([vertices[axis] for axis in "xyz"], -1), means.numpy(), atol=1e-6)

    DatasetRender(
        load_config=run / "config.yml",
        output_path=tmp_path / "renders",
        rendered_output_names=["rgb", "confidence", "repaired"],
    ).main()
    rgb, confidence, repaired = (
        sorted((tmp_path / "renders").rglob(f"{name}/*")) for name in ("rgb", "confidence", "repaired")
    )
    assert len(rgb) == len(confidence) == len(repaired) > 0
    assert rgb[0].read_bytes() != repaired[0].read_bytes()

    RenderInterpolated(
        load_config=run / "config.yml",
        output_path=tmp_path / "path",
        output_format="images",
        interpolation_steps=2,
        pose_source="train",
    ).main()
    assert list((tmp_path / "path").rglob("*.jpg"))


def test_repaired_renders_are_measured_in_training_and_offered_by_name_afterwards_alone(config: TrainerConfig) -> None:
    for mode, offered in (("val", False), ("test", True)):
        pipeline = config.pipeline.setup(device="cpu", test_mode=mode)
        pipeline.eval()
        camera, batch = next(iter(pipeline.datamanager.fixed_indices_eval_dataloader))
        with torch.no_grad():
            outputs = pipeline.model.get_outputs_for_camera(camera)
            metrics, images = pipeline.model.get_image_metrics_and_images(outputs, batch)
        assert ("repaired" in outputs) is offered
        assert {"repaired_psnr", "repaired_ssim", "repaired_lpips"} <= metrics.keys()
        assert images["repaired"].shape == images["img"].shape


def test_haze_of_finished_splats_fades_unless_that_is_switched_off(config: TrainerConfig) -> None:
    assert config.pipeline.setup(device="cpu", test_mode="val").model.references is None
    pipeline = config.pipeline.setup(device="cpu", test_mode="test")
    assert len(pipeline.model.references()) == len(pipeline.datamanager.train_dataset)
    config.pipeline.model.fade_haze = False
    assert config.pipeline.setup(device="cpu", test_mode="test").model.references is None


@pytest.mark.parametrize("setting", [{"repair_share": 0.0}, {"prior": "none"}, {"feed": "renders"}])
def test_nothing_is_repaired_where_nothing_asks_for_it(config: TrainerConfig, setting: dict) -> None:
    for name, value in setting.items():
        setattr(config.pipeline.model.enhance, name, value)
    assert config.pipeline.setup(device="cpu", test_mode="test").model.repair is None


def test_splats_are_shown_and_measured_where_their_prior_is_gone(config: TrainerConfig, tmp_path: Path) -> None:
    config.pipeline.model.enhance.prior = str(tmp_path / "gone")
    pipeline = config.pipeline.setup(device="cpu", test_mode="test")
    metrics = pipeline.get_average_eval_image_metrics()
    assert np.isfinite(metrics["psnr"])
    assert "repaired_psnr" not in metrics


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("repair_share", 1.5, r"is a .* in \[0, 1\], got 1.5"),
        ("ratio", 1.5, r"is a .* in \[0, 1\], got 1.5"),
        ("diffusion_rounds", -1, "must be at least 0, got -1"),
    ],
)
def test_a_setting_out_of_range_is_refused_before_seed_points_are_searched(
    config: TrainerConfig, monkeypatch, name: str, value: float, rule: str
) -> None:
    monkeypatch.setattr("nerfstudio_enhancer.initial_splats.seed_points", None)
    setattr(config.pipeline.model.enhance, name, value)
    with pytest.raises(ValueError, match=f"{name} {rule}"):
        train(config)


def test_the_same_seed_gives_the_same_splats(config: TrainerConfig) -> None:
    first = train(config)
    config.timestamp = "second"
    second = train(config)
    assert_same_splats(first, second)


def test_splats_whose_references_see_nearly_all_end_as_they_would_without_prior(
    config: TrainerConfig, monkeypatch
) -> None:
    monkeypatch.setattr(
        "nerfstudio_enhancer.enhance_step.view_need", lambda condition, *_: torch.full((condition.num_frames,), 0.04)
    )
    model = config.pipeline.model
    model.enhance.ratio = 1.0
    # Gaussians are split, by chance, after the round.
    splits = []
    monkeypatch.setattr("gsplat.strategy.default.split", lambda **kwargs: splits.append(1) or split(**kwargs))
    model.warmup_length, model.refine_every = START, 2
    model.densify_grad_thresh = model.densify_size_thresh = 0.0
    fed = train(config)
    assert views_of(fed).mean_need > 0
    model.enhance.prior, config.timestamp = "none", "second"
    alone = train(config)
    assert len(splits) == 2
    assert_same_splats(fed, alone)


def test_a_run_killed_in_its_round_resumes_from_the_step_before_it(config: TrainerConfig, monkeypatch) -> None:
    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("nerfstudio_enhancer.rounds.enhance_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    run = config.get_base_dir()
    assert checkpoints(run) == [f"step-{START - 1:09d}.ckpt"]
    assert not (run / "enhanced_views").exists()

    monkeypatch.undo()
    config.load_dir, config.timestamp = run / "nerfstudio_models", "resumed"
    config.max_num_iterations = STEPS - START
    resumed = train(config)
    assert checkpoints(resumed) == [f"step-{STEPS - 1:09d}.ckpt"]
    assert views_of(resumed).num_views >= 6


def test_a_run_killed_in_its_second_round_makes_that_one_alone_when_resumed(config: TrainerConfig, monkeypatch) -> None:
    second = START + config.pipeline.model.enhance.every
    config.pipeline.model.enhance.rounds = 2
    made = []

    def killed_in_the_second(*args):
        if made:
            raise KeyboardInterrupt
        made.append(1)
        return enhance_step(*args)

    monkeypatch.setattr("nerfstudio_enhancer.rounds.enhance_step", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    run = config.get_base_dir()
    assert checkpoints(run) == [f"step-{second - 1:09d}.ckpt"]
    assert list(views_of(run, second).rounds) == [START]

    monkeypatch.undo()
    config.load_dir, config.timestamp = run / "nerfstudio_models", "resumed"
    config.max_num_iterations = STEPS - second
    resumed = train(config)
    assert {path.name for path in (resumed / "enhanced_views").iterdir()} == {
        round_folder_name(START),
        round_folder_name(second),
    }


def test_a_resumed_run_goes_on_with_the_same_enhanced_views(config: TrainerConfig, monkeypatch) -> None:
    first = train(config)
    calls = []
    monkeypatch.setattr("nerfstudio_enhancer.rounds.enhance_step", lambda *args: calls.append(1) or enhance_step(*args))
    config.load_dir, config.timestamp, config.max_num_iterations = first / "nerfstudio_models", "resumed", 2
    seen = {}

    def remember(rounds, *_args):
        seen["views"] = rounds.store.rounds[START]

    monkeypatch.setattr("nerfstudio_enhancer.rounds.Rounds.run_if_due", lambda rounds, step: remember(rounds))
    resumed = train(config)
    assert not calls
    config.load_dir, config.timestamp = resumed / "nerfstudio_models", "resumed again"
    train(config)
    assert not calls
    for saved, taken in zip(views_of(first).rounds[START], seen["views"], strict=True):
        assert torch.equal(saved.rgb, taken.rgb)


def test_enhanced_views_of_an_older_training_in_the_same_folder_are_set_aside(config: TrainerConfig) -> None:
    first = train(config)
    config.pipeline.model.enhance.start = START + 1
    assert train(config) == first
    for folder, step in (("enhanced_views-older-1", START), ("enhanced_views", START + 1)):
        assert [path.name for path in (first / folder).iterdir()] == [round_folder_name(step)]


def test_a_round_takes_references_at_their_learnt_poses(config: TrainerConfig, monkeypatch) -> None:
    seen = []

    def remember(model, references, *args):
        seen.append((model, references))
        return enhance_step(model, references, *args)

    monkeypatch.setattr("nerfstudio_enhancer.rounds.enhance_step", remember)
    config.pipeline.model.camera_optimizer.mode = "SO3xR3"
    config.pipeline.model.sh_degree = 0
    config.max_num_iterations = START + 1
    config.optimizers["camera_opt"]["scheduler"] = None
    config.optimizers["camera_opt"]["optimizer"].lr = 0.01
    train(config)
    ((model, references),) = seen
    learnt = model.camera_optimizer.pose_adjustment.detach()[:, :3]
    assert (learnt.norm(dim=1) > 0.01).all()
    given = config.pipeline.datamanager.dataparser.setup().get_dataparser_outputs("train").cameras
    moved = references.cameras.camera_to_worlds[..., 3] - given.camera_to_worlds[..., 3]
    # One more step than at the round has been trained since.
    torch.testing.assert_close(moved, learnt, atol=0.011, rtol=0)
    assert (moved.norm(dim=1) > 0.01).all()


@pytest.mark.parametrize(("lost", "made_anew"), [("oldest", 0), ("newest", 1)])
def test_a_resumed_run_needs_the_newest_round_alone(
    config: TrainerConfig, monkeypatch, lost: str, made_anew: int
) -> None:
    config.pipeline.model.enhance.rounds = 2
    first = train(config)
    rounds = sorted((first / "enhanced_views").iterdir())
    assert len(rounds) == 2
    shutil.rmtree(rounds[0 if lost == "oldest" else -1])
    calls = []
    monkeypatch.setattr("nerfstudio_enhancer.rounds.enhance_step", lambda *args: calls.append(1) or enhance_step(*args))
    config.load_dir, config.timestamp, config.max_num_iterations = first / "nerfstudio_models", "resumed", 2
    train(config)
    assert len(calls) == made_anew


@pytest.mark.parametrize("feed", ["renders", "mean-filled", "blurred", "photographs", "faultless"])
def test_controls_and_oracle_need_no_prior(config: TrainerConfig, feed: str) -> None:
    config.pipeline.model.enhance.prior, config.pipeline.model.enhance.feed = "none", feed
    config.max_num_iterations = START + 1
    assert views_of(train(config)).num_views > 0


def test_the_ceiling_of_a_prior_learns_from_every_photograph_but_the_test_views(config, monkeypatch) -> None:
    class AskedFor(Exception):
        pass

    def asked_for(scene, names):
        assert scene.size is None  # as the run itself: at full size
        raise AskedFor(*names)

    monkeypatch.setattr("nerfstudio_enhancer.evaluation.faultless.train_on_all", asked_for)
    config.pipeline.datamanager.max_image_size = None
    config.pipeline.model.enhance.prior, config.pipeline.model.enhance.feed = "none", "faultless"
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    with pytest.raises(AskedFor) as caught:
        trainer.train()
    tests = {Path(path).name for path in trainer.pipeline.datamanager.eval_dataset.image_filenames}
    everything = {path.name for path in (config.data / "images").iterdir()}
    names = {Path(name).name for name in caught.value.args}
    assert tests
    assert names == everything - tests


def test_without_prior_no_round_runs(config: TrainerConfig) -> None:
    config.pipeline.model.enhance.prior = "none"
    assert not (train(config) / "enhanced_views").exists()


@pytest.mark.parametrize("mode", ["RGBA", "RGB"])
def test_a_round_keeps_its_opacity_where_photographs_are_transparent(
    config: TrainerConfig, nerfstudio_folder: Callable[..., Path], mode: str
) -> None:
    folder = nerfstudio_folder(num_images=10, width=64, height=48, mode=mode, masks=mode == "RGB")
    config.data = config.pipeline.datamanager.data = folder
    (clip, *_) = views_of(train(config)).rounds[START]
    assert (clip.alpha is not None) == (mode == "RGBA")


def test_splats_of_other_references_are_not_gone_on_with(config: TrainerConfig) -> None:
    config.pipeline.model.enhance.prior = "none"
    run = train(config)
    config.timestamp, config.load_dir = "again", run
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint .*did you mean .*nerfstudio_models\?"):
        train(config)
    config.load_dir = run / "nerfstudio_models"
    config.pipeline.datamanager.dataparser.num_views = 4
    with pytest.raises(ValueError, match="trained on other reference views"):
        train(config)
    config.pipeline.datamanager.dataparser.num_views = 3
    assert checkpoints(train(config)) == [f"step-{2 * STEPS - 1:09d}.ckpt"]


def test_the_references_decide_the_length_and_a_resumed_run_goes_on_to_its_end(
    config: TrainerConfig, tmp_path: Path, monkeypatch
) -> None:
    config.pipeline.model.enhance.prior, config.pipeline.model.stop_split_at = "none", 6
    whole = copy.deepcopy(config)
    config.max_num_iterations = START
    first = train(config)
    for settings in (config, whole):
        settings.max_num_iterations, settings.few_views_iterations, settings.schedule_iterations = (
            None,
            STEPS,
            2 * STEPS,
        )
    config.load_dir, config.timestamp = first / "nerfstudio_models", "resumed"
    resumed = copy.deepcopy(config)
    assert checkpoints(train(resumed)) == [f"step-{STEPS - 1:09d}.ckpt"]
    assert resumed.pipeline.model.stop_split_at == 3
    whole.timestamp = "whole"
    assert checkpoints(train(whole)) == [f"step-{STEPS - 1:09d}.ckpt"]
    finished = whole.get_base_dir() / "nerfstudio_models" / f"step-{STEPS - 1:09d}.ckpt"
    rule = rf"at its end, {STEPS} steps.*--max-num-iterations"
    with monkeypatch.context() as patch:
        patch.setattr("nerfstudio_enhancer.initial_splats.seed_points", None)
        for load_dir, load_checkpoint in ((finished.parent, None), (None, finished)):
            config.load_dir, config.load_checkpoint = load_dir, load_checkpoint
            with pytest.raises(ValueError, match=rule):
                train(config)
    config.load_checkpoint = finished.rename(tmp_path / "of another name.ckpt")
    with pytest.raises(ValueError, match=rule):
        train(config)


def test_several_rounds_run_and_the_last_is_kept(config: TrainerConfig) -> None:
    config.pipeline.model.enhance.rounds = 2
    run = train(config)
    assert {path.name for path in (run / "enhanced_views").iterdir()} == {round_folder_name(4), round_folder_name(6)}


@pytest.mark.parametrize(
    ("sampling_rounds", "asked", "sampled"),
    [(0, 0, [False] * 3), (2, 0, [False, True, True]), (None, 0, [True] * 3), (1, 5, [False, True, False, True])],
)
def test_the_last_rounds_alone_sample_and_those_that_are_asked_for(
    config: TrainerConfig, tmp_path: Path, monkeypatch, sampling_rounds: int | None, asked: int, sampled: list[bool]
) -> None:
    prior = tiny_prior()
    prior.set_coarse(CoarseRepair(side=8, folds=2, widths=(4, 8), gate_widths=(4, 8)))
    save_prior(prior, tmp_path / "coarse")
    seen = []

    def remember(model, references, enhance, lazy_prior, *args):
        seen.append(lazy_prior.sampling.diffusion)
        if len(seen) == 1 and asked:
            model.enhancer_controls.run_round.cb_hook(model.enhancer_controls.run_round)
        return enhance_step(model, references, enhance, lazy_prior, *args)

    monkeypatch.setattr("nerfstudio_enhancer.rounds.enhance_step", remember)
    enhance = config.pipeline.model.enhance
    enhance.prior, enhance.rounds, enhance.every = str(tmp_path / "coarse"), 3, 2 if asked else 1
    enhance.diffusion_rounds, config.max_num_iterations = sampling_rounds, START + 5
    train(config)
    assert seen == sampled


def test_a_disk_that_fills_up_during_training_leaves_the_older_checkpoint(config: TrainerConfig, monkeypatch) -> None:
    config.pipeline.model.enhance.prior, config.steps_per_save = "none", 3
    saved = []
    write = torch.save

    def full_after_the_first(state, path, *args, **kwargs):
        if saved:
            Path(path).write_bytes(b"half a checkpoint")
            raise OSError(28, "No space left on device")
        saved.append(path)
        write(state, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full_after_the_first)
    with pytest.raises(OSError, match="older checkpoint is untouched"):
        train(config)
    assert checkpoints(config.get_base_dir()) == ["step-000000003.ckpt"]


def test_an_unknown_prior_is_named_before_anything_is_trained(config: TrainerConfig, tmp_path: Path) -> None:
    config.pipeline.model.enhance.prior = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"unknown prior .*nowhere"):
        train(config)
    assert checkpoints(config.get_base_dir()) == []


def test_a_prior_that_the_hub_does_not_give_is_named_before_anything_is_trained(
    config: TrainerConfig, monkeypatch
) -> None:
    def no_network(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    config.pipeline.model.enhance.prior = all_methods["3dgs-enhancer-svd"].pipeline.model.enhance.prior
    with pytest.raises(
        FileNotFoundError, match=r"'stabilityai/stable-video-diffusion-img2vid-xt' .*no route to host.*give its folder"
    ):
        train(config)
    assert checkpoints(config.get_base_dir()) == []


def test_one_reference_view_cannot_be_enhanced(config: TrainerConfig) -> None:
    config.pipeline.datamanager.dataparser.num_views = 1
    with pytest.raises(ValueError, match="at least 2 reference views"):
        train(config)


def test_photographs_are_reduced_in_memory_to_the_size_asked_for(config: TrainerConfig, tmp_path: Path) -> None:
    config.pipeline.datamanager.max_image_size = 40
    config.pipeline.model.enhance.prior = "none"
    config.max_num_iterations = 1
    before = {path: path.stat().st_mtime_ns for path in config.data.rglob("*")}
    run = train(config)
    DatasetRender(load_config=run / "config.yml", output_path=tmp_path / "out", rendered_output_names=["rgb"]).main()
    from PIL import Image

    assert {Image.open(path).size for path in (tmp_path / "out").rglob("*.jpg")} == {(40, 30)}
    assert {path: path.stat().st_mtime_ns for path in config.data.rglob("*")} == before


@pytest.mark.parametrize("name", ["mixed_precision", "use_grad_scaler"])
def test_scaled_gradients_are_refused(config: TrainerConfig, name: str) -> None:
    setattr(config, name, True)
    with pytest.raises(ValueError, match=rf"`--{name.replace('_', '-')}` must be False, got True"):
        train(config)
