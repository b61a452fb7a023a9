"""What a share of images leaves behind, from which every figure is made: shares of any size add up to the same whole.

Samples are drawn in blocks of `BLOCK`, each from a generator of its own, so block i is the same whoever draws it; real
images come in stored order. So no figure depends on how many workers there were, nor on which of them did what.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from pyarrow import fs as pafs
from torch import Generator, Tensor

from models.contract import Samples
from models.metrics.frechet import Moments, merged, moments
from pipelines.data.manifest import Shard
from pipelines.data.windows import Layout, Read, pixels_of, read_window
from pipelines.evaluation.feature_networks import FeatureNetwork

BLOCK = 512
"""Samples that one generator makes; a network sees as many images at a time."""


@dataclass(frozen=True, eq=False)
class Share:
    """Of consecutive images."""

    first: int
    """Number of the first of them."""
    moments: Moments
    features: Tensor
    """float32 (n, F), of those among the first `kept` of all images."""
    logits: Tensor
    """float32 (N, K), of all of them."""


def share_of(first: int, images: Iterable[Tensor], network: FeatureNetwork, kept: int) -> Share:
    """Of images from number `first` on, uint8 (B, C, H, W) at a time; features of those before number `kept` stay."""
    parts, features, logits, at = [], [], [], first
    for batch in images:
        found, said = network(batch)
        parts.append(moments(found))
        features.append(found[: max(0, kept - at)])
        logits.append(said)
        at += len(batch)
    return Share(first, merged(parts), torch.cat(features), torch.cat(logits))


def together(shares: Iterable[Share]) -> Share:
    """Shares in any order -> that of all images. Merged in order: the same to the bit whichever came first."""
    ordered = sorted(shares, key=lambda share: share.first)
    return Share(
        ordered[0].first,
        merged(share.moments for share in ordered),
        torch.cat([share.features for share in ordered]),
        torch.cat([share.logits for share in ordered]),
    )


def sample_blocks(learner: Samples, seed: int, blocks: Iterable[int], n: int) -> Iterator[Tensor]:
    """The blocks of these numbers of `n` samples altogether, uint8 (B, C, H, W) each; the last one may be cut."""
    for block in blocks:
        size = min(BLOCK, n - block * BLOCK)
        torch.manual_seed(block_seed(seed, block))  # a learner may draw from torch's global state
        yield learner.sample(size, Generator().manual_seed(block_seed(seed, block)))


def block_seed(seed: int, block: int) -> int:
    """Of one block's generator: blocks of any two seeds share no random numbers."""
    return int(np.random.SeedSequence((seed, block)).generate_state(1, np.uint64)[0] >> 1)


def stored_images(fs: pafs.FileSystem, layout: Layout, shards: Iterable[Shard], most: int) -> Iterator[Tensor]:
    """The first `most` images of these shards in stored order, uint8 (B, C, H, W), at most BLOCK at a time."""
    for shard in shards:
        taken = min(shard.rows, most)
        most -= taken
        for table in read_window(fs, layout, Read((shard,), 0, taken)) if taken else ():
            pixels = pixels_of(table["image"], layout.width).reshape(-1, *layout.image_shape)
            yield from torch.from_numpy(pixels.copy()).split(BLOCK)


def noise_blocks(shape: tuple[int, int, int], seed: int, blocks: Iterable[int], n: int) -> Iterator[Tensor]:
    """Uniform noise in place of samples: what the worst generator draws."""
    for block in blocks:
        size = min(BLOCK, n - block * BLOCK)
        generator = Generator().manual_seed(block_seed(seed, block))
        yield torch.randint(0, 256, (size, *shape), generator=generator, dtype=torch.uint8)


def grey_blocks(shape: tuple[int, int, int], blocks: Iterable[int], n: int) -> Iterator[Tensor]:
    """The same grey image again and again: what a collapsed generator draws."""
    for block in blocks:
        yield torch.full((min(BLOCK, n - block * BLOCK), *shape), 128, dtype=torch.uint8)
