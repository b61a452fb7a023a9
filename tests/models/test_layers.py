"""The bricks that models share."""

from __future__ import annotations

import torch

from models.layers import SAMPLE_BATCH, in_latent_chunks, to_uint8, to_unit


def test_every_level_survives_the_way_to_the_unit_interval_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    unit = to_unit(levels)
    assert (unit.dtype, unit.min().item(), unit.max().item()) == (torch.float32, 0, 1)
    assert torch.equal(to_uint8(unit), levels)


def test_values_go_to_the_nearest_level_and_what_lies_outside_to_the_last() -> None:
    values = torch.tensor([-0.5, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.5])
    assert to_uint8(values).tolist() == [0, 0, 1, 255, 255]


def test_latents_are_drawn_in_whole_chunks_and_the_surplus_is_dropped() -> None:
    drawn: list[int] = []

    def draw(n: int) -> torch.Tensor:
        drawn.append(n)
        return torch.full((n, 1), float(len(drawn)))

    result = in_latent_chunks(SAMPLE_BATCH + 3, draw, lambda z: 10 * z)
    assert drawn == [SAMPLE_BATCH, SAMPLE_BATCH]
    assert result.flatten().tolist() == [10.0] * SAMPLE_BATCH + [20.0] * 3
