"""Freed memory is kept: a step finds room for its activations where the one before left it."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

KEPT_AFTER_A_STEP = """
import psutil, torch
from pipelines.training.allocator import keep_freed_memory

keep_freed_memory()
memory = psutil.Process().memory_info
before = memory().rss
step = torch.ones(6 * 2**20)  # 24 MiB: by default mapped by itself, and given back when freed
del step
print((memory().rss - before) / 2**20)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc has this setting")
def test_a_step_leaves_its_memory_to_the_next() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT_AFTER_A_STEP], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 23
