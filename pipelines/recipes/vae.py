"""Variational autoencoders."""

from __future__ import annotations

from models.vae import vae
from pipelines.config import ClusterSpec, DataSpec, Expected, RunSpec, TrainingSpec, VisualsSpec
from pipelines.recipes.recipe import Downloaded, Recipe, Shipped


def vae_mnist() -> RunSpec:
    """The paper's 500 tanh units and 20 latents, on MNIST, binarised dynamically."""
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
    """Two rectified layers, 10 latents and Adam, on 10,000 MNIST digits: samples one can read."""
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
        expected=Expected("elbo", -106.0, "higher", "docs/results.md; nats a test image, binarised dynamically"),
    )


RECIPES: dict[str, Recipe] = {
    "vae-demo": Recipe(vae_demo, Shipped("data/mnist-sample"), "2 CPU cores", "4 min"),
    "vae-mnist": Recipe(vae_mnist, Downloaded("mnist"), "2 CPU cores", "10 min"),
}
