"""A small residual network that says which class an image is of, and whose features samples are measured by.

    He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2016, arXiv 1512.03385: the blocks;
    Wu, He, "Group Normalization", 2018, arXiv 1803.08494: the norm;
    Szegedy et al., "Rethinking the Inception Architecture", 2016, arXiv 1512.00567, section 7: smoothed labels.

    h_0 = relu(n(3x3 x))                                                          w channels, the full side
    h_s = R(pool(relu(n(3x3 h_(s-1)))))     s = 1 … stages, half the side, twice the channels, at most 8 w
    R(h) = relu(h + n(3x3 relu(n(3x3 h))))                                        an identity shortcut (eq. 1)
    f = the greatest value of each channel of the last h, (B, F);   logits = W f + b
    L = -sum_k q_k log p_k,   q = (1 - eps) one-hot(y) + eps / K

stages = as many as leave a side of 3 or 4: 3 at 28x28 and 32x32, 4 at 64x64. The first stage below the full side has no
R: there it would cost more than anywhere else.

A group norm sees one image alone. So the features of an image depend on nothing but the image and the weights, and a
statistic of features is the same whatever the batch or the number of workers; with batch norm it would need averages
that differ between workers. Each step shows a random crop of the image within `padding` pixels (He et al., section
4.2), mirrored half the time where `mirror` says that this is still the same thing (a car is, a 2 is not).

SGD with Nesterov momentum; the step size rises linearly over the first `warm_up` of `decay_end` images and falls in a
half cosine to 0 at the end (Loshchilov, Hutter 2017, arXiv 1608.03983, without restarts).

Shape legend: B batch, C channels, H = W side, K classes, F features, w width.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from models.contract import Batch, ImageShape, Metrics, Needs
from models.layers import require_at_least_one, to_unit
from models.metrics.classification import errors

GROUP = 8  # channels that are normalised together
SMALLEST, MOST_DOUBLINGS = 3, 3  # side of the last feature map at least; of the channels


@dataclass(frozen=True)
class Config:
    """What a residual classifier is made of, and how it learns."""

    classes: int = 10
    """K, labels 0 … K - 1."""
    width: int = 32
    """w: channels of the first feature map, a multiple of 8."""
    mirror: bool = True
    """Whether an image may be shown mirrored."""
    padding: int = 4
    """Pixels that a crop may be off its place; what comes in is black."""
    smoothing: float = 0.1
    """eps: share of a label that is spread over all classes."""
    learning_rate: float = 0.1
    """The greatest step size of SGD."""
    momentum: float = 0.9
    """Of SGD, Nesterov's."""
    weight_decay: float = 5e-4
    """Times the weights, added to their gradients; not to norms and biases."""
    warm_up: float = 0.2
    """Share of `decay_end` in which the step size rises."""
    decay_end: int = 1_500_000
    """Images seen at which the step size is 0: what the run is to see."""


