"""Figures of a whole held-out set: every image once, in stored order, however many workers share it."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import fs as pafs
from torch import Tensor

from infra.storage import open_storage
from models.contract import Batch, Measures
from pipelines.data import stream
from pipelines.data.stream import evaluation_batches
from pipelines.data.windows import Layout, Read, read_window
from pipelines.training.held_out import HeldOut, merged
from pipelines.training.launch import Launch, Place
from pipelines.training.reporter import Reporter
from pipelines.training.worker import TrainingLoop
from tests.pipelines.training.pair import Pair
from tests.pipelines.training.toys import toy_dataset, toy_spec

ROWS = 43


class Encodes:
    """Its figures depend on which images come, and on their order."""

    def encode(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        flat = batch.images.double().flatten(1)
        return {"brightness": flat.mean(1), "pixels": flat}

    def measure(self, codes: Mapping[str, Tensor], labels: Tensor, columns: Mapping[str, Tensor]) -> dict[str, float]:
        place = torch.arange(1, len(labels) + 1, dtype=torch.float64)
        return {
            "images": float(len(labels)),
            "ordered": float((place * codes["brightness"]).sum()),
            "ordered_pixels": float((place[:, None] * codes["pixels"]).sum()),
            "ordered_labels": float((place * labels).sum()),
            "ordered_columns": float(sum((place[:, None] * column).sum() for column in columns.values())),
        }


class EncodesAndEvaluates(Encodes):
    def evaluate(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        return {"mean_brightness": batch.images.float().flatten(1).mean(1)}


def _loop(fs: pafs.FileSystem, rank: int, world: int) -> TrainingLoop:
    loop = TrainingLoop(
        Launch("n", toy_spec("vae"), fs, toy_dataset(fs, test=ROWS)),
        Place(rank, world, torch.device("cpu")),
        Reporter(),
    )
    loop.learner = EncodesAndEvaluates()  # type: ignore[assignment]
    return loop


def _of_one_of_two(rank: int, folder: str) -> dict[str, float]:
    def blocks(fs: pafs.FileSystem, layout: Layout, reads: Iterator[Read]) -> Generator[pa.Table, None, None]:
        for read in reads:
            yield from read_window(fs, layout, read)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_blocks", blocks)
        return _loop(open_storage(f"{folder}/{rank}"), rank, 2).evaluate()


@pytest.mark.usefixtures("in_process")
def test_two_workers_measure_what_one_does_and_what_the_stored_images_say(
    store: pafs.FileSystem, tmp_path: Path, pair: Pair
) -> None:
    alone = _loop(store, 0, 1).evaluate()
    with evaluation_batches(
        store, toy_dataset(store, test=ROWS), "test", world_size=1, rank=0, batch_size=ROWS
    ) as batches:
        images, labels, _ = next(batches)
    brightness = images.reshape(ROWS, -1).mean(1)
    place = range(1, ROWS + 1)
    assert alone["images"] == ROWS
    assert alone["ordered"] == pytest.approx(sum(i * b for i, b in zip(place, brightness, strict=True)))
    assert alone["ordered_labels"] == sum(i * label for i, label in zip(place, labels, strict=True))
    assert alone["mean_brightness"] == pytest.approx(brightness.mean(), rel=1e-6)
    first, second = pair.run(_of_one_of_two, str(tmp_path))
    assert first == second == pytest.approx(alone, rel=1e-6)
    assert {name: first[name] for name in ("images", "ordered", "ordered_pixels", "ordered_labels")} == {
        name: alone[name] for name in ("images", "ordered", "ordered_pixels", "ordered_labels")
    }


def _parts(rank: int) -> dict[str, float]:
    """The first worker has no image, the second has two batches with columns."""
    mine = HeldOut(torch.Generator())
    for size in (3, 2) if rank else ():
        images = torch.full((size, 1, 2, 2), size, dtype=torch.uint8)
        mine.add(Encodes(), Batch(images, torch.arange(size), 0, columns={"factors": torch.full((size, 2), 0.5)}))
    return mine.figures(Encodes())


def test_columns_come_along_and_a_worker_without_an_image_has_the_same_figures(pair: Pair) -> None:
    place = torch.arange(1.0, 6)
    for figures in pair.run(_parts):
        assert figures["images"] == 5
        assert figures["ordered"] == float((place * torch.tensor([3.0, 3, 3, 2, 2])).sum())
        assert figures["ordered_labels"] == float((place * torch.tensor([0.0, 1, 2, 0, 1])).sum())
        assert figures["ordered_columns"] == float(2 * 0.5 * place.sum())


@pytest.mark.usefixtures("in_process")
def test_images_are_encoded_under_the_averaged_weights(store: pafs.FileSystem) -> None:
    loop = TrainingLoop(
        Launch("n", toy_spec("vae"), store, toy_dataset(store, test=ROWS)), Place(0, 1, torch.device("cpu")), Reporter()
    )
    decoder = loop.learner.networks()["decoder"]
    last = next(reversed([*decoder.parameters()]))
    average = last.detach().clone()
    with torch.no_grad():
        last.add_(1.0)

    def encode(batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        return {"weight": last.detach().mean().expand(len(batch.images))}

    def measure(codes: Mapping[str, Tensor], labels: Tensor, columns: Mapping[str, Tensor]) -> dict[str, float]:
        assert columns == {}
        return {"weight": float(codes["weight"].mean())}

    loop.learner.encode, loop.learner.measure = encode, measure  # type: ignore[attr-defined]
    assert isinstance(loop.learner, Measures)
    figures = loop.evaluate()
    assert figures["weight"] == pytest.approx(float(average.mean()))
    assert "elbo" in figures, "the means beside it"


def test_two_figures_of_one_name_are_refused() -> None:
    assert merged({"a": 1.0}, {"b": 2.0}) == {"a": 1.0, "b": 2.0}
    with pytest.raises(ValueError, match=r"both give accuracy, elbo;"):
        merged({"elbo": 1.0, "accuracy": 1.0, "x": 0.0}, {"accuracy": 2.0, "elbo": 2.0})
