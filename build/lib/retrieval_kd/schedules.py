"""Schedules: numbers that depend on the step alone, so that a resumed run needs no state of theirs."""

from __future__ import annotations

import math

from retrieval_kd.stages import Ramp


def learning_rate_factor(step: int, steps: int, warmup: float, schedule: str) -> float:
    """The share of the peak learning rate at `step` (from 0) of `steps`.

    Rises linearly over the first `warmup` share of the steps, then falls to 0 (`linear`,
    `cosine`) or stays (`constant`).
    """
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    if schedule == "constant":
        return 1.0
    progress = (step - rising) / max(1.0, steps - rising)
    return 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def weight_at(weight: float | Ramp, step: int) -> float:
    """A weight at `step`: itself, or the value its ramp has reached."""
    if not isinstance(weight, Ramp):
        return weight
    share = min(1.0, step / weight.steps)
    return weight.to * (share if weight.ramp == "linear" else share**2)
