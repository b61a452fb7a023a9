"""Makes `heads`: grey pictures of 3D heads whose azimuth, elevation, light and width are known.

    python data/render_heads.py FOLDER          # writes FOLDER/heads.npz, which `jobs.ingest` reads

Stands in for the 3D faces of the InfoGAN paper (Chen et al. 2016, section 7.2), which come from a licensed face model.
Here every factor is a number beside the picture, so disentanglement can be measured.

A head is a smooth solid: the zero set of a field that joins ellipsoids (cranium, face, jaw, nose, …), whose proportions
are the head's identity. It is seen in parallel projection: rays march along the field to the surface, whose normal is
the field's gradient, and Lambert's law shades it, with some ambient light and a soft highlight.

Coordinates: x to the right of the picture, y up, z towards the viewer; the unit is half the height of a head.

The same seed gives the same pictures. What touches a pixel is +, -, *, / and square roots of single numbers in float32,
which IEEE 754 fixes to the bit, and no sum whose order is up to a library. Only sines of angles may differ in the last
place of float64, so two machines' pictures differ by one grey value at most, and nearly everywhere by none.

Shape legend: N heads, B heads of one chunk, P rays a head, S side in pixels. Point: three arrays (B, P) or (B, 1).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Point = tuple[Array, Array, Array]
Face = Mapping[str, Array]  # an identity as float32 (B, 1) a proportion

FACTORS = {  # name -> (lowest, highest), drawn uniformly
    "azimuth": (-90.0, 90.0),  # degrees; > 0: the face is turned to the right of the picture
    "elevation": (-30.0, 30.0),  # degrees; > 0: seen from above
    "light": (-90.0, 90.0),  # degrees; from where it shines, for the viewer; > 0: from the right of the picture
    "width": (0.8, 1.25),  # of the head, as a multiple of the usual one
}
IDENTITY = {  # name -> (lowest, highest), drawn uniformly; lengths in half heights of a head, heights above the eyes
    "crown": (0.64, 0.76),  # height of the cranium above its centre
    "depth": (0.76, 0.90),  # of the cranium, from its centre to its back
    "jaw": (0.34, 0.48),  # half its width
    "chin": (0.78, 0.92),  # how far below the eyes
    "chin_out": (0.56, 0.70),  # how far it stands out
    "cheek": (0.30, 0.42),  # distance of a cheek bone from the middle
    "brow": (0.56, 0.66),  # how far it stands out
    "brow_up": (0.15, 0.23),  # its height
    "eye_apart": (0.23, 0.31),  # distance of an eye from the middle
    "eye": (0.11, 0.155),  # half its width
    "nose": (0.26, 0.42),  # length
    "nose_out": (0.86, 1.00),  # how far its tip stands out
    "nose_wide": (0.08, 0.13),  # half its width
    "mouth": (0.16, 0.26),  # half its width
    "lips": (0.045, 0.08),  # half the thickness of one
    "ear": (0.15, 0.25),  # half its height
    "ear_out": (0.64, 0.72),  # distance of its middle from the head's
    "neck": (0.32, 0.42),  # half its width
    "skin": (0.65, 0.95),  # reflectance
    "hair": (0.08, 0.40),  # reflectance
    "hairline": (0.40, 0.64),  # height where it begins over the forehead
}

CENTRE = (0.0, -0.06, 0.0)  # the point that a head turns about
BOUND = 1.24  # radius around it within which every head lies
VIEW = 1.27  # half the side of the picture: no head comes to its border
BACKGROUND = 0.40
LIGHT_UP = 25.0  # degrees
AMBIENT, DIFFUSE, SHINE = 0.22, 0.72, 0.08

SAMPLES = 2  # rays a pixel along each side
NEAR = 2e-3  # a ray this near to the surface has arrived
STEPS = 24
GRAZING = 0.01  # a ray that is this near after all steps has arrived too: a quarter of the distance between two rays
LONGEST_STEP = 2.0  # in distances to the surface
EPSILON = 0.012  # of the differences that the normal is taken from
RAYS_AT_ONCE = 16 * 64 * 64  # about: few enough for a core's cache, enough that numpy's calls do not count
HEADS_A_JOB = 256
SAY_EVERY_S = 5.0


@dataclass(frozen=True)
class Heads:
    """What N heads look like: names -> float64 (N,)."""

    factors: Mapping[str, Array]
    identity: Mapping[str, Array]

    def part(self, start: int, stop: int) -> Heads:
        return Heads(*({k: v[start:stop] for k, v in d.items()} for d in (self.factors, self.identity)))

    def __len__(self) -> int:
        return len(self.factors["azimuth"])


def draw_heads(n: int, seed: int, split: str) -> Heads:
    """n heads with an identity each. Another split has other heads; fewer heads are the first ones of more."""
    rng = np.random.default_rng([seed, *split.encode()])
    ranges = {**FACTORS, **IDENTITY}
    drawn = rng.random((n, len(ranges)))
    values = {k: low + (high - low) * drawn[:, i] for i, (k, (low, high)) in enumerate(ranges.items())}
    return Heads({k: values[k] for k in FACTORS}, {k: values[k] for k in IDENTITY})


def render(heads: Heads, size: int) -> Array:
    """uint8 (N, 1, S, S)."""
    np.empty(
        1 << 24, np.uint8
    )  # freed at once: from here on glibc keeps what is freed, which saves a third of the time
    chunk = max(1, RAYS_AT_ONCE // (size * SAMPLES) ** 2)
    return np.concatenate([_render(heads.part(i, i + chunk), size) for i in range(0, len(heads), chunk)])


def _render(heads: Heads, size: int) -> Array:
    """uint8 (B, 1, S, S)."""
    face = {k: v.astype(np.float32)[:, None] for k, v in heads.identity.items()}
    wide = heads.factors["width"].astype(np.float32)[:, None]
    right, up, back = axes(heads.factors["azimuth"], heads.factors["elevation"])

    def in_head(a: Any, b: Any, c: Any) -> Point:
        """The vector a to the right, b up and c towards the viewer, in the coordinates of each head."""
        x, y, z = (a * right[i] + b * up[i] + c * back[i] for i in range(3))
        return x.astype(np.float32), y.astype(np.float32), z.astype(np.float32)

    side = size * SAMPLES
    along = ((np.arange(side) + 0.5) / side * 2 - 1) * VIEW
    u, v = (a.reshape(-1) for a in np.meshgrid(along, -along))
    pixel = np.flatnonzero(u * u + v * v < BOUND * BOUND)  # the others see nothing but background
    u, v = u[pixel], v[pixel]
    near = np.sqrt(BOUND * BOUND - u * u - v * v)
    x, y, z = in_head(u, v, near)
    origin, ahead = (x + CENTRE[0], y + CENTRE[1], z + CENTRE[2]), in_head(0, 0, -1)
    depth = march(face, wide, origin, ahead, 2 * near.astype(np.float32))

    hit = np.isfinite(depth)
    rays = first(hit)
    depth, hit, x, y, z = taken(rays, depth, hit, *origin)
    depth = np.where(hit, depth, 0)
    point = x + depth * ahead[0], y + depth * ahead[1], z + depth * ahead[2]
    angle, tilt = np.radians(heads.factors["light"])[:, None], np.radians(LIGHT_UP)
    light = in_head(np.cos(tilt) * np.sin(angle), np.sin(tilt), np.cos(tilt) * np.cos(angle))
    shown = shade(face, wide, point, light, in_head(0, 0, 1))

    grey = np.full((len(heads), side * side), BACKGROUND, np.float32)
    head = np.broadcast_to(np.arange(len(heads))[:, None], rays.shape)
    grey[head[hit], pixel[rays[hit]]] = shown[hit]
    fine = grey.reshape(-1, 1, size, SAMPLES, size, SAMPLES)
    rows = fine[:, :, :, 0] + fine[:, :, :, 1]
    mean = (rows[..., 0] + rows[..., 1]) * (255 / SAMPLES**2)  # in this order: a mirrored picture has the same bits
    return np.rint(np.clip(mean, 0, 255)).astype(np.uint8)


def axes(azimuth: Array, elevation: Array) -> tuple[Point, Point, Point]:
    """Degrees (B,) -> the picture's right, up and towards the viewer in the coordinates of each head, (B, 1) each."""
    a, e = np.radians(azimuth)[:, None], np.radians(elevation)[:, None]
    sin_a, cos_a, sin_e, cos_e = np.sin(a), np.cos(a), np.sin(e), np.cos(e)
    return (cos_a, 0 * a, sin_a), (sin_a * sin_e, cos_e, -cos_a * sin_e), (-sin_a * cos_e, sin_e, cos_a * cos_e)


