"""Draws the picture of docs/data/heads.md: what each factor does to one head, and heads as they are drawn.

python data/draw_heads_sheet.py docs/images/heads.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from render_heads import FACTORS, Array, Heads, draw_heads, render

SIZE = 64
COLUMNS = 9
USUAL = {"azimuth": 20.0, "elevation": 5.0, "light": 25.0, "width": 1.0}
SHOWN = 3  # of the training heads of seed 0: the one that the upper rows show
RANDOM_ROWS = 4


def sheet() -> Array:
    """uint8 (rows * S, COLUMNS * S): a row a factor from its lowest to its highest value, then the first heads."""
    one = draw_heads(SHOWN + 1, 0, "train").identity
    identity = {k: np.repeat(v[SHOWN:], COLUMNS) for k, v in one.items()}
    rows = [render(draw_heads(RANDOM_ROWS * COLUMNS, 0, "train"), SIZE)]
    for name in reversed(FACTORS):
        factors = {k: np.linspace(*FACTORS[k], COLUMNS) if k == name else np.full(COLUMNS, USUAL[k]) for k in FACTORS}
        rows.insert(0, render(Heads(factors, identity), SIZE))
    images = np.concatenate(rows).reshape(-1, COLUMNS, SIZE, SIZE)
    return images.transpose(0, 2, 1, 3).reshape(-1, COLUMNS * SIZE)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python data/draw_heads_sheet.py docs/images/heads.png")
    Image.fromarray(sheet()).save(sys.argv[1], optimize=True)
    print(f"{sys.argv[1]}: {Path(sys.argv[1]).stat().st_size:,} bytes")
