"""What the first worker tells the world while the loop runs: curves, pictures, sentences, and the outcome at the end.

Tracking and pictures never hold the training step: records leave through a queue (tracking.py), and only the sampling
itself happens here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from safetensors.torch import save as save_safetensors
from torch import Generator, Tensor

from models.contract import Exports, ExportsClassifier, Learner, Samples
from pipelines.config import RunSpec
from pipelines.data.stream import evaluation_batches
from pipelines.evaluation.figures import sample_figures
from pipelines.objects import children, read_object, write_json, write_object
from pipelines.tracking import Tracking, open_run
from pipelines.training.checkpoint import network_tensors
from pipelines.training.health import Health
from pipelines.training.launch import Launch
from pipelines.training.visuals import Drawing, Gallery, animate

REAL_IMAGES = 1_024
"""Held-out images that samples are compared with."""


@dataclass(frozen=True)
class Outcome:
    """What a finished run amounts to; stored as outcome.json in its folder."""

    name: str
    images_seen: int
    seconds: float  # wall time of the last launch, without the start of the workers
    images_per_s: float  # over the last launch
    figures: dict[str, float]
    protocol: str  # how the figures of the samples were measured
    checkpoint: str
    folder: str  # of the run, in the storage; the files below are in it
    pictures: list[str]
    grid: str
    animation: str
    tracking_url: str | None


class Trained(Protocol):
    """What there is when the last step is done: the loop, as far as it is anybody's business."""

    learner: Learner
    images_seen: int
    images_per_s: float
    checkpoint_path: str

    def averaged_weights(self) -> AbstractContextManager[None]: ...


class Reporter:
    """The silent one, for every worker but the first. The loop begins it once, before anything else but sentences."""

    def begin(self) -> None: ...

    def say(self, text: str) -> None: ...

    def metrics(self, metrics: Mapping[str, float], images_seen: int, total: int, sentences: list[str]) -> None: ...

    def figures(self, figures: Mapping[str, float], images_seen: int) -> None: ...

    def checkpoint(self, path: str) -> None: ...

    def picture_due(self, before: int, images_seen: int) -> bool:
        return False

    def draw(self, learner: Learner, images_seen: int, health: Health) -> None: ...

    def finish(self, trained: Trained, figures: Mapping[str, float]) -> Outcome | None:
        return None

    def fail(self, sentence: str) -> None: ...

    def interrupt(self, reason: str) -> None: ...