def march(face: Face, wide: Array, origin: Point, ahead: Point, length: Array) -> Array:
    """How far along its ray the surface lies, inf where it does not: (B, P). `length` (P,): where rays end.

    A ray goes on by the distance to the surface, and by up to LONGEST_STEP times that where the last step, which was
    longer than it brought the surface nearer, says that it comes in at an angle. One that got inside goes back.
    """
    (x, y, z), (dx, dy, dz) = origin, ahead
    depth: Array = np.full(x.shape, np.inf, np.float32)
    place = np.broadcast_to(np.arange(depth.shape[1]), depth.shape)
    head = np.arange(len(depth))[:, None]
    live: Array = np.ones(depth.shape, bool)
    end = np.broadcast_to(length, depth.shape)
    t = last = step = np.zeros(depth.shape, np.float32)
    x, dx, safe = x / wide, dx / wide, np.minimum(wide, 1)  # the field is that of the usual width
    for _ in range(STEPS):
        gap = field(face, (x + t * dx, y + t * dy, z + t * dz))
        arrived = live & (np.abs(gap) < NEAR)
        depth[np.broadcast_to(head, t.shape)[arrived], place[arrived]] = t[arrived]
        ratio = step / np.maximum(last - gap, np.maximum(step, NEAR) / LONGEST_STEP)
        step = gap * np.where((gap > 0) & (gap < last), np.maximum(ratio, safe), safe)
        t, last = t + step, gap
        live = live & ~arrived & (t < end)
        most = live.sum(1).max()
        if most == 0:
            break
        if most < 0.9 * live.shape[1]:
            t, live, place, end, last, step, x, y, z = taken(first(live), t, live, place, end, last, step, x, y, z)
    grazing = live & (last < GRAZING)
    depth[np.broadcast_to(head, t.shape)[grazing], place[grazing]] = t[grazing]
    return depth


