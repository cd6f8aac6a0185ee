import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from diffusion_prior.data.clips import ClipConfig, ClipDataset, find_gaps, to_float
from diffusion_prior.training import loop
from diffusion_prior.training.config import TrainingConfig
from diffusion_prior.training.loop import (
    Losses,
    Progress,
    Task,
    Validation,
    averaged_weights,
    load_checkpoint,
    make_accelerator,
    train,
)

CLIPS = ClipConfig(num_frames=3, batch_size=2, crop_px=16, size_multiple=8, good_render_probability=0.0)


class ColourGain(Losses):
    """Learns the factor from render to photograph, with noise and, as by a layer of a network, gaps in what it is shown."""

    def __init__(self, wall_at: int | None = None) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3, 1, 1))
        self.wall_at = wall_at
        self.seen = 0

    def forward(self, batch, generator, progress, player):
        if self.seen == self.wall_at:
            raise KeyboardInterrupt
        self.seen += 1
        shown = to_float(batch.rgb) + 0.01 * torch.randn(batch.rgb.shape, generator=generator)
        shown = nn.functional.dropout(shown, 0.01)
        return {"loss": (self.gain * shown - to_float(batch.target))[:, 1:-1].square().mean()}


class ColourTask(Task):
    name = "colour"

    def __init__(self, pairs, wall_at: int | None = None) -> None:
        self.losses = ColourGain(wall_at)
        self.pairs = pairs
        self.validated_gains: list[float] = []

    def dataset(self, rank, world_size):
        return ClipDataset(find_gaps(self.pairs), CLIPS, 0, rank, world_size)

    def validate(self):
        self.validated_gains.append(float(self.losses.gain.mean()))
        return Validation({"gain": self.validated_gains[-1]}, sheet=torch.rand(3, 4, 4))

    def finish(self):
        raise AssertionError("the loop leaves this to its caller")


def settings(pairs, output, **changes) -> TrainingConfig:
    values = {
        "steps": 12,
        "precision": "fp32",
        "log_every": 1,
        "save_every": 4,
        "validate_every": 6,
        "learning_rate": 0.1,
    }
    return TrainingConfig(pairs=pairs, output=output, **{**values, **changes})


def run(task: ColourTask, config: TrainingConfig) -> list[dict]:
    train(task, config, make_accelerator(config))
    return log(config)


