"""Generative adversarial networks whose images show codes."""

from __future__ import annotations

from models.gan import infogan
from pipelines.config import ClusterSpec, DataSpec, Expected, RunSpec, TrainingSpec, VisualsSpec
from pipelines.recipes.recipe import Downloaded, Fetched, Generated, Recipe, Shipped


def infogan_demo() -> RunSpec:
    """Narrow networks on 10,000 MNIST digits: one code of ten categories, which become digits."""
    return RunSpec(
        recipe="infogan-demo",
        # With the paper's lambda of 1 categories settle before images look like digits, more by slant than by digit;
        # continuous codes that weigh less leave the digit to them.
        model=infogan.Config(
            names=("digit category",),
            generator_width=32,
            discriminator_width=32,
            hidden=256,
            categorical_weight=0.1,
            continuous_weight=0.1,
        ),
        data=DataSpec(dataset="mnist-sample"),
        training=TrainingSpec(
            images=200_000, batch_size=64, ema_half_life=10_000, log_every=4_000, checkpoint_every=100_000
        ),
        visuals=VisualsSpec(grid=10),
        cluster=ClusterSpec(workers=2),
        expected=Expected("category_accuracy", 0.5, "higher", "docs/results.md; chance .1"),
    )


def infogan_mnist() -> RunSpec:
    """The paper's MNIST networks, ten categories and two continuous codes, and its 5,000 steps."""
    return RunSpec(
        recipe="infogan-mnist",
        model=infogan.Config(names=("digit category",)),
        data=DataSpec(dataset="mnist"),
        training=TrainingSpec(images=640_000, batch_size=128, log_every=6_400, checkpoint_every=128_000),
        visuals=VisualsSpec(grid=10),
        expected=Expected("category_accuracy", 0.95, "higher", "the paper, section 7.2, of its best run"),
    )


def infogan_heads() -> RunSpec:
    """Narrow networks on rendered 3D heads: codes come to turn the head and to move the light."""
    return RunSpec(
        recipe="infogan-heads",
        # With a deviation of 1 a mixture of factors is read as well as one factor; learned ones pay for a code that is
        # read exactly. They have far more to gain: with a weight of .5 images became patterns that Q reads and no eye.
        model=infogan.Config(
            noise=32,
            categories=(),
            continuous=5,
            generator_width=24,
            discriminator_width=24,
            hidden=256,
            learned_deviation=True,
            continuous_weight=0.1,
        ),
        data=DataSpec(dataset="heads"),
        training=TrainingSpec(
            images=200_000, batch_size=64, ema_half_life=10_000, log_every=4_000, checkpoint_every=100_000
        ),
        visuals=VisualsSpec(grid=10),
        cluster=ClusterSpec(workers=2),
        expected=Expected("factor_correlation", 0.5, "higher", "docs/models/infogan.md; untrained networks .25"),
    )


def infogan_heads_wide() -> RunSpec:
    """The paper's codes for 3D faces, five continuous ones and 128 numbers of noise, on rendered heads."""
    return RunSpec(
        recipe="infogan-heads-wide",
        model=infogan.Config(noise=128, categories=(), continuous=5),
        data=DataSpec(dataset="heads"),
        training=TrainingSpec(images=1_000_000, batch_size=128, log_every=10_000, checkpoint_every=200_000),
        visuals=VisualsSpec(grid=10),
    )


def infogan_svhn() -> RunSpec:
    """The paper's codes for SVHN: four of ten categories and four continuous ones, 124 numbers of noise."""
    return RunSpec(
        recipe="infogan-svhn",
        model=infogan.Config(noise=124, categories=(10,) * 4, continuous=4, hidden=0),
        data=DataSpec(dataset="svhn"),
        training=TrainingSpec(
            images=3_600_000,  # some 50 epochs
            batch_size=128,
            log_every=20_000,
            checkpoint_every=400_000,
        ),
        visuals=VisualsSpec(grid=10),
    )


def infogan_celeba() -> RunSpec:
    """The paper's codes for CelebA, ten of ten categories and 128 numbers of noise, at 64x64."""
    return RunSpec(
        recipe="infogan-celeba",
        model=infogan.Config(noise=128, categories=(10,) * 10, continuous=0, hidden=0),
        data=DataSpec(dataset="celeba64"),
        training=TrainingSpec(
            images=4_000_000,  # some 25 epochs
            batch_size=128,
            precision="bf16",
            log_every=20_000,
            checkpoint_every=400_000,
        ),
        visuals=VisualsSpec(grid=10),
    )


RECIPES: dict[str, Recipe] = {
    "infogan-demo": Recipe(infogan_demo, Shipped("data/mnist-sample"), "2 CPU cores", "5 min"),
    "infogan-mnist": Recipe(infogan_mnist, Downloaded("mnist"), "one GPU"),
    "infogan-heads": Recipe(infogan_heads, Generated("data/render_heads.py"), "2 CPU cores", "5 min"),
    "infogan-heads-wide": Recipe(infogan_heads_wide, Generated("data/render_heads.py"), "one GPU"),
    "infogan-svhn": Recipe(infogan_svhn, Downloaded("svhn"), "one GPU"),
    "infogan-celeba": Recipe(
        infogan_celeba,
        Fetched(
            "img_align_celeba.zip, list_attr_celeba.txt and list_eval_partition.txt of"
            " mmlab.ie.cuhk.edu.hk/projects/CelebA in one FOLDER",
            "FOLDER",
        ),
        "one GPU",
    ),
}
