"""Recipes: functions that return one complete `RunSpec`. The name of a recipe is what `python -m jobs.train` takes."""

from __future__ import annotations

from collections.abc import Callable

from models.gan import dcgan
from models.vae import vae
from pipelines.config import ClusterSpec, DataSpec, Expected, RunSpec, TrainingSpec, VisualsSpec


def dcgan_demo() -> RunSpec:
    """A narrow DCGAN on the shipped CIFAR-10 sample: a picture in some minutes on two CPU cores."""
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
    """DCGAN as in the paper, at 32x32 on the whole of CIFAR-10; for a GPU."""
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
    """DCGAN as in the paper, at 64x64 on ImageNet-1k; for a node with four GPUs. Samples are compared with training
    images: the train archive holds none out."""
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


def vae_mnist() -> RunSpec:
    """The VAE of Kingma and Welling on binarised MNIST."""
    return RunSpec(
        recipe="vae-mnist",
        model=vae.Config(),
        data=DataSpec(dataset="mnist"),
        training=TrainingSpec(
            images=3_000_000,  # 50 epochs
            batch_size=100,
            log_every=60_000,
            evaluate_every=300_000,
            checkpoint_every=500_000,
        ),
        visuals=VisualsSpec(clock="log"),
        expected=Expected("elbo", -107.0, "higher", "docs/results.md; nats a test image, binarised dynamically"),
    )


def vae_demo() -> RunSpec:
    """A VAE on the shipped MNIST sample: digits that can be read, in some minutes on two CPU cores."""
    return RunSpec(
        recipe="vae-demo",
        # For digits that can be read after a short run, of which the paper's setting draws too few: a deeper network
        # under Adam, and fewer latents, so that draws from the prior fall more often where the codes of images lie.
        model=vae.Config(
            latent=10,
            hidden=400,
            layers=2,
            activation="relu",
            optimizer="adam",
            learning_rate=0.002,
            prior_images=10_000,
            init_std=None,
        ),
        data=DataSpec(dataset="mnist-sample"),
        training=TrainingSpec(
            images=600_000,  # 60 epochs
            batch_size=200,
            ema_half_life=15_000,
            log_every=20_000,
            checkpoint_every=150_000,
        ),
        visuals=VisualsSpec(clock="log"),
        cluster=ClusterSpec(workers=2),
        expected=Expected("elbo", -106.0, "higher", "docs/models/vae.md; nats a test image, binarised dynamically"),
    )


RECIPES: dict[str, Callable[[], RunSpec]] = {
    "dcgan-demo": dcgan_demo,
    "dcgan-cifar10": dcgan_cifar10,
    "dcgan-imagenet64": dcgan_imagenet64,
    "vae-demo": vae_demo,
    "vae-mnist": vae_mnist,
}
