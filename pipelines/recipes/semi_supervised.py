"""Semi-supervised classifiers: Improved GAN (Salimans et al. 2016).

A batch of 200 unlabelled images is the paper's batch of 100 for D and of 100 for G's target, so an epoch of the paper
is twice the images of the split. The paper's average of D, a <- a + .0001 (p - a) with every step, halves an old weight
in log(1/2) / log(.9999) = 6,931 steps.
"""

from __future__ import annotations

from models.gan import semi_supervised
from pipelines.config import DataSpec, Expected, RunSpec, TrainingSpec
from pipelines.recipes.recipe import Downloaded, Recipe, Shipped

AVERAGE_OF_THE_PAPER = 1_386_000  # images: 6,931 steps of 200


def semi_supervised_demo() -> RunSpec:
    """Digits by 10 labels a class: a narrow Improved GAN on 10,000 MNIST images."""
    return RunSpec(
        recipe="semi-supervised-demo",
        # Narrower, and with half the paper's batch: G needs many steps before it is of use to D, and a short run has
        # none to spare.
        model=semi_supervised.Config(width=0.4),
        data=DataSpec(dataset="mnist-sample", labels_per_class=10),
        training=TrainingSpec(
            images=1_500_000,
            batch_size=100,
            ema_half_life=40_000,
            log_every=20_000,
            evaluate_every=150_000,
            checkpoint_every=300_000,
        ),
        expected=Expected("error", 0.08, "lower", "docs/results.md; chance .9"),
    )


def semi_supervised_mnist() -> RunSpec:
    """The paper's fully connected networks, on MNIST with 10 labels a class."""
    return RunSpec(
        recipe="semi-supervised-mnist",
        model=semi_supervised.Config(),
        data=DataSpec(dataset="mnist", labels_per_class=10),
        training=TrainingSpec(
            images=36_000_000,  # the paper's 300 epochs
            batch_size=200,
            ema_half_life=AVERAGE_OF_THE_PAPER,
            log_every=120_000,
            evaluate_every=1_200_000,
            checkpoint_every=1_200_000,
        ),
        expected=Expected("error", 0.0106, "lower", "table 1: 93 ± 6.5 of 10,000, and two deviations"),
    )


def semi_supervised_svhn() -> RunSpec:
    """The paper's 64-channel networks, on SVHN with 100 labels a class."""
    return RunSpec(
        recipe="semi-supervised-svhn",
        model=semi_supervised.Config(
            architecture="svhn",
            learning_rate=3e-4,
            decay_start=87_800_000,  # the paper's epoch 600 of 900, of 73,200 images each
            decay_end=131_800_000,
        ),
        data=DataSpec(dataset="svhn", labels_per_class=100),
        training=TrainingSpec(
            images=131_800_000,
            batch_size=200,
            ema_half_life=AVERAGE_OF_THE_PAPER,
            log_every=200_000,
            evaluate_every=1_500_000,
            checkpoint_every=1_500_000,
        ),
        expected=Expected("error", 0.0941, "lower", "table 3: 8.11 ± 1.3 %, and one deviation"),
    )


def semi_supervised_cifar10() -> RunSpec:
    """The paper's 96-channel networks, on CIFAR-10 with 400 labels a class."""
    return RunSpec(
        recipe="semi-supervised-cifar10",
        model=semi_supervised.Config(
            architecture="cifar10",
            learning_rate=3e-4,
            decay_start=80_000_000,  # the paper's epoch 800 of 1,200
            decay_end=120_000_000,
        ),
        data=DataSpec(dataset="cifar10", labels_per_class=400),
        training=TrainingSpec(
            images=120_000_000,
            batch_size=200,
            ema_half_life=AVERAGE_OF_THE_PAPER,
            log_every=200_000,
            evaluate_every=1_000_000,
            checkpoint_every=1_000_000,
        ),
        expected=Expected("error", 0.2095, "lower", "table 2: 18.63 ± 2.32 %, and one deviation"),
    )


RECIPES: dict[str, Recipe] = {
    "semi-supervised-demo": Recipe(semi_supervised_demo, Shipped("data/mnist-sample"), "2 CPU cores", "6 min"),
    "semi-supervised-mnist": Recipe(semi_supervised_mnist, Downloaded("mnist"), "one GPU"),
    "semi-supervised-svhn": Recipe(semi_supervised_svhn, Downloaded("svhn"), "one GPU"),
    "semi-supervised-cifar10": Recipe(semi_supervised_cifar10, Downloaded("cifar10"), "one GPU"),
}
