"""Numbers about a trained model's samples that need no other network: they can be computed anywhere, in seconds."""

from __future__ import annotations

from torch import Generator, Tensor

from models.contract import Learner
from models.metrics.diversity import diversity_index, pixel_features
from models.metrics.sliced_wasserstein import Settings, distance


def sample_figures(learner: Learner, real: Tensor, seed: int) -> tuple[dict[str, float], str]:
    """As many samples as there are held-out images `real`, uint8 (N, C, H, W), against them.

    ({"swd": sliced Wasserstein distance of patches, "diversity": pairwise distance relative to real}, protocol string).
    """
    samples = learner.sample(len(real), Generator(real.device).manual_seed(seed))
    settings = Settings()
    values = {"swd": distance(real, samples, settings)["swd"]}
    values["diversity"] = diversity_index(pixel_features(samples), pixel_features(real))
    return values, f"{settings.protocol(len(real), real.shape[-2])} latents-seed={seed}"
