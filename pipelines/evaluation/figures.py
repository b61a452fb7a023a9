"""Numbers about a trained model's samples that need no other network: they can be computed anywhere, in seconds."""

from __future__ import annotations

from torch import Generator, Tensor

from models.contract import Samples
from models.metrics.diversity import diversity_index, mean_pairwise_distance, pixel_features
from models.metrics.sliced_wasserstein import Settings, distance
from pipelines.errors import FigmentError


def check_measurable(image_shape: tuple[int, int, int], held_out: int, split: str) -> None:
    """`FigmentError` when samples of a data set could not be compared with its `held_out` images of `split`."""
    if held_out < 2:
        raise FigmentError(
            f"split {split!r} has {held_out} image(s); samples are compared with two or more:"
            " name another by --data.eval-split, 'train' if there is no other"
        )
    side, patch = min(image_shape[1:]), Settings().patch
    if side < patch:
        raise FigmentError(
            f"images of {image_shape[1]}x{image_shape[2]} are too small: patches of {patch}x{patch} are compared;"
            " ingest them with a larger --size"
        )


def sample_figures(learner: Samples, real: Tensor, real_from: str, seed: int) -> tuple[dict[str, float], str]:
    """As many samples as there are images in `real`, uint8 (N, C, H, W), against them; `real_from` says what they are.

    ({"swd": sliced Wasserstein distance of patches, "diversity": pairwise distance relative to real}, protocol string).
    Without "diversity" where the real images are all alike.
    """
    samples = learner.sample(len(real), Generator(real.device).manual_seed(seed))
    settings = Settings()
    values = {"swd": distance(real, samples, settings)["swd"]}
    if mean_pairwise_distance(pixel_features(real)) > 0:
        values["diversity"] = diversity_index(pixel_features(samples), pixel_features(real))
    return values, f"{settings.protocol(len(real), min(real.shape[-2:]))} latents-seed={seed} real={real_from}"
