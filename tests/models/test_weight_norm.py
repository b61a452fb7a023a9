"""Weight normalisation against its equations and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.gan.weight_norm import Layer, WeightNorm, initialise


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(layer: Layer, **settings: float) -> WeightNorm:
    """With gains and biases of their own."""
    normed = WeightNorm(layer, **settings)  # type: ignore[arg-type]
    with torch.no_grad():
        normed.gain.copy_(torch.rand(len(normed.gain), generator=rng(1)) + 0.5)
        layer.bias.copy_(torch.randn(len(layer.bias), generator=rng(2)))  # type: ignore[union-attr, arg-type]
    return normed


def test_the_weight_of_each_output_has_the_direction_of_v_and_the_length_of_its_gain() -> None:
    normed = WeightNorm(nn.Linear(2, 3))
    with torch.no_grad():
        normed.layer.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]]))
        normed.gain.copy_(torch.tensor([10.0, 1.0, 3.0]))
        normed.layer.bias.copy_(torch.tensor([0.0, 5.0, 1.0]))  # type: ignore[union-attr]
    got = normed(torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(got, torch.tensor([[6.0 + 16.0, 2.0 + 5.0, -3.0 + 1.0]]))


def test_each_kind_of_layer_is_the_layer_with_that_weight() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 5, generator=rng())
    conv = made(nn.Conv2d(3, 4, 3, stride=2, padding=1))
    v = conv.layer.weight
    weight = torch.stack([conv.gain[i] * v[i] / v[i].norm() for i in range(4)])
    torch.testing.assert_close(conv(x), F.conv2d(x, weight, conv.layer.bias, stride=2, padding=1))
    up = made(nn.ConvTranspose2d(3, 4, 5, stride=2, padding=2, output_padding=1))
    v = up.layer.weight
    weight = torch.stack([up.gain[i] * v[:, i] / v[:, i].norm() for i in range(4)], dim=1)
    expected = F.conv_transpose2d(x, weight, up.layer.bias, stride=2, padding=2, output_padding=1)
    torch.testing.assert_close(up(x), expected)
    assert up(x).shape == (2, 4, 10, 10)


@pytest.mark.parametrize("std", [1.0, 0.1])
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Linear(6, 4), (50, 6)),
        (nn.Conv2d(3, 4, 3, padding=1), (5, 3, 7, 7)),
        (nn.ConvTranspose2d(3, 4, 5, stride=2, padding=2, output_padding=1), (5, 3, 7, 7)),
    ],
)
def test_fitted_outputs_have_mean_zero_and_the_deviation_asked_for(
    layer: Layer, size: tuple[int, ...], std: float
) -> None:
    """Whatever gain and bias were before."""
    normed = made(layer, init_std=std)
    x = 3 + 2 * torch.randn(size, generator=rng(3))
    normed.fit(x)
    y = normed(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(y.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(1, correction=0), torch.full((4,), std), rtol=1e-4, atol=0)


def test_a_unit_that_says_the_same_of_every_input_keeps_its_gain() -> None:
    normed = WeightNorm(nn.Linear(2, 3))
    normed.fit(torch.ones(5, 2))
    assert torch.equal(normed.gain, torch.ones(3))
    torch.testing.assert_close(normed(torch.ones(5, 2)), torch.zeros(5, 3))


def test_layers_are_fitted_one_after_the_other_to_what_reaches_them() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(WeightNorm(nn.Linear(6, 8)), nn.ReLU(), WeightNorm(nn.Linear(8, 5)), nn.ReLU())
    x = 5 + torch.randn(64, 6, generator=rng(4))
    initialise(network, lambda: network.forward(x))
    for depth in (1, 3):
        outputs = network[:depth](x)
        torch.testing.assert_close(outputs.mean(0), torch.zeros(outputs.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(outputs.std(0, correction=0), torch.ones(outputs.shape[1]), rtol=1e-4, atol=0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network(x + 1)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items()), "once, not ever after"


def test_a_frozen_gain_is_a_buffer_and_a_learnt_one_a_parameter() -> None:
    frozen, learnt = WeightNorm(nn.Linear(2, 3)), WeightNorm(nn.Linear(2, 3), learn_gain=True)
    assert {name for name, _ in frozen.named_parameters()} == {"layer.weight", "layer.bias"}
    assert {name for name, _ in learnt.named_parameters()} == {"layer.weight", "layer.bias", "gain"}
    assert [*frozen.state_dict()] and "gain" in frozen.state_dict()


def test_the_gradient_of_v_is_perpendicular_to_v_and_that_of_the_gain_is_along_it() -> None:
    """Section 2.1 of the paper, with the gradient with respect to the weight in autograd's own words."""
    torch.manual_seed(0)
    normed = made(nn.Linear(4, 3), learn_gain=True)
    nn.init.normal_(normed.layer.weight, 0.0, 3.0)  # long enough for the epsilon under the root not to matter
    x, target = torch.randn(7, 4, generator=rng(5)), torch.randn(7, 3, generator=rng(6))
    weight = normed.weight().detach().requires_grad_()
    (of_weight,) = torch.autograd.grad(((F.linear(x, weight, normed.layer.bias) - target) ** 2).sum(), weight)
    ((normed(x) - target) ** 2).sum().backward()
    v, gradient = normed.layer.weight.detach(), normed.layer.weight.grad
    assert gradient is not None
    torch.testing.assert_close((v * gradient).sum(1), torch.zeros(3), atol=1e-4, rtol=0)
    along: Tensor = (of_weight * v).sum(1) / v.norm(dim=1)
    torch.testing.assert_close(normed.gain.grad, along, rtol=1e-4, atol=1e-5)