def first(wanted: Array) -> Array:
    """bool (B, P) -> (B, most of a row): the places of the wanted ones of a row in order, then some unwanted ones."""
    return np.argsort(~wanted, axis=1, kind="stable")[:, : wanted.sum(1).max()]


def taken(places: Array, *arrays: Array) -> list[Array]:
    return [np.take_along_axis(a, places, 1) for a in arrays]


def field(f: Face, p: Point) -> Array:
    """Distance to the surface of the head of the usual width, roughly; < 0 inside it."""
    x, y, z = p = np.sqrt(p[0] * p[0] + 1e-3), p[1], p[2]  # |x| without its kink: both halves are alike
    mouth, half_nose = mouth_height(f), f["nose"] * 0.5
    d = ellipsoid(p, (0, 0.26, -0.12), (0.64, f["crown"], f["depth"]))
    d = join(d, ellipsoid(p, (0, -0.18, 0.22), (0.54, 0.66, 0.55)), 0.15)  # the face
    d = join(d, ellipsoid(p, (0, 0.12 - f["chin"] * 0.75, 0.20), (f["jaw"], 0.32, 0.46)), 0.12)  # the jaw
    d = join(d, ellipsoid(p, (0, 0.12 - f["chin"], f["chin_out"]), (0.17, 0.12, 0.15)), 0.12)
    d = join(d, ellipsoid(p, (f["cheek"], -0.20, 0.50), (0.17, 0.15, 0.18)), 0.12)
    d = join(d, ellipsoid(p, (f["eye_apart"] * 0.9, f["brow_up"], f["brow"]), (0.25, 0.08, 0.14)), 0.10)
    d = -join(-d, ellipsoid(p, (f["eye_apart"], 0, 0.86), (0.17, 0.10, 0.16)), 0.08)  # an eye's socket is taken away
    d = join(d, ellipsoid(p, (f["eye_apart"], 0, 0.60), (0.13, 0.11, 0.13)), 0.02)
    sheared = x, y, z + (f["nose_out"] - 0.80) / f["nose"] * (y + half_nose)  # the bridge stands out more the lower
    bridge = ellipsoid(sheared, (0, -half_nose, 0.30 + f["nose_out"] * 0.5), (0.075, half_nose + 0.12, 0.13))
    d = join(d, bridge, 0.06)
    d = join(d, ellipsoid(p, (0, -f["nose"], f["nose_out"] - 0.11), (f["nose_wide"], 0.085, 0.11)), 0.06)
    nostril = ellipsoid(p, (f["nose_wide"], -f["nose"] - 0.01, f["nose_out"] - 0.2), (0.06, 0.06, 0.09))
    d = join(d, nostril, 0.04)
    d = join(d, ellipsoid(p, (0, mouth + f["lips"] * 0.7, 0.70), (f["mouth"], f["lips"], 0.10)), 0.04)
    d = join(d, ellipsoid(p, (0, mouth - f["lips"] * 0.7, 0.68), (f["mouth"] * 0.85, f["lips"], 0.10)), 0.04)
    d = join(d, ellipsoid(p, (f["ear_out"], -0.08, -0.10), (0.06, f["ear"], 0.12)), 0.03)
    neck = ellipsoid(p, (0, -0.80, -0.20), (f["neck"], 1.0, f["neck"]))
    return np.maximum(join(d, neck, 0.10), -1.10 - y)  # which is cut off level


