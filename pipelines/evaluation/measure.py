"""Samples against real images by a feature network: shares are computed wherever there is room, figures here.

    python -m jobs.evaluate run RUN --features RUN_OF_A_CLASSIFIER

One task a core takes the next piece of work; it loads weights from the storage once. What real images leave behind is
kept in the storage, `evaluations/reference/DATASET@VERSION-SPLIT/NETWORK.safetensors`: it is computed once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from pipelines.evaluation.feature_networks import FeatureNetwork, feature_network
from pipelines.evaluation.protocol import AS_THEY_ARE, Protocol
from pipelines.evaluation.sampling import learner_from_checkpoint
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
KEPT = 10_000  # images whose features stay for what looks at pairs
Say = Callable[[str], None]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """What is measured: the samples of a run, or what a generator is compared with to know what a number means."""

    kind: Literal["run", "split", "noise", "grey"]
    name: str
    """Folder of the run or checkpoint, name of the split, else what it is."""


@dataclass(frozen=True)
class Settings:
    """How much is measured, beside what each metric has of its own."""

    samples: int = 10_000
    """Images drawn."""
    seed: int = 0
    """Of the latents."""
    pairs: int = KEPT
    """Images of either set whose features are compared pair by pair, at most: precision and recall cost its square."""


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
    features: str,
    settings: Settings,
    say: Say,
) -> Measured:
    """Of a subject, against the images of a split, by the network in the run folder `features`.

    `FigmentError` when the network, the subject and the data do not fit one another."""
    network = feature_network(fs, features)
    if network.image_shape != manifest.image_shape:
        raise FigmentError(
            f"{features} was trained on images of {_by(network.image_shape)}, and those of {manifest.name!r} are"
            f" {_by(manifest.image_shape)}: measure by a network of the same size"
        )
    weights = _checked(fs, subject, manifest) if subject.kind == "run" else "last"
    real = reference(fs, manifest, split, features, network, settings.pairs, say)
    if subject.kind == "split":
        fake = reference(fs, manifest, subject.name, features, network, settings.pairs, say)
    else:
        fake = _drawn(fs, subject, manifest, features, settings, say)

    def protocol(metric: str) -> Protocol:
        return Protocol(
            metric=metric,
            features=network.name,
            resize=AS_THEY_ARE,
            samples=len(fake.logits),
            data=f"{manifest.name}@{manifest.version}/{split}",
            real=len(real.logits),
            weights=weights,
            run=subject.name.removeprefix("runs/"),
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


def reference(
    fs: pafs.FileSystem,
    manifest: Manifest,
    split: str,
    features: str,
    network: FeatureNetwork,
    pairs: int,
    say: Say,
) -> Share:
    """What the real images leave behind, from the storage where it lies there already."""
    kind = network.name.replace(":", "-")
    path = f"evaluations/reference/{manifest.name}@{manifest.version}-{split}/{kind}-{pairs}.safetensors"
    if exists(fs, path):
        return _share_from(load_safetensors(read_object(fs, path)))
    firsts, at = [], 0
    shards = manifest.shards(split)
    for shard in shards:
        firsts.append(at)
        at += shard.rows
    work = [(first, ("split", split, (i,))) for i, first in enumerate(firsts)]
    share = _computed(fs, manifest, features, work, at, pairs, 0, f"images of {manifest.name}/{split}", say)
    tensors = {**share.moments.tensors(), "features": share.features, "logits": share.logits}
    write_object(fs, path, save_safetensors(tensors))
    return share


def _share_from(tensors: Mapping[str, Tensor]) -> Share:
    return Share(0, moments_from_tensors(tensors), tensors["features"], tensors["logits"])


def _checked(fs: pafs.FileSystem, subject: Subject, manifest: Manifest) -> str:
    """Whether the weights that a run draws by are averaged ones; `FigmentError` where it draws no such images."""
    learner, spec, shape = learner_from_checkpoint(fs, subject.name)
    if not isinstance(learner, Samples):
        raise FigmentError(f"{subject.name} draws no images: it is a classifier; name a run of a generative model")
    if shape != manifest.image_shape:
        theirs = f"those of {manifest.name!r} are {_by(manifest.image_shape)}"
        raise FigmentError(f"{subject.name} draws images of {_by(shape)}, {theirs}: measure against its own data set")
    return "averaged" if spec.training.ema_half_life else "last"


def _drawn(
    fs: pafs.FileSystem, subject: Subject, manifest: Manifest, features: str, settings: Settings, say: Say
) -> Share:
    """What samples, or what stands in their place, leave behind."""
    blocks = range(-(-settings.samples // BLOCK))
    pieces = [tuple(blocks[i : i + PIECE]) for i in range(0, len(blocks), PIECE)]
    work = [(piece[0] * BLOCK, (subject.kind, subject.name, piece)) for piece in pieces]
    said = f"samples of {subject.name}"
    return _computed(fs, manifest, features, work, settings.samples, settings.pairs, settings.seed, said, say)


Work = tuple[int, tuple[str, str, tuple[int, ...]]]
"""Number of the first image, and (kind, name, blocks or shards) of what is to be looked at."""


def _computed(
    fs: pafs.FileSystem,
    manifest: Manifest,
    features: str,
    work: Sequence[Work],
    n: int,
    kept: int,
    seed: int,
    said: str,
    say: Say,
) -> Share:
    """The share of all `work`, which is divided among as many tasks as the cluster has room for."""
    began, done = time.monotonic(), 0
    task = ray.remote(num_cpus=1, max_retries=3)(_piece)
    waiting = [task.remote(fs, manifest, features, item, n, kept, seed) for item in work]
    shares: list[Share] = []
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1)
        for share in ray.get(ready):
            shares.append(share)
            done += len(share.logits)
        left = (time.monotonic() - began) * (n - done) / max(done, 1)
        say(f"  {done:,}/{n:,} {said}  ETA {round(left) // 60}:{round(left) % 60:02d}")
    return together(shares)


def _piece(fs: pafs.FileSystem, manifest: Manifest, features: str, item: Work, n: int, kept: int, seed: int) -> Share:
    """One task's share."""
    torch.set_num_threads(1)
    first, (kind, name, numbers) = item
    network = feature_network(fs, features)
    return share_of(first, _images(fs, manifest, kind, name, numbers, n, seed), network, kept)


def _images(
    fs: pafs.FileSystem, manifest: Manifest, kind: str, name: str, numbers: tuple[int, ...], n: int, seed: int
) -> Any:
    if kind == "split":
        shards = manifest.shards(name)
        return stored_images(fs, Layout.of(manifest), [shards[i] for i in numbers])
    if kind == "noise":
        return noise_blocks(manifest.image_shape, seed, numbers, n)
    if kind == "grey":
        return grey_blocks(manifest.image_shape, numbers, n)
    learner, _, _ = learner_from_checkpoint(fs, name)
    if not isinstance(learner, Samples):
        raise TypeError(f"{name} draws no images")
    return sample_blocks(learner, seed, numbers, n)


def _by(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))
