"""Classifiers whose features samples are measured by."""

from __future__ import annotations

from models.classifier import residual
from pipelines.config import ClusterSpec, DataSpec, Expected, RunSpec, TrainingSpec
from pipelines.recipes.recipe import Downloaded, Recipe

CIFAR10_IMAGES, MNIST_IMAGES = 2_000_000, 600_000


def features_cifar10() -> RunSpec:
    """A residual network of ten layers that classifies CIFAR-10, for features to measure samples by."""
    return RunSpec(
        recipe="features-cifar10",
        model=residual.Config(width=24, decay_end=CIFAR10_IMAGES),
        data=DataSpec(dataset="cifar10"),
        training=TrainingSpec(
            images=CIFAR10_IMAGES,  # 40 epochs
            batch_size=128,
            log_every=20_000,
            evaluate_every=200_000,
            checkpoint_every=200_000,
        ),
        cluster=ClusterSpec(workers=2),
        expected=Expected("error", 0.10, "lower", "what features are worth measuring by"),
    )


def features_mnist() -> RunSpec:
    """A narrower one that classifies MNIST, of which nothing is shown mirrored."""
    return RunSpec(
        recipe="features-mnist",
        model=residual.Config(width=16, mirror=False, padding=2, decay_end=MNIST_IMAGES),
        data=DataSpec(dataset="mnist"),
        training=TrainingSpec(
            images=MNIST_IMAGES,  # 10 epochs
            batch_size=128,
            log_every=20_000,
            evaluate_every=100_000,
            checkpoint_every=200_000,
        ),
        cluster=ClusterSpec(workers=2),
        expected=Expected("error", 0.007, "lower", "what features are worth measuring by"),
    )


RECIPES: dict[str, Recipe] = {
    "features-cifar10": Recipe(features_cifar10, Downloaded("cifar10"), "2 CPU cores"),
    "features-mnist": Recipe(features_mnist, Downloaded("mnist"), "2 CPU cores", "6 min"),
}