def mouth_height(f: Face) -> Array:
    return -0.5 * (f["nose"] + f["chin"])


def ellipsoid(p: Point, centre: tuple[Any, Any, Any], radii: tuple[Any, Any, Any]) -> Array:
    """Distance to an ellipsoid to first order (Taubin): (|q|^2 - 1) / |its gradient|, q = (p - centre) / radii."""
    inverse = [1 / r for r in radii]
    q = [(a - c) * i for a, c, i in zip(p, centre, inverse, strict=True)]
    n = [a * i for a, i in zip(q, inverse, strict=True)]
    gradient = np.sqrt(n[0] * n[0] + n[1] * n[1] + n[2] * n[2]) * 2
    return (q[0] * q[0] + q[1] * q[1] + q[2] * q[2] - 1) / (gradient + 1e-6)


def join(a: Array, b: Array, k: float) -> Array:
    """The smaller one, rounded off where they differ by less than k: two solids become one without a seam."""
    h = np.maximum(k - np.abs(a - b), 0)
    return np.minimum(a, b) - h * h * (0.25 / k)


def shade(f: Face, wide: Array, point: Point, light: Point, viewer: Point) -> Array:
    """Brightness (B, P) of points of the surface; `light` and `viewer`: unit vectors towards them."""
    x, y, z = np.abs(point[0]) / wide, point[1], point[2]
    here = field(f, (x, y, z))
    half = np.where(point[0] < 0, -1, 1).astype(np.float32)
    normal = unit(
        (
            (field(f, (x + EPSILON, y, z)) - here) * half / wide,
            field(f, (x, y + EPSILON, z)) - here,
            field(f, (x, y, z + EPSILON)) - here,
        )
    )
    between = unit((light[0] + viewer[0], light[1] + viewer[1], light[2] + viewer[2]))
    shine = np.maximum(dot(normal, between), 0)
    for _ in range(4):  # to the 16th power
        shine = shine * shine
    return paint(f, (x, y, z)) * (AMBIENT + DIFFUSE * np.maximum(dot(normal, light), 0)) + SHINE * shine


