"""Gradients between `backward()` and `step()`: averaging over real processes, the finite check, clipping; and what else
workers do together."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import models
from models.contract import Batch
from models.vae import vae
from pipelines.training.collectives import broadcast_from_first, from_first, gather
from pipelines.training.gradients import NonFiniteError, guard_optimizers
from pipelines.training.worker import Meter
from tests.models.cases import CASES
from tests.pipelines.training.pair import Pair


def _vae_gradients(images: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """d/dθ of the mean negative ELBO of `images` under the noise given, at seed-0 weights; averaged over workers."""
    torch.manual_seed(0)
    config = vae.Config(hidden=16, latent=3)
    network = nn.ModuleDict({"encoder": vae.Encoder(config, 36), "decoder": vae.BernoulliDecoder(config, 36)})
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    guard_optimizers({"vae": network}, {"sgd": optimizer}, grad_clip=None, where=lambda: "step 1")
    x = (images.flatten(1) > 127).float()
    mu, log_var = network["encoder"](x)
    z = mu + (log_var / 2).exp() * noise
    loss = (vae.kl_to_prior(mu, log_var) - network["decoder"].log_likelihood(x, z[None])[0]).mean()
    loss.backward()
    optimizer.step()
    return {name: p.grad.clone() for name, p in network.named_parameters()}


def _half_batch(rank: int, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
    own = slice(rank * len(images) // 2, (rank + 1) * len(images) // 2)
    return _vae_gradients(images[own], noise[own])


def test_two_workers_with_half_the_batch_have_the_gradients_of_one_with_all_of_it(pair: Pair) -> None:
    images = torch.randint(0, 256, (16, 1, 6, 6), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    noise = torch.randn(16, 3, generator=torch.Generator().manual_seed(2))
    whole = _vae_gradients(images, noise)
    halves = pair.run(_half_batch, images, noise)
    for name, gradient in whole.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(halves[0][name], gradient, rtol=1e-5, atol=1e-7)
        assert torch.equal(halves[0][name], halves[1][name]), name


def _train(rank: int, name: str) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(rank)  # other weights on each worker, until the first one's are sent to all
    shape = CASES[name].shape
    learner = models.build(CASES[name].config, shape)
    broadcast_from_first(learner.networks())
    guard_optimizers(learner.networks(), learner.optimizers(), grad_clip=None, where=lambda: "step")
    rng = torch.Generator().manual_seed(rank)
    for _ in range(3):
        images = torch.randint(0, 256, (6, shape.channels, shape.height, shape.width), generator=rng).to(torch.uint8)
        learner.step(Batch(images, torch.zeros(6, dtype=torch.long), 0), rng)
    return {name: network.state_dict() for name, network in learner.networks().items()}


@pytest.mark.parametrize("name", CASES)
def test_every_network_stays_equal_on_all_workers_while_their_data_differ(name: str, pair: Pair) -> None:
    first, second = pair.run(_train, name)
    for network, tensors in first.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, second[network][key]), (network, key)


def _branches(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Three weights of 1: the first has the gradient 2 on both workers, the second 6 on the second worker alone, the
    third on none."""
    net = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in ("both", "one", "none")})
    adam = torch.optim.Adam(net.parameters(), lr=0.1)
    sgd = torch.optim.SGD(net.parameters(), lr=0.5, weight_decay=0.1)
    guard_optimizers({"net": net}, {"adam": adam, "sgd": sgd}, grad_clip=None, where=lambda: "step 1")
    loss = 2 * net["both"].sum() + (6 * net["one"].sum() if rank == 1 else 0)
    loss.backward()
    sgd.step()
    after_one = {name: p.detach().clone() for name, p in net.items()}
    for _ in range(3):
        for p in net.values():
            p.grad = None
        (2 * net["both"].sum() + (6 * net["one"].sum() if rank == 1 else 0)).backward()
        adam.step()
    return after_one, {name: p.detach() for name, p in net.items()}


