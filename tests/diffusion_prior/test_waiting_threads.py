import os
import subprocess
import sys

import pytest

SHORT_OPERATIONS = """
import time
import torch
from diffusion_prior.waiting_threads import let_waiting_threads_sleep
torch.set_num_threads(2)
if {sleep}:
    let_waiting_threads_sleep()
    let_waiting_threads_sleep()
numbers = torch.zeros(1 << 17)
numbers.add_(1)
begin = time.process_time()
for _ in range(50):
    numbers.add_(1)
    time.sleep(0.01)
print(time.process_time() - begin, torch.get_num_threads())
"""


def core_seconds(sleep: bool, **environment: str) -> float:
    """Of all threads, for the same work: what is more in one run than in another went into waiting."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    code = SHORT_OPERATIONS.format(sleep=sleep)
    run = subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, check=True
    )
    seconds, threads = run.stdout.split()
    assert int(threads) == 2
    return float(seconds)


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has another OpenMP elsewhere")
def test_waiting_takes_no_core_unless_the_user_says_so() -> None:
    asleep, awake = core_seconds(True), core_seconds(False)
    assert asleep < awake / 3
    assert core_seconds(True, GOMP_SPINCOUNT="300000") > asleep * 3
