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
numbers = torch.zeros(1 << 17)
others = 0.0
def cores_of_others(period_s):
    time.sleep(0.02)
    return others
waiting_threads.available_cores = lambda: 2
waiting_threads._cores_of_others = cores_of_others
waiting_threads.let_waiting_threads_sleep()
waiting_threads.let_waiting_threads_sleep()
for others in (0.1, 1.0, 0.0):
    time.sleep(0.3)
    numbers.add_(1)
    begin = time.process_time()
    for _ in range(30):
        numbers.add_(1)
        time.sleep(0.01)
    print(time.process_time() - begin)
assert torch.get_num_threads() == 2
"""


def core_seconds(**environment: str) -> list[float]:
    """Of all threads for the same work while others use 0.1, 1 and no core: what is more in one went into waiting."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", SHORT_OPERATIONS]
    run = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    return [float(line) for line in run.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has another OpenMP elsewhere")
def test_waiting_takes_no_core_that_others_want_unless_the_user_says_so() -> None:
    before, asleep, after = core_seconds()
    assert asleep < before / 3
    assert asleep < after / 3
    assert min(core_seconds(GOMP_SPINCOUNT="300000")) > asleep * 3


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
