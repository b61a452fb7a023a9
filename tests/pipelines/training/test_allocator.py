"""Freed memory is kept: the second step finds its activations where the first one left them."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

FAULTS_OF_STEPS = """
import resource, sys, torch
from pipelines.training.allocator import keep_freed_memory

def step():
    [torch.ones(2**20) for _ in range(8)]  # 8 activations of 4 MiB, freed together

if sys.argv[1] == "kept":
    keep_freed_memory()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc has this setting")
def test_steps_after_the_first_cost_few_page_faults() -> None:
    def faults(kind: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS_OF_STEPS, kind], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("kept") < faults("plain") / 4
