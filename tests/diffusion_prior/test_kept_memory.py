import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from diffusion_prior.kept_memory import keep_freed_memory
keep_freed_memory(sys.argv[1])
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensor = torch.ones(64 << 18)  # 64 MiB
    del tensor
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of GNU's C library")
@pytest.mark.parametrize(
    ("device", "setting", "kept"),
    [("cpu", {}, True), ("cuda", {}, False), ("cpu", {"MALLOC_TRIM_THRESHOLD_": "1000000"}, False)],
)
def test_the_next_tensor_has_the_memory_of_the_one_before_it(device: str, setting: dict[str, str], kept: bool) -> None:
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE")
    environment = {name: value for name, value in os.environ.items() if name not in names} | setting
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, device], env=environment, capture_output=True, text=True, check=True
    )
    pages = 64 * 2**20 / 4096
    faults = int(done.stdout)
    assert faults < pages / 100 if kept else faults > pages / 2
