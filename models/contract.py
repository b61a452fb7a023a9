"""The words that every model and the training loop share.

A `Learner` owns its networks and its optimisers; one call of `step` is one full update on one batch, however many
networks play in it. The loop that drives it knows neither GAN nor VAE. What a model can do beyond that is said by small
protocols of their own (`Evaluates`, `Reconstructs`, …), which it has or has not.

Shape legend, here and in every model file: B batch, C channels, H height, W width, D latent dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Generator, Tensor, nn
from torch.optim import Optimizer

Metrics = dict[str, Tensor]
"""Scalar tensors, detached, still on the device: the loop decides when to pay for the transfer."""


@dataclass(frozen=True)
class Labelled:
    """Images of the labelled subset of a run, drawn anew for each step."""

    images: Tensor  # uint8 (N, C, H, W)
    labels: Tensor  # int64 (N,)


@dataclass(frozen=True)
class Batch:
    """One worker's share of one global batch."""

    images: Tensor  # uint8 (B, C, H, W), on the learner's device; scaling and dequantisation are the model's own
    labels: Tensor  # int64 (B,); in a run with a labelled subset all are UNKNOWN while it trains
    images_seen: int  # the clock: images that all workers together saw before this batch
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # name -> float32 (B, width): what else a row carries
    labelled: Labelled | None = None  # where the run has a labelled subset


UNKNOWN = -1
"""The label of an image whose label the model must not see."""


@dataclass(frozen=True)
class ImageShape:
    """The shape of one image of the data set."""

    channels: int
    height: int
    width: int


class Learner(Protocol):
    """What every model is to the loop.

    The loop moves, compiles, averages, saves and restores by the names that `networks` and `optimizers` give. Before
    each `optimizer.step()` that `step` makes, the loop averages the gradients over the workers, refuses non-finite ones
    and clips them (hooks on the optimiser): a learner writes plain PyTorch and is correct at any world size.
    Whatever else must survive a restart is a buffer of one of the networks.
    """

    def networks(self) -> dict[str, nn.Module]: ...

    def optimizers(self) -> dict[str, Optimizer]: ...

    def step(self, batch: Batch, generator: Generator) -> Metrics:
        """One full update. All randomness comes from `generator` (on the learner's device) or torch's global state."""
        ...


@runtime_checkable
class Samples(Protocol):
    """Draws images: what all generative models do, and a classifier does not."""

    def sample(self, n: int, generator: Generator) -> Tensor:
        """uint8 (n, C, H, W). The same generator state gives the same latents, whatever the weights."""
        ...


@dataclass(frozen=True)
class Needs:
    """What a learner asks of its data, refused before anything starts where the data set has it not."""

    classes: int = 0
    """K: the data set must name K classes, and an image whose label is not in 0 … K - 1 ends the run when it comes.
    0: labels are not looked at."""
    columns: Mapping[str, int] = field(default_factory=dict)
    """Name -> width of columns without which it cannot work."""
    labelled: bool = False
    """Whether it learns from the labelled subset of a run; a run with one is refused where nothing would."""


@runtime_checkable
class Asks(Protocol):
    """Cannot work with any images alone."""

    def needs(self) -> Needs: ...


@runtime_checkable
class LimitsShare(Protocol):
    """Cannot work with any number of images a step."""

    def check_share(self, images: int) -> None:
        """`ValueError` with the reason and what to choose when a worker's share of a batch cannot be `images` images;
        asked before anything starts."""
        ...


@runtime_checkable
class InitialisesFromData(Protocol):
    """Has weights that the first images make (gains of normalised weights, …)."""

    def initialise(self, batch: Batch, generator: Generator) -> None:
        """Called once in a run, by every worker with the batch of its first step, before that step; afterwards all have
        the first worker's weights and buffers. In fp32, uncompiled."""
        ...


@runtime_checkable
class Evaluates(Protocol):
    """Has a number on held-out images."""

    def evaluate(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """Named values per image, each (B,), so that a mean over batches of uneven size is exact."""
        ...


@runtime_checkable
class Classifies(Protocol):
    """Says which class an image is of."""

    def classify(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> logits (B, K)."""
        ...


@runtime_checkable
class Embeds(Protocol):
    """Turns images into features that samples can be measured by. Those of an image depend on no other image."""

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, C, H, W) -> features (B, F) and logits (B, K), float32."""
        ...


@runtime_checkable
class Measures(Protocol):
    """Has figures of a whole held-out set that are no means over its images (the accuracy of a clustering, …)."""

    def encode(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """Named codes of the images, each (B,) or (B, width)."""
        ...

    def measure(self, codes: Mapping[str, Tensor], labels: Tensor, columns: Mapping[str, Tensor]) -> dict[str, float]:
        """The same for all held-out images together, on the CPU, in stored order -> figures, each of them finite."""
        ...


@runtime_checkable
class Reconstructs(Protocol):
    """Encodes images and gives them back."""

    def reconstruct(self, images: Tensor, generator: Generator) -> Tensor:
        """uint8 (B, C, H, W) -> uint8 (B, C, H, W)."""
        ...


@dataclass(frozen=True)
class Traversal:
    """Walks along a latent space."""

    images: Tensor  # uint8 (rows, steps, C, H, W): each row is one walk
    titles: list[str]  # what each row walks along; "" where there is nothing to say


@runtime_checkable
class Traverses(Protocol):
    """Walks along its latent space."""

    def traverse(self, rows: int, steps: int, generator: Generator) -> Traversal: ...


@runtime_checkable
class Diagnoses(Protocol):
    """Knows what its own metrics look like when training goes wrong."""

    def diagnose(self, metrics: Mapping[str, float]) -> list[str]:
        """Metrics averaged over one logging interval -> sentences for the user; empty when all is well."""
        ...


@runtime_checkable
class Exports(Protocol):
    """Can be published as one module that needs no code of ours."""

    def export(self, generator: Generator) -> tuple[nn.Module, Tensor]:
        """(module in eval mode, example input with a batch dimension): latents in, images in [0, 1] out."""
        ...


@runtime_checkable
class ExportsClassifier(Protocol):
    """Can be published as a classifier too, beside what `Exports` publishes."""

    def export_classifier(self) -> tuple[nn.Module, Tensor]:
        """(module in eval mode, example input with a batch dimension): images in [0, 1] in, probabilities out."""
        ...
