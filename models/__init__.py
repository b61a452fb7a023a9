"""The models and their only registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from models.classifier import residual
from models.contract import ImageShape, Learner
from models.gan import dcgan, imagenet, infogan, r3gan, semi_supervised
from models.vae import vae


class ModelConfig(Protocol):
    """The `Config` of a model file: a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


@runtime_checkable
class ChecksSettings(Protocol):
    """A `Config` that knows which of its settings go together, whatever the images."""

    def check(self) -> None:
        """`ValueError` that says what does not, and why."""
        ...


class Model(NamedTuple):
    """A model file's `Config` and `build`, and the paper that it is of (models/README.md is made from it)."""

    title: str
    paper: str
    arxiv: str
    equations: str
    config: type[Any]
    build: Callable[[Any, ImageShape], Learner]


# fmt: off
MODELS: dict[str, Model] = {
    "dcgan": Model("DCGAN", "Radford, Metz, Chintala 2015", "1511.06434", "L_D = -log D(x) - log(1 - D(G(z))), L_G = -log D(G(z))", dcgan.Config, dcgan.build),  # noqa: E501
    "infogan": Model("InfoGAN", "Chen, Duan, Houthooft, Schulman, Sutskever, Abbeel 2016", "1606.03657", "eq. 5, 6: L_I = E log Q(c) + H(c), L_D - λ L_I, L_G - λ L_I", infogan.Config, infogan.build),  # noqa: E501
    "improved-gan-imagenet": Model("Improved GAN, ImageNet", "Salimans et al. 2016", "1606.03498", "L_D = KL(.75, D(x)) + KL(0, D(G(z))) + class loss, L_G = KL(.375, D(G(z)))", imagenet.Config, imagenet.build),  # noqa: E501
    "r3gan": Model("R3GAN", "Huang, Gokaslan, Kuleshov, Tompkin 2024", "2501.05441", "L_D = softplus(D(G(z)) - D(x)) + R1 + R2, L_G = softplus(D(x) - D(G(z)))", r3gan.Config, r3gan.build),  # noqa: E501
    "residual-classifier": Model("Residual classifier", "He, Zhang, Ren, Sun 2015", "1512.03385", "eq. 1: y = F(x) + x; section 4.2", residual.Config, residual.build),  # noqa: E501
    "semi-supervised": Model("Semi-supervised GAN", "Salimans et al. 2016", "1606.03498", "L_D = L_lab + L_unl with D(x) = sigmoid(Z), L_G = mean abs(E f(x) - E f(G(z)))", semi_supervised.Config, semi_supervised.build),  # noqa: E501
    "vae": Model("VAE", "Kingma, Welling 2013", "1312.6114", "eq. 8, 9, 10, appendix C", vae.Config, vae.build),
}
# fmt: on


def name_of(config: ModelConfig) -> str:
    """The registered name of the model that `config` is of."""
    for name, model in MODELS.items():
        if isinstance(config, model.config):
            return name
    raise ValueError(f"{type(config).__qualname__} of {type(config).__module__} is no registered model's config")


def build(config: ModelConfig, shape: ImageShape) -> Learner:
    """A fresh learner on the CPU; torch's global random state decides the weights. ValueError: shape does not fit."""
    return MODELS[name_of(config)].build(config, shape)
