"""What a policy over teachers sees of a batch (see `controllers.Selection`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.targets import softmax, zscore

_TINY = 1e-12


def selection_features(
    lists: NDArray[np.float32], student: NDArray[np.float32], valid: NDArray[np.bool_], positive: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Four features of every teacher's list, each near [0, 1]: how undecided the teacher is (entropy), how low it ranks
    the best positive, how far the student is from it (KL), how far it is from the teachers' mean (KL).

    Shapes: lists (T, R, C) scores, NaN where there is none; student (R, C); valid, positive (R, C); returns (T, R, 4).
    """
    scores = zscore(np.where(valid, lists, np.nan))
    chance = softmax(scores)  # (T, R, C)
    size = np.log(np.maximum(2, valid.sum(-1)))
    entropy = -(chance * np.log(chance + _TINY)).sum(-1) / size
    best = np.where(positive, np.nan_to_num(scores, nan=-np.inf), -np.inf).max(-1, keepdims=True)
    rank = np.where(np.isfinite(best[..., 0]), (scores > best).sum(-1) / valid.shape[1], 0.0)
    guess = np.log(softmax(np.where(valid, student, np.nan)) + _TINY)
    gap = (chance * (np.log(chance + _TINY) - guess)).sum(-1) / size
    mean = np.log(chance.mean(0) + _TINY)
    dissent = (chance * (np.log(chance + _TINY) - mean)).sum(-1) / size
    return np.stack([entropy, rank, np.clip(gap, 0, 1), dissent], axis=-1).astype(np.float64)
