"""Recipes: functions that return one complete `RunSpec`. The name of a recipe is what `python -m jobs.train` takes."""

from __future__ import annotations

from collections.abc import Callable

from models.gan import dcgan
from models.vae import vae
from pipelines.config import ClusterSpec, DataSpec, RunSpec, TrainingSpec, VisualsSpec


def dcgan_demo() -> RunSpec:
    """A narrow DCGAN on the shipped CIFAR-10 sample: a picture in some minutes on two CPU cores."""
    return RunSpec(
        recipe="dcgan-demo",
        model=dcgan.Config(generator_width=32, discriminator_width=32),
        data=DataSpec(dataset="cifar10-sample"),
        training=TrainingSpec(
            images=120_000, batch_size=64, ema_half_life=2_000, log_every=2_000, checkpoint_every=30_000
        ),
        cluster=ClusterSpec(workers=2),
    )


def vae_mnist() -> RunSpec:
    """The VAE of Kingma and Welling on binarised MNIST."""
    return RunSpec(
        recipe="vae-mnist",
        model=vae.Config(),
        data=DataSpec(dataset="mnist"),
        training=TrainingSpec(images=6_000_000, batch_size=100, log_every=60_000, evaluate_every=300_000),
        visuals=VisualsSpec(clock="log"),
    )


RECIPES: dict[str, Callable[[], RunSpec]] = {
    "dcgan-demo": dcgan_demo,
    "vae-mnist": vae_mnist,
}
