"""What a run is: plain frozen dataclasses. A recipe (recipes/) returns a complete `RunSpec`; a command line edits it.

The clock of every schedule is images seen, counted over all workers, so that a number means the same at any batch size
and any number of workers. The text under a field is its `--help`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from models import MODELS, ChecksSettings, ModelConfig, name_of
from pipelines.errors import FigmentError


@dataclass(frozen=True)
class DataSpec:
    dataset: str
    """NAME of an ingested data set (its newest complete version) or NAME@VERSION."""
    split: str = "train"
    """Split to train on."""
    eval_split: str = "test"
    """Held-out split: evaluation and the real side of every comparison."""
    shuffle_shards: int = 8
    """Shards whose rows are permuted together; what one read task holds in memory."""
    prefetch_batches: int = 4
    """Batches that wait ready in a worker."""
    labels_per_class: int | None = None
    """Labels of each class that the model may see while it trains, for semi-supervised learning; None: all."""
    labels_seed: int = 0
    """Draws the images that keep their labels."""


@dataclass(frozen=True)
class TrainingSpec:
    images: int
    """Length of the run: images seen by all workers together."""
    batch_size: int
    """Images in one step over all workers together."""
    seed: int = 0
    """Seeds initial weights, data order, latents."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the forward passes; weights stay fp32."""
    compile: bool = False
    """torch.compile every network."""
    deterministic: bool = True
    """Only algorithms that give the same bits again on the same kind of processor, where there are such; slower on a
    GPU."""
    grad_clip: float | None = None
    """Largest norm of one optimiser's gradient; None: no clipping."""
    ema_half_life: int = 0
    """Images after which an old weight counts half in the averaged weights, which draw the pictures; 0: no average."""
    log_every: int = 2_000
    """Images between two points of the curves."""
    evaluate_every: int = 0
    """Images between two evaluations on the held-out split; 0: only at the end."""
    checkpoint_every: int = 50_000
    """Images between two checkpoints; there is always one at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""


@dataclass(frozen=True)
class VisualsSpec:
    grid: int = 8
    """A sample grid has grid x grid images."""
    frames: int = 60
    """Frames of the animation of how the model learned."""
    clock: Literal["linear", "log"] = "linear"
    """Frames even in images seen, or in its logarithm."""


@dataclass(frozen=True)
class ClusterSpec:
    workers: int = 1
    """Training workers; the batch is split among them."""
    gpu: Literal["auto", "yes", "no"] = "auto"
    """One GPU a worker (nccl); auto: when the cluster has enough of them."""
    cpus_per_worker: float = 1
    """Logical CPUs that one worker takes; the data tasks need some beside them."""
    threads_per_worker: int = 0
    """Torch threads in one worker; 0: Ray's choice (one a logical CPU)."""
    max_failures: int = 3
    """Restarts after a lost worker before the run fails."""


@dataclass(frozen=True)
class Expected:
    """The figure that tells whether the recipe worked, and where the bound comes from."""

    metric: str
    """Name of the final figure."""
    bound: float
    """Reached when the figure is on the good side of this."""
    better: Literal["lower", "higher"]
    """Which side is good."""
    source: str
    """Paper table, or the entry of docs/results.md."""

    def reached(self, value: float) -> bool:
        return value <= self.bound if self.better == "lower" else value >= self.bound


@dataclass(frozen=True)
class RunSpec:
    recipe: str
    """Name of the recipe that this was made from."""
    model: ModelConfig
    data: DataSpec
    training: TrainingSpec
    visuals: VisualsSpec = field(default_factory=VisualsSpec)
    cluster: ClusterSpec = field(default_factory=ClusterSpec)
    expected: Expected | None = None

    def check(self) -> None:
        """`FigmentError` for a spec that cannot run, before anything is started."""
        training, cluster = self.training, self.cluster
        for name, value in {
            "--training.images": training.images,
            "--training.batch-size": training.batch_size,
            "--training.log-every": training.log_every,
            "--training.checkpoint-every": training.checkpoint_every,
            "--training.keep-checkpoints": training.keep_checkpoints,
            "--data.shuffle-shards": self.data.shuffle_shards,
            "--data.prefetch-batches": self.data.prefetch_batches,
            "--cluster.workers": cluster.workers,
            "--visuals.grid": self.visuals.grid,
        }.items():
            if value < 1:
                raise FigmentError(f"{name} is {value}; it must be at least 1")
        if self.data.labels_per_class is not None and self.data.labels_per_class < 1:
            raise FigmentError(
                f"--data.labels-per-class is {self.data.labels_per_class}; it must be at least 1, or None"
            )
        if self.data.labels_seed < 0:
            raise FigmentError(f"--data.labels-seed is {self.data.labels_seed}; it must be at least 0")
        if not self.data.dataset.partition("@")[0]:
            raise FigmentError(f"--data.dataset is {self.data.dataset!r}; it must be NAME or NAME@VERSION")
        if self.visuals.frames < 2:
            raise FigmentError(f"--visuals.frames is {self.visuals.frames}; an animation needs at least 2")
        if isinstance(self.model, ChecksSettings):
            try:
                self.model.check()
            except ValueError as error:
                raise FigmentError(f"the model's settings do not go together: {error}") from error
        if training.batch_size % cluster.workers:
            raise FigmentError(
                f"--training.batch-size {training.batch_size} cannot be split evenly among"
                f" --cluster.workers {cluster.workers}; choose a multiple of {cluster.workers}"
            )

    def to_dict(self) -> dict[str, Any]:
        return {"model_name": name_of(self.model), **dataclasses.asdict(self)}

    @property
    def identity(self) -> str:
        """Hash of everything that decides which numbers a run produces: a run is only resumed under the same identity.

        Left out: what may change from one launch to the next (the length of the run, where and how often it is saved
        and logged, and the cluster; another number of workers goes on from the same cursor), and the version of the
        data set: a run keeps the one that it began with (run.json).
        """
        body = self.to_dict()
        for name in ("images", "deterministic", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints"):
            del body["training"][name]
        body["data"]["dataset"] = self.data.dataset.partition("@")[0]
        del body["data"]["prefetch_batches"]
        for name in ("recipe", "visuals", "cluster", "expected"):
            del body[name]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def spec_from_dict(body: dict[str, Any]) -> RunSpec:
    """Inverse of `RunSpec.to_dict`, for specs stored in checkpoints and model artifacts; tuples came as lists."""
    config_type = MODELS[body["model_name"]].config
    model = {name: tuple(value) if isinstance(value, list) else value for name, value in body["model"].items()}
    expected = body["expected"]
    return RunSpec(
        recipe=body["recipe"],
        model=config_type(**model),
        data=DataSpec(**body["data"]),
        training=TrainingSpec(**body["training"]),
        visuals=VisualsSpec(**body["visuals"]),
        cluster=ClusterSpec(**body["cluster"]),
        expected=None if expected is None else Expected(**expected),
    )
