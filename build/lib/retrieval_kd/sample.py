"""Samples at equal distances, the same whenever they are taken."""

from __future__ import annotations

import numpy as np


def spread(count: int, size: int) -> list[int]:
    """At most `size` places of `count`, at equal distances, the first and the last among them."""
    return [int(place) for place in np.unique(np.linspace(0, count - 1, min(count, size)).astype(int))]
