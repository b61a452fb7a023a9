"""Samples against real images by a feature network: shares are computed wherever there is room, figures here.

    python -m jobs.evaluate run RUN --features RUN_OF_A_CLASSIFIER

One task a core takes the next piece of work, with the weights that were loaded at the start. What real images leave
behind is kept in the storage, `evaluations/reference/DATASET@VERSION-SPLIT/NETWORK-PAIRS.safetensors` (the sha256 of it
behind it): it is computed once.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import ray
import torch
from pyarrow import fs as pafs
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from models.contract import Samples
from models.metrics import kernel, manifold, modes
from models.metrics.frechet import PROTOCOL as FID_PROTOCOL
from models.metrics.frechet import frechet_distance, moments_from_tensors
from models.metrics.inception_score import inception_score
from models.metrics.inception_score import protocol as inception_protocol
from pipelines.data.manifest import Manifest
from pipelines.data.windows import Layout
from pipelines.errors import FigmentError
from pipelines.evaluation.feature_networks import FeatureNetwork
from pipelines.evaluation.protocol import AS_THEY_ARE, Protocol
from pipelines.evaluation.sampling import Restored, learner_from_checkpoint
from pipelines.evaluation.shares import (
    BLOCK,
    Share,
    grey_blocks,
    noise_blocks,
    sample_blocks,
    share_of,
    stored_images,
    together,
)
from pipelines.objects import exists, read_object, write_object

PIECE = 8  # blocks of a task
FEWEST = 12  # images: ten parts of the Inception score, five neighbours of each
KEPT = 10_000  # images whose features stay for what looks at pairs
Say = Callable[[str], None]
_DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True, eq=False)
class Subject:
    """What is measured: the samples of a run, or what a generator is compared with to know what a number means."""

    kind: Literal["run", "split", "noise", "grey"]
    name: str
    """Of the run or the split, else what it is."""
    drawn_by: Restored | None = None
    """Of a run: the checkpoint, loaded once. A run may go on while it is measured."""


def run_subject(fs: pafs.FileSystem, folder: str) -> Subject:
    """The newest checkpoint of the run in `folder`, or the one that `folder` is. `FigmentError` if it draws nothing."""
    restored = learner_from_checkpoint(fs, folder)
    if not isinstance(restored.learner, Samples):
        raise FigmentError(f"{folder} draws no images: it is a classifier; name a run of a generative model")
    return Subject("run", folder.removeprefix("runs/").partition("/")[0], restored)


@dataclass(frozen=True)
class Settings:
    """How much is measured, beside what each metric has of its own."""

    samples: int = 10_000
    """Images drawn, or taken of a split."""
    seed: int = 0
    """Of the latents."""
    pairs: int = KEPT
    """Images of either set whose features are compared pair by pair, at most: precision and recall cost its square."""

    def check(self, real: int) -> None:
        """`FigmentError` where there are too few images for some figure, of which the split has `real`."""
        for said, count in (("--samples", self.samples), ("--pairs", self.pairs), ("the split's images", real)):
            if count < FEWEST:
                raise FigmentError(f"{said}: {count}; the Inception score and the neighbours want {FEWEST} at least")
        if self.seed < 0:
            raise FigmentError(f"--seed is {self.seed}; it must be at least 0")


@dataclass(frozen=True)
class Measured:
    """Figures, each with the protocol that it was measured by."""

    figures: dict[str, float]
    protocols: dict[str, str]


def measure(
    fs: pafs.FileSystem,
    subject: Subject,
    manifest: Manifest,
    split: str,
    network: FeatureNetwork,
    settings: Settings,
    say: Say,
) -> Measured:
    """Of a subject, against the images of a split. `FigmentError` when network, subject and data do not fit."""
    settings.check(manifest.rows(split))
    theirs = f"those of {manifest.name!r} are {_by(manifest.image_shape)}"
    if network.image_shape != manifest.image_shape:
        raise FigmentError(
            f"{network.name} was trained on images of {_by(network.image_shape)}, {theirs}: measure by a network of the"
            " same size"
        )
    drawn_by = subject.drawn_by
    if drawn_by is not None and drawn_by.image_shape != manifest.image_shape:
        raise FigmentError(
            f"{subject.name} draws images of {_by(drawn_by.image_shape)}, {theirs}: measure against its own data set"
        )
    # The weights travel with the tasks: who loaded them anew would find others where a run has gone on meanwhile.
    looking = _Looking(fs, manifest, ray.put(network), ray.put(subject), settings, say)
    real = reference(looking, network.name, split)
    fake = _drawn(looking, subject)

    def protocol(metric: str) -> Protocol:
        return Protocol(
            metric=metric,
            features=network.name,
            resize=AS_THEY_ARE,
            samples=len(fake.logits),
            data=f"{manifest.name}@{manifest.version}/{split}",
            real=len(real.logits),
            weights=drawn_by.weights if drawn_by is not None else "last",
            run=subject.name,
            seed=settings.seed,
        )

    return figures(real, fake, protocol, settings)


def figures(real: Share, fake: Share, protocol: Callable[[str], Protocol], settings: Settings) -> Measured:
    """All figures that two shares allow."""
    found: dict[str, float] = {"fid": frechet_distance(real.moments, fake.moments)}
    metrics = {"fid": FID_PROTOCOL}
    ours, theirs = real.features[: settings.pairs], fake.features[: settings.pairs]
    by_kernel = kernel.Settings()
    found["kid"], found["kid_std"] = kernel.kernel_distance(ours, theirs, by_kernel)
    metrics["kid"] = metrics["kid_std"] = by_kernel.protocol(len(ours), len(theirs))
    found["is"], found["is_std"] = inception_score(fake.logits)
    metrics["is"] = metrics["is_std"] = inception_protocol()
    by_balls = manifold.Settings()
    for name, value in manifold.measure(ours, theirs, by_balls).items():
        found[name] = value
        metrics[name] = f"{by_balls.protocol()} pairs={len(ours)}x{len(theirs)}"
    covered = modes.modes_of(modes.class_counts(fake.logits.argmax(1), fake.logits.shape[1]))
    found |= {"classes_covered": float(covered.covered), "class_kl": covered.kl}
    metrics |= {name: modes.protocol(covered.of) for name in ("classes_covered", "class_kl")}
    return Measured(found, {name: str(protocol(metric)) for name, metric in metrics.items()})


@dataclass(frozen=True)
class _Looking:
    """What all tasks of a measurement share; weights lie in the object store."""

    fs: pafs.FileSystem
    manifest: Manifest
    network: Any  # ObjectRef of a FeatureNetwork
    subject: Any  # ObjectRef of a Subject
    settings: Settings
    say: Say


def reference(looking: _Looking, network: str, split: str) -> Share:
    """What the real images leave behind, from the storage where it lies there whole already."""
    fs, manifest, pairs = looking.fs, looking.manifest, looking.settings.pairs
    folder = f"evaluations/reference/{manifest.name}@{manifest.version}-{split}"
    path, rows = f"{folder}/{network.replace(':', '-')}-{pairs}.safetensors", manifest.rows(split)
    known = _share_from(read_object(fs, path), rows, pairs) if exists(fs, path) else None
    if known is not None:
        return known
    work = _of_split(manifest, split, rows)
    share = _computed(looking, work, rows, f"images of {manifest.name}/{split}")
    tensors = {**share.moments.tensors(), "features": share.features, "logits": share.logits}
    body = save_safetensors(tensors)
    write_object(fs, path, body + hashlib.sha256(body).digest())
    return share


def _of_split(manifest: Manifest, split: str, n: int) -> list[_Piece]:
    """The first n images of a split, a shard a piece."""
    shards = manifest.shards(split)
    firsts = accumulate((shard.rows for shard in shards[:-1]), initial=0)
    return [_Piece(first, "split", split, (i,), n) for i, first in enumerate(firsts) if first < n]


def _share_from(data: bytes, rows: int, pairs: int) -> Share | None:
    """None where it is not the whole of `rows` images: it is made again."""
    body, digest = data[:-_DIGEST], data[-_DIGEST:]
    if hashlib.sha256(body).digest() != digest:
        return None
    tensors = load_safetensors(body)
    share = Share(0, moments_from_tensors(tensors), tensors["features"], tensors["logits"])
    whole = share.moments.count == len(share.logits) == rows and len(share.features) == min(rows, pairs)
    return share if whole else None


def _drawn(looking: _Looking, subject: Subject) -> Share:
    """What samples, or what stands in their place, leave behind; of a split as many images as samples are asked for."""
    n = looking.settings.samples
    if subject.kind == "split":
        work = _of_split(looking.manifest, subject.name, n)
        n = min(n, looking.manifest.rows(subject.name))
        return _computed(looking, work, n, f"images of {looking.manifest.name}/{subject.name}")
    blocks = range(-(-n // BLOCK))
    pieces = [tuple(blocks[i : i + PIECE]) for i in range(0, len(blocks), PIECE)]
    work = [_Piece(piece[0] * BLOCK, subject.kind, subject.name, piece, n) for piece in pieces]
    return _computed(looking, work, n, f"samples of {subject.name}")


@dataclass(frozen=True)
class _Piece:
    """A task's share of the work."""

    first: int  # number of its first image
    kind: Literal["run", "split", "noise", "grey"]
    name: str
    numbers: tuple[int, ...]  # of the blocks, or of the split's shards
    n: int  # images altogether


