"""Jobs on a Ray of this machine's own."""

import operator
import os
from pathlib import Path

import pytest

from diffusion_prior.data.pairs import find_runs, read_header, verify_run
from nerfstudio_enhancer.jobs import Job
from nerfstudio_enhancer.pairs.make_pairs import MakePairs, make_pairs
from nerfstudio_enhancer.ray_jobs import run_jobs_on_ray

pytest.importorskip("ray")
pytestmark = pytest.mark.slow


def results(jobs, **options):
    return {result.key: result for result in run_jobs_on_ray(jobs, "local", **options)}


def test_values_errors_and_crashes_come_back_and_what_is_printed_is_in_the_log(tmp_path):
    log = tmp_path / "logs" / "told.txt"
    done = results(
        [
            Job("good", operator.mul, (2, 4)),
            Job("bad", int, ("splats",)),
            Job("killed", os.abort),
            Job("told", os.system, ("echo to the log",), log=log),
            Job("after them", operator.mul, (3, 5)),
            Job("too late", operator.mul, (1, 1)),
        ],
        may_start=lambda job: job.key != "too late",
    )
    assert {key: done[key].value for key in ("good", "told", "after them")} == {"good": 8, "told": 0, "after them": 15}
    assert done["bad"].error == "ValueError: invalid literal for int() with base 10: 'splats'"
    assert "died" in (done["killed"].error or "") or "Crash" in (done["killed"].error or "")
    assert "too late" not in done
    assert log.read_text() == "to the log\n"


class TwoCores:
    """What of Ray is asked before the first job starts, of a cluster without a GPU; a real one takes ten seconds to start."""

    def __init__(self) -> None:
        self.left = False

    def remote(self, **_):
        return lambda function: function

    def cluster_resources(self):
        return {"CPU": 2.0, "memory": 1e9}

    def shutdown(self):
        self.left = True


@pytest.mark.parametrize(("threads", "gpus"), [(1, 1.0), (3, 0.0)])
def test_what_no_machine_has_is_refused_and_the_cluster_left(threads, gpus, monkeypatch):
    cluster = TwoCores()
    monkeypatch.setattr("nerfstudio_enhancer.ray_jobs._connect", lambda address: cluster)
    with pytest.raises(RuntimeError, match=rf"has 2 cores and 0 GPUs; a job takes {threads} and {gpus:g}\."):
        results([Job("large", operator.mul, (2, 4))], threads=threads, gpus=gpus)
    assert cluster.left


def test_jobs_that_wait_for_each_other_are_refused():
    with pytest.raises(ValueError, match="must not wait"):
        results([Job("first", operator.mul, (2, 4)), Job("second", operator.mul, (2, 4), after="first")])


def test_pairs_are_made_on_ray(nerfstudio_folder, tmp_path, monkeypatch):
    scene = nerfstudio_folder(num_images=12, width=64, height=48)
    monkeypatch.chdir(tmp_path)  # relative paths hold for processes elsewhere too
    make_pairs(
        MakePairs(Path("pairs"), (scene,), views=(3,), steps=(4,), size=48, random_points_share=1.0, ray="local")
    )
    (folder,) = find_runs(tmp_path / "pairs")
    verify_run(folder)
    assert read_header(folder).num_frames == 9  # 12 photographs, 3 references
