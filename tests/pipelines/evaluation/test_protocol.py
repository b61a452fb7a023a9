"""Protocols as text and back, and what keeps two figures from being compared."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.metrics import frechet, inception_score, kernel, manifold, modes
from pipelines.errors import FigmentError
from pipelines.evaluation.protocol import Protocol, difference, protocol_from_text

FID = Protocol(
    metric=frechet.PROTOCOL,
    features="inception-2015:0123abcd",
    resize="bicubic-299",
    samples=50_000,
    data="cifar10@0123456789ab/train",
    real=50_000,
    weights="averaged",
    run="dcgan-cifar10",
    seed=0,
)
METRICS = (
    frechet.PROTOCOL,
    kernel.Settings().protocol(50_000, 50_000),
    inception_score.protocol(),
    manifold.Settings().protocol(),
    modes.protocol(modes.STACKED_MODES),
)


def test_the_text_is_one_line_of_words() -> None:
    assert str(FID) == (
        "fid-1 features=inception-2015:0123abcd resize=bicubic-299 samples=50000 real=cifar10@0123456789ab/train"
        " of=50000 weights=averaged run=dcgan-cifar10 latents-seed=0"
    )


words = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="=@/"), min_size=1)


@given(
    metric=st.sampled_from(METRICS),
    features=words,
    resize=words,
    samples=st.integers(1, 10**7),
    data=st.tuples(words, words, words).map(lambda t: f"{t[0]}@{t[1]}/{t[2]}"),
    real=st.integers(1, 10**7),
    weights=st.sampled_from(["averaged", "last"]),
    run=words,
    seed=st.integers(0, 2**63),
)
def test_it_comes_back_from_its_text(**values: str | int) -> None:
    protocol = Protocol(**values)  # type: ignore[arg-type]
    assert protocol_from_text(str(protocol)) == protocol


def test_run_and_seed_alone_may_differ() -> None:
    assert difference(FID, FID) == ""
    assert difference(FID, replace(FID, run="improved-gan", seed=7)) == ""
    others = {
        "metric": "kid-1 subsets=100 of=1000 subsets-seed=0",
        "features": "cifar10-classifier:0badcafe",
        "resize": "bilinear-299",
        "samples": 10_000,
        "data": "cifar10@0123456789ab/test",
        "real": 10_000,
        "weights": "last",
    }
    assert {field.name for field in fields(Protocol)} == {*others, "run", "seed"}
    for name, value in others.items():
        said = difference(FID, replace(FID, **{name: value}))
        assert said.count("; ") == 0 and str(value) in said and str(getattr(FID, name)) in said


def test_the_sentence_says_all_that_differs() -> None:
    assert difference(FID, replace(FID, samples=10_000, data="cifar10@ffffffffffff/train")) == (
        "the two figures cannot be compared: numbers of samples are 50000 and 10000;"
        " samples were compared with cifar10@0123456789ab/train and cifar10@ffffffffffff/train"
    )


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("run", "my run", "run is 'my run'"),
        ("features", "a=b", "features is 'a=b'"),
        ("resize", "", "resize is ''"),
        ("metric", "FID", "like fid-1"),
        ("metric", "fid", "like fid-1"),
        ("metric", "kid-1 subsets", "setting=value"),
        ("metric", "kid-1  subsets=3", "setting=value"),
        ("metric", "fid-1 features=x", "a part of their own"),
        ("data", "cifar10/test", "NAME@VERSION/SPLIT"),
        ("weights", "ema", "averaged or last"),
        ("samples", 0, "1 or more"),
        ("seed", -1, "0 or more"),
    ],
)
def test_what_would_not_come_back_is_refused(name: str, value: str | int, said: str) -> None:
    with pytest.raises(FigmentError, match=said):
        replace(FID, **{name: value})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no protocol"),
        ("fid-1", "is no protocol"),
        (str(FID).replace(" run=dcgan-cifar10", ""), "after the metric come features, resize"),
        (f"{FID} more=1", "is no protocol"),
        (str(FID).replace("samples=50000", "samples=many"), "samples is 'many', not a number"),
        (str(FID).replace(" of=50000", " of=-5"), "of is '-5', not a number"),
        ("swd-1 levels=32/16 patch=7 per-image=32 projections=256 n=1024 seed=0", "is no protocol"),
    ],
)
def test_what_is_no_protocol_is_refused(text: str, said: str) -> None:
    with pytest.raises(FigmentError, match=said):
        protocol_from_text(text)
