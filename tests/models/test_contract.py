"""What the loop relies on, for every registered model: each test runs on each of them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from models import MODELS, dcgan, vae
from models.contract import (
    UNKNOWN,
    Batch,
    Classifies,
    Embeds,
    Evaluates,
    Exports,
    ExportsClassifier,
    ImageShape,
    Learner,
    Measures,
    Reconstructs,
    Samples,
    Traverses,
)
from tests.models.cases import CAPABILITIES, CASES, Case


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def able(capability: type) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [case for case in CASES.values() if capability in case.can])


def make(case: Case, seed: int = 0) -> Learner:
    torch.manual_seed(seed)
    return models.build(case.config, case.shape)


def samples_of(learner: Learner, n: int, generator: torch.Generator) -> Tensor:
    assert isinstance(learner, Samples)
    return learner.sample(n, generator)


def images(shape: ImageShape, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, shape.channels, shape.height, shape.width), generator=generator, dtype=torch.uint8)


def batch(shape: ImageShape, n: int = 8, seed: int = 0) -> Batch:
    return Batch(images(shape, n, seed), torch.zeros(n, dtype=torch.int64), 0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(learner: Learner) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, network in learner.networks().items()
        for key, value in network.state_dict().items()
    }


def buffers(learner: Learner) -> set[str]:
    return {f"{name}.{key}" for name, network in learner.networks().items() for key, _ in network.named_buffers()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_every_registered_model_is_among_the_cases() -> None:
    assert {models.name_of(case.config) for case in CASES.values()} == set(MODELS)


def test_a_foreign_config_has_no_name() -> None:
    with pytest.raises(ValueError, match="registered"):
        models.name_of("dcgan")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "field"),
    [(dcgan.Config(generator_width=0), "generator_width"), (vae.Config(evaluation_draws=-2), "evaluation_draws")],
)
def test_a_size_below_one_is_refused_by_name(config: Any, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} is "):
        models.build(config, ImageShape(1, 8, 8))


def test_steps_change_every_parameter_of_every_network_and_give_finite_detached_scalars(case: Case) -> None:
    """Two of them: where the last weight of a residual branch starts at 0, the first step moves nothing before it."""
    learner = make(case)
    before = weights(learner)
    for seed in range(2):
        metrics = learner.step(batch(case.shape, seed=seed), rng(seed))
    after = weights(learner)
    assert {key for key in before if torch.equal(before[key], after[key])} <= buffers(learner)
    for value in metrics.values():
        assert value.shape == ()
        assert not value.requires_grad
        assert value.isfinite()


def test_optimisers_hold_each_parameter_of_the_networks_once(case: Case) -> None:
    learner = make(case)
    owned = [p for o in learner.optimizers().values() for group in o.param_groups for p in group["params"]]
    expected = [p for network in learner.networks().values() for p in network.parameters()]
    assert len(owned) == len({id(p) for p in owned})
    assert {id(p) for p in owned} == {id(p) for p in expected}


def test_each_optimiser_steps_once_a_batch_with_a_gradient_for_each_parameter(case: Case) -> None:
    """The loop averages, checks and clips in hooks that run before each optimiser step, so gradients must be there."""
    learner = make(case)
    seen: list[str] = []

    def hook(name: str) -> Any:
        def check(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            assert all(p.grad is not None for group in optimizer.param_groups for p in group["params"])
            seen.append(name)

        return check

    for name, optimizer in learner.optimizers().items():
        optimizer.register_step_pre_hook(hook(name))
    learner.step(batch(case.shape), rng())
    assert sorted(seen) == sorted(learner.optimizers())


def test_all_randomness_of_a_step_is_the_generators(case: Case) -> None:
    results = []
    for noise in range(2):
        learner, generator = make(case), rng(5)
        torch.manual_seed(100 + noise)
        for seed in range(2):
            learner.step(batch(case.shape, seed=seed), generator)
        results.append(weights(learner))
    assert equal(*results)

    other = make(case)
    for seed in range(2):
        other.step(batch(case.shape, seed=seed), rng(6))
    assert not equal(results[0], weights(other))


def test_going_on_from_saved_networks_and_optimisers_is_going_on(case: Case) -> None:
    straight = make(case)
    straight.step(batch(case.shape), rng(1))
    saved = copy.deepcopy(
        (
            {name: network.state_dict() for name, network in straight.networks().items()},
            {name: optimizer.state_dict() for name, optimizer in straight.optimizers().items()},
        )
    )
    straight.step(batch(case.shape, seed=1), rng(2))

    resumed = make(case, seed=9)
    for name, network in resumed.networks().items():
        network.load_state_dict(saved[0][name])
    for name, optimizer in resumed.optimizers().items():
        optimizer.load_state_dict(saved[1][name])
    resumed.step(batch(case.shape, seed=1), rng(2))
    assert equal(weights(straight), weights(resumed))


def test_no_buffer_of_a_network_depends_on_the_worker(case: Case) -> None:
    """Workers have other images and other noise, and the same gradients, since those are averaged: with these, a step
    must leave the same buffers. So batch statistics are not kept; averages of weights may be."""
    kept = []
    for seed in range(2):
        learner = make(case)
        for optimizer in learner.optimizers().values():
            optimizer.register_step_pre_hook(average_of_all_workers)
        for step in range(2):
            learner.step(batch(case.shape, seed=10 * seed + step), rng(seed))
        kept.append({key: value for key, value in weights(learner).items() if key in buffers(learner)})
    assert equal(*kept)


def average_of_all_workers(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Stands for it: any gradient that is the same on each of them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)


@able(Samples)
def test_samples_are_a_function_of_the_generator_and_image_i_is_the_same_whatever_n(case: Case) -> None:
    learner = make(case)
    shape = case.shape
    many = samples_of(learner, 130, rng(3))
    assert many.dtype == torch.uint8
    assert many.shape == (130, shape.channels, shape.height, shape.width)
    for n in (1, 2, 17, 128, 130):
        assert torch.equal(samples_of(learner, n, rng(3)), many[:n])
    assert not torch.equal(samples_of(learner, 130, rng(4)), many)


def test_every_model_has_something_to_show(case: Case) -> None:
    """A picture of a run: samples, or the classes of held-out images."""
    assert isinstance(make(case), Samples | Classifies)


def test_sampling_leaves_weights_and_modes_alone(case: Case) -> None:
    learner = make(case)
    before, modes = weights(learner), [n.training for n in learner.networks().values()]
    if isinstance(learner, Samples):
        learner.sample(3, rng())
    if isinstance(learner, Exports):
        learner.export(rng())
    if isinstance(learner, ExportsClassifier):
        learner.export_classifier()
    assert equal(before, weights(learner))
    assert modes == [n.training for n in learner.networks().values()]
    assert all(p.requires_grad for n in learner.networks().values() for p in n.parameters())


@able(Samples)
def test_sampling_uses_up_the_generator_alike_whatever_the_weights(case: Case) -> None:
    """The same latents for each picture of an animation."""
    states = []
    for seed in range(2):
        generator = rng(3)
        samples_of(make(case, seed), 5, generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


@able(Samples)
@pytest.mark.parametrize("n", [0, -1])
def test_sampling_none_is_refused(case: Case, n: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        samples_of(make(case), n, rng())


@able(Exports)
def test_the_published_module_takes_any_batch_through_torch_export(case: Case) -> None:
    learner = make(case)
    assert isinstance(learner, Exports)
    module, latents = learner.export(rng())
    assert not module.training
    program = torch.export.export(module, (latents,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for n in (1, 5):
        z = torch.rand(n, latents.shape[1], generator=rng(n)) * 2 - 1
        drawn = module(z)
        assert drawn.shape == (n, case.shape.channels, case.shape.height, case.shape.width)
        assert drawn.min() >= 0
        assert drawn.max() <= 1
        torch.testing.assert_close(program.module()(z), drawn)
        torch.testing.assert_close(module(z[:1]), drawn[:1])  # no image depends on its neighbours


@able(Exports)
def test_the_published_module_does_not_follow_the_training(case: Case) -> None:
    learner = make(case)
    assert isinstance(learner, Exports)
    module, latents = learner.export(rng())
    before = module(latents)
    learner.step(batch(case.shape), rng())
    assert torch.equal(module(latents), before)


def test_networks_may_be_compiled_in_place(case: Case) -> None:
    plain, compiled = make(case), make(case)
    for network in compiled.networks().values():
        network.compile(backend="eager")
    for learner in (plain, compiled):
        learner.step(batch(case.shape), rng())
    assert weights(plain).keys() == weights(compiled).keys()
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(compiled)[key], value)
    if isinstance(compiled, Exports):
        assert isinstance(compiled.export(rng())[0], nn.Module)


def test_bfloat16_autocast_trains(case: Case) -> None:
    learner = make(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metrics = learner.step(batch(case.shape), rng())
    assert all(value.isfinite() and value.dtype == torch.float32 for value in metrics.values())
    assert all(value.isfinite().all() for value in weights(learner).values())


@able(Evaluates)
def test_evaluation_gives_one_value_an_image(case: Case) -> None:
    learner = make(case)
    assert isinstance(learner, Evaluates)
    for value in learner.evaluate(batch(case.shape, 5), rng()).values():
        assert value.shape == (5,)
        assert not value.requires_grad


@able(Embeds)
def test_features_of_an_image_depend_on_no_other_image(case: Case) -> None:
    learner = make(case)
    assert isinstance(learner, Embeds)
    x = images(case.shape, 5)
    features, logits = learner.features(x)
    assert (features.dtype, logits.dtype) == (torch.float32, torch.float32) and len(features) == len(logits) == 5
    for i in range(5):
        alone, said = learner.features(x[i : i + 1])
        torch.testing.assert_close(alone, features[i : i + 1])
        torch.testing.assert_close(said, logits[i : i + 1])


@able(Reconstructs)
def test_reconstructions_are_images(case: Case) -> None:
    learner = make(case)
    assert isinstance(learner, Reconstructs)
    x = images(case.shape, 5)
    again = learner.reconstruct(x, rng())
    assert (again.shape, again.dtype) == (x.shape, torch.uint8)


@able(Traverses)
def test_walks_are_rows_of_images(case: Case) -> None:
    learner = make(case)
    assert isinstance(learner, Traverses)
    walk = learner.traverse(6, 3, rng())
    shape = case.shape
    assert (walk.images.shape, walk.images.dtype) == ((6, 3, shape.channels, shape.height, shape.width), torch.uint8)
    assert len(walk.titles) == 6


@able(Measures)
@pytest.mark.parametrize("labels", [(0, 1, 2, 0, 1), (1, 1, 1, 1, 1), (UNKNOWN,) * 5])
def test_what_is_measured_of_codes_is_finite_whatever_the_labels(labels: tuple[int, ...], case: Case) -> None:
    learner = make(case)
    assert isinstance(learner, Measures)
    factors = torch.rand(5, 3, generator=rng(2))
    factors[:, 2] = 0.5  # one that does not vary
    for columns in ({}, {"factors": factors}):
        given = Batch(images(case.shape, 5), torch.tensor(labels), 0, columns)
        codes = learner.encode(given, rng())
        assert all(len(code) == 5 and not code.requires_grad for code in codes.values())
        figures = learner.measure(codes, given.labels, given.columns)
        assert all(isinstance(value, float) and math.isfinite(value) for value in figures.values()), figures


def test_a_learner_can_do_what_its_case_says_and_nothing_else(case: Case) -> None:
    learner = make(case)
    assert {capability for capability in CAPABILITIES if isinstance(learner, capability)} == case.can
