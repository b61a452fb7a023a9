"""What a figure of samples depends on, as one line of text and back; two figures compare only where it agrees.

    fid-1 features=inception-2015:0123abcd resize=bicubic-299 samples=50000 real=cifar10@0123456789ab/train of=50000
        weights=averaged run=dcgan-cifar10 latents-seed=0                                  (one line, one space between)

The metric with its own settings comes first, as the metric's file under `models/metrics/` writes it; what follows is
the same for all. It belongs beside every figure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from pipelines.errors import FigmentError

NO_FEATURES = "none"
"""Of metrics that work on classes or pixels without a network, …"""
AS_THEY_ARE = "none"
"""… and of images that are not resized."""
WEIGHTS = ("averaged", "last")

_KEYS = {  # field -> its name in the text, in the order of the text; the metric comes before them, without one
    "features": "features",
    "resize": "resize",
    "samples": "samples",
    "data": "real",
    "real": "of",
    "weights": "weights",
    "run": "run",
    "seed": "latents-seed",
}
_MAY_DIFFER = ("run", "seed")


@dataclass(frozen=True)
class Protocol:
    """How a figure was measured."""

    metric: str
    """Name and version, and the settings that only it has: `kid-1 subsets=100 of=1000 subsets-seed=0`."""
    features: str
    """Feature network and digits of its weights' hash, `inception-2015:0123abcd`; `none`."""
    resize: str
    """Filter and side that images are brought to before the network, `bicubic-299`; `none`."""
    samples: int
    """Number of drawn images."""
    data: str
    """What they are compared with: `NAME@VERSION/SPLIT`."""
    real: int
    """Number of real images."""
    weights: str
    """`averaged` or `last`."""
    run: str
    """Which model drew."""
    seed: int
    """Of the latents."""

    def __post_init__(self) -> None:
        for name in ("features", "resize", "data", "run"):
            if not re.fullmatch(r"[^\s=]+", getattr(self, name)):
                raise FigmentError(f"protocol: {name} is {getattr(self, name)!r}, it is one word without '='")
        words = self.metric.split(" ")
        if not re.fullmatch(r"[a-z][a-z0-9-]*-\d+", words[0]):
            raise FigmentError(f"protocol: metric {self.metric!r} does not begin with a name and a version, like fid-1")
        if not all(re.fullmatch(r"[^\s=]+=[^\s=]+", word) for word in words[1:]):
            raise FigmentError(f"protocol: what follows the name in {self.metric!r} is not of the form setting=value")
        if re.search(r" features=", self.metric):
            raise FigmentError(f"protocol: {self.metric!r} says the features itself; they are a part of their own")
        if not re.fullmatch(r"[^@/]+@[^@/]+/[^@/]+", self.data):
            raise FigmentError(f"protocol: data is {self.data!r}, not NAME@VERSION/SPLIT")
        if self.weights not in WEIGHTS:
            raise FigmentError(f"protocol: weights are {' or '.join(WEIGHTS)}, not {self.weights!r}")
        if min(self.samples, self.real) < 1 or self.seed < 0:
            raise FigmentError("protocol: numbers of images are 1 or more, the seed is 0 or more")

    def __str__(self) -> str:
        return " ".join([self.metric, *(f"{key}={getattr(self, name)}" for name, key in _KEYS.items())])


def protocol_from_text(text: str) -> Protocol:
    """The inverse of `str`; `FigmentError` for what is no protocol."""
    metric, found, rest = text.partition(f" {_KEYS['features']}=")
    pairs = [word.partition("=") for word in (found + rest).split(" ")[1:]]
    if [key for key, _, _ in pairs] != [*_KEYS.values()]:
        raise FigmentError(f"{text!r} is no protocol: after the metric come {', '.join(_KEYS.values())}")
    given: dict[str, str | int] = dict(zip(_KEYS, (value for _, _, value in pairs), strict=True))
    for name in ("samples", "real", "seed"):
        if not re.fullmatch(r"\d+", str(given[name]), re.ASCII):
            raise FigmentError(f"{text!r} is no protocol: {_KEYS[name]} is {given[name]!r}, not a number")
        given[name] = int(given[name])
    return Protocol(metric=metric, **given)  # type: ignore[arg-type]


def difference(one: Protocol, other: Protocol) -> str:
    """One sentence that says why the two figures cannot be compared; "" where nothing differs but run and seed."""
    apart = [
        f"{_said(field.name)} {getattr(one, field.name)} and {getattr(other, field.name)}"
        for field in fields(Protocol)
        if field.name not in _MAY_DIFFER and getattr(one, field.name) != getattr(other, field.name)
    ]
    return f"the two figures cannot be compared: {'; '.join(apart)}" if apart else ""


def _said(name: str) -> str:
    return {
        "metric": "they are values of",
        "features": "their features are of",
        "resize": "images were resized by",
        "samples": "numbers of samples are",
        "data": "samples were compared with",
        "real": "numbers of real images are",
        "weights": "the models' weights are",
    }[name]
