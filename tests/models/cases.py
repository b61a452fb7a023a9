"""Every model in small, one line each: it joins the contract tests, resume to the bit, and two workers."""

from __future__ import annotations

from typing import NamedTuple

from models import ModelConfig, dcgan, infogan, vae
from models.contract import Diagnoses, Evaluates, Exports, ImageShape, Measures, Reconstructs, Traverses

CAPABILITIES = (Diagnoses, Evaluates, Exports, Measures, Reconstructs, Traverses)
VAE = {Diagnoses, Evaluates, Exports, Reconstructs, Traverses}
CODES = {Diagnoses, Evaluates, Exports, Measures, Traverses}


class Case(NamedTuple):
    config: ModelConfig
    shape: ImageShape
    can: set[type]


# fmt: off
CASES: dict[str, Case] = {
    "dcgan": Case(dcgan.Config(latent=8, generator_width=4, discriminator_width=4), ImageShape(3, 16, 16), {Diagnoses, Exports}),  # noqa: E501
    "infogan": Case(infogan.Config(noise=4, categories=(3, 2), generator_width=4, discriminator_width=4, hidden=8), ImageShape(1, 8, 8), CODES),  # noqa: E501
    "infogan-continuous": Case(infogan.Config(noise=4, categories=(), learned_deviation=True, generator_width=4, discriminator_width=4, hidden=0), ImageShape(3, 14, 14), CODES),  # noqa: E501
    "vae": Case(vae.Config(latent=4, hidden=16), ImageShape(1, 8, 8), VAE),
    "vae-gaussian": Case(vae.Config(latent=4, hidden=16, likelihood="gaussian", learning_rate=0.01), ImageShape(3, 8, 8), VAE),  # noqa: E501
}
# fmt: on
