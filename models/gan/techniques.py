"""What a GAN can be given beside its paper's own game: a setting each, all off at first, and which go together.

Each is a part of its own (`losses.py`, `penalties.py`, `minibatch.py`, `historical.py`, `weight_norm.py`,
`virtual_batch_norm.py`, `augment.py`); this file only names them and refuses what cannot be.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from models.gan.augment import Change
from models.gan.losses import CLASSIFIES, Game
from models.gan.penalties import Penalty


@dataclass(frozen=True, kw_only=True)
class Techniques:
    """Settings that a GAN's `Config` inherits."""

    loss: Game = "non-saturating"
    """The game that D and G play (models/gan/losses.py has the formulas)."""
    penalty: Penalty = "none"
    """Of D's slope: r1 at real images, r2 at drawn ones, wgan-gp between them. D may have no batch norm then."""
    penalty_weight: float = 10.0
    """gamma of r1 and r2 (half of it counts), lambda of wgan-gp."""
    real_label: float = 1.0
    """alpha, D's label of real images; below 1 it is one-sided label smoothing."""
    minibatch_kernels: int = 0
    """B, features of D that tell how close the other images of a worker's share are; 0: none. Improved GAN has 100."""
    minibatch_dimensions: int = 5
    """C, dimensions in which a kernel measures how close two images are."""
    feature_matching: bool = False
    """G matches the mean of D's last hidden layer instead of playing its half of the game."""
    historical_weight: float = 0.0
    """Times the squared distance of either network's weights from their mean so far, added to its loss; 0: none."""
    discriminator_norm: Literal["batch", "virtual", "spectral", "weight", "none"] = "batch"
    """What normalises D: batch and virtual every layer's outputs but the first's, spectral and weight every weight but
    that of minibatch features."""
    generator_norm: Literal["batch", "virtual"] = "batch"
    """What normalises G."""
    virtual_reference: int = 32
    """n, images of the fixed reference batch of a virtual norm: D's are the first that the first worker gets."""
    learnt_gains: Literal["all", "last", "none"] = "last"
    """Which gains of D's weight norm are learnt; the others stay as the first images set them."""
    discriminator_learning_rate: float | None = None
    """Adam's step size for D; None: the same as G's."""
    discriminator_steps: int = 1
    """Updates of D before one of G. A worker's share of a batch is divided among them: each sees images of its own."""
    augment: tuple[Change, ...] = ()
    """Random changes of all images that D sees, real and drawn: colour, translation, cutout."""
    augment_probability: float = 1.0
    """Share of images that each of these changes is made to."""
    classes: int = 0
    """K: images are drawn of one of K classes, labels 0 … K - 1; 0: whatever the data are."""

    def check(self) -> None:
        """`ValueError` for what cannot be, or would do nothing."""
        self._check_numbers()
        self._check_use()
        if self.penalty != "none":
            neighbours = "batch norm" if self.discriminator_norm == "batch" else "minibatch features"
            if self.discriminator_norm == "batch" or self.minibatch_kernels:
                raise ValueError(
                    f"penalty {self.penalty} is a slope of D at one image, which a D with {neighbours} does not have,"
                    " since its answer to an image depends on the other images of the batch; choose another"
                    " discriminator_norm, and no minibatch_kernels"
                )
        if self.real_label != 1 and self.loss not in CLASSIFIES:
            raise ValueError(
                f"real_label smooths the label of a classifier, and D has no labels under loss {self.loss}; choose loss"
                " non-saturating or saturating, or leave real_label at 1"
            )
        if self.feature_matching and self.loss == "saturating":
            raise ValueError(
                "feature_matching and loss saturating are both a loss of G, which has one; D's half of the game is the"
                " same under loss non-saturating"
            )
        if self.feature_matching and self.classes:
            raise ValueError(
                "feature_matching compares means over all classes, so that a G with classes is never told of which one"
                " it shall draw; choose one of the two"
            )
        if self.loss == "wasserstein" and self.minibatch_kernels:
            raise ValueError(
                "loss wasserstein needs a D whose slope is bounded, and nothing bounds that of minibatch features;"
                " choose another loss, or no minibatch_kernels"
            )
        if self.loss == "wasserstein" and self.penalty == "none" and self.discriminator_norm != "spectral":
            raise ValueError(
                "loss wasserstein has no lower end for a D whose slope nothing bounds; choose a penalty or"
                " discriminator_norm spectral"
            )
        if "virtual" in (self.discriminator_norm, self.generator_norm) and self.virtual_reference < 1:
            raise ValueError(
                f"virtual_reference is {self.virtual_reference}; a virtual norm needs at least 1 reference image"
            )

    def _check_use(self) -> None:
        """Of a technique that is off, nothing may be set: who sets it believes that it is on."""
        defaults = {field.name: field.default for field in fields(self)}
        for name, is_on, switch in (
            ("penalty_weight", self.penalty != "none", "a penalty"),
            ("minibatch_dimensions", self.minibatch_kernels > 0, "minibatch_kernels"),
            ("virtual_reference", "virtual" in (self.discriminator_norm, self.generator_norm), "a virtual norm"),
            ("learnt_gains", self.discriminator_norm == "weight", "discriminator_norm weight"),
            ("augment_probability", bool(self.augment), "augment"),
        ):
            value = getattr(self, name)
            if not is_on and value != defaults[name]:
                raise ValueError(f"{name} is {value}, which does nothing without {switch}; choose that too, or neither")

    def _check_numbers(self) -> None:
        if self.classes < 0 or self.classes == 1:
            raise ValueError(f"classes is {self.classes}; there must be 2 or more to choose from, or 0 for none")
        if self.minibatch_kernels < 0 or self.minibatch_dimensions < 1:
            raise ValueError(
                f"minibatch_kernels is {self.minibatch_kernels} and minibatch_dimensions {self.minibatch_dimensions};"
                " they must be at least 0 and 1"
            )
        if self.discriminator_steps < 1:
            raise ValueError(f"discriminator_steps is {self.discriminator_steps}; it must be at least 1")
        for name, value in (("real_label", self.real_label), ("augment_probability", self.augment_probability)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} is {value:g}; it must be above 0 and at most 1")
        if not self.penalty_weight > 0:
            raise ValueError(f"penalty_weight is {self.penalty_weight:g}; it must be above 0")
        if not self.historical_weight >= 0:
            raise ValueError(f"historical_weight is {self.historical_weight:g}; it must not be negative")
        if self.discriminator_learning_rate is not None and not self.discriminator_learning_rate > 0:
            raise ValueError(
                f"discriminator_learning_rate is {self.discriminator_learning_rate:g}; it must be above 0, or None for"
                " G's"
            )
        if len(set(self.augment)) < len(self.augment):
            raise ValueError(f"augment is {' '.join(self.augment)}; each change can be named once")
