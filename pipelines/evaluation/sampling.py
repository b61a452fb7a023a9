"""From stored weights back to a learner that draws."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pyarrow import fs as pafs
from safetensors.torch import load as load_safetensors
from torch import Generator, Tensor

import models
from models.contract import ImageShape, Learner, Samples
from pipelines.config import RunSpec, spec_from_dict
from pipelines.errors import FigmentError
from pipelines.training.checkpoint import load_bundle, load_networks, set_network_tensors
from pipelines.training.history import newest_bundle

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Restored:
    """What a checkpoint holds."""

    learner: Learner
    spec: RunSpec
    image_shape: tuple[int, int, int]  # (C, H, W)
    images_seen: int

    @property
    def weights(self) -> Literal["averaged", "last"]:
        return "averaged" if self.spec.training.ema_half_life else "last"


def learner_from_checkpoint(fs: pafs.FileSystem, path: str) -> Restored:
    """`path` is the folder of a bundle, or of a run (its newest bundle). Averaged weights when the run kept them."""
    path = path.rstrip("/")
    found, damaged = newest_bundle(fs, path)
    for sentence in damaged:
        log.warning("%s", sentence)
    bundle = found.bundle if found is not None else load_bundle(fs, path)
    learner = models.build(bundle.spec.model, ImageShape(*bundle.image_shape))
    load_networks(fs, bundle, learner.networks(), averaged=True)
    return Restored(learner, bundle.spec, bundle.image_shape, bundle.images_seen)


def learner_from_files(files: Mapping[str, bytes]) -> tuple[Learner, RunSpec]:
    """From the `networks.safetensors` and `spec.json` that a tracked run published."""
    missing = {"networks.safetensors", "spec.json"} - files.keys()
    if missing:
        raise FigmentError(f"the published model lacks {', '.join(sorted(missing))}; it was not published by Figment")
    body = json.loads(files["spec.json"])
    spec = spec_from_dict(body["spec"])
    learner = models.build(spec.model, ImageShape(*body["image_shape"]))
    set_network_tensors(learner.networks(), load_safetensors(files["networks.safetensors"]))
    return learner, spec


@torch.no_grad()
def draw_samples(learner: Learner, n: int, seed: int) -> Tensor:
    """uint8 (n, C, H, W), a pure function of weights, n and seed. `FigmentError` for a model that draws nothing."""
    if not isinstance(learner, Samples):
        raise FigmentError("this model draws no images: it is a classifier; name a run of a generative one")
    return learner.sample(n, Generator().manual_seed(seed))