class Block(nn.Module):
    """R: (B, c, h, h) -> (B, c, h, h)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(channels, channels), _convolution(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        return F.relu(h + self.second(F.relu(self.first(h))))


class Network(nn.Module):
    """Images (B, C, H, W) in [0, 1] -> features (B, F) and logits (B, K)."""

    def __init__(self, config: Config, shape: ImageShape) -> None:
        super().__init__()
        channels = config.width
        stages: list[nn.Module] = [_convolution(shape.channels, channels), nn.ReLU()]
        for stage in range(stages_of(shape)):
            wider = channels * 2 if stage < MOST_DOUBLINGS else channels
            stages += [_convolution(channels, wider), nn.ReLU(), nn.MaxPool2d(2)]
            stages += [Block(wider)] if stage else []
            channels = wider
        self.trunk = nn.Sequential(*stages)
        self.head = nn.Linear(channels, config.classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(2 * x - 1).amax((2, 3)).float()
        return features, self.head(features)


def _convolution(inputs: int, outputs: int) -> nn.Module:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, nn.GroupNorm(outputs // GROUP, outputs))


def stages_of(shape: ImageShape) -> int:
    """How often the side is halved."""
    return max(0, int(math.log2(min(shape.height, shape.width) / SMALLEST)))


def step_size(config: Config, images_seen: int) -> float:
    """Linear to learning_rate over the first warm_up of the run, half a cosine from there to 0."""
    at = min(images_seen / config.decay_end, 1.0)
    if at < config.warm_up:
        return config.learning_rate * at / config.warm_up
    return config.learning_rate * (1 + math.cos(math.pi * (at - config.warm_up) / (1 - config.warm_up))) / 2


def shown(x: Tensor, padding: int, mirror: bool, generator: Generator) -> Tensor:
    """Each image moved by U{-padding … padding} pixels down and across, and mirrored by a coin; black comes in.

    x: (B, C, H, W), the same random numbers whatever is switched on."""
    n, _, height, width = x.shape
    down, across = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator, device=x.device)
    flipped = torch.rand(n, 1, generator=generator, device=x.device) < (0.5 if mirror else 0.0)
    rows = down + torch.arange(height, device=x.device)
    columns = across + torch.arange(width, device=x.device)
    columns = torch.where(flipped, columns.flip(1), columns)
    padded, image = F.pad(x, (padding,) * 4), torch.arange(n, device=x.device)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


class ResidualClassifier:
    """The learner: one network, one optimiser."""

    def __init__(self, config: Config, shape: ImageShape) -> None:
        self.config, self.shape = config, shape
        self.network = Network(config, shape)
        decayed = [p for p in self.network.parameters() if p.dim() > 1]
        rest = [p for p in self.network.parameters() if p.dim() == 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=True)

    def networks(self) -> dict[str, nn.Module]:
        return {"classifier": self.network}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"classifier": self.optimizer}

    def needs(self) -> Needs:
        return Needs(classes=self.config.classes)

    def step(self, batch: Batch, generator: Generator) -> Metrics:
        for group in self.optimizer.param_groups:
            group["lr"] = step_size(self.config, batch.images_seen + len(batch.images))
        x = shown(to_unit(batch.images), self.config.padding, self.config.mirror, generator)
        self.optimizer.zero_grad(set_to_none=True)
        _, logits = self.network(x)
        loss = F.cross_entropy(logits.float(), batch.labels, label_smoothing=self.config.smoothing)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach(), "train_error": errors(logits.detach(), batch.labels).mean()}

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, C, H, W) -> features (B, F) and logits (B, K), float32."""
        features, logits = self.network(to_unit(images))
        return features, logits.float()

    def classify(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> logits (B, K)."""
        return self.features(images)[1]

    def evaluate(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """error: 1 where the class is wrong, else 0; cross_entropy: nats, of the label itself; (B,) each."""
        logits = self.classify(batch.images)
        cross_entropy = F.cross_entropy(logits, batch.labels, reduction="none")
        return {"error": errors(logits, batch.labels), "cross_entropy": cross_entropy}

    def export_classifier(self) -> tuple[nn.Module, Tensor]:
        """Images (B, C, H, W) in [0, 1] -> probabilities of the K classes (B, K)."""
        device = next(self.network.parameters()).device
        example = torch.zeros(2, self.shape.channels, self.shape.height, self.shape.width, device=device)
        return Probabilities(self.network).eval().requires_grad_(False), example


class Probabilities(nn.Module):
    """The network's softmax."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)  # what is published does not follow the training

    def forward(self, x: Tensor) -> Tensor:
        _, logits = self.network(x)
        return logits.softmax(1)


def build(config: Config, shape: ImageShape) -> ResidualClassifier:
    """A fresh learner on the CPU; torch's global random state decides the weights. ValueError: impossible settings."""
    require_at_least_one(config, "classes", "width", "decay_end")
    if config.width % GROUP:
        raise ValueError(f"width is {config.width}; channels are normalised {GROUP} at a time: choose a multiple")
    if not 0 <= config.warm_up < 1 or not 0 <= config.smoothing < 1 or config.padding < 0:
        raise ValueError("warm_up and smoothing are shares in 0 … 1, and padding is 0 or more pixels")
    if min(shape.height, shape.width) < 2 * SMALLEST:
        raise ValueError(f"images are {shape.height}x{shape.width}; a side of {2 * SMALLEST} is the least")
    return ResidualClassifier(config, shape)
