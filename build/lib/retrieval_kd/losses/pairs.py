"""Losses on pairs of candidates of one row: which of two comes first.

Every function takes student (R, C) scores, what it learns from, and valid (R, C) bool;
`row_weights` (R,) weigh the rows' pairs in the mean. The result is the mean over all compared pairs
of all rows together, 0 when there is none: a row with more pairs counts for more. Invalid places
have exactly zero gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from retrieval_kd.losses.primitives import Count, Positive, differences, fill, mean, order_by, pairs

__all__ = ["lambda_rank", "preference_kl", "ranknet", "ranknet_soft"]


def ranknet(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    weights: Literal["none", "gap", "squared_gap"] = "none",
    row_weights: Tensor | None = None,
) -> Tensor:
    """Pairwise logistic loss on the teacher's order.

    The mean over all pairs with t_i > t_j of weight * log(1 + exp(-(s_i - s_j))), where the weight is
    1, the gap t_i - t_j, or |t_i^2 - t_j^2|; it is divided by the number of pairs, not by the
    weights. With probabilities as teacher scores, `gap` is D2LLM's rank imitation
    max(0, P_k - P_l) * -log sigmoid(s_k - s_l).
    Source: Burges et al. 2005, "Learning to rank using gradient descent"; the weights as in
    matchmaker (sebastian-hofstaetter/matchmaker); D2LLM, arXiv:2406.17262.
    """
    student, teacher = fill(student, valid), fill(teacher, valid)
    gaps = differences(teacher)
    losses = F.softplus(-differences(student))
    if weights == "gap":
        losses = gaps * losses
    elif weights == "squared_gap":
        losses = differences(teacher.square()).abs() * losses
    return mean(losses, pairs(valid) & (gaps > 0), row_weights)


def ranknet_soft(student: Tensor, teacher: Tensor, valid: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """Pairwise cross-entropy with the teacher's probability that i comes before j, sigmoid(t_i - t_j).

    The mean over all pairs of two candidates of -P log sigmoid(s_i - s_j) - (1 - P) log sigmoid(s_j - s_i).
    Only gaps count, near ties as much as clear cases. Its gradient is that of `preference_kl` with
    the same probabilities; the values differ by the entropy of P.
    Source: Burges et al. 2005, "Learning to rank using gradient descent".
    """
    wanted = torch.sigmoid(differences(fill(teacher, valid)))
    losses = F.binary_cross_entropy_with_logits(differences(fill(student, valid)), wanted, reduction="none")
    return mean(losses, pairs(valid), row_weights)


def preference_kl(
    student: Tensor,
    preference: Tensor,
    valid: Tensor,
    temperature: Positive = 1.0,
    row_weights: Tensor | None = None,
) -> Tensor:
    """KL from a pairwise ranker's answers: preference[i, j] is the probability that i beats j.

    The mean over the pairs that were asked (preference (R, C, C) is NaN elsewhere) of
    KL([P, 1 - P] || softmax([s_i, s_j] / temperature)); no temperature factor. A pair that was asked
    in both orders counts twice.
    Source: Huang and Chen 2024 (PairDistill), arXiv:2410.01383.
    """
    asked = pairs(valid) & preference.isfinite()
    wanted = fill(preference, asked, 0.5)
    margins = differences(fill(student, valid)) / temperature
    cross = F.binary_cross_entropy_with_logits(margins, wanted, reduction="none")
    entropy = torch.special.entr(wanted) + torch.special.entr(1 - wanted)
    return mean(cross - entropy, asked, row_weights)


def lambda_rank(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    scheme: Literal["lambda", "ndcg2", "ndcg2++"] = "ndcg2++",
    k: Count | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Pairwise logistic loss weighted by what the pair means for nDCG in the student's current order.

    The mean over the pairs with t_i > t_j, one of them in the student's first `k` (absent: all), of
    -w * log2 sigmoid(s_i - s_j). With ranks r by the student's scores, discounts D_r = log2(1 + r) and
    gains G = (2^rel - 1) / maxDCG@k, the weight w is |G_i - G_j| times
    lambda: |1/D_ri - 1/D_rj|; ndcg2: |1/D_d - 1/D_(d+1)| for d = |ri - rj|; ndcg2++: 10 * ndcg2 + lambda.
    rel is the teacher's score above the row's lowest, as scores have no zero of their own; gains grow
    with its power, so normalise a teacher whose scores spread over more than a few units.
    Ranks have no gradient.
    Source: Wang et al. 2018, "The LambdaLoss framework for ranking metric optimization".
    """
    student, lows = fill(student, valid), torch.where(valid, teacher, torch.inf).amin(1, keepdim=True)
    relevance = fill(teacher - lows, valid)
    places = torch.arange(1, valid.shape[1] + 1, device=valid.device, dtype=student.dtype)
    ranks = order_by(student.detach(), valid).argsort(dim=1).to(student.dtype) + 1  # (R, C)
    first = valid.shape[1] if k is None else k
    # the powers are divided by the row's largest, which cancels in G: no float holds 2^200
    high = relevance.amax(1, keepdim=True)
    powers = fill(torch.exp2(relevance - high) - torch.exp2(-high), valid)
    ideal = (powers.gather(1, order_by(relevance, valid)) / torch.log2(1 + places))[:, :first].sum(1, keepdim=True)
    gains = powers / torch.where(ideal > 0, ideal, 1.0)
    distance = differences(ranks).abs()
    apart = distance.clamp(min=1)
    steps = 1 / torch.log2(1 + apart) - 1 / torch.log2(2 + apart)
    swaps = differences(1 / torch.log2(1 + ranks)).abs()
    weights = {"lambda": swaps, "ndcg2": steps, "ndcg2++": 10 * steps + swaps}[scheme] * differences(gains).abs()
    losses = weights * F.softplus(-differences(student)) / math.log(2)
    near = ranks <= first
    counted = pairs(valid) & (differences(relevance) > 0) & (near[:, :, None] | near[:, None, :])
    return mean(losses, counted, row_weights)
