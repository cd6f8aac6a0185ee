"""The rasteriser's threads beside torch's: as many as torch has, asleep between calls, renewed after a fork."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import json, os, time, torch
from nerfstudio_enhancer.rasterize import rasterization

def threads():
    return set(os.listdir("/proc/self/task"))

def ticks(thread):  # user and system time of a thread, after its name in brackets
    fields = open(f"/proc/self/task/{thread}/stat").read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])

def torch_step():
    x = torch.ones(400, 400, requires_grad=True)
    (x @ x).exp().sum().backward()

def step():
    image, _, _ = rasterization(means, *scene)
    image.sum().backward()
    return image.detach().numpy().tobytes()

generator = torch.Generator().manual_seed(0)
n = 20_000
means = torch.randn(n, 3, generator=generator) + torch.tensor([0.0, 0.0, 5.0])
means.requires_grad_()
scene = [torch.randn(n, 4, generator=generator), torch.full((n, 3), 0.02), torch.full((n,), 0.5), torch.rand(n, 3)]
scene += [torch.eye(4)[None], torch.tensor([[[200.0, 0.0, 80.0], [0.0, 200.0, 60.0], [0.0, 0.0, 1.0]]]), 160, 120]
out = {}
for count in (1, 3):
    torch.set_num_threads(count)
    torch_step()
    before = threads()
    for _ in range(3):
        expected = step()
    out[f"new with {count}"] = len(threads() - before)
workers = threads() - before
torch.set_num_threads(1)
before = {worker: ticks(worker) for worker in workers}
end = time.monotonic() + 0.5
while time.monotonic() < end:
    step()
out["ticks of idle workers"] = [ticks(worker) - before[worker] for worker in workers]
torch.set_num_threads(3)
child = os.fork()
if child == 0:  # the image only: torch's autograd does not survive a fork
    os._exit(0 if rasterization(means.detach(), *scene)[0].numpy().tobytes() == expected else 1)
out["child"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(out))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the threads of a process are listed on Linux only")
def test_the_threads_are_those_that_torch_may_use():
    # A process of its own: the workers of earlier tests would be counted, and a hanging child would hang pytest.
    result = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, timeout=120)
    out = json.loads(result.stdout)
    assert out["new with 1"] == 0
    assert out["new with 3"] == 2
    assert max(out["ticks of idle workers"]) <= 1  # of some 50 that a spinning thread would take
    assert out["child"] == 0
