"""Pictures: where each pixel goes, when each frame is due, and that both films can be played."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from models.contract import Batch, Metrics, Traversal
from pipelines.training.visuals import BACKGROUND, Gallery, animate, frame_times, grid, pairs, png, predictions, walks

CLOCKS = st.sampled_from(["linear", "log"])


def flat(*values: int, channels: int = 1, height: int = 2, width: int = 3) -> np.ndarray:
    """One uniform image for each value."""
    return np.stack([np.full((channels, height, width), value, np.uint8) for value in values])


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


# --- grids ------------------------------------------------------------------------------------------------------------


def test_grid_places_every_image() -> None:
    picture = grid(flat(10, 20, 30), columns=2, scale=1, gap=1)
    o = BACKGROUND
    assert picture.shape == (7, 9, 3) and picture.dtype == np.uint8
    assert (picture[..., 0] == picture[..., 1]).all() and (picture[..., 0] == picture[..., 2]).all()
    assert picture[..., 0].tolist() == [
        [o, o, o, o, o, o, o, o, o],
        [o, 10, 10, 10, o, 20, 20, 20, o],
        [o, 10, 10, 10, o, 20, 20, 20, o],
        [o, o, o, o, o, o, o, o, o],
        [o, 30, 30, 30, o, o, o, o, o],
        [o, 30, 30, 30, o, o, o, o, o],
        [o, o, o, o, o, o, o, o, o],
    ]


def test_grid_keeps_colours_and_orientation() -> None:
    image = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 2, 2)
    picture = grid(image, columns=1, scale=2, gap=0)
    assert picture.shape == (4, 4, 3)
    assert picture[0, 0].tolist() == [0, 4, 8]
    assert picture[0, 2].tolist() == picture[1, 3].tolist() == [1, 5, 9]  # to the right
    assert picture[2, 0].tolist() == [2, 6, 10]  # below


@pytest.mark.parametrize(("side", "shown"), [(28, 84), (32, 64), (64, 64), (100, 100)])
def test_grid_makes_small_images_visible(side: int, shown: int) -> None:
    assert grid(flat(0, height=side, width=side), columns=8, gap=0).shape == (shown, shown, 3)


@pytest.mark.parametrize(
    "images", [np.zeros((1, 1, 2, 2)), np.zeros((1, 2, 2, 2), np.uint8), np.zeros((0, 3, 2, 2), np.uint8)]
)
def test_grid_refuses_what_it_cannot_show(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="a grid is made of"):
        grid(images, 2)


def test_pairs_put_the_reconstruction_below() -> None:
    originals, again = torch.from_numpy(flat(10, 20, 30)), torch.from_numpy(flat(11, 21, 31))
    picture = pairs(originals, again, columns=2)
    scale = (picture.shape[0] - 6) // 8  # two rows of pairs, each four pixels high
    across, down = 3 * scale + 2, 4 * scale + 2
    assert [picture[2 + r * down, 2 + c * across, 0] for r, c in ((0, 0), (0, 1), (1, 0))] == [10, 20, 30]
    assert [picture[1 + r * down + 4 * scale, 2 + c * across, 0] for r, c in ((0, 0), (0, 1), (1, 0))] == [11, 21, 31]


def test_walks_have_a_row_each() -> None:
    images = torch.from_numpy(flat(1, 2, 3, 4, 5, 6)).unflatten(0, (2, 3))
    picture = walks(Traversal(images, ["", ""]))
    assert (picture == grid(images.flatten(0, 1), 3)).all()
    assert set(picture[-3, :, 0].tolist()) == {4, 5, 6, BACKGROUND}


def test_the_title_of_a_walk_stands_beside_its_row() -> None:
    images = torch.from_numpy(flat(1, 2, 3, 4, 5, 6, 7, 8, 9)).unflatten(0, (3, 3))
    pictures = grid(images.flatten(0, 1), 3)
    titled = walks(Traversal(images, ["digit category", "", "c2"]))
    left = titled.shape[1] - pictures.shape[1]
    assert left > 50 and (titled[:, left:] == pictures).all()
    tops = [2 + row * (pictures.shape[0] - 2) // 3 for row in range(3)]
    written = [(titled[top : top + 43, :left] < 128).any(axis=(0, 2)) for top in tops]
    assert [columns.sum() > 0 for columns in written] == [True, False, True]
    assert written[0].sum() > written[2].sum(), "the longer title"
    assert (titled[[0, 1, -1, -2], :left] == BACKGROUND).all()
    assert not written[0][:2].any() and not written[0][-2:].any(), "nothing is cut off"


RED = [200, 0, 0]


def test_a_wrong_prediction_is_framed_in_red_and_named_with_the_truth() -> None:
    """Right, wrong, and one whose label nobody knows."""
    images, labels = torch.from_numpy(flat(10, 20, 30, height=64, width=64)), torch.tensor([0, 0, -1])
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    picture = predictions(images, labels, logits, ["cat", "dog"], columns=3)
    across = 64 + 6 + 2
    assert [picture[2 + 3, 2 + 3 + i * across, 0] for i in range(3)] == [10, 20, 30]
    assert [picture[2, 2 + i * across].tolist() for i in range(3)] == [[BACKGROUND] * 3, RED, [BACKGROUND] * 3]
    captions = [picture[2 + 70 : 2 + 85, 2 + i * across : 2 + 70 + i * across] for i in range(3)]
    red = [bool((caption[..., 0] > 100 + caption[..., 1].astype(int)).any()) for caption in captions]
    assert red == [False, True, False]
    dark = [int((caption < 200).any(-1).sum()) for caption in captions]
    assert dark[1] > 1.5 * max(dark[0], dark[2]) > 0, "`dog, not cat` is longer than `cat` and `dog`"
    same = predictions(images, torch.tensor([0, 1, 1]), logits, ["cat", "dog"], columns=3)
    assert not (same == RED).all(-1).any()
    numbers = predictions(images, torch.tensor([0, 1, 1]), logits, [], columns=3)
    assert (numbers != same).any() and numbers.shape == same.shape, "without names the classes' numbers are shown"


def test_png_gives_back_pixels_and_clock() -> None:
    picture = grid(flat(1, 200), 2)
    data = png(picture, images_seen=12800)
    assert (opened(data) == picture).all()
    assert Image.open(io.BytesIO(data)).info["images_seen"] == "12800"


# --- the clock --------------------------------------------------------------------------------------------------------


@given(total=st.integers(1, 10**9), frames=st.integers(2, 200), clock=CLOCKS)
def test_frame_times(total: int, frames: int, clock: str) -> None:
    times = frame_times(total, frames, clock)  # type: ignore[arg-type]
    assert times[0] == 0 and times[-1] == total
    assert all(a < b for a, b in itertools.pairwise(times))
    assert len(times) <= frames
    if total >= 10**6:  # enough images that no two frames fall on one
        assert len(times) == frames


def test_linear_times_are_even() -> None:
    assert frame_times(1000, 5, "linear") == (0, 250, 500, 750, 1000)


def test_log_times_are_even_in_the_logarithm() -> None:
    assert frame_times(1_000_000, 5, "log") == (0, 1000, 10_000, 100_000, 1_000_000)
    steps = np.diff(np.log(frame_times(10**8, 60, "log")[1:]))
    assert np.allclose(steps, steps[0], rtol=1e-3)


@pytest.mark.parametrize(("total", "frames"), [(0, 5), (10, 1)])
def test_frame_times_refuses_what_is_no_animation(total: int, frames: int) -> None:
    with pytest.raises(ValueError, match="has no"):
        frame_times(total, frames, "linear")


@given(
    total=st.integers(1, 5000),
    frames=st.integers(2, 40),
    clock=CLOCKS,
    steps=st.lists(st.integers(1, 700), min_size=1, max_size=30),
    data=st.data(),
)
def test_every_frame_falls_due_once_whatever_the_steps_and_restarts(
    total: int, frames: int, clock: str, steps: list[int], data: st.DataObject
) -> None:
    """A step that passes several times is one frame; every time is passed by exactly one step that is due."""
    marks = [-1, 0]
    while marks[-1] < total:
        marks.append(marks[-1] + steps[len(marks) % len(steps)])
    drawn: list[tuple[int, int]] = []
    for before, seen in itertools.pairwise(marks):
        # A new process may begin anywhere: nothing but the numbers tells it what is due.
        gallery = Gallery(2, frames, clock, total, seed=0)  # type: ignore[arg-type]
        if gallery.due(before, seen):
            drawn.append((before, seen))
    times = frame_times(total, frames, clock)  # type: ignore[arg-type]
    assert [sum(before < time <= seen for before, seen in drawn) for time in times] == [1] * len(times)
    assert all(any(before < time <= seen for time in times) for before, seen in drawn)
    # After a restart at a checkpoint the same steps are due again, at the same marks.
    start = data.draw(st.integers(1, len(marks) - 1))
    gallery = Gallery(2, frames, clock, total, seed=0)  # type: ignore[arg-type]
    again = [pair for pair in zip(marks[start:], marks[start + 1 :], strict=False) if gallery.due(*pair)]
    assert again == [pair for pair in drawn if pair[0] >= marks[start]]


# --- drawing a learner ------------------------------------------------------------------------------------------------


class Draws:
    """A learner that can only sample; it also uses torch's global random state, as a model may."""

    def __init__(self) -> None:
        self.g = nn.Linear(3, 2 * 2)

    def networks(self) -> dict[str, nn.Module]:
        return {"g": self.g}

    def optimizers(self) -> dict[str, Optimizer]:
        return {}

    def step(self, batch: Batch, generator: Generator) -> Metrics:
        raise AssertionError("drawing never trains")

    def sample(self, n: int, generator: Generator) -> Tensor:
        noise = torch.rand(n, 3, generator=generator) + torch.rand(n, 3)
        return (torch.sigmoid(self.g(noise)) * 255).to(torch.uint8).reshape(n, 1, 2, 2)


