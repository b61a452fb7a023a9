"""With every technique off, DCGAN is bit for bit the DCGAN of before there were any: weights, optimisers, randomness.

The former model is written out here, networks and update, with nothing of today's but its numbers.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from models.contract import Batch, ImageShape
from models.gan.dcgan import Config, build

LATENT, WIDTH = 10, 4
SHAPES = [ImageShape(1, 8, 8), ImageShape(3, 32, 32)]  # no hidden convolution, and two


def rng(seed: int) -> Generator:
    return Generator().manual_seed(seed)


class FormerGenerator(nn.Module):
    def __init__(self, shape: ImageShape) -> None:
        super().__init__()
        widths = [WIDTH * 2**i for i in reversed(range(stages(shape)))]
        self.project = nn.Linear(LATENT, widths[0] * 16, bias=False)
        self.project_norm = nn.BatchNorm1d(widths[0] * 16, eps=1e-8, track_running_stats=False)
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            layers += [up(wide, narrow), nn.BatchNorm2d(narrow, eps=1e-8, track_running_stats=False), nn.ReLU()]
        self.upsample = nn.Sequential(*layers, up(widths[-1], shape.channels), nn.Tanh())
        self.apply(start)

    def forward(self, z: Tensor) -> Tensor:
        h = F.relu(self.project_norm(self.project(z)))
        return self.upsample(h.unflatten(1, (-1, 4, 4)))


class FormerDiscriminator(nn.Module):
    def __init__(self, shape: ImageShape) -> None:
        super().__init__()
        widths = [WIDTH * 2**i for i in range(stages(shape))]
        layers: list[nn.Module] = [down(shape.channels, widths[0]), nn.LeakyReLU(0.2)]
        for narrow, wide in pairwise(widths):
            norm = nn.BatchNorm2d(wide, eps=1e-8, track_running_stats=False)
            layers += [down(narrow, wide), norm, nn.LeakyReLU(0.2)]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.classify = nn.Linear(widths[-1] * 16, 1, bias=False)
        self.apply(start)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x)).squeeze(1)


class Former:
    """The learner of before: one update of D and one of G a batch."""

    def __init__(self, shape: ImageShape) -> None:
        self.g, self.d = FormerGenerator(shape), FormerDiscriminator(shape)
        self.optimizer_g, self.optimizer_d = (
            torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999), weight_decay=1e-5)
            for network in (self.g, self.d)
        )

    def step(self, images: Tensor, generator: Generator) -> dict[str, Tensor]:
        x = images.to(torch.float32) / 255.0 * 2 - 1
        fake = self.g(torch.rand(len(x), LATENT, generator=generator) * 2 - 1)
        self.optimizer_d.zero_grad(set_to_none=True)
        real_logits, fake_logits = self.d(x), self.d(fake.detach())
        loss_d = F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
        loss_d.backward()
        self.optimizer_d.step()
        self.optimizer_g.zero_grad(set_to_none=True)
        self.d.requires_grad_(False)
        loss_g = F.softplus(-self.d(fake)).mean()
        loss_g.backward()
        self.d.requires_grad_(True)
        self.optimizer_g.step()
        return {
            "loss_d": loss_d.detach(),
            "loss_g": loss_g.detach(),
            "p_real": real_logits.detach().sigmoid().mean(),
            "p_fake": fake_logits.detach().sigmoid().mean(),
        }


def up(wide: int, narrow: int) -> nn.Module:
    return nn.ConvTranspose2d(wide, narrow, 5, stride=2, padding=2, output_padding=1, bias=False)


def down(narrow: int, wide: int) -> nn.Module:
    return nn.Conv2d(narrow, wide, 5, stride=2, padding=2, bias=False)


def start(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def stages(shape: ImageShape) -> int:
    return (shape.height // 4).bit_length() - 1


def assert_the_same(a: Any, b: Any) -> None:
    """To the bit, through dictionaries and lists."""
    if isinstance(a, dict):
        assert [*a] == [*b]
        for key in a:
            assert_the_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        for one, other in zip(a, b, strict=True):
            assert_the_same(one, other)
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_techniques_it_is_the_former_dcgan_to_the_bit(shape: ImageShape) -> None:
    config = Config(latent=LATENT, generator_width=WIDTH, discriminator_width=WIDTH)
    torch.manual_seed(0)
    now = build(config, shape)
    after_building = torch.get_rng_state()
    torch.manual_seed(0)
    former = Former(shape)
    assert torch.equal(after_building, torch.get_rng_state())
    assert [*now.networks()] == [*now.optimizers()] == ["generator", "discriminator"]

    randomness, formers = rng(1), rng(1)
    for step in range(3):
        assert_the_same(now.g.state_dict(), former.g.state_dict())
        assert_the_same(now.d.state_dict(), former.d.state_dict())
        images = torch.randint(0, 256, (6, shape.channels, shape.height, shape.width), generator=rng(10 + step))
        batch = Batch(images.to(torch.uint8), torch.full((6,), step), 6 * step)
        now.initialise(batch, randomness)
        metrics = now.step(batch, randomness)
        assert metrics.keys() == {"loss_d", "loss_g", "p_real", "p_fake"}
        for name, value in former.step(batch.images, formers).items():
            assert torch.equal(metrics[name], value), name
    assert_the_same(now.g.state_dict(), former.g.state_dict())
    assert_the_same(now.d.state_dict(), former.d.state_dict())
    assert_the_same(now.optimizer_g.state_dict(), former.optimizer_g.state_dict())
    assert_the_same(now.optimizer_d.state_dict(), former.optimizer_d.state_dict())
    assert torch.equal(randomness.get_state(), formers.get_state())
