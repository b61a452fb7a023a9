"""Parts of Improved GAN and of its successors: each against its equation, in the plainest other way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from models.gan.augment import CHANGES, Change, augment, colour, cutout, translation
from models.gan.historical import HistoricalAverage
from models.gan.minibatch import MinibatchDiscrimination, closeness
from models.gan.virtual_batch_norm import EPS, VirtualBatchNorm


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- minibatch discrimination


def by_double_loop(m: Tensor) -> Tensor:
    n, kernels, _ = m.shape
    o = torch.zeros(n, kernels)
    for i in range(n):
        for b in range(kernels):
            for j in range(n):
                if j != i:
                    o[i, b] += math.exp(-float((m[i, b] - m[j, b]).detach().abs().sum()))
    return o


def test_closeness_is_a_sum_over_the_others_of_the_batch() -> None:
    m = 0.5 * torch.randn(6, 3, 4, generator=rng())
    torch.testing.assert_close(closeness(m), by_double_loop(m))


def test_minibatch_features_stand_behind_the_features_and_come_from_the_papers_tensor() -> None:
    torch.manual_seed(0)
    layer = MinibatchDiscrimination(5, kernels=3, dimensions=2)
    f = torch.randn(4, 5, generator=rng())
    t = layer.t.weight.T.unflatten(1, (3, 2))  # A x B x C
    out = layer(f)
    assert torch.equal(out[:, :5], f)
    torch.testing.assert_close(out[:, 5:], by_double_loop(torch.einsum("na,abc->nbc", f, t)))


def test_equal_images_are_as_close_as_can_be_and_one_alone_has_none() -> None:
    torch.testing.assert_close(closeness(torch.ones(7, 2, 3)), torch.full((7, 2), 6.0))
    assert torch.equal(closeness(torch.ones(1, 2, 3)), torch.zeros(1, 2))


# --- historical averaging


def test_the_mean_is_that_of_all_weights_so_far_and_the_gradient_leads_to_it() -> None:
    network = nn.Linear(2, 1, bias=False)
    history = HistoricalAverage(network)
    path = torch.tensor([[1.0, 0.0], [4.0, 2.0], [1.0, 4.0]])
    for weights in path:
        with torch.no_grad():
            network.weight.copy_(weights)
        history.add(network)
    distance = history.distance(network)  # of (1, 4) from the mean (2, 2)
    assert distance.item() == pytest.approx(1 + 4)
    torch.testing.assert_close(torch.autograd.grad(distance, network.weight)[0], torch.tensor([[-2.0, 4.0]]))
    assert int(history.updates) == 3


def test_history_comes_back_by_its_state_alone() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    history, again = HistoricalAverage(network), HistoricalAverage(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)))
    for _ in range(3):
        history.add(network)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.5)
    again.load_state_dict(history.state_dict())
    assert [*history.parameters()] == []
    for one in (history, again):
        one.add(network)
    assert history.distance(network) > 0 and torch.equal(history.distance(network), again.distance(network))


# --- norms


def test_virtual_batch_norm_is_batch_norm_where_every_image_has_the_moments_of_the_reference() -> None:
    """The reference is normalised by its own moments; of images that are alike all over, mixing changes no moment."""
    torch.manual_seed(0)
    norm, plain = VirtualBatchNorm(3), nn.BatchNorm2d(3, eps=EPS, track_running_stats=False)
    plain.load_state_dict({"weight": norm.gamma, "bias": norm.beta})
    r = torch.randn(1, 3, 4, 4, generator=rng()).repeat(6, 1, 1, 1)
    x, reference = norm(r, r)
    torch.testing.assert_close(x, plain(r))
    torch.testing.assert_close(reference, plain(r))
    various = torch.randn(6, 3, 4, 4, generator=rng(1))
    torch.testing.assert_close(norm(r, various)[1], plain(various))


def test_spectral_norm_is_the_largest_singular_value() -> None:
    torch.manual_seed(0)
    conv = spectral_norm(nn.Conv2d(3, 8, 5, bias=False))
    for _ in range(200):
        conv(torch.zeros(1, 3, 5, 5))  # one power iteration a pass
    v = conv.parametrizations["weight"].original.detach()
    largest = torch.linalg.svdvals(v.flatten(1))[0]
    torch.testing.assert_close(conv.weight.detach(), v / largest, rtol=1e-4, atol=1e-6)


# --- augmentation


def ramp(n: int = 6, side: int = 8) -> Tensor:
    """Every pixel another value, none of them 0."""
    return (torch.arange(n * 2 * side * side, dtype=torch.float32) + 1).view(n, 2, side, side) / (2 * n * side * side)


@pytest.mark.parametrize("change", CHANGES)
def test_at_probability_zero_images_stay_as_they_are_and_at_one_none_does(change: Change) -> None:
    x = ramp(64)
    assert torch.equal(augment(x, [change], 0.0, rng()), x)
    moved = (augment(x, [change], 1.0, rng()) != x).flatten(1).any(1)
    assert moved.float().mean() > 0.85  # one translation in nine is by nothing
    some = (augment(x, [change], 0.3, rng(1)) != x).flatten(1).any(1).float().mean()
    assert 0.1 < some < 0.5


@pytest.mark.parametrize("change", CHANGES)
def test_gradients_flow_through_and_are_autograds_own(change: Change) -> None:
    x = torch.randn(3, 2, 8, 8, generator=rng(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: CHANGES[change](y, rng(4)), x)
    assert torch.autograd.gradgradcheck(
        lambda y: CHANGES[change](y, rng(4)).square(), x[:1, :, :4, :4].detach().requires_grad_()
    )


def test_a_translation_moves_whole_images_by_an_eighth_at_most_and_lets_in_black() -> None:
    x = ramp(40)
    seen = set()
    for before, after in zip(x, translation(x, rng()), strict=True):
        fitting = []
        for down in (-1, 0, 1):
            for across in (-1, 0, 1):
                moved = torch.zeros(2, 10, 10)
                moved[:, 1 + down : 9 + down, 1 + across : 9 + across] = before
                if torch.equal(moved[:, 1:9, 1:9], after):
                    fitting.append((down, across))
        assert len(fitting) == 1
        seen.update(fitting)
    assert len(seen) == 9


def test_a_cutout_is_one_square_of_half_the_side_cut_off_at_the_border() -> None:
    x = ramp(300)
    hidden = cutout(x, rng()) == 0
    assert torch.equal(cutout(x, rng())[~hidden], x[~hidden])
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    sizes = set()
    for mask in hidden[:, 0]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
        assert mask.sum() == height * width
        sizes.add(height)
        assert 2 <= width <= 4
    assert sizes == {2, 3, 4}


def test_colours_change_by_brightness_saturation_and_contrast_in_the_papers_ranges() -> None:
    """Of a grey image of value v, saturation and contrast do nothing: v + b. Two pixels show each of them."""
    grey = torch.full((500, 3, 2, 2), 0.25)
    b = colour(grey, rng())[:, 0, 0, 0] - 0.25
    assert -0.5 <= b.min() < -0.48 and 0.48 < b.max() <= 0.5
    x = torch.zeros(500, 3, 1, 2)
    x[:, 0, :, 0], x[:, :, :, 1] = 0.3, 0.6  # means over channels .1 and .6
    changed = colour(x, rng(1))
    contrast = (changed.mean(1)[:, 0, 1] - changed.mean(1)[:, 0, 0]) / 0.5
    saturation = (changed[:, 0, 0, 0] - changed[:, 1, 0, 0]) / 0.3 / contrast
    assert 0.5 <= contrast.min() < 0.52 and 1.48 < contrast.max() <= 1.5 + 1e-5
    assert -1e-5 <= saturation.min() < 0.05 and 1.95 < saturation.max() <= 2 + 1e-4
