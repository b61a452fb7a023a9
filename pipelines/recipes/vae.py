"""Variational autoencoders."""

from __future__ import annotations

from models.vae import vae
from pipelines.config import DataSpec, Expected, RunSpec, TrainingSpec, VisualsSpec
from pipelines.recipes.recipe import Known, Recipe


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


RECIPES: dict[str, Recipe] = {
    "vae-mnist": Recipe(vae_mnist, Known("mnist"), "2 CPU cores", "10 min"),
}
