"""Pictures of a learner and the animation of how it learned: uint8 arrays or PNG bytes; nothing is stored here.

A frame carries the images seen when it was drawn inside its PNG, so that the frames of one run, also those made before
it was killed, need nothing but themselves to become an animation with a readable clock.
"""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Generator, Tensor

from models.contract import Classifies, Learner, Reconstructs, Samples, Traversal, Traverses

GAP = 2  # pixels between and around the images of a grid
BACKGROUND = 255
SAMPLES = 64  # drawn at least, whatever a grid shows: their diversity is watched
_VISIBLE = 64  # pixels: auto scaling makes the longer side of an image at least this large
_LOG_DECADES = 3  # a logarithmic clock has no zero: after frame 0 it starts at this many decades before the end

_HOLD_S = 2.0  # how long the last frame stands
_CAPTION = 20  # pixels under a frame, for the clock
_FONT, _INK, _MARGIN = 13, (60, 60, 60), 6  # size and colour of what is written, pixels of background beside it
_GIF_SIDE, _GIF_BYTES, _GIF_COLOURS = 512, 4 * 10**6, 128
_CLOCK = "images_seen"  # key of the PNG text chunk

_FRAME, _NAME = 3, 15  # pixels: the frame around a classified image, and the line beneath it
_RIGHT, _WRONG = (60, 60, 60), (200, 0, 0)