class TrackedReporter(Reporter):
    """The first worker's."""

    def __init__(
        self,
        launch: Launch,
        device: torch.device,
        tracking: Tracking | None,
        tags: Mapping[str, str],
        say: Callable[[str], None],
    ) -> None:
        self._launch, self._device, self._say = launch, device, say
        spec, manifest, fs = launch.spec, launch.manifest, launch.fs
        self._started = time.perf_counter()
        self._run = open_run(
            tracking,
            name=launch.name,
            outbox=(fs, f"{launch.folder}/tracking-outbox"),  # remembers the run's id, so a resumed run goes on in it
            params=spec.to_dict(),
            tags={"spec.identity": spec.identity, "run.folder": launch.folder, **tags},
        )
        self._run.dataset(
            manifest.name,
            manifest.version,
            manifest.content_hash,
            source=manifest.folder,
            rows=manifest.rows(spec.data.split),
        )
        self._gallery = Gallery(
            columns=spec.visuals.grid,
            frames=spec.visuals.frames,
            clock=spec.visuals.clock,
            total_images=spec.training.images,
            seed=spec.training.seed,
        )
        self._real_from = f"{manifest.name}@{manifest.version}/{spec.data.eval_split}"

    def begin(self) -> None:
        self._real, self._labels = self._held_out()

    def say(self, text: str) -> None:
        self._say(text)

    def metrics(self, metrics: Mapping[str, float], images_seen: int, total: int, sentences: list[str]) -> None:
        self._run.metrics(metrics, images_seen)
        self._say(status_line(metrics, images_seen, total))
        self._warn(sentences)

    def figures(self, figures: Mapping[str, float], images_seen: int) -> None:
        if figures:
            self._run.metrics({f"test/{name}": value for name, value in figures.items()}, images_seen)
            self._say("  test  " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))

    def checkpoint(self, path: str) -> None:
        self._run.settle(0)  # what is not sent yet is kept in the run folder: a kill from now on loses none of it
        self._say(f"  checkpoint {path}")

    def picture_due(self, before: int, images_seen: int) -> bool:
        return self._gallery.due(before, images_seen)

    def draw(self, learner: Learner, images_seen: int, health: Health) -> None:
        drawing = self._drawing(learner, images_seen)
        for path, png in drawing.pictures.items():
            self._run.artifact(png, path)
            if path == drawing.first:
                write_object(self._launch.fs, f"{self._launch.folder}/frames/{images_seen:012d}.png", png)
        if images_seen > 0 and drawing.samples is not None:
            n = min(len(self._real), len(drawing.samples))
            diversity, sentences = health.check_samples(drawing.samples[:n], self._real[:n], images_seen)
            if diversity is not None:
                self._run.metrics({"diversity": diversity}, images_seen)
            self._warn(sentences)

    def finish(self, trained: Trained, figures: Mapping[str, float]) -> Outcome:
        """Final figures, pictures, the animation of the whole run, and the model for others."""
        launch, seen = self._launch, trained.images_seen
        seconds = time.perf_counter() - self._started
        self._say("training ends; measuring and drawing…")
        with trained.averaged_weights(), torch.no_grad():
            of_samples, protocol = self._figures_of_samples(trained.learner)
            final = {**figures, **of_samples}
            drawing = self._drawing(trained.learner, seen)
            weights = save_safetensors(network_tensors(trained.learner.networks()))
        self._run.metrics({f"test/{name}": value for name, value in final.items()}, seen)
        files = {f"{path.split('/')[0]}.png": png for path, png in drawing.pictures.items()}
        frames = [
            read_object(launch.fs, f"{launch.folder}/frames/{name}")
            for name in children(launch.fs, f"{launch.folder}/frames")
        ]
        animation = animate(frames)
        files |= {"training.mp4": animation.mp4, "training.gif": animation.gif}
        launch.check_owner()
        for name, data in files.items():
            write_object(launch.fs, f"{launch.folder}/{name}", data)
            self._run.artifact(data, f"final/{name}")
        self._publish(trained, {"networks.safetensors": weights, "spec.json": _spec_json(launch)})
        outcome = Outcome(
            name=launch.name,
            images_seen=seen,
            seconds=seconds,
            images_per_s=trained.images_per_s,
            figures=final,
            protocol=protocol,
            checkpoint=trained.checkpoint_path,
            folder=launch.folder,
            pictures=sorted(files),
            grid=f"{drawing.first.split('/')[0]}.png",
            animation="training.mp4",
            tracking_url=self._run.url,
        )
        self._run.note(_summary(launch, outcome))
        if waiting := self._run.close("FINISHED"):
            self._say(
                f"  ! {waiting} parcels of records could not be sent to MLflow ({self._run.trouble}); they are kept in"
                f" {launch.folder}/tracking-outbox and sent when the same command is run again"
            )
        write_json(launch.fs, f"{launch.folder}/outcome.json", {**asdict(outcome), "tracking_url": self._run.url})
        return outcome

    def _figures_of_samples(self, learner: Learner) -> tuple[dict[str, float], str]:
        if not isinstance(learner, Samples):
            return {}, "it draws no samples"
        return sample_figures(learner, self._real, self._real_from, self._launch.spec.training.seed)

    def _publish(self, trained: Trained, files: Mapping[str, bytes]) -> None:
        """The generator last: it is what a run's newest model is."""
        name, learner = f"figment-{self._launch.spec.recipe}", trained.learner
        if isinstance(learner, ExportsClassifier):
            with trained.averaged_weights():
                module, example = learner.export_classifier()
            self._run.publish(module, example, files=files, registered_name=f"{name}-classifier", name="classifier")
        if isinstance(learner, Exports):
            with trained.averaged_weights():
                seed = self._launch.spec.training.seed
                module, example = learner.export(Generator(self._real.device).manual_seed(seed))
            self._run.publish(module, example, files=files, registered_name=name)

    def fail(self, sentence: str) -> None:
        self._say(f"stopped: {sentence}")
        self._run.note(f"stopped: {sentence}")
        self._run.close("FAILED")

    def interrupt(self, reason: str) -> None:
        self._run.note(f"interrupted: {reason}")
        self._run.close("KILLED")

    def _warn(self, sentences: list[str]) -> None:
        for sentence in sentences:
            self._say(f"  ! {sentence}")

    def _drawing(self, learner: Learner, images_seen: int) -> Drawing:
        return self._gallery.draw(learner, images_seen, self._real, self._labels, self._launch.manifest.label_names)

    def _held_out(self) -> tuple[Tensor, Tensor]:
        """uint8 (N, C, H, W) and int64 (N,): the first images of the evaluation split in stored order, at most
        `REAL_IMAGES`, and their labels."""
        data = evaluation_batches(
            self._launch.fs,
            self._launch.manifest,
            self._launch.spec.data.eval_split,
            rank=0,
            world_size=1,
            batch_size=REAL_IMAGES,
        )
        with closing(data) as batches:
            batch = next(batches)
        return torch.from_numpy(batch.images).to(self._device), torch.from_numpy(batch.labels)


