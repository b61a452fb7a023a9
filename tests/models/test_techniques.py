"""Which techniques of a GAN go together: every refusal with its reason, and every other pair in a step."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from models.contract import Batch, ImageShape
from models.gan.dcgan import Config, build
from models.gan.techniques import Techniques

R1 = {"penalty": "r1", "discriminator_norm": "none"}

# fmt: off
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"penalty": "r1"}, r"penalty r1 is a slope of D at one image, which a D with batch norm does not have"),
    ({"penalty": "wgan-gp", "discriminator_norm": "spectral", "minibatch_kernels": 3}, "penalty wgan-gp .* a D with minibatch features does not have"),  # noqa: E501
    ({"real_label": 0.9, "loss": "hinge"}, "D has no labels under loss hinge"),
    ({"real_label": 0.9, "loss": "wasserstein", "discriminator_norm": "spectral"}, "D has no labels under loss wasserstein"),  # noqa: E501
    ({"real_label": 0.9, "loss": "relativistic"}, "D has no labels under loss relativistic"),
    ({"feature_matching": True, "loss": "saturating"}, "both a loss of G, which has one"),
    ({"feature_matching": True, "classes": 3}, "never told of which one"),
    ({"loss": "wasserstein"}, "no lower end for a D whose slope nothing bounds"),
    ({"loss": "wasserstein", "discriminator_norm": "weight"}, "no lower end"),
    ({"loss": "wasserstein", "discriminator_norm": "spectral", "minibatch_kernels": 3}, "nothing bounds that of minibatch features"),  # noqa: E501
    ({"discriminator_norm": "virtual", "virtual_reference": 0}, "virtual_reference is 0; a virtual norm needs at least 1"),  # noqa: E501
    ({"generator_norm": "virtual", "virtual_reference": 0}, "virtual_reference is 0; a virtual norm needs at least 1"),
    ({"penalty_weight": 5.0}, "penalty_weight is 5.0, which does nothing without a penalty"),
    ({"minibatch_dimensions": 3}, "minibatch_dimensions is 3, which does nothing without minibatch_kernels"),
    ({"virtual_reference": 3}, "virtual_reference is 3, which does nothing without a virtual norm"),
    ({"learnt_gains": "all"}, "learnt_gains is all, which does nothing without discriminator_norm weight"),
    ({"augment_probability": 0.5}, "augment_probability is 0.5, which does nothing without augment"),
    ({"classes": 1}, "classes is 1; there must be 2 or more"),
    ({"classes": -1}, "classes is -1"),
    ({"minibatch_kernels": -1}, "minibatch_kernels is -1"),
    ({"minibatch_kernels": 3, "minibatch_dimensions": 0}, "minibatch_dimensions 0"),
    ({"discriminator_steps": 0}, "discriminator_steps is 0; it must be at least 1"),
    ({"real_label": 0.0}, "real_label is 0; it must be above 0 and at most 1"),
    ({"real_label": 1.2}, "real_label is 1.2"),
    ({"augment": ("cutout",), "augment_probability": 0.0}, "augment_probability is 0; it must be above 0"),
    ({**R1, "penalty_weight": 0.0}, "penalty_weight is 0; it must be above 0"),
    ({**R1, "penalty_weight": float("nan")}, "penalty_weight is nan"),
    ({"historical_weight": -1.0}, "historical_weight is -1; it must not be negative"),
    ({"discriminator_learning_rate": 0.0}, "discriminator_learning_rate is 0; it must be above 0, or None"),
    ({"augment": ("cutout", "cutout")}, "augment is cutout cutout; each change can be named once"),
]
# fmt: on


@pytest.mark.parametrize(
    ("settings", "words"), REFUSED, ids=lambda value: None if isinstance(value, str) else str(value)
)
def test_what_cannot_be_is_refused_with_the_reason(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refusal:
        Techniques(**settings).check()
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=words):
        build(Config(**settings), ImageShape(1, 8, 8))


def test_what_is_off_and_as_it_was_is_not_refused() -> None:
    Techniques().check()
    Techniques(penalty_weight=10.0, learnt_gains="last", virtual_reference=32).check()


# --- every pair

ON: list[dict[str, Any]] = [
    *({"loss": loss} for loss in ("saturating", "hinge", "wasserstein", "relativistic")),
    *({"penalty": penalty, "penalty_weight": 1.0} for penalty in ("r1", "r2", "r1+r2", "wgan-gp")),
    {"real_label": 0.9},
    {"minibatch_kernels": 3, "minibatch_dimensions": 2},
    {"feature_matching": True},
    {"historical_weight": 0.1},
    {"discriminator_norm": "virtual", "virtual_reference": 3},
    {"discriminator_norm": "weight"},
    {"discriminator_norm": "weight", "learnt_gains": "none"},
    {"discriminator_norm": "none"},
    {"generator_norm": "virtual", "virtual_reference": 3},
    {"discriminator_learning_rate": 1e-3},
    {"discriminator_steps": 2},
    {"augment": ("colour", "translation", "cutout")},
    {"classes": 3},
]
BASES: list[dict[str, Any]] = [{}, {"discriminator_norm": "spectral"}]  # many combinations need another than batch norm


def refusal(settings: tuple[tuple[str, Any], ...]) -> str | None:
    try:
        Techniques(**dict(settings)).check()
    except ValueError as error:
        return str(error)
    return None


@cache
def after_two_steps(settings: tuple[tuple[str, Any], ...]) -> dict[str, Tensor]:
    """Flat weights of each network: at the start and behind two steps; finite gradients on the way."""
    torch.manual_seed(0)
    config = Config(latent=4, generator_width=2, discriminator_width=2, l2=0.0, **dict(settings))
    model, generator = build(config, ImageShape(1, 16, 16)), torch.Generator().manual_seed(1)

    def flat() -> dict[str, Tensor]:
        networks = {"g": model.g, "d": model.d}
        return {k: torch.cat([p.detach().flatten() for p in n.parameters()]) for k, n in networks.items()}

    images = torch.randint(0, 256, (2, 8, 1, 16, 16), generator=generator, dtype=torch.uint8)
    model.initialise(Batch(images[0], torch.arange(8) % 3, 0), generator)
    start = flat()
    for seen, batch in enumerate(images):
        model.step(Batch(batch, torch.arange(8) % 3, 8 * seen), generator)
        for network in (model.g, model.d):
            for name, parameter in network.named_parameters():
                assert parameter.grad is not None and parameter.grad.isfinite().all(), (settings, name)
                if parameter.dim() > 1:  # the bias of a logit cancels in most games
                    assert parameter.grad.any(), (settings, name)
    end = flat()
    assert all(not torch.equal(start[name], end[name]) for name in start), settings
    assert all(value.isfinite().all() for value in end.values())
    return end


def key(*settings: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    merged: dict[str, Any] = {}
    for each in settings:
        merged |= each
    return tuple(sorted(merged.items()))


@pytest.mark.parametrize("base", BASES, ids=str)
def test_each_pair_is_refused_in_a_sentence_or_trains_both_networks_otherwise_than_either_alone(
    base: dict[str, Any],
) -> None:
    refused, trained = 0, 0
    for one, other in combinations(ON, 2):
        both = key(base, one, other)
        if both in (key(base, one), key(base, other)) or key(one, other) != key(other, one):
            continue  # two values of one setting are no pair
        why = refusal(both)
        if why is not None:
            refused += 1
            assert "\n" not in why and len(why) > 40, (both, why)
            continue
        trained += 1
        end = after_two_steps(both)
        for alone in (key(base, one), key(base, other)):
            if refusal(alone) is None:
                was = after_two_steps(alone)
                assert any(
                    end[name].shape != was[name].shape or not torch.equal(end[name], was[name]) for name in end
                ), f"{both} trains as {alone} does: one of the two does nothing"
    assert trained > refused
