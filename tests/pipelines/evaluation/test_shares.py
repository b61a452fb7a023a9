"""Shares of images: cut anywhere and merged in any order they are the same whole."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from pyarrow import fs as pafs
from torch import Tensor

import models
from models.contract import Embeds, Samples
from pipelines.data.windows import Layout
from pipelines.evaluation import shares
from pipelines.evaluation.feature_networks import FeatureNetwork, weights_hash
from pipelines.evaluation.shares import (
    block_seed,
    grey_blocks,
    noise_blocks,
    sample_blocks,
    share_of,
    stored_images,
    together,
)
from tests.models.cases import CASES
from tests.pipelines.data.shards import image_of, write_dataset

SHAPE = (3, 12, 12)


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    torch.manual_seed(0)
    learner = models.build(CASES["residual-classifier"].config, CASES["residual-classifier"].shape)
    assert isinstance(learner, Embeds)
    return FeatureNetwork("toy:0", learner, SHAPE)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "BLOCK", 8)


def images(n: int) -> Tensor:
    return torch.randint(0, 256, (n, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_a_whole_is_the_same_however_it_is_cut(network: FeatureNetwork) -> None:
    x = images(50)
    whole = share_of(0, [x], network, kept=31)
    cuts = [0, 1, 18, 30, 33, 50]
    parts = [share_of(a, x[a:b].split(7), network, kept=31) for a, b in pairwise(cuts)]
    merged = together([parts[i] for i in (3, 0, 4, 2, 1)])
    assert merged.moments.count == 50
    assert merged.features.shape == whole.features.shape == (31, len(whole.moments.mean))
    torch.testing.assert_close(merged.moments.mean, whole.moments.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged.moments.scatter, whole.moments.scatter, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.features, whole.features, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.logits, whole.logits, rtol=1e-5, atol=1e-6)
    again = together(reversed(parts))
    assert torch.equal(again.moments.scatter, merged.moments.scatter) and torch.equal(again.logits, merged.logits)


def test_a_block_of_samples_is_the_same_whoever_draws_it(network: FeatureNetwork) -> None:
    torch.manual_seed(1)
    learner = models.build(CASES["dcgan"].config, CASES["dcgan"].shape)
    assert isinstance(learner, Samples)

    def drawn(blocks: list[int], n: int = 30, seed: int = 5) -> list[Tensor]:
        return list(sample_blocks(learner, seed, blocks, n))

    class OfTorchsGlobalState:
        def sample(self, n: int, generator: torch.Generator) -> Tensor:
            return torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8)

    blocks = [list(sample_blocks(OfTorchsGlobalState(), 5, order, 30)) for order in ([0, 1], [1, 0])]
    assert torch.equal(blocks[0][0], blocks[1][1]) and torch.equal(blocks[0][1], blocks[1][0])
    assert not torch.equal(*blocks[0])

    all_of_them = drawn([0, 1, 2, 3])
    assert [len(block) for block in all_of_them] == [8, 8, 8, 6]
    for i in range(4):
        assert torch.equal(drawn([i])[0], all_of_them[i])
    assert not torch.equal(all_of_them[0], all_of_them[1]) and not torch.equal(drawn([0], seed=6)[0], all_of_them[0])
    assert len({block_seed(seed, block) for seed in range(20) for block in range(50)}) == 1_000


def test_what_stands_in_the_place_of_samples() -> None:
    noise = torch.cat(list(noise_blocks(SHAPE, 0, range(100), 795)))
    assert noise.shape == (795, *SHAPE) and abs(float(noise.float().mean()) - 127.5) < 0.5
    grey = torch.cat(list(grey_blocks(SHAPE, range(3), 20)))
    assert grey.shape == (20, *SHAPE) and grey.unique().tolist() == [128]


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_stored_images_come_whole_and_in_order(store: pafs.FileSystem, encoding: str) -> None:
    manifest = write_dataset(store, "a", (11, 3), encoding=encoding)

    def read(most: int) -> Iterator[Tensor]:
        return stored_images(store, Layout.of(manifest), manifest.shards("train"), most)

    assert max(len(batch) for batch in read(99)) <= 8
    for most, found in ((99, 14), (14, 14), (12, 12), (11, 11), (3, 3)):
        np.testing.assert_array_equal(torch.cat(list(read(most))), [image_of(i, (1, 4, 4)) for i in range(found)])


def test_the_name_of_a_network_changes_with_any_weight(network: FeatureNetwork) -> None:
    torch.manual_seed(0)
    learner = models.build(CASES["residual-classifier"].config, CASES["residual-classifier"].shape)
    before = weights_hash(learner.networks())
    assert before == weights_hash(learner.networks()) and len(before) == 8
    with torch.no_grad():
        next(learner.networks()["classifier"].parameters()).flatten()[0].add_(1e-6)
    assert weights_hash(learner.networks()) != before
