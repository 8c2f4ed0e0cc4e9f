"""The loss that compares a batch's rows with one another: entropic optimal transport."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from retrieval_kd.losses.primitives import Count, Positive, log_softmax, mean, order_by

__all__ = ["sinkhorn"]


def sinkhorn(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    temperature: Positive = 2.0,
    epsilon: Positive = 0.1,
    iterations: Count = 20,
    slots: Literal["rank", "column"] = "rank",
    row_weights: Tensor | None = None,
) -> Tensor:
    """Transport the batch's student distributions onto its teacher distributions (SinKD).

    The cost between student row i and teacher row j is the L1 distance of their softmaxes at
    `temperature`; exp(-cost / epsilon) is scaled to rows and columns of sum 1 in `iterations` turns; the
    loss is the mean over student rows of the plan's cost (the paper's sum, divided by their number).
    No temperature factor. Places of two rows are compared by `slots`: "rank" sorts each row by its
    teacher score, as lists of different queries have nothing else in common; "column" takes them as they
    stand, for rows over the same documents. Rows with fewer than two valid places do not take part;
    0 when none does. The gradient passes through the plan. `row_weights` weigh the student's rows.

    Shapes: student, teacher (R, C) float; valid (R, C) bool; row_weights (R,).
    Source: Cui et al. 2024, arXiv:2402.17110.
    """
    rows = valid.sum(1) >= 2
    log_s, log_t = log_softmax(student / temperature, valid), log_softmax(teacher / temperature, valid)
    order = order_by(teacher, valid) if slots == "rank" else torch.arange(valid.shape[1], device=valid.device)
    order = order.expand_as(valid)
    guess, target = (torch.where(valid, side.exp(), 0.0).gather(1, order)[rows] for side in (log_s, log_t))
    cost = torch.cdist(guess, target, p=1)
    plan = -cost / epsilon  # its logarithm
    for _ in range(iterations):
        plan = plan - plan.logsumexp(1, keepdim=True)
        plan = plan - plan.logsumexp(0, keepdim=True)
    values = (plan.exp() * cost).sum(1)
    weights = None if row_weights is None else row_weights[rows]
    return mean(values, torch.ones_like(values, dtype=torch.bool), weights)