def test_a_gradient_that_some_workers_lack_counts_as_zero_there_and_one_that_all_lack_leaves_the_weight(
    pair: Pair,
) -> None:
    (first, later), (second, later_second) = pair.run(_branches)
    decay = 0.1
    torch.testing.assert_close(first["both"], torch.full((2,), 1 - 0.5 * (2 + decay)))
    torch.testing.assert_close(first["one"], torch.full((2,), 1 - 0.5 * (3 + decay)))  # the mean of 0 and 6
    assert torch.equal(first["none"], torch.ones(2)), "left alone: not even its weight decays"
    for name in first:
        assert torch.equal(first[name], second[name]), name
        assert torch.equal(later[name], later_second[name]), name
    assert not torch.equal(later["one"], first["one"])


def _together(rank: int) -> tuple[list[dict[str, int]], str, float, dict[str, float]]:
    meter = Meter(0)
    meter.add({"loss": torch.tensor(1.0 + 2 * rank)})
    meter.add({"loss": torch.tensor(3.0 + 4 * rank), f"of {rank}": torch.tensor(10.0 + rank)})
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, 5.0 + rank)
    broadcast_from_first({"layer": layer})
    return gather({"rank": rank}), from_first(f"of {rank}"), layer.weight.item(), meter.read(20, 0.0)


def test_workers_see_each_others_values_and_log_their_common_mean(pair: Pair) -> None:
    for everyone, from_the_first, weight, means in pair.run(_together):
        assert everyone == [{"rank": 0}, {"rank": 1}]
        assert (from_the_first, weight) == ("of 0", 5.0)
        assert means["loss"] == pytest.approx((1 + 3 + 3 + 7) / 4)
        assert (means["of 0"], means["of 1"]) == (10.0, 11.0), "a mean over the steps and workers that have the metric"


@pytest.fixture
def line() -> tuple[nn.Linear, torch.optim.SGD]:
    layer = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(layer.weight)
    return layer, torch.optim.SGD(layer.parameters(), lr=1.0)


def test_a_gradient_longer_than_the_clip_keeps_its_direction_and_gets_its_length(
    line: tuple[nn.Linear, torch.optim.SGD],
) -> None:
    layer, optimizer = line
    guard_optimizers({"net": layer}, {"sgd": optimizer}, grad_clip=1.0, where=lambda: "step 1")
    layer(torch.tensor([[3.0, 4.0]])).sum().backward()  # gradient (3, 4), length 5
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([[-0.6, -0.8]]))


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "NaN"), (math.inf, "infinite")])
def test_a_gradient_that_is_not_finite_stops_before_the_update_and_is_named(
    line: tuple[nn.Linear, torch.optim.SGD], value: float, kind: str
) -> None:
    layer, optimizer = line
    guard_optimizers({"critic": layer}, {"sgd": optimizer}, grad_clip=None, where=lambda: "step 7 (640 images seen)")
    layer(torch.tensor([[value, 1.0]])).sum().backward()
    with pytest.raises(NonFiniteError, match=rf"step 7 \(640 images seen\).*critic\.weight is {kind}.*'sgd'"):
        optimizer.step()
    assert torch.equal(layer.weight.detach(), torch.zeros(1, 2))


def test_finite_gradients_whose_norm_overflows_are_refused_too(line: tuple[nn.Linear, torch.optim.SGD]) -> None:
    layer, optimizer = line
    guard_optimizers({"net": layer}, {"sgd": optimizer}, grad_clip=None, where=lambda: "step 1")
    layer(torch.tensor([[3e38, 3e38]])).sum().backward()
    with pytest.raises(NonFiniteError, match="overflowed"):
        optimizer.step()


@pytest.mark.parametrize(
    ("bad", "words"),
    [(1, "of net.0.weight is"), (2, "and of 1 more tensors is"), (3, "of net.0.weight and of 2 more tensors is")],
)
def test_the_first_of_several_bad_gradients_is_named_and_the_others_are_counted(bad: int, words: str) -> None:
    layers = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(4)])
    optimizer = torch.optim.SGD(layers.parameters(), lr=1.0)
    guard_optimizers({"net": layers}, {"sgd": optimizer}, grad_clip=None, where=lambda: "step 1")
    for i, parameter in enumerate(layers.parameters()):
        parameter.grad = torch.full((1, 1), math.nan if i < bad else 1.0)
    with pytest.raises(NonFiniteError, match=words):
        optimizer.step()
