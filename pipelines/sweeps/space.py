"""Search spaces: which fields of a recipe vary, and between what. A space is a file or one that is known by name.

    {"model.learning_rate": {"low": 1e-5, "high": 1e-2, "log": true},
     "training.batch_size": {"choices": [32, 64, 128]},
     "model.discriminator_steps": {"low": 1, "high": 5}}

A field is named by its path in the spec, as on the command line. Every value is checked against the field's own type
before anything starts; whether settings go together is told by the model, one trial at a time.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pipelines.config import RunSpec
from pipelines.errors import FigmentError

SECTIONS = ("model", "data", "training", "visuals", "cluster")
_KEYS = {"low", "high", "log"}


@dataclass(frozen=True)
class Between:
    """Numbers from low to high, both among them."""

    low: float
    high: float
    log: bool = False
    """Whether their logarithms are drawn evenly."""


@dataclass(frozen=True)
class OneOf:
    values: tuple[Any, ...]


Variable = Between | OneOf
Space = Mapping[str, Variable]
"""Path of a field -> what it varies between."""

GAN_STABILITY: Space = {
    "model.learning_rate": Between(5e-5, 2e-3, log=True),
    "model.discriminator_learning_rate": Between(5e-5, 2e-3, log=True),
    "model.beta1": OneOf((0.0, 0.5, 0.9)),
    "model.discriminator_steps": OneOf((1, 2)),
    "model.loss": OneOf(("non-saturating", "hinge", "wasserstein", "relativistic")),
    "model.real_label": OneOf((1.0, 0.9)),
    "model.penalty": OneOf(("none", "r1", "r1+r2", "wgan-gp")),
    "model.penalty_weight": Between(0.05, 20.0, log=True),
    "model.discriminator_norm": OneOf(("batch", "virtual", "spectral", "weight", "none")),
    "model.generator_norm": OneOf(("batch", "virtual")),
    "model.minibatch_kernels": OneOf((0, 32)),
    "model.feature_matching": OneOf((False, True)),
    "model.historical_weight": OneOf((0.0, 1e-3)),
    "model.augment": OneOf(((), ("translation",), ("colour", "translation", "cutout"))),
    "model.discriminator_width": OneOf((16, 32, 64)),
    "training.batch_size": OneOf((32, 64, 128)),
}
"""Of DCGAN: both step sizes, the game, what bounds and what normalises D, and the techniques of Improved GAN. D's width
varies while G's stays."""

NAMED: Mapping[str, Space] = {"gan-stability": GAN_STABILITY}


def space_from_text(text: str, name: str) -> dict[str, Variable]:
    """From the JSON of a file called `name`. `FigmentError` where it is none, or a range is empty."""
    try:
        body = json.loads(text)
    except ValueError as error:
        raise FigmentError(f"{name} is no JSON: {error}") from error
    if not isinstance(body, dict) or not body:
        raise FigmentError(f"{name} names no field: it is to be an object of field paths and what they vary between")
    return {path: _variable(given, f"{name}: {path}") for path, given in body.items()}


def _variable(given: Any, where: str) -> Variable:
    if isinstance(given, dict) and given.keys() == {"choices"} and isinstance(given["choices"], list):
        return OneOf(tuple(tuple(v) if isinstance(v, list) else v for v in given["choices"]))
    if isinstance(given, dict) and {"low", "high"} <= given.keys() <= _KEYS:
        low, high, log = given["low"], given["high"], given.get("log", False)
        if _is_number(low) and _is_number(high) and isinstance(log, bool):
            return Between(low, high, log)
    raise FigmentError(f'{where} is {json.dumps(given)}: use {{"choices": […]}} or {{"low": …, "high": …, "log": …}}')


def check_space(space: Space, spec: RunSpec) -> None:
    """`FigmentError` for a field that the recipe has not, by name with the nearest one; for a range that is empty, and
    for values that are none of its field."""
    for path, variable in space.items():
        kind = _kind(spec, path)
        match variable:
            case OneOf(values):
                if not values:
                    raise FigmentError(f"{path} has no choices")
                if len(set(map(repr, values))) < len(values):
                    raise FigmentError(f"{path} has a choice twice: {', '.join(map(repr, values))}")
                for value in values:
                    if not _is_a(value, kind):
                        raise FigmentError(f"{path} cannot be {value!r}: {_in_words(kind)} is expected")
            case Between(low, high, log):
                if not (math.isfinite(low) and math.isfinite(high) and low < high):
                    raise FigmentError(f"{path} lies between {low:g} and {high:g}: nothing, or one value alone")
                if log and low <= 0:
                    raise FigmentError(f"{path} begins at {low:g}: the logarithm wants a low end above 0")
                if not _is_a(low, kind) or not _is_a(high, kind) or isinstance(low, bool):
                    raise FigmentError(f"{path} cannot lie between {low!r} and {high!r}: {_in_words(kind)} is expected")


def is_whole(spec: RunSpec, path: str) -> bool:
    """Whether a field's numbers are whole ones."""
    return not _is_a(0.5, _kind(spec, path))


def with_values(spec: RunSpec, values: Mapping[str, Any]) -> RunSpec:
    """The spec with these fields changed; `FigmentError` for a value that is none of its field."""
    for path, given in values.items():
        kind = _kind(spec, path)
        value: Any = tuple(given) if isinstance(given, list) else given
        if not _is_a(value, kind):
            raise FigmentError(f"{path} cannot be {value!r}: {_in_words(kind)} is expected")
        section, _, field = path.partition(".")
        if _is_number(value) and _is_a(0.5, kind):
            value = float(value)
        spec = replace(spec, **{section: replace(getattr(spec, section), **{field: value})})
    return spec


def _kind(spec: RunSpec, path: str) -> Any:
    """The type of a field."""
    known = {
        f"{section}.{field.name}": hint for section in SECTIONS for field, hint in _fields(type(getattr(spec, section)))
    }
    if path not in known:
        near = difflib.get_close_matches(path, known, n=1) or difflib.get_close_matches(f"model.{path}", known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise FigmentError(f"recipe {spec.recipe!r} has no field {path!r}; {hint}see jobs.train {spec.recipe} --help")
    return known[path]


def _fields(section: type[Any]) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = get_type_hints(section)
    return [(field, hints[field.name]) for field in dataclasses.fields(section)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a field of this type may be `value`; a whole number is a float too, a truth value is no number."""
    origin = get_origin(kind)
    if origin is Literal:
        return any(value == known and type(value) is type(known) for known in get_args(kind))
    if origin in (Union, types.UnionType):
        return any(_is_a(value, part) for part in get_args(kind))
    if origin is tuple:
        of, *rest = get_args(kind)
        return isinstance(value, tuple) and rest == [Ellipsis] and all(_is_a(item, of) for item in value)
    if kind is float:
        return _is_number(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _in_words(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(part) for part in get_args(kind))
    if origin is tuple:
        return f"a list, each {_in_words(get_args(kind)[0])}"
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a word", type(None): "null"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))
