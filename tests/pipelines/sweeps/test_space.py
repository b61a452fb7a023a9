"""Search spaces: fields by path, values of the field's own type, and what is wrong by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from models import dcgan
from pipelines.errors import FigmentError
from pipelines.recipes import RECIPES
from pipelines.sweeps.space import (
    GAN_STABILITY,
    NAMED,
    Between,
    OneOf,
    Variable,
    check_space,
    is_whole,
    space_from_text,
    with_values,
)

SPEC = RECIPES["dcgan-demo"]()


@pytest.mark.parametrize("name", NAMED)
def test_the_known_spaces_are_of_dcgan(name: str) -> None:
    check_space(NAMED[name], SPEC)
    assert len(NAMED[name]) >= 12


def test_every_choice_of_the_stability_space_can_be_set() -> None:
    for path, variable in GAN_STABILITY.items():
        values = variable.values if isinstance(variable, OneOf) else (variable.low, variable.high)
        for value in values:
            changed = with_values(SPEC, {path: value})
            section, _, field = path.partition(".")
            assert getattr(getattr(changed, section), field) == value
            assert with_values(changed, {path: getattr(getattr(SPEC, section), field)}) == SPEC


def test_a_file_says_the_same_as_the_code() -> None:
    text = json.dumps(
        {
            "model.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
            "model.discriminator_steps": {"low": 1, "high": 5},
            "model.augment": {"choices": [[], ["colour", "cutout"]]},
            "model.discriminator_learning_rate": {"choices": [None, 1e-3]},
        }
    )
    space = space_from_text(text, "space.json")
    assert space == {
        "model.learning_rate": Between(1e-5, 1e-2, log=True),
        "model.discriminator_steps": Between(1, 5),
        "model.augment": OneOf(((), ("colour", "cutout"))),
        "model.discriminator_learning_rate": OneOf((None, 1e-3)),
    }
    check_space(space, SPEC)
    assert is_whole(SPEC, "model.discriminator_steps") and not is_whole(SPEC, "model.learning_rate")
    assert not is_whole(SPEC, "model.discriminator_learning_rate")


def test_values_come_into_their_fields() -> None:
    changed = with_values(SPEC, {"model.beta1": 0, "model.augment": ["cutout"], "training.batch_size": 128})
    assert changed.model == replace(SPEC.model, beta1=0.0, augment=("cutout",))  # type: ignore[type-var]
    assert isinstance(changed.model, dcgan.Config) and isinstance(changed.model.beta1, float)
    assert changed.training == replace(SPEC.training, batch_size=128) and changed.data == SPEC.data


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"model.learning_rat": Between(0, 1)}, "no field 'model.learning_rat'; did you mean 'model.learning_rate'?"),
        ({"learning_rate": Between(0, 1)}, "did you mean 'model.learning_rate'?"),
        ({"recipe": OneOf(("a",))}, "no field 'recipe'"),
        ({"model.beta1": OneOf(())}, "has no choices"),
        ({"model.beta1": OneOf((0.5, 0.5))}, "a choice twice"),
        ({"model.beta1": OneOf(("x",))}, "model.beta1 cannot be 'x': a number is expected"),
        ({"model.beta1": OneOf((True,))}, "cannot be True: a number is expected"),
        ({"model.beta1": Between(0.9, 0.5)}, "between 0.9 and 0.5: nothing"),
        ({"model.beta1": Between(0.5, 0.5)}, "one value alone"),
        ({"model.beta1": Between(0.0, float("nan"))}, "nothing, or one value"),
        ({"model.learning_rate": Between(0.0, 1.0, log=True)}, "the logarithm wants a low end above 0"),
        ({"model.discriminator_steps": Between(1, 2.5)}, "between 1 and 2.5: a whole number is expected"),
        ({"model.loss": OneOf(("hing",))}, "cannot be 'hing': one of 'non-saturating', .*'hinge'"),
        ({"model.loss": Between(0, 1)}, "cannot lie between 0 and 1: one of"),
        ({"model.feature_matching": OneOf((1,))}, "cannot be 1: true or false is expected"),
        ({"model.augment": OneOf((("blur",),))}, "a list, each one of 'colour', 'translation', 'cutout' is expected"),
        ({"model.discriminator_learning_rate": OneOf(("x",))}, "a number or null is expected"),
    ],
)
def test_what_is_wrong_is_named(space: dict[str, Variable], words: str) -> None:
    with pytest.raises(FigmentError, match=words) as error:
        check_space(space, SPEC)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        *(3, [], {}, {"low": 1}, {"low": "a", "high": 2}, {"choices": 1}),
        *({"choices": [1], "low": 1}, {"low": 1, "high": 2, "log": 1}),
    ],
)
def test_other_files_are_refused(given: Any) -> None:
    with pytest.raises(FigmentError, match=r"s\.json: model\.beta1 is .*: use \{\"choices\""):
        space_from_text(json.dumps({"model.beta1": given}), "s.json")
    for text, words in (("{", "is no JSON"), ("[]", "names no field"), ("{}", "names no field")):
        with pytest.raises(FigmentError, match=words):
            space_from_text(text, "s.json")


def test_a_value_of_another_kind_is_not_set() -> None:
    with pytest.raises(FigmentError, match=r"cannot be 1\.5: a whole number"):
        with_values(SPEC, {"training.batch_size": 1.5})
