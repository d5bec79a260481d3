"""Freed memory is used again instead of being mapped and zeroed anew: counted in page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from dist_moe.engine.launch.environment import disable_malloc_trim

if sys.argv[1] == "keep":
    assert disable_malloc_trim()
def step():
    tensors = [torch.ones(16 * 2**20) for _ in range(4)]  # 64 MiB each: above what glibc keeps by itself
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own tuning")
def test_a_step_faults_its_memory_in_only_once() -> None:
    kept = min(page_faults("keep") for _ in range(3))  # the kernel may take pages away meanwhile
    assert kept * 4 < page_faults("as it is")