def grid(images: Tensor | np.ndarray, columns: int, *, scale: int | None = None, gap: int = GAP) -> np.ndarray:
    """uint8 (N, C, H, W) with C 1 or 3, row by row -> uint8 (H', W', 3).

    Every image is magnified `scale` times without smoothing (None: until its longer side has 64 pixels). `gap` pixels
    of background lie between images and around them; the last row is filled up with it.
    """
    array = images.cpu().numpy() if isinstance(images, Tensor) else images
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] not in (1, 3) or len(array) == 0 or columns < 1:
        raise ValueError(f"a grid is made of uint8 (N, 1 or 3, H, W), not of {array.dtype} {array.shape}")
    n, channels, height, width = array.shape
    if scale is None:
        scale = max(1, math.ceil(_VISIBLE / max(height, width)))
    tiles = array.repeat(3 // channels, axis=1).repeat(scale, axis=2).repeat(scale, axis=3).transpose(0, 2, 3, 1)
    columns, rows = min(columns, n), math.ceil(n / min(columns, n))
    down, across = height * scale + gap, width * scale + gap
    canvas = np.full((gap + rows * down, gap + columns * across, 3), BACKGROUND, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = gap + i // columns * down, gap + i % columns * across
        canvas[top : top + height * scale, left : left + width * scale] = tile
    return canvas


def pairs(originals: Tensor, reconstructions: Tensor, columns: int) -> np.ndarray:
    """Twice uint8 (N, C, H, W) -> a grid (H', W', 3) of N pairs: the original above its reconstruction."""
    return grid(torch.cat([originals.cpu(), reconstructions.cpu()], dim=2), columns)


def walks(traversal: Traversal) -> np.ndarray:
    """A grid (H', W', 3) with one walk through the latent space in each row, and its title to the left of it."""
    rows, steps = traversal.images.shape[:2]
    picture = Image.fromarray(grid(traversal.images.flatten(0, 1), steps))
    font = ImageFont.load_default(_FONT)
    room = math.ceil(max(font.getlength(title) for title in traversal.titles))
    if room == 0:
        return np.asarray(picture)
    left = room + 2 * _MARGIN
    canvas = Image.new("RGB", (left + picture.width, picture.height), (BACKGROUND,) * 3)
    canvas.paste(picture, (left, 0))
    row = (picture.height - GAP) / rows
    for i, title in enumerate(traversal.titles):
        middle = (left - _MARGIN, GAP / 2 + row * (i + 0.5))
        ImageDraw.Draw(canvas).text(middle, title, fill=_INK, font=font, anchor="rm")
    return np.asarray(canvas)


def predictions(images: Tensor, labels: Tensor, logits: Tensor, names: Sequence[str], columns: int) -> np.ndarray:
    """uint8 (N, C, H, W), labels (N,), logits (N, K) -> a grid (H', W', 3) with the predicted class beneath each image.

    A wrong one is framed in red and says what it is instead. `names` are the classes', else their numbers are shown;
    an image with a negative label is neither right nor wrong."""
    tiles = []
    for image, label, predicted in zip(images, labels.tolist(), logits.argmax(1).tolist(), strict=True):
        picture = Image.fromarray(grid(image[None], 1, gap=0))
        wrong = 0 <= label != predicted
        tiles.append(_classified(picture, _name(names, predicted), _name(names, label) if wrong else None))
    return grid(np.stack(tiles).transpose(0, 3, 1, 2), columns, scale=1)


def _classified(picture: Image.Image, said: str, truth: str | None) -> np.ndarray:
    colour = _RIGHT if truth is None else _WRONG
    width, height = picture.size
    tile = Image.new("RGB", (width + 2 * _FRAME, height + 2 * _FRAME + _NAME), (BACKGROUND,) * 3)
    if truth is not None:
        tile.paste(colour, (0, 0, tile.width, height + 2 * _FRAME))
    tile.paste(picture, (_FRAME, _FRAME))
    text = said if truth is None else f"{said}, not {truth}"
    ImageDraw.Draw(tile).text((_FRAME, height + 2 * _FRAME), text, fill=colour, font=ImageFont.load_default(10))
    return np.asarray(tile)


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else str(label)


def png(array: np.ndarray, images_seen: int | None = None) -> bytes:
    """uint8 (H, W, 3) -> a PNG file, with the clock inside when given."""
    info = PngInfo()
    if images_seen is not None:
        info.add_text(_CLOCK, str(images_seen))
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", pnginfo=info, compress_level=4)  # 6: as many bytes, three times as long
    return file.getvalue()


def frame_times(total_images: int, frames: int, clock: Literal["linear", "log"]) -> tuple[int, ...]:
    """Images seen at which a frame is due: 0 … total_images, strictly increasing, at most `frames` of them.

    linear: even in images. log: after 0, even in log(images) over the last three decades before the end. Times that
    would fall on the same image are one.
    """
    if total_images < 1 or frames < 2:
        raise ValueError(f"an animation of {total_images} images has no {frames} frames")
    if clock == "linear":
        times = [round(i * total_images / (frames - 1)) for i in range(frames)]
    else:
        first = max(1.0, total_images / 10**_LOG_DECADES)
        shares = [i / (frames - 2) if frames > 2 else 1.0 for i in range(frames - 1)]
        times = [0, *(round(first * (total_images / first) ** share) for share in shares)]
    return tuple(sorted({0, *times, total_images}))


@dataclass(frozen=True)
class Drawing:
    samples: Tensor | None  # uint8 (N, C, H, W), if it can; the grid shows the first of them
    pictures: dict[str, bytes]
    """Path -> PNG: samples/000000012800.png, reconstructions/…, traversals/…, predictions/…, what of these it can."""

    @property
    def first(self) -> str:
        """Path of the picture that an animation is made of."""
        return next(iter(self.pictures))


@dataclass(frozen=True)
class Gallery:
    """When pictures of a learner are due, and how they are drawn. Without state: a resumed run goes on by the clock."""

    columns: int  # a sample grid has columns x columns images
    frames: int  # of the animation
    clock: Literal["linear", "log"]
    total_images: int
    seed: int  # of the latents, the same in every picture

    def due(self, before: int, images_seen: int) -> bool:
        """True when a frame's time lies in (before, images_seen]; `before` is -1 at the start of a run."""
        return any(before < time <= images_seen for time in frame_times(self.total_images, self.frames, self.clock))

    def draw(
        self,
        learner: Learner,
        images_seen: int,
        real_images: Tensor,
        labels: Tensor | None = None,
        names: Sequence[str] = (),
    ) -> Drawing:
        """`real_images`: uint8 (B, C, H, W) on the learner's device; as many are reconstructed as fill half a grid, and
        as many classified as fill one, when their `labels` (B,) are given; `names` are the classes'."""
        device = real_images.device
        name = f"{images_seen:012d}.png"
        # A learner may draw from torch's global state; training must not notice that it did.
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            samples, pictures = None, {}
            if isinstance(learner, Samples):
                samples = learner.sample(max(self.columns**2, SAMPLES), self._latents(device))
                pictures[f"samples/{name}"] = grid(samples[: self.columns**2], self.columns)
            if isinstance(learner, Reconstructs):
                originals = real_images[: self.columns * max(1, self.columns // 2)]
                again = learner.reconstruct(originals, self._latents(device))
                pictures[f"reconstructions/{name}"] = pairs(originals, again, self.columns)
            if isinstance(learner, Traverses):
                walked = learner.traverse(self.columns, self.columns, self._latents(device))
                pictures[f"traversals/{name}"] = walks(walked)
            if isinstance(learner, Classifies) and labels is not None:
                shown = real_images[: self.columns**2]
                said = learner.classify(shown)
                pictures[f"predictions/{name}"] = predictions(shown, labels[: len(shown)], said, names, self.columns)
        return Drawing(samples, {path: png(picture, images_seen) for path, picture in pictures.items()})

    def _latents(self, device: torch.device) -> Generator:
        return Generator(device).manual_seed(self.seed)


@dataclass(frozen=True)
class Animation:
    mp4: bytes  # H.264, yuv420p: plays in browsers
    gif: bytes  # at most 512 pixels a side and 4 MB; long animations leave out frames for it


def animate(frames: Sequence[bytes], seconds: float = 8.0) -> Animation:
    """PNG frames in order -> the two forms of their animation, `seconds` long; the last frame stands 2 s longer.

    Frames that `png` gave a clock show it beneath. Frames of another size than the last one are fitted to it.
    """
    if not frames:
        raise ValueError("an animation needs at least one frame")
    pictures: list[tuple[Image.Image, str]] = []
    for frame in frames:
        with Image.open(io.BytesIO(frame)) as image:
            seen = image.info.get(_CLOCK)
            pictures.append((image.convert("RGB"), "" if seen is None else f"{int(seen):,} images"))
    size = pictures[-1][0].size
    return Animation(_mp4(pictures, size, seconds / len(pictures)), _gif(pictures, size, seconds / len(pictures)))


def _captioned(picture: Image.Image, text: str, size: tuple[int, int]) -> Image.Image:
    """The picture in `size` with a strip beneath that says `text`; even sides, as H.264 wants them."""
    width, height = size
    canvas = Image.new("RGB", (width + width % 2, height + _CAPTION + height % 2), (BACKGROUND,) * 3)
    fitted = picture if picture.size == size else picture.resize(size, Image.Resampling.BOX)
    canvas.paste(fitted, (0, 0))
    place, font = (canvas.width - _MARGIN, height + 2), ImageFont.load_default(_FONT)
    ImageDraw.Draw(canvas).text(place, text, fill=_INK, font=font, anchor="ra")
    return canvas


def _mp4(pictures: Sequence[tuple[Image.Image, str]], size: tuple[int, int], frame_s: float) -> bytes:
    stills = [_captioned(picture, text, size) for picture, text in pictures]
    stills += [stills[-1]] * math.ceil(_HOLD_S / frame_s)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "animation.mp4")
        # The index of an MP4 stands at its end unless it is moved: faststart lets a browser play while it loads.
        options = ["-crf", "20", "-preset", "veryfast", "-movflags", "+faststart"]
        writer: Any = imageio_ffmpeg.write_frames(
            str(path),
            stills[0].size,
            fps=1 / frame_s,
            codec="libx264",
            pix_fmt_out="yuv420p",
            macro_block_size=2,
            quality=None,
            output_params=options,
        )
        writer.send(None)
        for still in stills:
            writer.send(still.tobytes())
        writer.close()
        return path.read_bytes()


def _gif(pictures: Sequence[tuple[Image.Image, str]], size: tuple[int, int], frame_s: float) -> bytes:
    share, step = min(1.0, (_GIF_SIDE - _CAPTION - 1) / max(size)), 1
    while True:
        # Counted from the end, so that the last frame is always one of them.
        chosen = pictures[::-1][::step][::-1]
        small = (max(1, int(size[0] * share)), max(1, int(size[1] * share)))
        data = _encode_gif([_captioned(picture, text, small) for picture, text in chosen], frame_s * step)
        excess = len(data) / _GIF_BYTES
        if excess <= 1 or max(small) <= _VISIBLE:
            return data
        if excess > 2 and len(chosen) > 30:
            step, excess = step * 2, excess / 2
        share *= math.sqrt(0.9 / max(excess, 0.9))


def _encode_gif(stills: Sequence[Image.Image], frame_s: float) -> bytes:
    flat = [still.quantize(_GIF_COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE) for still in stills]
    durations = [max(20, round(1000 * frame_s))] * len(flat)  # milliseconds; browsers slow down anything faster
    durations[-1] += round(1000 * _HOLD_S)
    file = io.BytesIO()
    flat[0].save(file, "GIF", save_all=True, append_images=flat[1:], duration=durations, loop=0, optimize=False)
    return file.getvalue()
