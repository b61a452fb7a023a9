"""Freed memory is kept: a step finds room for its activations where the one before left it."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

FAULTS_OF_STEPS = """
import resource, torch
from pipelines.training.allocator import keep_freed_memory

def step():
    [torch.ones(2**20) for _ in range(8)]  # 8 activations of 4 MiB, freed together

keep_freed_memory()
for _ in range(10):  # until the heap has the size that a step needs
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc has this setting")
def test_a_step_costs_no_page_faults() -> None:
    """Without the setting the ten steps cost 60,000 to 80,000, or none when something happens to lie above them."""
    done = subprocess.run([sys.executable, "-c", FAULTS_OF_STEPS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100