def unit(p: Point) -> Point:
    scale = 1 / np.sqrt(dot(p, p) + 1e-12)
    return p[0] * scale, p[1] * scale, p[2] * scale


def dot(p: Point, q: Point) -> Array:
    return p[0] * q[0] + p[1] * q[1] + p[2] * q[2]


def paint(f: Face, p: Point) -> Array:
    """Reflectance (B, P): skin, and on it eyes, brows, lips and hair. Every edge is soft."""
    x, y, z = p

    def spot(a: Any, b: Any, height: Any, half_width: Any, half_height: Any) -> Array:
        """1 in an ellipse around the height, 0 outside; a, b: the point's coordinates in its plane."""
        return np.clip((1.25 - (a / half_width) ** 2 - ((b - height) / half_height) ** 2) * 4, 0, 1)

    def over(below: Array, colour: Any, where: Array) -> Array:
        return below + (colour - below) * where

    front, eye, mouth = z > 0.3, x - f["eye_apart"], mouth_height(f)
    grey = over(f["skin"], 0.95, front * spot(eye, y, 0, f["eye"], 0.065))
    grey = over(grey, 0.05, front * spot(eye, y, 0, 0.062, 0.065))
    grey = over(grey, f["hair"] * 0.7, front * spot(eye, y, f["brow_up"], 0.17, 0.035))
    grey = over(grey, f["skin"] * 0.55, front * spot(x, y, mouth, f["mouth"], f["lips"] * 1.5))
    grey = over(grey, f["skin"] * 0.20, front * spot(x, y, mouth, f["mouth"], 0.018))
    behind = np.clip((y - f["hairline"] + 0.95 * (0.62 - z)) * 12, 0, 1)  # of a line from forehead to nape
    ear = np.clip((x - 0.56) * 20, 0, 1) * spot(z + 0.10, y, -0.08, 0.13, f["ear"] * 1.1)
    return over(grey, f["hair"], behind * np.clip((y + 0.55) * 12, 0, 1) * (1 - ear))


def render_all(heads: Heads, size: int, what: str) -> Array:
    """uint8 (N, 1, S, S), rendered on all cores; says how far it is."""
    starts = range(0, len(heads), HEADS_A_JOB)
    parts = [heads.part(start, start + HEADS_A_JOB) for start in starts]
    images = np.empty((len(heads), 1, size, size), np.uint8)
    began = said = time.monotonic()
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(parts)), multiprocessing.get_context("spawn")) as pool:
        for start, made in zip(starts, pool.map(render, parts, [size] * len(parts)), strict=True):
            images[start : start + len(made)] = made
            done, now = start + len(made), time.monotonic()
            if now - said >= SAY_EVERY_S or done == len(heads):
                said = now
                print(f"{what}: {done:,} of {len(heads):,} heads, {done / (now - began):,.0f} a second", flush=True)
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where heads.npz is written")
    parser.add_argument("--size", type=int, choices=(32, 64), default=32, help="side of the pictures in pixels")
    parser.add_argument("--train", type=int, default=20_000, help="heads to train with")
    parser.add_argument("--test", type=int, default=2_000, help="other heads, with other identities")
    parser.add_argument("--seed", type=int, default=0, help="of factors and identities")
    given = parser.parse_args()
    if min(given.train, given.test) < 1 or given.seed < 0:
        parser.error("--train and --test are 1 or more, --seed is 0 or more")
    members: dict[str, Array] = {}
    for split, n in (("train", given.train), ("test", given.test)):
        heads = draw_heads(n, given.seed, split)
        members[f"{split}/images"] = render_all(heads, given.size, split)
        members[f"{split}/labels"] = np.zeros(n, np.int64)
        members[f"{split}/factors"] = np.stack(list(heads.factors.values()), axis=1).astype(np.float32)
    about = {"labels": ["head"], "columns": {"factors": list(FACTORS)}}
    members["about.json"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    given.folder.mkdir(parents=True, exist_ok=True)
    target, unfinished = given.folder / "heads.npz", given.folder / ".heads.npz.unfinished"
    with unfinished.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **members)
    unfinished.replace(target)
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
