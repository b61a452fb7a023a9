"""Watches a run and says in a sentence what a person would see too late."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from models.contract import Diagnoses, Learner
from models.metrics.diversity import diversity_index, mean_pairwise_distance, pixel_features
from pipelines.training.gradients import NonFiniteError

COLLAPSED_BELOW = 0.35
"""Samples that differ from each other less than about a third as much as real images do look alike to the eye."""


WARM_UP = 0.1
"""Share of a run in which a model may look unwell: nearly all do until they have learned the first colours."""


class Health:
    """Speaks when a topic turns bad, and again only after it was well in between."""

    def __init__(self, total_images: int) -> None:
        self._speaks_from = WARM_UP * total_images
        self._unwell: set[str] = set()

    def check_metrics(self, learner: Learner, metrics: Mapping[str, float], images_seen: int) -> list[str]:
        """New sentences about one logging interval's mean metrics; `NonFiniteError` when one is not a number."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"at {images_seen:,} images seen: metric {name!r} is {value}; lower the learning rate or set"
                    " --training.grad-clip; the run stops here and the last checkpoint is kept"
                )
        sentences = learner.diagnose(metrics) if isinstance(learner, Diagnoses) else []
        return self._turned("metrics", sentences, images_seen)

    def check_samples(self, samples: Tensor, real: Tensor, images_seen: int) -> tuple[float | None, list[str]]:
        """(diversity of the samples relative to real images, new sentences). uint8 (N, C, H, W) both. None where it has
        no scale: fewer than two images, or real ones that are all alike."""
        features = pixel_features(real)
        if len(real) < 2 or mean_pairwise_distance(features) == 0.0:
            return None, []
        ratio = diversity_index(pixel_features(samples), features)
        sentence = (
            f"samples are only {ratio:.0%} as different from each other as real images: the model may be collapsing;"
            " look at the latest grid, and if they look alike lower the learning rate or go back a checkpoint"
        )
        sentences = [sentence] if ratio < COLLAPSED_BELOW else []
        return ratio, self._turned("samples", sentences, images_seen)

    def _turned(self, topic: str, sentences: list[str], images_seen: int) -> list[str]:
        if images_seen < self._speaks_from:
            return []
        was_unwell = topic in self._unwell
        (self._unwell.add if sentences else self._unwell.discard)(topic)
        return [] if was_unwell else sentences
