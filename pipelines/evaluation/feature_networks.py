"""Networks that samples are measured by: where one comes from, and the name that a figure says it by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from pyarrow import fs as pafs
from torch import Tensor, nn

import models
from models.contract import Embeds
from pipelines.errors import FigmentError
from pipelines.evaluation.sampling import learner_from_checkpoint
from pipelines.training.checkpoint import network_tensors

HASH_DIGITS = 8


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """Weights that turn images into features and logits."""

    name: str
    """`KIND:HASH`, of the model's name and the first digits of the sha256 of its weights."""
    learner: Embeds
    image_shape: tuple[int, int, int]
    """Of the images that it was trained on: others are refused, since nothing here is resized."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, C, H, W) -> features (B, F), logits (B, K), float32 on the CPU."""
        features, logits = self.learner.features(images)
        return features.float().cpu(), logits.float().cpu()


def feature_network(fs: pafs.FileSystem, folder: str) -> FeatureNetwork:
    """From a run or checkpoint of a model that `Embeds`, in the storage. `FigmentError` for any other."""
    restored = learner_from_checkpoint(fs, folder)
    learner, spec = restored.learner, restored.spec
    if not isinstance(learner, Embeds):
        raise FigmentError(
            f"{folder} is a run of {models.name_of(spec.model)!r}, which gives no features; train one that does:"
            " python -m jobs.evaluate train-features DATASET"
        )
    kind, digits = models.name_of(spec.model), weights_hash(learner.networks())
    return FeatureNetwork(f"{kind}:{digits}", learner, restored.image_shape)


def weights_hash(networks: dict[str, nn.Module]) -> str:
    """First digits of the sha256 of all weights and buffers, by name."""
    whole = hashlib.sha256()
    for name, tensor in sorted(network_tensors(networks).items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()[:HASH_DIGITS]