def log(config: TrainingConfig) -> list[dict]:
    return [json.loads(line) for line in (config.output / "log.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_the_gain_is_found(pairs, tmp_path):
    task = ColourTask(pairs)
    lines = [line for line in run(task, settings(pairs, tmp_path, steps=150, warmup_steps=5)) if "loss" in line]
    assert lines[-1]["loss"] < 0.3 * lines[0]["loss"]
    # all renders are 0.7 of the photographs
    assert float(task.losses.gain.detach().mean()) == pytest.approx(1 / 0.7, abs=0.05)


def test_a_killed_training_goes_on_with_the_losses_it_would_have_had(pairs, tmp_path):
    whole = [line for line in run(ColourTask(pairs), settings(pairs, tmp_path / "whole")) if "loss" in line]
    config = settings(pairs, tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        run(ColourTask(pairs, wall_at=6), config)  # after the checkpoint at 4 steps, in step 7
    killed = {line["step"]: line for line in log(config) if "loss" in line}
    assert sorted(killed) == [1, 2, 3, 4, 5, 6]
    resumed = [line for line in run(ColourTask(pairs), config) if "loss" in line][6:]
    assert [line["step"] for line in resumed] == [5, 6, 7, 8, 9, 10, 11, 12]
    for line in whole:
        for attempt in (killed.get(line["step"]), *[one for one in resumed if one["step"] == line["step"]]):
            if attempt is not None:
                assert attempt["loss"] == line["loss"]
                assert attempt["learning_rate"] == line["learning_rate"]


def test_tensorboard_shows_every_step_once_although_the_training_was_killed(pairs, tmp_path):
    config = settings(pairs, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(ColourTask(pairs, wall_at=6), config)
    lines = run(ColourTask(pairs), config)
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    board = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0, "images": 0}).Reload()
    shown = board.Scalars("training/loss")
    assert [event.step for event in shown] == list(range(1, 13))
    assert [event.value for event in shown] == pytest.approx(list(losses.values()), rel=1e-5)
    gains = {line["step"]: line["gain"] for line in lines if "gain" in line}
    assert {event.step: event.value for event in board.Scalars("validation/gain")} == pytest.approx(gains, rel=1e-5)
    (sheets,) = [board.Images(tag) for tag in board.Tags()["images"]]
    assert [(event.step, event.width, event.height) for event in sheets][:2] == [(6, 4, 4), (12, 4, 4)]


def test_a_figure_is_averaged_over_the_batches_that_tell_it():
    told = [{"loss": 1.0, "gate": 4.0}, {"loss": 2.0}, {"loss": 6.0, "gate": 2.0}]
    assert loop._mean_of_told(told) == {"loss": 3.0, "gate": 3.0}


def test_resumed_weights_and_averages_equal_those_of_an_unbroken_run(pairs, tmp_path):
    unbroken, broken = ColourTask(pairs), ColourTask(pairs)
    run(unbroken, settings(pairs, tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run(ColourTask(pairs, wall_at=9), settings(pairs, tmp_path / "broken"))
    run(broken, settings(pairs, tmp_path / "broken"))
    assert torch.equal(unbroken.losses.gain, broken.losses.gain)


def test_a_finished_training_that_is_started_again_only_validates(pairs, tmp_path):
    config = settings(pairs, tmp_path)
    run(ColourTask(pairs), config)
    again = ColourTask(pairs, wall_at=0)
    run(again, config)
    assert len(again.validated_gains) == 1


def test_validation_sees_the_averaged_weights_and_training_goes_on_with_its_own(pairs, tmp_path):
    network = nn.Linear(1, 1)
    own = network.weight.detach().clone()
    with averaged_weights(network, {"weight": own + 5, "bias": network.bias.detach() + 5}):
        assert torch.equal(network.weight, own + 5)
    assert torch.equal(network.weight, own)


def test_no_minutes_left_stops_before_the_first_step(pairs, tmp_path):
    task = ColourTask(pairs, wall_at=0)
    run(task, settings(pairs, tmp_path, max_minutes=0.0))
    assert task.validated_gains == [1.0]


def test_progress_counts_steps_or_minutes_whichever_is_further(tmp_path):
    config = settings(tmp_path, tmp_path, steps=100, max_minutes=2.0)
    assert Progress(step=50, seconds=12.0).share(config) == pytest.approx(0.5)
    assert Progress(step=50, seconds=90.0).share(config) == pytest.approx(0.75)
    assert Progress(step=50, seconds=500.0).share(config) == 1.0


def test_contact_sheets_are_written_at_every_validation(pairs, tmp_path):
    run(ColourTask(pairs), settings(pairs, tmp_path))
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == ["step-0000006.png", "step-0000012.png"]


def test_a_checkpoint_of_other_networks_is_refused(pairs, tmp_path):
    config = settings(pairs, tmp_path)
    run(ColourTask(pairs), config)
    other = ColourGain()
    other.offset = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="holds other networks"):
        load_checkpoint(tmp_path / "checkpoint.pt", loop._start(other, config))


def test_a_checkpoint_of_another_version_is_refused(pairs, tmp_path):
    torch.save({"version": 0}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="version 1, got 0"):
        run(ColourTask(pairs), settings(pairs, tmp_path))


def test_a_save_that_fails_keeps_the_older_checkpoint(pairs, tmp_path, monkeypatch):
    config = settings(pairs, tmp_path)
    run(ColourTask(pairs), config)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def disk_full(content, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        loop.save_checkpoint(tmp_path / "checkpoint.pt", loop._checkpoint(loop._start(ColourGain(), config)))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*partial*"))


def test_gradients_that_are_not_finite_are_skipped_and_end_the_training_if_they_last(pairs, tmp_path):
    class Broken(ColourGain):
        def forward(self, batch, generator, progress, player):
            return {"loss": (self.gain * float("nan")).sum()}

    task = ColourTask(pairs)
    task.losses = Broken()
    with pytest.raises(FloatingPointError, match="20 steps in a row"):
        run(task, settings(pairs, tmp_path, steps=30))
    assert torch.equal(task.losses.gain.detach(), torch.ones(3, 1, 1))


def test_a_second_player_s_finite_gradients_do_not_hide_that_the_first_one_s_never_are(pairs, tmp_path):
    class Broken(ColourGain):
        def __init__(self):
            super().__init__()
            self.networks = nn.ModuleDict({"first": nn.Linear(1, 1, bias=False), "second": nn.Linear(1, 1)})

        @property
        def players(self):
            return dict(self.networks.items())

        def forward(self, batch, generator, progress, player):
            return {"loss": self.networks[player].weight.sum() * (float("inf") if player == "first" else 1.0)}

    task = ColourTask(pairs)
    task.losses = Broken()
    with pytest.raises(FloatingPointError, match=r"20 steps in a row \(step 19\)"):
        run(task, settings(pairs, tmp_path, steps=30, validate_every=100))


@pytest.mark.parametrize("name", ["steps", "log_every", "validate_every", "save_every", "validation_clips"])
def test_settings_that_count_start_at_one(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        TrainingConfig(pairs=tmp_path, output=tmp_path, **{name: 0})


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must not be negative"):
        TrainingConfig(pairs=tmp_path, output=tmp_path, max_minutes=-1.0)
