"""Generative adversarial networks."""

from __future__ import annotations

from models.gan import dcgan, imagenet, r3gan
from pipelines.config import ClusterSpec, DataSpec, Expected, RunSpec, TrainingSpec
from pipelines.recipes.recipe import Downloaded, Fetched, Recipe, Shipped


def dcgan_demo() -> RunSpec:
    """A narrow DCGAN at 32x32 on 4,096 real CIFAR-10 images."""
    return RunSpec(
        recipe="dcgan-demo",
        # The step size of the released code's 32x32 (SVHN) model; with the average of weights it makes up for the
        # short run: at 2e-4 the same number of images gives greyer, more broken shapes.
        model=dcgan.Config(generator_width=32, discriminator_width=32, learning_rate=5e-4),
        data=DataSpec(dataset="cifar10-sample"),
        training=TrainingSpec(
            images=90_000, batch_size=64, ema_half_life=5_000, log_every=2_000, checkpoint_every=30_000
        ),
        cluster=ClusterSpec(workers=2),
        expected=Expected("swd", 0.2, "lower", "docs/results.md; grey images 0.74, noise 1.21"),
    )


def dcgan_cifar10() -> RunSpec:
    """The paper's widths at 32x32, on the whole of CIFAR-10."""
    return RunSpec(
        recipe="dcgan-cifar10",
        model=dcgan.Config(),
        data=DataSpec(dataset="cifar10"),
        training=TrainingSpec(
            images=5_000_000,  # 100 epochs; each network is updated as often as in 200 of the released code
            batch_size=128,
            log_every=20_000,
            checkpoint_every=500_000,
        ),
    )


def dcgan_imagenet64() -> RunSpec:
    """The paper's networks at 64x64, on ImageNet-1k.

    Samples are compared with training images: the train archive holds none out.
    """
    return RunSpec(
        recipe="dcgan-imagenet64",
        model=dcgan.Config(),
        data=DataSpec(dataset="imagenet64", eval_split="train"),
        training=TrainingSpec(
            images=32_000_000,  # 25 epochs
            batch_size=512,  # 128 a worker, as the paper's: batch statistics are each worker's own
            precision="bf16",
            log_every=100_000,
            checkpoint_every=2_000_000,
        ),
        cluster=ClusterSpec(workers=4),
    )


def improved_gan_imagenet128() -> RunSpec:
    """Improved GAN's ImageNet model at 128x128, with labels.

    Neither paper nor code say for how long it was trained. Samples are compared with training images: the train archive
    holds none out.
    """
    return RunSpec(
        recipe="improved-gan-imagenet128",
        model=imagenet.Config(),
        data=DataSpec(dataset="imagenet128", eval_split="train"),
        training=TrainingSpec(
            images=32_000_000,  # 25 epochs
            batch_size=64,  # 16 a worker, as the code's: D compares the images of one worker
            log_every=100_000,
            checkpoint_every=2_000_000,
        ),
        cluster=ClusterSpec(workers=4),
    )


def r3gan_demo() -> RunSpec:
    """A narrow R3GAN at 32x32 on 4,096 real CIFAR-10 images of ten classes."""
    return RunSpec(
        recipe="r3gan-demo",
        # Most of the work is at 32x32, so that stage is narrow. gamma and the step size are for a run this short:
        # docs/models/r3gan.md has what else was tried.
        model=r3gan.Config(
            widths=(128, 64, 32, 16),
            blocks=1,
            expansion=1,
            group_width=8,
            augment=(),
            burn_in=60_000,
            learning_rate=1e-3,
            last_learning_rate=5e-4,
            gamma=1.0,
            last_gamma=0.1,
        ),
        data=DataSpec(dataset="cifar10-sample"),
        training=TrainingSpec(
            images=60_000, batch_size=32, ema_half_life=5_000, log_every=2_000, checkpoint_every=20_000
        ),
        cluster=ClusterSpec(workers=2),
        expected=Expected("swd", 0.12, "lower", "docs/models/r3gan.md; grey images 0.74, noise 1.21"),
    )


def r3gan_cifar10() -> RunSpec:
    """The paper's R3GAN at 32x32, on the whole of CIFAR-10 with its classes."""
    return RunSpec(
        recipe="r3gan-cifar10",
        model=r3gan.Config(),
        data=DataSpec(dataset="cifar10"),
        training=TrainingSpec(
            images=250_000_000,
            batch_size=512,
            precision="bf16",
            ema_half_life=5_000_000,
            log_every=100_000,
            checkpoint_every=2_000_000,
        ),
        cluster=ClusterSpec(workers=8),
    )


RECIPES: dict[str, Recipe] = {
    "dcgan-demo": Recipe(dcgan_demo, Shipped("data/cifar-10-sample.tar.xz"), "2 CPU cores", "5 min"),
    "dcgan-cifar10": Recipe(dcgan_cifar10, Downloaded("cifar10"), "one GPU"),
    "dcgan-imagenet64": Recipe(
        dcgan_imagenet64,
        Fetched("ILSVRC2012_img_train.tar from image-net.org", "ILSVRC2012_img_train.tar --size 64"),
        "four GPUs",
    ),
    "improved-gan-imagenet128": Recipe(
        improved_gan_imagenet128,
        Fetched("ILSVRC2012_img_train.tar from image-net.org", "ILSVRC2012_img_train.tar --size 128"),
        "four GPUs",
    ),
    "r3gan-demo": Recipe(r3gan_demo, Shipped("data/cifar-10-sample.tar.xz"), "2 CPU cores", "6 min"),
    "r3gan-cifar10": Recipe(r3gan_cifar10, Downloaded("cifar10"), "eight GPUs"),
}
