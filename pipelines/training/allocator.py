"""Keeps freed memory in the process instead of giving it back to the kernel at every step.

A training step on a CPU frees and asks again for the same large activations. glibc's default returns them to the kernel
in between: some 4,800 page faults a step of 64 images of `dcgan-demo`, about 10 % of its time (docs/results.md). Kept,
they cost nothing but what the next step takes anyway. No result of a computation changes.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = 2**30  # free bytes at the end of the heap
_LARGEST = 32 * 2**20  # of an allocation that comes from the heap; glibc takes no more


def keep_freed_memory() -> None:
    """For this process, from now on. Does nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
