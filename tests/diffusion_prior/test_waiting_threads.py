import os
import subprocess
import sys

import pytest

from diffusion_prior.waiting_threads import busy_seconds

SHORT_OPERATIONS = """
import time
import torch
from diffusion_prior import waiting_threads
torch.set_num_threads(2)
waiting_threads.available_cores = lambda: 2
others = [{others}]
def cores_of_others(period_s):
    time.sleep(0.05)
    return others[0]
waiting_threads._cores_of_others = cores_of_others
waiting_threads.let_waiting_threads_sleep()
waiting_threads.let_waiting_threads_sleep()
time.sleep(1)
others[0] = {others_later}
time.sleep(1)
numbers = torch.zeros(1 << 17)
numbers.add_(1)
begin = time.process_time()
for _ in range(50):
    numbers.add_(1)
    time.sleep(0.01)
print(time.process_time() - begin, torch.get_num_threads())
"""


def core_seconds(others: float, others_later: float | None = None, **environment: str) -> float:
    """Of all threads, for the same work: what is more in one run than in another went into waiting."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    code = SHORT_OPERATIONS.format(others=others, others_later=others if others_later is None else others_later)
    run = subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, check=True
    )
    seconds, threads = run.stdout.split()
    assert int(threads) == 2
    return float(seconds)


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has another OpenMP elsewhere")
def test_waiting_takes_no_core_that_others_want_unless_the_user_says_so() -> None:
    asleep, awake = core_seconds(others=1.0), core_seconds(others=0.1)
    assert asleep < awake / 3
    assert core_seconds(others=1.0, others_later=0.0) > asleep * 3
    assert core_seconds(others=1.0, GOMP_SPINCOUNT="300000") > asleep * 3


def test_busy_seconds_are_those_of_the_cores_that_are_asked_for() -> None:
    statistics = (
        "cpu  1 2 3 4 5 6 7 8 9 10\n"
        "cpu0 100 20 30 4000 500 6 7 8 90 0\n"
        "cpu1 50 0 0 9999 0 0 0 0 0 0\n"
        "cpu10 7 0 0 0 0 0 0 0 0 0\n"
        "intr 5 5\n"
    )
    assert busy_seconds(statistics, {0}, 100) == pytest.approx(1.71)  # guests are among the users' already
    assert busy_seconds(statistics, {0, 1}, 100) == pytest.approx(2.21)
