"""The models and their only registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from models.contract import ImageShape, Learner
from models.gan import dcgan
from models.vae import vae

ModelConfig = dcgan.Config | vae.Config


class Model(NamedTuple):
    """A model file's `Config` and `build`."""

    config: type[Any]
    build: Callable[[Any, ImageShape], Learner]


MODELS: dict[str, Model] = {
    "dcgan": Model(dcgan.Config, dcgan.build),
    "vae": Model(vae.Config, vae.build),
}


def name_of(config: ModelConfig) -> str:
    """The registered name of the model that `config` is of."""
    for name, model in MODELS.items():
        if isinstance(config, model.config):
            return name
    raise ValueError(f"{type(config).__qualname__} of {type(config).__module__} is no registered model's config")


def build(config: ModelConfig, shape: ImageShape) -> Learner:
    """A fresh learner on the CPU; torch's global random state decides the weights. ValueError: shape does not fit."""
    return MODELS[name_of(config)].build(config, shape)
