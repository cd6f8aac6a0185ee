"""The profile of a training step: parts are charged once, and every step of a real training is covered."""

from __future__ import annotations

import time

import pytest

from nerfstudio_enhancer.rasterize.profile_step import RASTERISER, ProfileStep, Sections, profile_step, table


def test_a_part_inside_another_is_taken_out_of_it():
    sections = Sections()
    inner = sections.timed("inner", lambda: time.sleep(0.03))

    def outer() -> str:
        time.sleep(0.01)
        inner()
        return "done"

    start = time.perf_counter()
    assert sections.timed("outer", outer)() == "done"
    whole = time.perf_counter() - start
    assert sections.seconds["inner"] >= 0.03
    assert 0.01 <= sections.seconds["outer"] <= whole - sections.seconds["inner"] + 1e-9


def test_a_part_that_raises_is_charged_and_forgotten():
    sections = Sections()

    def fails() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        sections.timed("a", fails)()
    sections.timed("b", time.sleep)(0.01)
    assert sections.seconds["a"] < 0.01 <= sections.seconds["b"]


@pytest.mark.slow
@pytest.mark.parametrize("stock", [False, True])
def test_the_parts_of_a_real_training_step_add_up(stock):
    result = profile_step(ProfileStep(gaussians=300, width=48, steps=3, warm_up=1, viewer=False, stock=stock))
    assert sum(result["parts_ms"].values()) == pytest.approx(result["step_ms"])
    assert result["rasteriser_ms"] + result["everything_else_ms"] == pytest.approx(result["step_ms"])
    for part in (RASTERISER, "D-SSIM", "Adam", "data loading"):
        assert result["parts_ms"][part] > 0
    assert 0 < result["seconds_from_start_of_training_to_end_of_first_step"] < 60
    assert any(line.startswith("| D-SSIM |") for line in table(result))


def test_a_profile_without_steps_is_refused():
    with pytest.raises(ValueError, match="`steps` must be at least 1 and `warm_up` 0, got 0 and 10"):
        profile_step(ProfileStep(steps=0))
