"""Errors of classifiers, and of several together."""

from __future__ import annotations

import math

import torch

from models.metrics.classification import errors, mean_probabilities


def test_an_error_is_a_label_that_is_not_the_largest_score() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [-1.0, -2.0, -3.0]])
    assert errors(scores, torch.tensor([0, 1, 0])).tolist() == [0, 1, 0]


def test_an_ensemble_averages_probabilities_not_logits_nor_votes() -> None:
    """Two models lean a little to class 1, one is sure of class 0: votes say 1, the mean says 0."""
    lean, sure = [math.log(0.4), math.log(0.6)], [math.log(0.95), math.log(0.05)]
    mean = mean_probabilities(torch.tensor([[lean], [lean], [sure]]))
    torch.testing.assert_close(mean, torch.tensor([[1.75 / 3, 1.25 / 3]]))
    assert errors(mean, torch.tensor([0])).item() == 0
    shifted = torch.tensor([[lean], [lean], [sure]]) + torch.tensor([5.0, -3.0, 100.0]).view(3, 1, 1)
    torch.testing.assert_close(mean_probabilities(shifted), mean)


def test_an_ensemble_of_one_is_its_softmax() -> None:
    logits = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean_probabilities(logits), torch.softmax(logits[0], 1))