def status_line(metrics: Mapping[str, float], images_seen: int, total: int) -> str:
    """`  38.4/102.4 kimg  812 img/s  stall 1%  loss_d 0.912  loss_g 1.43  ETA 1:19`"""
    remaining = max(0, total - images_seen) / max(metrics["images_per_s"], 1e-9)
    minutes, seconds = divmod(round(remaining), 60)
    hours, minutes = divmod(minutes, 60)
    eta = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    own = "  ".join(f"{k} {v:.3g}" for k, v in metrics.items() if k not in ("images_per_s", "data_stall"))
    speed = f"{metrics['images_per_s']:,.0f} img/s  stall {metrics['data_stall']:.0%}"
    return f"  {images_seen / 1000:.1f}/{total / 1000:.1f} kimg  {speed}  {own}  ETA {eta}"


def _spec_json(launch: Launch) -> bytes:
    body = {"spec": launch.spec.to_dict(), "image_shape": list(launch.manifest.image_shape)}
    return json.dumps(body, indent=2).encode()


def _summary(launch: Launch, outcome: Outcome) -> str:
    """Markdown for the head of the run's page."""
    spec, manifest = launch.spec, launch.manifest
    lines = [
        f"**{spec.recipe}** on `{manifest.name}@{manifest.version}`: {outcome.images_seen:,} images,"
        f" seed {spec.training.seed}, {spec.cluster.workers} worker(s)",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {name} | {value:.5g} |" for name, value in outcome.figures.items()),
        "",
        expected_line(spec, outcome.figures),
        "",
        f"Samples were measured by: {outcome.protocol}. Files: `{launch.folder}`.",
    ]
    return "\n".join(lines)


def expected_line(spec: RunSpec, figures: Mapping[str, float]) -> str:
    """`expected swd <= 0.2 (…), got 0.17: reached`"""
    if spec.expected is None:
        return "no figure is expected of this recipe"
    expected = spec.expected
    sign = "<=" if expected.better == "lower" else ">="
    got = figures.get(expected.metric)
    if got is None:
        return f"expected {expected.metric} {sign} {expected.bound:g} ({expected.source}), which could not be measured"
    verdict = "reached" if expected.reached(got) else "not reached"
    return f"expected {expected.metric} {sign} {expected.bound:g} ({expected.source}), got {got:.5g}: {verdict}"
