"""Losses that compare the student's scores with a teacher's, list by list.

Every function takes student (R, C) and teacher (R, C) scores and valid (R, C) bool, True where the
teacher gave a score and the candidate exists, and returns a scalar: 0 when nothing is valid.
Invalid places have exactly zero gradient. The teacher is never differentiated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["kl", "margin_mse", "ranknet"]


def margin_mse(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Match the student's score margins to the teacher's: column 0 against every other column.

    The mean over valid pairs (row, c >= 1) of the squared difference between s[0] - s[c] and
    t[0] - t[c]. The order is the list's: where the teacher prefers a "negative", the target
    margin is negative and is kept. Wants an unbounded student score, or a `scale` that fits it.
    Source: Hofstätter et al. 2020, arXiv:2010.02666.
    """
    student, teacher = _without(student, valid, 0.0), _without(teacher, valid, 0.0)
    error = (student[:, :1] - student[:, 1:]) - (teacher[:, :1] - teacher[:, 1:])  # (R, C-1)
    pairs = valid[:, :1] & valid[:, 1:]
    return torch.where(pairs, error, 0.0).square().sum() / pairs.sum().clamp(min=1)


def kl(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
) -> Tensor:
    """Forward KL between the teacher's and the student's distribution over each list.

    temperature**2 * KL(softmax(t / teacher_temperature) || softmax(s / temperature)): summed over
    columns, averaged over the rows with at least two valid candidates. `teacher_temperature`
    defaults to `temperature`; the factor is the student's temperature squared.
    Source: Hinton et al. 2015, arXiv:1503.02531; for ranking, Lin et al. 2020, arXiv:2010.11386.
    """
    rows = valid.sum(1) >= 2
    target = _log_softmax(teacher / (teacher_temperature or temperature), valid)
    guess = _log_softmax(student / temperature, valid)
    terms = torch.where(valid & rows[:, None], target.exp() * (target - guess), 0.0)
    return temperature**2 * terms.sum() / rows.sum().clamp(min=1)


def ranknet(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Pairwise logistic loss on the teacher's order.

    The mean over all pairs with t_i > t_j, of all rows together, of log(1 + exp(-(s_i - s_j))).
    Source: Burges et al. 2005, "Learning to rank using gradient descent".
    """
    student, teacher = _without(student, valid, 0.0), _without(teacher, valid, 0.0)
    both = valid[:, :, None] & valid[:, None, :]
    ordered = both & (teacher[:, :, None] > teacher[:, None, :])  # (R, C, C)
    error = F.softplus(student[:, None, :] - student[:, :, None])
    return torch.where(ordered, error, 0.0).sum() / ordered.sum().clamp(min=1)


def _without(values: Tensor, valid: Tensor, fill: float) -> Tensor:
    """`values` with invalid places (which may hold NaN or -inf) set to `fill`, cut from the gradient."""
    return torch.where(valid, values, fill)


def _log_softmax(values: Tensor, valid: Tensor) -> Tensor:
    """Row-wise log-softmax over the valid places; 0 elsewhere."""
    lowest = torch.finfo(values.dtype).min
    return torch.where(valid, F.log_softmax(_without(values, valid, lowest), dim=1), 0.0)
