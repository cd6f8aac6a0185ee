import operator
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nerfstudio_enhancer import jobs
from nerfstudio_enhancer.jobs import Job, run_jobs, workers_and_threads


def results(jobs, **options):
    return {result.key: result for result in run_jobs(jobs, workers=2, **options)}


def test_each_job_returns_its_value_and_its_memory():
    done = results([Job(str(number), operator.mul, (2, number)) for number in range(4)])
    assert {key: result.value for key, result in done.items()} == {"0": 0, "1": 2, "2": 4, "3": 6}
    assert all(result.error is None and result.peak_rss_mb > 1 for result in done.values())


def test_with_a_gpu_jobs_run_one_at_a_time_in_processes_that_are_not_forked(monkeypatch):
    assert jobs._context((), 1).get_start_method() == "forkserver"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert workers_and_threads(None)[0] == 1
    assert jobs._context((), 1).get_start_method() == "spawn"
    assert results([Job("product", operator.mul, (2, 4))])["product"].value == 8


def test_a_failed_or_killed_job_leaves_the_others_alone():
    done = results([Job("bad", int, ("splats",)), Job("killed", os.abort), Job("good", operator.mul, (2, 4))])
    assert done["bad"].error == "ValueError: invalid literal for int() with base 10: 'splats'"
    assert "signal 6" in (done["killed"].error or "")
    assert done["good"].value == 8


KILLED_COMMAND = """
import os, sys
from pathlib import Path
from nerfstudio_enhancer.jobs import Job, run_jobs
from test_jobs import say_who_and_sleep

if __name__ == "__main__":
    list(run_jobs([Job("sleeps", say_who_and_sleep, (Path(sys.argv[1]),))], workers=1))
"""


def say_who_and_sleep(path: Path) -> None:
    path.with_suffix(".partial").write_text(str(os.getpid()))
    path.with_suffix(".partial").rename(path)
    time.sleep(600)


def test_jobs_end_with_a_command_that_is_killed(tmp_path):
    script, told = tmp_path / "command.py", tmp_path / "pid"
    script.write_text(KILLED_COMMAND)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = subprocess.Popen([sys.executable, str(script), str(told)], env=environment)
    wait_until(told.exists)
    assert is_running(int(told.read_text()))
    command.kill()
    command.wait()
    wait_until(lambda: not is_running(int(told.read_text())))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_job_waits_for_its_predecessor_and_fails_with_it():
    done = results(
        [
            Job("first", time.sleep, (0.2,)),
            Job("second", time.time, after="first"),
            Job("bad", int, ("broken",)),
            Job("after bad", operator.mul, (2, 1), after="bad"),
            Job("after that", operator.mul, (2, 1), after="after bad"),
        ]
    )
    assert done["first"].wall_s >= 0.2
    assert list(done).index("first") < list(done).index("second")
    assert done["after bad"].error == "not started, since 'bad' failed"
    assert done["after that"].error == "not started, since 'after bad' failed"


def test_jobs_that_may_not_start_are_left_out_with_all_that_wait_for_them():
    done = results(
        [
            Job("a", operator.mul, (2, 1)),
            Job("b", operator.mul, (2, 1), after="a"),
            Job("c", operator.mul, (2, 1), after="b"),
        ],
        may_start=lambda job: job.key == "a",
    )
    assert list(done) == ["a"]


def test_what_a_job_prints_goes_to_its_log(tmp_path):
    done = results([Job("word", print, ("hello",), log=tmp_path / "logs/word.txt")])
    assert done["word"].error is None
    assert "hello" in (tmp_path / "logs/word.txt").read_text()


def test_a_job_whose_log_cannot_be_written_fails_with_a_reason_and_the_others_run(tmp_path):
    (tmp_path / "file").write_text("")
    done = results([Job("a", operator.mul, (2, 1), log=tmp_path / "file/log.txt"), Job("b", operator.mul, (2, 1))])
    assert "its log" in done["a"].error
    assert "log.txt cannot be written" in done["a"].error
    assert done["b"].value == 2


def test_bad_job_lists_are_refused():
    with pytest.raises(ValueError, match="distinct keys"):
        results([Job("a", operator.mul, (2, 1)), Job("a", operator.mul, (2, 2))])
    with pytest.raises(ValueError, match="no job before it"):
        results([Job("a", operator.mul, (2, 1), after="b")])


def test_threads_share_the_cores(monkeypatch):
    monkeypatch.setattr("diffusion_prior.waiting_threads.available_cores", lambda: 8)
    assert workers_and_threads(None) == (8, 1)
    assert workers_and_threads(2) == (2, 4)
    assert workers_and_threads(16) == (16, 1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        workers_and_threads(0)
