"""Modes: how many of the classes that data have a generator makes, and how evenly.

    covered = number of classes that are predicted for one sample or more
    KL(p || u) = sum over classes of p log(p K) = log K - H(p),   p: shares of predicted classes, u: 1/K each, in nats

Stacked MNIST: images of three random digits, one a colour channel, have 10^3 modes (Metz, Poole, Pfau, Sohl-Dickstein,
"Unrolled Generative Adversarial Networks", 2016, arXiv 1611.02163, §3.3.1). A classifier of single digits tells each
channel's; digits a, b, c of red, green, blue are mode 100a + 10b + c.

N matters. N images drawn evenly over K classes miss K (1 - 1/K)^N of them and have a KL of about (K - 1) / 2N nats that
is not there: .019 at the 26,000 samples of K = 1,000 that VEEGAN's and PacGAN's protocol has, where nothing is missing;
Unrolled GAN's has 25,600. A value near that is as good as it gets. The data themselves need not be uniform: digits of
MNIST are not equally frequent, so measure the test images by the same classifier and show that beside it.

Pitfalls: the classifier's errors cover modes that are not there (a wrong digit in one of many images of a mode makes
another one covered); so name it, with its error.

Shape legend: N samples, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STACKED_MODES = 1000


@dataclass(frozen=True)
class Modes:
    """What the predicted classes of samples say."""

    covered: int
    """Classes that came once or more."""
    of: int
    """K, all there are."""
    kl: float
    """KL(p || u) in nats: 0 where all classes come equally often, log K where all samples are of one."""


def modes(predicted: Tensor, classes: int) -> Modes:
    """Predicted classes int (N,), N >= 1, in 0 … classes - 1."""
    return modes_of(class_counts(predicted, classes))


def modes_of(counts: Tensor) -> Modes:
    """The same from counts (K,), of which those of several workers can be added up."""
    if counts.ndim != 1 or int(counts.sum()) < 1 or int(counts.min()) < 0:
        raise ValueError(f"counts (K,) of one image or more are needed, not {tuple(counts.shape)} of none or below 0")
    shares = counts.double() / counts.sum()
    evenness = counts.double() * len(counts) / counts.sum()  # exactly 1 where all are equal
    kl = max(float(torch.special.xlogy(shares, evenness).sum()), 0.0)
    return Modes(covered=int((counts > 0).sum()), of=len(counts), kl=kl)


def class_counts(predicted: Tensor, classes: int) -> Tensor:
    """int (N,) -> how many of each class, int64 (K,)."""
    if predicted.ndim != 1 or predicted.is_floating_point():
        raise ValueError(f"predicted classes are whole numbers (N,), not {predicted.dtype} {tuple(predicted.shape)}")
    if len(predicted) and not (int(predicted.min()) >= 0 and int(predicted.max()) < classes):
        raise ValueError(f"a predicted class is not in 0 … {classes - 1}")
    return torch.bincount(predicted.long(), minlength=classes)


def protocol(classes: int) -> str:
    """All that a value depends on besides the predictions."""
    return f"modes-1 classes={classes}"


def stacked_modes(digits: Tensor) -> Tensor:
    """int (N, 3), digits of red, green, blue -> 100a + 10b + c, int64 (N,)."""
    if digits.ndim != 2 or digits.shape[1] != 3 or digits.is_floating_point():
        raise ValueError(f"digits are whole numbers (N, 3), not {digits.dtype} {tuple(digits.shape)}")
    if len(digits) and not (int(digits.min()) >= 0 and int(digits.max()) <= 9):
        raise ValueError("a digit is not in 0 … 9")
    return digits.long() @ torch.tensor([100, 10, 1], device=digits.device)


def kl_of_even_samples(n: int, classes: int) -> float:
    """The KL in nats, to first order, that n samples drawn evenly over K classes have: (K - 1) / 2N. For n >> K."""
    return (classes - 1) / (2 * n)
