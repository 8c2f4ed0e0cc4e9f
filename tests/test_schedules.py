"""Schedules by hand."""

from __future__ import annotations

import math

import pytest

from retrieval_kd.schedules import learning_rate_factor, weight_at
from retrieval_kd.stages import Ramp


def test_learning_rate_by_hand() -> None:
    linear = [learning_rate_factor(step, 8, 0.25, "linear") for step in range(9)]
    assert linear == pytest.approx([1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    constant = [learning_rate_factor(step, 8, 0.25, "constant") for step in range(8)]
    assert constant == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1])
    cosine = [learning_rate_factor(step, 4, 0.0, "cosine") for step in range(5)]
    root = math.sqrt(0.5)
    assert cosine == pytest.approx([1, (1 + root) / 2, 0.5, (1 - root) / 2, 0])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.99])
def test_every_step_learns_something(schedule: str, steps: int, warmup: float) -> None:
    factors = [learning_rate_factor(step, steps, warmup, schedule) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_weights_by_hand() -> None:
    assert weight_at(0.3, 10_000) == 0.3
    quadratic = Ramp(ramp="quadratic", to=2.0, steps=50_000)
    assert weight_at(quadratic, 10_000) == pytest.approx(2.0 * 0.04)
    linear = Ramp(ramp="linear", to=2.0, steps=4)
    assert [weight_at(linear, step) for step in range(6)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