def _computed(looking: _Looking, work: Sequence[_Piece], n: int, said: str) -> Share:
    """The share of all `work`, which is divided among as many tasks as the cluster has room for."""
    began, done, settings = time.monotonic(), 0, looking.settings
    task = ray.remote(num_cpus=1, max_retries=3)(_share_of)
    shared = (looking.fs, looking.manifest, looking.network, looking.subject, settings)
    waiting = [task.remote(*shared, piece) for piece in work]
    shares: list[Share] = []
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1)
        for share in ray.get(ready):
            shares.append(share)
            done += len(share.logits)
        left = (time.monotonic() - began) * (n - done) / max(done, 1)
        looking.say(f"  {done:,}/{n:,} {said}  ETA {round(left) // 60}:{round(left) % 60:02d}")
    return together(shares)


def _share_of(
    fs: pafs.FileSystem,
    manifest: Manifest,
    network: FeatureNetwork,
    subject: Subject,
    settings: Settings,
    piece: _Piece,
) -> Share:
    torch.set_num_threads(1)
    return share_of(piece.first, _images(fs, manifest, subject, settings.seed, piece), network, settings.pairs)


def _images(fs: pafs.FileSystem, manifest: Manifest, subject: Subject, seed: int, piece: _Piece) -> Iterator[Tensor]:
    if piece.kind == "split":
        shards = manifest.shards(piece.name)
        return stored_images(fs, Layout.of(manifest), [shards[i] for i in piece.numbers], piece.n - piece.first)
    if piece.kind == "noise":
        return noise_blocks(manifest.image_shape, seed, piece.numbers, piece.n)
    if piece.kind == "grey":
        return grey_blocks(manifest.image_shape, piece.numbers, piece.n)
    assert subject.drawn_by is not None and isinstance(subject.drawn_by.learner, Samples)
    return sample_blocks(subject.drawn_by.learner, seed, piece.numbers, piece.n)


def _by(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))
