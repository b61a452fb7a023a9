"""Every model in small, one line each: it joins the contract tests, resume to the bit, and two workers."""

from __future__ import annotations

from typing import NamedTuple

from models import ModelConfig, dcgan, imagenet, infogan, r3gan, residual, semi_supervised, vae
from models.contract import (
    Asks,
    Classifies,
    Diagnoses,
    Embeds,
    Evaluates,
    Exports,
    ExportsClassifier,
    ImageShape,
    InitialisesFromData,
    LimitsShare,
    Measures,
    Reconstructs,
    Samples,
    Traverses,
)

CAPABILITIES = (
    Asks,
    Classifies,
    Diagnoses,
    Embeds,
    Evaluates,
    Exports,
    ExportsClassifier,
    InitialisesFromData,
    LimitsShare,
    Measures,
    Reconstructs,
    Samples,
    Traverses,
)
CLASSIFIER = {Asks, Classifies, Embeds, Evaluates, ExportsClassifier}
CODES = {Diagnoses, Evaluates, Exports, LimitsShare, Measures, Samples, Traverses}
GAN = {Asks, Diagnoses, Exports, InitialisesFromData, LimitsShare, Samples}
SEMI_SUPERVISED = (GAN | CLASSIFIER) - {Embeds}
VAE = {Diagnoses, Evaluates, Exports, Reconstructs, Samples, Traverses}


class Case(NamedTuple):
    config: ModelConfig
    shape: ImageShape
    can: set[type]


# fmt: off
CASES: dict[str, Case] = {
    "dcgan": Case(dcgan.Config(latent=8, generator_width=4, discriminator_width=4), ImageShape(3, 16, 16), GAN),
    "dcgan-improved": Case(dcgan.Config(latent=6, generator_width=4, discriminator_width=4, real_label=0.9, minibatch_kernels=3, feature_matching=True, historical_weight=0.1, discriminator_norm="weight", generator_norm="virtual", virtual_reference=4, learnt_gains="all", augment=("colour", "translation", "cutout")), ImageShape(1, 8, 8), GAN),  # noqa: E501
    "dcgan-penalised": Case(dcgan.Config(latent=6, generator_width=4, discriminator_width=4, loss="relativistic", penalty="r1+r2", discriminator_norm="virtual", virtual_reference=3, augment=("translation",), augment_probability=0.5), ImageShape(3, 16, 16), GAN),  # noqa: E501
    "dcgan-spectral": Case(dcgan.Config(latent=6, generator_width=4, discriminator_width=4, loss="hinge", discriminator_norm="spectral", generator_norm="virtual", virtual_reference=3, classes=2), ImageShape(1, 16, 16), GAN),  # noqa: E501
    "infogan": Case(infogan.Config(noise=4, categories=(3, 2), generator_width=4, discriminator_width=4, hidden=8), ImageShape(1, 8, 8), CODES),  # noqa: E501
    "infogan-continuous": Case(infogan.Config(noise=4, categories=(), learned_deviation=True, generator_width=4, discriminator_width=4, hidden=0), ImageShape(3, 14, 14), CODES),  # noqa: E501
    "improved-gan-imagenet": Case(imagenet.Config(6, generator_width=4, discriminator_width=2, kernels=2, kernel_dimensions=2, classes=2, reference=3), ImageShape(3, 32, 32), {Asks, Diagnoses, Exports, LimitsShare, Samples}),  # noqa: E501
    "r3gan": Case(r3gan.Config(latent=6, widths=(8, 6), blocks=1, group_width=4, classes=2, burn_in=100, augment_probability=0.5), ImageShape(3, 8, 8), {Asks, Diagnoses, Exports, Samples}),  # noqa: E501
    "r3gan-unconditional": Case(r3gan.Config(latent=6, widths=(4, 4, 4), group_width=4, classes=0, mirror=False, augment=(), burn_in=0), ImageShape(1, 16, 16), {Asks, Diagnoses, Exports, Samples}),  # noqa: E501
    "residual-classifier": Case(residual.Config(classes=2, width=8, decay_end=400), ImageShape(3, 12, 12), CLASSIFIER),
    "semi-supervised": Case(semi_supervised.Config(latent=6, classes=2, width=0.02), ImageShape(1, 8, 8), SEMI_SUPERVISED),  # noqa: E501
    "semi-supervised-convolutional": Case(semi_supervised.Config("svhn", classes=2, latent=6, width=0.04, learning_rate=3e-4), ImageShape(3, 16, 16), SEMI_SUPERVISED),  # noqa: E501
    "vae": Case(vae.Config(latent=4, hidden=16), ImageShape(1, 8, 8), VAE),
    "vae-gaussian": Case(vae.Config(latent=4, hidden=16, likelihood="gaussian", learning_rate=0.01), ImageShape(3, 8, 8), VAE),  # noqa: E501
}
# fmt: on
