"""What a VAE can have beside the paper's one tanh layer under Adagrad."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim import Adagrad, Adam

from models.contract import ImageShape
from models.vae.vae import Config, build
from tests.models.test_vae import all_binary_images, batch, learner, rng


def test_layers_and_activation_are_settings() -> None:
    model = learner(Config(latent=2, hidden=5, layers=2, activation="relu", init_std=None), ImageShape(1, 2, 2))
    x, z = torch.rand(3, 4, generator=rng()), torch.randn(3, 2, generator=rng(1))
    (w1, b1, w2, b2, w3, b3, *_), (v1, c1, v2, c2, v3, c3) = model.encoder.parameters(), model.decoder.parameters()
    h = torch.relu(torch.relu(x @ w1.T + b1) @ w2.T + b2)
    torch.testing.assert_close(model.encoder(x)[0], h @ w3.T + b3)
    torch.testing.assert_close(model.decoder(z), torch.relu(torch.relu(z @ v1.T + c1) @ v2.T + c2) @ v3.T + c3)
    for weight in (w1, w2, w3, v1, v2, v3):  # torch's own first weights
        bound = 1 / math.sqrt(weight.shape[1])
        assert 0.5 * bound < weight.abs().max().item() <= bound
    with pytest.raises(ValueError, match="layers"):
        build(Config(layers=0), ImageShape(1, 2, 2))


def test_weights_have_the_names_under_which_checkpoints_and_published_models_hold_them() -> None:
    model = learner(Config(latent=2, hidden=4), ImageShape(1, 2, 2))
    layers = {"encoder": ("hidden", "mu", "log_var"), "decoder": ("hidden", "logits")}
    for name, network in model.networks().items():
        names = [f"{layer}.{kind}" for layer in layers[name] for kind in ("weight", "bias")]
        assert list(network.state_dict()) == names


def test_adam_steps_on_the_same_loss() -> None:
    """Its first step goes by the sign of the gradient, as Adagrad's does."""
    moved = []
    for rule, kind in (("adagrad", Adagrad), ("adam", Adam)):
        config = Config(latent=2, hidden=4, prior_images=50, learning_rate=0.01, init_std=0.3, optimizer=rule)
        model = learner(config, ImageShape(1, 2, 2))
        before = [p.detach().clone() for n in model.networks().values() for p in n.parameters()]
        model.step(batch(all_binary_images()), rng(3))
        after = [p.detach() for n in model.networks().values() for p in n.parameters()]
        moved.append(torch.cat([(p - q).flatten() for p, q in zip(after, before, strict=True)]))
        assert type(model.optimizer) is kind
    torch.testing.assert_close(moved[0], moved[1], atol=1e-4, rtol=0)
    assert moved[0].abs().min() > 0.009
