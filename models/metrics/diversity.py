"""How much the images of a set differ from one another, as a share of how much real images do.

    index = mean over pairs i < j of |s_i - s_j|  /  mean over pairs i < j of |x_i - x_j|    (Euclidean, over features)

0: all samples are alike (a generator that has collapsed). 1: as diverse as the data. On plain pixels noise counts as
diversity, so a high value says nothing of quality; a low one says that the model has collapsed.

Shape legend: N samples, M real images, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.layers import to_unit


def pixel_features(images: Tensor) -> Tensor:
    """uint8 (N, C, H, W) -> float32 (N, F), F = C*H*W, in [0, 1]."""
    return to_unit(images).flatten(1)


def mean_pairwise_distance(features: Tensor) -> float:
    """(N, F), N >= 2 -> mean Euclidean distance over all pairs of different rows."""
    if len(features) < 2:
        raise ValueError(f"a pairwise distance needs two images or more, not {len(features)}")
    # differences of float32 features: the matrix-product form of cdist would lose small distances to cancellation
    return float(torch.nn.functional.pdist(features).double().mean())


def diversity_index(samples: Tensor, real: Tensor) -> float:
    """Features (N, F) and (M, F) -> 0 for samples all alike, 1 for samples as diverse as `real`."""
    scale = mean_pairwise_distance(real)
    if scale == 0.0:
        raise ValueError("the real images are all alike: diversity has no scale")
    return mean_pairwise_distance(samples) / scale
