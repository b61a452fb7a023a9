"""Minibatch discrimination on two workers: each compares the images of its own share, as one of one worker would."""

from __future__ import annotations

import torch
from torch import Tensor

from models.gan.minibatch import closeness
from tests.models.test_gan_parts import by_double_loop, rng
from tests.pipelines.training.pair import Pair


def _of_own_share(rank: int, m: Tensor) -> Tensor:
    return closeness(m.chunk(2)[rank])


def test_each_of_two_workers_sees_its_own_share_of_the_batch(pair: Pair) -> None:
    m = 0.5 * torch.randn(8, 2, 3, generator=rng(1))
    together = torch.cat(pair.run(_of_own_share, m))
    torch.testing.assert_close(together, torch.cat([by_double_loop(m[:4]), by_double_loop(m[4:])]))
    assert (by_double_loop(m) > together).all()
