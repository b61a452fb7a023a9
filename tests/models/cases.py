"""Every model in small, one line each: it joins the contract tests, resume to the bit, and two workers."""

from __future__ import annotations

from typing import NamedTuple

from models import ModelConfig, dcgan, vae
from models.contract import Diagnoses, Evaluates, Exports, ImageShape, Reconstructs, Traverses

CAPABILITIES = (Diagnoses, Evaluates, Exports, Reconstructs, Traverses)


class Case(NamedTuple):
    config: ModelConfig
    shape: ImageShape
    can: set[type]


# fmt: off
CASES: dict[str, Case] = {
    "dcgan": Case(dcgan.Config(latent=8, generator_width=4, discriminator_width=4), ImageShape(3, 16, 16), {Diagnoses, Exports}),  # noqa: E501
    "dcgan-improved": Case(dcgan.Config(latent=6, generator_width=4, discriminator_width=4, real_label=0.9, minibatch_kernels=3, feature_matching=True, historical_weight=0.1, discriminator_norm="weight", generator_norm="virtual", virtual_reference=4, learnt_gains="all", augment=("colour", "translation", "cutout"), classes=2), ImageShape(1, 8, 8), {Diagnoses, Exports}),  # noqa: E501
    "dcgan-penalised": Case(dcgan.Config(latent=6, generator_width=4, discriminator_width=4, loss="relativistic", penalty="r1+r2", discriminator_norm="virtual", virtual_reference=3, augment=("translation",), augment_probability=0.5), ImageShape(3, 8, 8), {Diagnoses, Exports}),  # noqa: E501
    "dcgan-spectral": Case(dcgan.Config(latent=6, generator_width=4, discriminator_width=4, loss="hinge", discriminator_norm="spectral", classes=2), ImageShape(1, 8, 8), {Diagnoses, Exports}),  # noqa: E501
    "vae": Case(vae.Config(latent=4, hidden=16), ImageShape(1, 8, 8), {*CAPABILITIES}),
    "vae-gaussian": Case(vae.Config(latent=4, hidden=16, likelihood="gaussian", learning_rate=0.01), ImageShape(3, 8, 8), {*CAPABILITIES}),  # noqa: E501
}
# fmt: on
