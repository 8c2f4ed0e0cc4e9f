"""Losses on the teacher's order: Plackett-Luce likelihoods, and the top of the list against the rest.

Every function takes student (R, C) and teacher (R, C) scores and valid (R, C) bool, True where the
candidate exists and the teacher scored it; `row_weights` (R,) weigh the rows in the mean. A row's
loss is a sum over its stages, and the result is the mean over the rows with at least two valid
places, 0 when there is none. Invalid places have exactly zero gradient. Candidates to which the
teacher gives equal scores stand in the order of the list.

Under Plackett-Luce a ranking is made in stages: of all that is left, the softmax of the scores
chooses the next. The loss of stage k is logsumexp over l >= k of s_l, minus s_k.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from retrieval_kd.losses.primitives import (
    Count,
    NonNegative,
    Positive,
    fill,
    log_softmax,
    lowest,
    mean,
    order_by,
)

__all__ = ["listmle", "p_listmle", "partial_pl", "pld", "rank_distil"]


def listmle(student: Tensor, teacher: Tensor, valid: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """Minus the log-likelihood of the teacher's whole ranking: the sum of all stages.

    Source: Xia et al. 2008, "Listwise approach to learning to rank: theory and algorithm".
    """
    stages = _stages(student, valid, order_by(teacher, valid))
    return mean(stages.sum(1), valid.sum(1) >= 2, row_weights)


def p_listmle(student: Tensor, teacher: Tensor, valid: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """ListMLE with stages weighted by position: 2^(n - r) - 1 at rank r of n, divided by the weights' sum.

    Source: Lan et al. 2014, "Position-aware ListMLE: a sequential learning process for ranking".
    """
    stages = _stages(student, valid, order_by(teacher, valid))
    count = valid.sum(1, keepdim=True)
    ranks = torch.arange(1, valid.shape[1] + 1, device=valid.device)
    # divided by 2^n, which no float holds for a long list
    weights = (torch.exp2(-ranks.to(stages.dtype)) - torch.exp2(-count.to(stages.dtype))) * (ranks < count)
    total = weights.sum(1, keepdim=True)
    weights = weights / torch.where(total > 0, total, 1.0)
    return mean((weights * stages).sum(1), valid.sum(1) >= 2, row_weights)


def pld(
    student: Tensor,
    teacher: Tensor,
    positive: Tensor,
    valid: Tensor,
    teacher_temperature: Positive = 1.0,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Plackett-Luce distillation: positives first, then by teacher score, each stage weighted by the teacher.

    Stage k has the weight softmax(t / teacher_temperature) of the candidate that it chooses; the
    student is not tempered. Positives stand in the order of their teacher scores; a row without one
    is ranked by the teacher alone. A saturated teacher turns it into cross-entropy: raise the
    temperature (the paper uses 4).
    Source: Bassam et al. 2025, arXiv:2506.12542.
    """
    order = order_by(teacher, valid)
    order = order.gather(1, order_by((positive & valid).gather(1, order).to(student.dtype), valid.gather(1, order)))
    weights = log_softmax(teacher / teacher_temperature, valid).exp().gather(1, order)
    stages = _stages(student, valid, order)
    return mean((weights * stages).sum(1), valid.sum(1) >= 2, row_weights)


def partial_pl(
    student: Tensor, teacher: Tensor, valid: Tensor, depth: Count = 2, row_weights: Tensor | None = None
) -> Tensor:
    """The likelihood of the teacher's first `depth` places alone: the first stages of ListMLE.

    Nothing is asked of the order below. Depth 1 is cross-entropy with the teacher's first as the
    positive; depth 2 is Syntriever's alignment with the preference p > n, all else below both.
    Source: Kim and Baek 2025 (Syntriever), arXiv:2502.03824.
    """
    stages = _stages(student, valid, order_by(teacher, valid))
    return mean(stages[:, :depth].sum(1), valid.sum(1) >= 2, row_weights)


def rank_distil(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    depth: Count = 10,
    penalty: Literal["softplus", "hinge"] = "softplus",
    margin: NonNegative = 0.0,
    weight: NonNegative = 1.0,
    temperature: Positive = 1.0,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Keep the teacher's top: match the distribution over its first `depth`, and press all others below.

    temperature^2 * KL(p_t || p_s) over the teacher's top, plus weight * the sum over all others j of
    phi(s_j - s_k + margin), where k is the teacher's last within the depth and phi is softplus or
    max(0, x). The order of the others is not asked for.
    Source: the idea is Reddi et al. 2021, "RankDistil: knowledge distillation for ranking"; KL as
    the matching loss and the threshold at s_k are the choice made here.
    """
    order = order_by(teacher, valid)
    top = valid & (order.argsort(dim=1) < depth)
    others = valid & ~top
    log_t, log_s = log_softmax(teacher / temperature, top), log_softmax(student / temperature, top)
    match = temperature**2 * (log_t.exp() * (log_t - log_s)).sum(1)
    scores = fill(student, valid)
    excess = scores - scores.gather(1, order)[:, min(depth, scores.shape[1]) - 1, None] + margin
    pressed = F.softplus(excess) if penalty == "softplus" else F.relu(excess)
    return mean(match + weight * fill(pressed, others).sum(1), valid.sum(1) >= 2, row_weights)


def _stages(student: Tensor, valid: Tensor, order: Tensor) -> Tensor:
    """The loss of each Plackett-Luce stage along `order`, invalid places last and 0. (R, C) to (R, C)."""
    scores = fill(student, valid, lowest(student)).gather(1, order)
    remaining = scores.flip(1).logcumsumexp(1).flip(1)
    return fill(remaining - scores, valid.gather(1, order))
