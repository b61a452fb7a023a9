"""The rendered heads: the geometry by hand, what each factor does to a picture, and the file that the script writes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "data/render_heads.py"
REFERENCE = Path(__file__).with_name("heads-reference.npz")
"""`images`: render(draw_heads(6, 0, "train"), 32)."""
Array = np.ndarray


def _module(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module  # where dataclasses, and the script beside it, look
    spec.loader.exec_module(module)
    return module


made = _module(SCRIPT)


def picture(size: int = 32, seed: int = 0, **factors: float) -> Array:
    """int (S, S): one head; a factor that is not given is that of a head seen and lit from the front."""
    values = {"azimuth": 0.0, "elevation": 0.0, "light": 0.0, "width": 1.0} | factors
    head = replace(made.draw_heads(1, seed, "train"), factors={k: np.array([v]) for k, v in values.items()})
    return made.render(head, size)[0, 0].astype(int)


def columns(image: Array) -> tuple[int, int]:
    """The first and the last column that is not background alone."""
    there = np.flatnonzero((image != BACKGROUND).any(axis=0))
    return int(there[0]), int(there[-1])


BACKGROUND = round(255 * made.BACKGROUND)


def test_distance_to_a_sphere_by_hand() -> None:
    """(|p|^2 - r^2) / (2 |p|): at |p| = 2 of radius 1 it is 3/4; on the surface it is the distance."""
    x = np.array([[2.0, 1.001, 1.0, 0.5]])
    got = made.ellipsoid((x, 0 * x, 0 * x), (0, 0, 0), (1.0, 1.0, 1.0))
    assert got == pytest.approx(np.array([[0.75, 0.001, 0.0, -0.75]]), abs=2e-6)
    shifted = made.ellipsoid((x + 3, 0 * x + 4, 0 * x), (3, 4, 0), (1.0, 5.0, 7.0))
    assert shifted == pytest.approx(got, abs=2e-6)  # on the axis of x only that radius counts


def test_join_is_the_smaller_one_but_for_a_fillet_of_a_quarter() -> None:
    a, b = np.array([0.0, 0.0, 0.0, 0.2]), np.array([0.1, 0.0, 0.05, 0.0])
    assert made.join(a, b, 0.1) == pytest.approx(np.array([0.0, -0.025, -0.00625, 0.0]))


def test_axes_are_orthonormal_and_turn_the_face_as_the_factors_say() -> None:
    rng = np.random.default_rng(0)
    azimuth, elevation = rng.uniform(-90, 90, 20), rng.uniform(-30, 30, 20)
    frame = np.stack([np.concatenate(axis, axis=1) for axis in made.axes(azimuth, elevation)], axis=1)  # (20, 3, 3)
    assert frame @ frame.transpose(0, 2, 1) == pytest.approx(np.broadcast_to(np.eye(3), (20, 3, 3)))
    assert np.linalg.det(frame) == pytest.approx(1)
    seen = frame @ np.array([0, 0, 1.0])  # where the nose points to: right, up, towards the viewer
    assert (np.sign(seen[:, 0]) == np.sign(azimuth)).all()
    assert (np.sign(seen[:, 1]) == -np.sign(elevation)).all()
    right, _, _ = made.axes(np.array([90.0]), np.array([0.0]))
    assert float(right[2][0, 0]) == pytest.approx(1)


def test_rays_end_where_a_search_in_small_steps_finds_the_surface() -> None:
    """Against the first of 1,500 places along each ray that lies inside the head."""
    heads = made.draw_heads(4, 1, "train")
    face = {k: v.astype(np.float32)[:, None] for k, v in heads.identity.items()}
    u, v = (a.reshape(-1) for a in np.meshgrid(np.linspace(-0.8, 0.8, 17), np.linspace(-0.9, 0.9, 17)))
    near = np.sqrt(made.BOUND**2 - u * u - v * v)
    right, up, back = made.axes(heads.factors["azimuth"], heads.factors["elevation"])
    axes = zip(right, up, back, made.CENTRE, strict=True)
    origin = [(u * r + v * h + near * b + c).astype(np.float32) for r, h, b, c in axes]
    ahead = [-b.astype(np.float32) for b in back]

    def gap(t: Array) -> Array:
        return made.field(face, [o + t * a for o, a in zip(origin, ahead, strict=True)])

    wide = np.ones((4, 1), np.float32)
    depth = made.march(face, wide, origin, ahead, (2 * near).astype(np.float32))
    places = np.linspace(0, 2 * made.BOUND, 1500, dtype=np.float32)
    inside = np.stack([gap(t) < 0 for t in places])
    hit, should = np.isfinite(depth), inside.any(axis=0)
    assert 0.4 < should.mean() < 0.8 and (hit == should).mean() > 0.98  # what differs grazes the outline
    both = hit & should
    wrong = np.abs(depth[both] - places[inside.argmax(axis=0)][both])
    assert np.median(wrong) < 2e-3 and (wrong < 0.03).mean() > 0.98  # near the outline a small gap is a long way
    assert np.abs(gap(np.where(hit, depth, 0))[hit]).max() < 2 * made.GRAZING


@pytest.mark.parametrize("width", made.FACTORS["width"])
def test_no_head_comes_to_the_border(width: float) -> None:
    """The field is positive on the whole sphere of radius BOUND, and what is seen of that lies within the picture."""
    rng = np.random.default_rng(0)
    sphere = rng.normal(size=(3, 1, 3000))
    sphere *= made.BOUND / np.sqrt((sphere**2).sum(axis=0))
    x, y, z = (a + c for a, c in zip(sphere, made.CENTRE, strict=True))
    face = {k: v[:, None] for k, v in made.draw_heads(300, 0, "train").identity.items()}
    assert made.field(face, (x / width, y, z)).min() > made.GRAZING
    assert made.BOUND < made.VIEW


@pytest.fixture(scope="module")
def train() -> tuple[Array, Array]:
    return _drawn(600, "train")


@pytest.fixture(scope="module")
def held_out() -> tuple[Array, Array]:
    return _drawn(200, "test")


def _drawn(n: int, split: str) -> tuple[Array, Array]:
    """Pictures uint8 (n, 32, 32) and factors (n, 4) in [-1, 1]."""
    heads = made.draw_heads(n, 0, split)
    scaled = [2 * (heads.factors[k] - low) / (high - low) - 1 for k, (low, high) in made.FACTORS.items()]
    return made.render(heads, 32)[:, 0], np.stack(scaled, axis=1)


def test_every_picture_shows_a_head_within_background(train: tuple[Array, Array]) -> None:
    images, factors = train
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
    assert (border == BACKGROUND).all()
    assert ((images != BACKGROUND).mean(axis=(1, 2)) > 0.2).all() and (images.std(axis=(1, 2)) > 8).all()
    assert len({image.tobytes() for image in images}) == len(images)
    assert np.abs(factors).max() <= 1 and np.abs(factors.mean(axis=0)).max() < 0.1
    assert factors.std(axis=0) == pytest.approx(np.full(4, 1 / np.sqrt(3)), rel=0.1)  # uniform


def test_factors_can_be_read_linearly_from_pixels_of_unseen_heads(
    train: tuple[Array, Array], held_out: tuple[Array, Array]
) -> None:
    """Ridge regression on 600 heads; R^2 on 200 others of identities that it has not seen (0: as good as the mean)."""
    (x, y), (x_new, y_new) = ((images.reshape(len(images), -1) / 255, factors) for images, factors in (train, held_out))
    mean = x.mean(axis=0)
    weights = np.linalg.solve((x - mean).T @ (x - mean) + 10 * np.eye(x.shape[1]), (x - mean).T @ (y - y.mean(axis=0)))
    wrong = y_new - y.mean(axis=0) - (x_new - mean) @ weights
    r2 = 1 - (wrong**2).mean(axis=0) / y_new.var(axis=0)
    assert (r2 > [0.93, 0.80, 0.84, 0.40]).all(), r2


def test_pictures_are_those_of_the_reference() -> None:
    with np.load(REFERENCE) as stored:
        images = stored["images"].astype(int)
    assert images.shape == (6, 1, 32, 32)
    assert np.abs(made.render(made.draw_heads(6, 0, "train"), 32).astype(int) - images).max() <= 1


def test_a_processor_without_wide_registers_makes_the_same_pictures(tmp_path: Path) -> None:
    """With everything off that numpy found here beyond its baseline: other loops for every operation."""
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])  # type: ignore[index]
    code = f"import sys; sys.path[0] = {str(SCRIPT.parent)!r}; import numpy as np; from render_heads import *"
    code += f"; np.save({str(tmp_path / 'images.npy')!r}, render(draw_heads(30, 0, 'train'), 32))"
    without = {**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(found)}
    subprocess.run([sys.executable, "-c", code], check=True, env=without)
    images = made.render(made.draw_heads(30, 0, "train"), 32).astype(int)
    assert np.abs(np.load(tmp_path / "images.npy") - images).max() <= 1


def test_a_head_looks_the_same_whoever_is_rendered_beside_it() -> None:
    heads = made.draw_heads(20, 5, "test")
    together = made.render(heads, 32)
    assert np.array_equal(made.render(heads.part(13, 14), 32)[0], together[13])
    fewer = made.draw_heads(7, 5, "test")
    assert np.array_equal(fewer.identity["nose"], heads.identity["nose"][:7])
    other = made.draw_heads(20, 5, "train")
    assert not np.isin(other.identity["nose"], heads.identity["nose"]).any()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_mirrored_pose_under_mirrored_light_is_the_mirrored_picture(seed: int) -> None:
    one = picture(seed=seed, azimuth=40, elevation=15, light=-55, width=1.1)
    other = picture(seed=seed, azimuth=-40, elevation=15, light=55, width=1.1)
    assert np.array_equal(one[:, ::-1], other) and not np.array_equal(one, other)
    assert np.array_equal(picture(seed=seed, azimuth=70)[:, ::-1], picture(seed=seed, azimuth=-70))
    assert np.array_equal(picture(seed=seed, light=80)[:, ::-1], picture(seed=seed, light=-80))


def test_light_from_the_right_makes_the_right_half_the_brighter_one() -> None:
    image = picture(light=60)
    assert image[:, 16:].mean() > image[:, :16].mean() + 10
    assert columns(image) == columns(picture(light=-20))  # and leaves the shape alone


def test_azimuth_turns_the_face_to_its_side_and_nothing_up_or_down() -> None:
    side = picture(64, azimuth=90)
    assert side[:, 32:].mean() > side[:, :32].mean() + 15  # a face is brighter than the back of the head, its hair
    rows = [columns(picture(64, azimuth=a).T) for a in (0, 45, 90)]
    assert np.ptp(rows, axis=0).max() <= 1


def test_elevation_shows_the_hair_from_above_and_nothing_wider() -> None:
    below, level, above = (picture(64, elevation=e) for e in (-30, 0, 30))
    dark = [(image < 70).sum() for image in (below, level, above)]  # the hair of this head
    assert dark[0] < dark[1] < dark[2]
    assert np.ptp([columns(image) for image in (below, level, above)], axis=0).max() <= 1


def test_width_stretches_the_head_from_the_front_and_hardly_shows_from_the_side() -> None:
    narrow, wide = (columns(picture(64, width=w)) for w in (0.8, 1.2))
    assert (wide[1] - wide[0] + 1) / (narrow[1] - narrow[0] + 1) == pytest.approx(1.5, rel=0.07)
    assert columns(picture(64, width=0.8, azimuth=90)) == columns(picture(64, width=1.2, azimuth=90))
    assert columns(picture(64, width=0.8).T) == columns(picture(64, width=1.2).T)


def test_the_script_writes_one_whole_file_the_same_each_time(tmp_path: Path) -> None:
    def write(folder: str, *options: str) -> bytes:
        command = [sys.executable, str(SCRIPT), str(tmp_path / folder), "--train", "20", "--test", "9", *options]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert "train: 20 of 20 heads" in out and "test: 9 of 9 heads" in out
        assert [path.name for path in (tmp_path / folder).iterdir()] == ["heads.npz"]
        return (tmp_path / folder / "heads.npz").read_bytes()

    assert write("one") == write("two") == write("one")
    with np.load(tmp_path / "one/heads.npz", allow_pickle=False) as file:
        members = {name: file[name] for name in file.files}
    about = json.loads(members.pop("about.json").tobytes())
    assert about == {"labels": ["head"], "columns": {"factors": ["azimuth", "elevation", "light", "width"]}}
    for split, n in (("train", 20), ("test", 9)):
        images, labels, factors = (members.pop(f"{split}/{name}") for name in ("images", "labels", "factors"))
        heads = made.draw_heads(n, 0, split)
        assert images.dtype == np.uint8 and np.array_equal(images, made.render(heads, 32))
        assert labels.tolist() == [0] * n
        assert factors.dtype == np.float32 and factors.shape == (n, 4)
        assert factors[:, 2] == pytest.approx(heads.factors["light"])
    assert not members
    write("other", "--seed", "1", "--size", "64")
    with np.load(tmp_path / "other/heads.npz") as file:
        assert file["test/images"].shape == (9, 1, 64, 64)
        assert not np.isin(file["test/factors"][:, 0], made.draw_heads(20, 0, "train").factors["azimuth"]).any()


def test_the_script_refuses_no_heads(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "heads"), "--train", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--train and --test are 1 or more" in done.stderr
    assert not (tmp_path / "heads").exists()


def test_the_page_says_what_the_script_does() -> None:
    page = (ROOT / "docs/data/heads.md").read_text()
    for name, (low, high) in made.FACTORS.items():
        assert f"| `{name}` | {low:g} … {high:g} " in page
    assert f"{len(made.IDENTITY)}\nproportions" in page and f"grey {BACKGROUND};" in page
    assert f"{made.LIGHT_UP:g} degrees above" in page
    drawn = _module(ROOT / "data/draw_heads_sheet.py").sheet()
    with Image.open(ROOT / "docs/images/heads.png") as shown:
        assert np.abs(np.asarray(shown).astype(int) - drawn).max() <= 1