class DrawsEverything(Draws):
    def reconstruct(self, images: Tensor, generator: Generator) -> Tensor:
        return 255 - images

    def traverse(self, rows: int, steps: int, generator: Generator) -> Traversal:
        values = torch.arange(rows * steps, dtype=torch.uint8).reshape(rows, steps, 1, 1, 1)
        return Traversal(values.expand(-1, -1, 1, 2, 2), [""] * rows)


class DrawsAndClassifies(Draws):
    def classify(self, images: Tensor) -> Tensor:
        """The class is the grey value, halved."""
        return torch.eye(10)[images[:, 0, 0, 0].long() // 2]


GALLERY = Gallery(columns=3, frames=5, clock="linear", total_images=1000, seed=7)
REAL = torch.from_numpy(flat(*range(20), height=2, width=2))


def test_draw_gives_what_the_learner_can_do() -> None:
    drawing = GALLERY.draw(Draws(), 12800, REAL)
    assert list(drawing.pictures) == ["samples/000000012800.png"]
    assert (opened(drawing.pictures["samples/000000012800.png"]) == grid(drawing.samples[:9], 3)).all()
    pictures = GALLERY.draw(DrawsEverything(), 12800, REAL).pictures
    assert list(pictures) == [f"{kind}/000000012800.png" for kind in ("samples", "reconstructions", "traversals")]
    assert (opened(pictures["reconstructions/000000012800.png"]) == pairs(REAL[:3], 255 - REAL[:3], 3)).all()
    assert set(np.unique(opened(pictures["traversals/000000012800.png"]))) == {*range(9), BACKGROUND}


def test_held_out_images_are_shown_with_their_predicted_classes_when_there_are_labels() -> None:
    labels = torch.arange(20) // 2
    pictures = GALLERY.draw(DrawsAndClassifies(), 500, REAL, labels).pictures
    assert list(pictures) == ["samples/000000000500.png", "predictions/000000000500.png"]
    own = torch.eye(10)[labels[:9]]
    assert (opened(pictures["predictions/000000000500.png"]) == predictions(REAL[:9], labels[:9], own, (), 3)).all()
    assert list(GALLERY.draw(DrawsAndClassifies(), 500, REAL).pictures) == ["samples/000000000500.png"]


def test_draw_leaves_training_as_it_was() -> None:
    learner = DrawsEverything()
    weights = {k: v.clone() for k, v in learner.g.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    GALLERY.draw(learner, 0, REAL)
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(v, weights[k]) for k, v in learner.g.state_dict().items())
    assert learner.g.weight.grad is None


def test_samples_come_from_the_same_latents_each_time() -> None:
    learner = Draws()
    first = GALLERY.draw(learner, 0, REAL).pictures["samples/000000000000.png"]
    torch.rand(5)
    second = GALLERY.draw(learner, 500, REAL).pictures["samples/000000000500.png"]
    assert (opened(first) == opened(second)).all()
    with torch.no_grad():
        learner.g.weight.add_(1.0)
    assert (opened(GALLERY.draw(learner, 0, REAL).pictures["samples/000000000000.png"]) != opened(first)).any()


# --- animations -------------------------------------------------------------------------------------------------------


def noisy(n: int, side: int, images: int = 4) -> list[bytes]:
    random = np.random.default_rng(0)
    shape = (images, 3, side, side)
    return [png(grid(random.integers(0, 256, shape, np.uint8), 2), 64 * i) for i in range(n)]


def test_both_films_have_every_frame(tmp_path: Path) -> None:
    frames = noisy(6, side=31)
    film = animate(frames, seconds=3.0)
    (tmp_path / "a.mp4").write_bytes(film.mp4)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4"))
    meta = next(reader)
    held = math.ceil(2.0 / 0.5)
    assert sum(1 for _ in reader) == 6 + held
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p")
    width, height = meta["source_size"]
    assert width % 2 == height % 2 == 0
    # The index lies before the pictures: a browser can begin to play while it loads.
    assert film.mp4.index(b"moov") < film.mp4.index(b"mdat")

    gif = Image.open(io.BytesIO(film.gif))
    assert gif.n_frames == 6
    durations = []
    for i in range(gif.n_frames):
        gif.seek(i)
        durations.append(gif.info["duration"])
    assert durations == [500] * 5 + [2500]
    assert gif.info["loop"] == 0


def test_a_film_shows_its_frames_and_their_clock(tmp_path: Path) -> None:
    pictures = [grid(flat(value, height=32, width=32, channels=3), 1) for value in (0, 120, 250)]
    film = animate([png(picture, 1000 * i) for i, picture in enumerate(pictures)], seconds=1.5)
    gif = Image.open(io.BytesIO(film.gif))
    strips = []
    for i, picture in enumerate(pictures):
        gif.seek(i)
        shown = np.asarray(gif.convert("RGB")).astype(int)
        height, width, _ = picture.shape
        assert np.abs(shown[:height, :width] - picture).max() <= 8  # the palette is small
        strips.append(shown[height:])
    assert all((strip < 128).any() for strip in strips)  # something is written there …
    assert (strips[0] != strips[1]).any() and (strips[1] != strips[2]).any()  # … and it changes
    (tmp_path / "a.mp4").write_bytes(film.mp4)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4"))
    width, height = next(reader)["source_size"]
    first = np.frombuffer(next(reader), np.uint8).reshape(height, width, 3).astype(int)
    assert np.abs(first[: pictures[0].shape[0], : pictures[0].shape[1]] - pictures[0]).mean() < 12


def test_a_large_animation_becomes_a_modest_gif() -> None:
    film = animate(noisy(40, side=128, images=16))
    gif = Image.open(io.BytesIO(film.gif))
    assert len(film.gif) <= 4 * 10**6
    assert max(gif.size) <= 512 and gif.n_frames >= 15


def test_frames_of_other_sizes_and_without_a_clock_are_fitted() -> None:
    frames = [png(grid(flat(9, height=8, width=8), 1)), png(grid(flat(9, 9, height=16, width=16), 2), 100)]
    gif = Image.open(io.BytesIO(animate(frames).gif))
    assert gif.n_frames == 2


def test_one_frame_is_an_animation_and_none_is_not() -> None:
    assert Image.open(io.BytesIO(animate(noisy(1, side=32)).gif)).n_frames == 1
    with pytest.raises(ValueError, match="at least one frame"):
        animate([])
