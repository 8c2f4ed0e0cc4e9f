"""Targets: teacher scores made comparable and fused, as pure functions of arrays.

The statistics of a list are taken over its valid places, which are those that hold a finite score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def minmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each list mapped to [0, 1] as (x - min) / (max - min + 1e-6); NaN where not finite.

    Shapes: (..., K) to (..., K).
    """
    scores = _finite(scores)
    low, high = _nan(np.nanmin, scores), _nan(np.nanmax, scores)
    return ((scores - low) / (high - low + 1e-6)).astype(np.float32)


def zscore(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each list shifted to mean 0 and scaled to population deviation 1 (plus 1e-6); NaN where not finite.

    Shapes: (..., K) to (..., K).
    """
    exact = _finite(scores).astype(np.float64)  # float32 would make a deviation of its own of a constant list
    return np.asarray((exact - _nan(np.nanmean, exact)) / (_nan(np.nanstd, exact) + 1e-6), np.float32)


def fuse(
    scores: NDArray[np.float32], normalize: str = "none", shares: Sequence[float] = (), scale: float = 1.0
) -> NDArray[np.float32]:
    """Normalise every teacher's lists, average them with `shares`, multiply by `scale`.

    Shapes: scores (T, Q, K) to (Q, K); a place that any teacher leaves open is NaN. Equal shares
    when none are given; shares are divided by their sum.
    """
    normalised = {"none": _finite, "minmax": minmax, "zscore": zscore}[normalize](scores)
    weights = np.asarray(shares or [1.0] * len(scores), np.float32)
    return (scale * np.tensordot(weights / weights.sum(), normalised, axes=1)).astype(np.float32)


def _finite(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(np.isfinite(scores), scores, np.float32(np.nan))


def _nan(statistic: Callable[..., NDArray[Any]], scores: NDArray[np.floating]) -> NDArray[np.floating]:
    """A NaN-ignoring statistic of the last axis, kept as an axis; NaN for a list without scores."""
    empty = np.isnan(scores).all(-1, keepdims=True)
    value = statistic(np.where(empty, 0.0, scores), axis=-1, keepdims=True)
    return np.asarray(np.where(empty, np.nan, value), scores.dtype)
