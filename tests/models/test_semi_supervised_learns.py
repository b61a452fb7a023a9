"""The semi-supervised GAN on a small problem: one label a class, and what G is for."""

from __future__ import annotations

import torch
from torch import Tensor

from models.contract import UNKNOWN, Batch, ImageShape, Labelled
from models.gan.semi_supervised import Config, SemiSupervisedGAN, build

QUARTERS = [(slice(y, y + 4), slice(x, x + 4)) for y in (0, 4) for x in (0, 4)]


def bright_quarters(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """8x8 images in strong noise, a quarter of which is bright: which one is their class."""
    labels = torch.arange(n) % 4
    images = 40 + 50 * torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0][QUARTERS[label]] += 160
    return images.round().clamp(0, 255).to(torch.uint8), labels


def distance_to_nearest(images: Tensor, others: Tensor) -> float:
    return float(torch.cdist(images.flatten(1).float(), others.flatten(1).float()).min(1).values.mean())


def trained(images: Tensor, few: Labelled, unlabelled_weight: float) -> SemiSupervisedGAN:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = Config(classes=4, latent=8, width=0.3, unlabelled_weight=unlabelled_weight)
    model = build(config, ImageShape(1, 8, 8))
    for step in range(300):
        chosen = images[torch.randint(0, len(images), (64,), generator=generator)]
        batch = Batch(chosen, torch.full((64,), UNKNOWN), 64 * step, labelled=few)
        if step == 0:
            model.initialise(batch, generator)
        model.step(batch, generator)
    return model


def test_four_labels_and_unlabelled_images_are_enough_and_g_draws_where_the_data_lie() -> None:
    """Without the unlabelled loss D does not say where the data lie, and G's images are of no kind."""
    images, labels = bright_quarters(400, seed=1)
    held_out, truth = bright_quarters(400, seed=2)
    few = Labelled(images[:4], labels[:4])
    model, blind = trained(images, few, 1.0), trained(images, few, 0.0)
    generator = torch.Generator().manual_seed(3)
    assert model.evaluate(Batch(held_out, truth, 0), generator)["error"].mean() < 0.02
    real = distance_to_nearest(held_out, images)
    drawn, drawn_blind = (learner.sample(128, generator) for learner in (model, blind))
    assert distance_to_nearest(drawn, images) < 1.15 * real
    assert distance_to_nearest(drawn_blind, images) > 1.4 * real
    kinds = torch.cdist(drawn.flatten(1).float(), images.flatten(1).float()).argmin(1) % 4
    assert kinds.bincount(minlength=4).min() >= 8, "all four kinds"
