"""Errors of classifiers, one alone and several together."""

from __future__ import annotations

import torch
from torch import Tensor


def errors(scores: Tensor, labels: Tensor) -> Tensor:
    """Logits or probabilities (B, K), labels (B,) -> 1 where the largest is not the label's, else 0, (B,)."""
    return (scores.argmax(-1) != labels).float()


def mean_probabilities(logits: Tensor) -> Tensor:
    """Logits of M models (M, B, K) -> the mean of their softmax, (B, K).

    The ensemble of Improved GAN (Salimans et al. 2016, table 1): the predictions of ten models, averaged."""
    return torch.softmax(logits.float(), dim=-1).mean(0)
