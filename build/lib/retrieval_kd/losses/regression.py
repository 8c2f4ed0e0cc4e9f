"""Losses that regress numbers of the student to numbers of the teacher: margins, scores, ranks.

Every function takes student (R, C) and teacher (R, C) scores and valid (R, C) bool, True where the
candidate exists and the teacher scored it; `row_weights` (R,) weigh the rows in the mean. It returns
a scalar, 0 when nothing is valid; invalid places have exactly zero gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from retrieval_kd.losses.primitives import Positive, differences, fill, mean, pairs

__all__ = ["approx_rank_mse", "huber", "margin_mse", "margin_mse_all", "mse", "pearson"]


def margin_mse(student: Tensor, teacher: Tensor, valid: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """Match the student's score margins to the teacher's: column 0 against every other column.

    The mean over valid pairs (row, c >= 1) of the squared difference between s[0] - s[c] and
    t[0] - t[c]; with two columns, the paper's triples. The order is the list's: where the teacher
    prefers a "negative", the target margin is negative and is kept. No temperature: wants an
    unbounded student score, or a `scale` that fits it.
    Source: Hofstätter et al. 2020, arXiv:2010.02666.
    """
    error = fill(student, valid) - fill(teacher, valid)
    return mean((error[:, :1] - error[:, 1:]).square(), valid[:, :1] & valid[:, 1:], row_weights)


def margin_mse_all(student: Tensor, teacher: Tensor, valid: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """Match the margins between all candidates of a row, in both orders.

    The mean over all valid (row, i, j), i = j included, of the squared difference between s_i - s_j
    and t_i - t_j, which is twice the variance of the error s - t within a row: it is computed so,
    without an (R, C, C) tensor. 4 T^2 KL tends to it as T grows.
    Source: the trainer of naver/splade (`mse_margin`); margins as in arXiv:2010.02666.
    """
    error = fill(student - teacher, valid)
    count = valid.sum(1, keepdim=True).to(error.dtype)
    spread = error - error.sum(1, keepdim=True) / count.clamp(min=1)
    places = count[:, 0] if row_weights is None else count[:, 0] * row_weights
    return mean(2 * spread.square(), valid, places)  # a row has count * count pairs, a place in it count


def mse(student: Tensor, teacher: Tensor, valid: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """Squared difference of the scores themselves, the mean over valid places.

    Scale and zero point of the teacher count: the student must be able to reach its scores.
    Source: Barkan et al. 2020 (Distilled Sentence Embedding), arXiv:1908.05161.
    """
    return mean((fill(student, valid) - fill(teacher, valid)).square(), valid, row_weights)


def huber(
    student: Tensor, teacher: Tensor, valid: Tensor, delta: Positive = 1.0, row_weights: Tensor | None = None
) -> Tensor:
    """Like `mse`, but linear beyond an error of `delta`, so that outliers of the teacher pull less.

    The mean over valid places of e^2 / 2 for |e| <= delta, else delta * (|e| - delta / 2).
    Source: Huber 1964, "Robust estimation of a location parameter".
    """
    error = F.huber_loss(fill(student, valid), fill(teacher, valid), reduction="none", delta=delta)
    return mean(error, valid, row_weights)


def pearson(student: Tensor, teacher: Tensor, valid: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """1 - Pearson's correlation of a row's scores, the mean over rows.

    Neither scale nor zero point counts on either side. Rows in which the scores of a side are all
    equal have no correlation and do not count.
    Source: Huang et al. 2022 (DIST), arXiv:2205.10536; rank imitation of D2LLM, arXiv:2406.17262.
    """
    counted = valid.sum(1) >= 2
    sides = []
    for scores in (student, teacher):
        varied = torch.where(valid, scores, -torch.inf).amax(1) > torch.where(valid, scores, torch.inf).amin(1)
        counted = counted & varied
        scores = fill(scores, valid)
        average = scores.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
        sides.append(fill(scores - average, valid))
    left, right = sides
    # 1 where a row does not count: the root of 0 has no gradient
    lengths = [torch.where(counted, side.square().sum(1), 1.0).sqrt() for side in sides]
    return mean(1 - (left * right).sum(1) / lengths[0] / lengths[1], counted, row_weights)


def approx_rank_mse(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    temperature: Positive = 1.0,
    discount: Literal["none", "log2", "reciprocal"] = "none",
    row_weights: Tensor | None = None,
) -> Tensor:
    """Squared difference between the student's smooth ranks and the teacher's ranks, the mean over valid places.

    The smooth rank of i is 1 + the sum over j of sigmoid((s_j - s_i) / temperature); no temperature
    factor. The teacher's ranks count from 1, and candidates with equal scores share the mean of their
    ranks. `discount` weighs the error at teacher rank r with 1 / log2(1 + r) or 1 / r. The teacher
    has no gradient.
    Source: Schlatt et al. 2025 (Rank-DistiLLM), arXiv:2405.07920; smooth ranks of Qin et al. 2010.
    """
    compared = pairs(valid)
    ahead = -differences(fill(student, valid)) / temperature  # s_j - s_i at (i, j)
    smooth = 1 + fill(torch.sigmoid(ahead), compared).sum(2)
    behind = (1 - torch.sign(differences(fill(teacher, valid).detach()))) / 2
    ranks = 1 + fill(behind, compared).sum(2)
    weights = {"none": torch.ones_like(ranks), "log2": 1 / torch.log2(1 + ranks), "reciprocal": 1 / ranks}
    return mean(weights[discount] * (smooth - ranks).square(), valid, row_weights)
