"""Losses that compare distributions over a row: the softmax of the student's scores with the teacher's.

Every function takes student (R, C) and teacher (R, C) scores and valid (R, C) bool, True where the
candidate exists and the teacher scored it; `row_weights` (R,) weigh the rows in the mean. A row's
loss is a sum over its places, and the result is the mean over the rows with at least two valid
places, 0 when there is none. Invalid places have exactly zero gradient.

`temperature` divides the student's scores and `teacher_temperature`, which is the same unless
given, the teacher's. `squared` multiplies the loss by the student's temperature squared, which keeps
the size of its gradient (Hinton et al. 2015, arXiv:1503.02531).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from retrieval_kd.losses.labels import info_nce
from retrieval_kd.losses.primitives import NonNegative, Positive, Share, fill, log_softmax, log_sum_exp, mean

__all__ = ["bd_kl", "confidence_nce", "dkd", "js", "kl", "listnet", "mixed_kl", "reverse_kl", "skew_kl"]


def kl(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    temperature: Positive = 1.0,
    teacher_temperature: Positive | None = None,
    squared: bool = True,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Forward KL: KL(p_t || p_s), which asks the student to cover all that the teacher finds likely.

    Source: Hinton et al. 2015, arXiv:1503.02531; for ranking, Lin et al. 2020, arXiv:2010.11386
    (temperature 1, teacher_temperature 0.25, not squared).
    """
    log_s, log_t = _distributions(student, teacher, valid, temperature, teacher_temperature)
    return _mean(_kl(log_t, log_s), valid, temperature, squared, row_weights)


def reverse_kl(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    temperature: Positive = 1.0,
    teacher_temperature: Positive | None = None,
    squared: bool = True,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Reverse KL: KL(p_s || p_t), which asks the student to stay where the teacher finds something likely.

    Source: Gu et al. 2024 (MiniLLM), arXiv:2306.08543.
    """
    log_s, log_t = _distributions(student, teacher, valid, temperature, teacher_temperature)
    return _mean(_kl(log_s, log_t), valid, temperature, squared, row_weights)


def mixed_kl(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    forward: NonNegative = 0.5,
    reverse: NonNegative = 0.5,
    temperature: Positive = 1.0,
    teacher_temperature: Positive | None = None,
    squared: bool = True,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Both directions with constant weights: forward * KL(p_t || p_s) + reverse * KL(p_s || p_t).

    Source: with both weights 1, Sun et al. 2023 (LEAD), arXiv:2212.05225.
    """
    log_s, log_t = _distributions(student, teacher, valid, temperature, teacher_temperature)
    rows = forward * _kl(log_t, log_s) + reverse * _kl(log_s, log_t)
    return _mean(rows, valid, temperature, squared, row_weights)


def bd_kl(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    favoured: NonNegative = 2.0,
    uncertain: Literal["reverse", "forward"] = "reverse",
    temperature: Positive = 1.0,
    teacher_temperature: Positive | None = None,
    squared: bool = True,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Both directions, balanced row by row by comparing the entropies of student and teacher.

    One direction has the weight `favoured`, the other 1. Where the student is less certain than the
    teacher (its entropy is larger), the direction called `uncertain` is favoured, elsewhere the other.
    Source: the idea of weights by row from the entropy gap is Amara et al. 2022 (BD-KD),
    arXiv:2212.12965; two constant weights and the direction are options here.
    """
    log_s, log_t = _distributions(student, teacher, valid, temperature, teacher_temperature)
    unsure = _entropy(log_s) > _entropy(log_t)
    reversed_more = unsure if uncertain == "reverse" else ~unsure
    forward, reverse = _kl(log_t, log_s), _kl(log_s, log_t)
    rows = torch.where(reversed_more, forward + favoured * reverse, favoured * forward + reverse)
    return _mean(rows, valid, temperature, squared, row_weights)


def js(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    beta: Share = 0.5,
    temperature: Positive = 1.0,
    teacher_temperature: Positive | None = None,
    squared: bool = True,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Jensen-Shannon: beta * KL(p_t || m) + (1 - beta) * KL(p_s || m), with m = beta * p_t + (1 - beta) * p_s.

    At most log 2 for beta 0.5, whatever the teacher's certainty; 0 for beta 0 and 1.
    Source: Agarwal et al. 2024 (GKD), arXiv:2306.13649.
    """
    log_s, log_t = _distributions(student, teacher, valid, temperature, teacher_temperature)
    log_m = _log_mixture(log_t, log_s, beta)
    return _mean(beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m), valid, temperature, squared, row_weights)


def skew_kl(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    skew: Share = 0.1,
    temperature: Positive = 1.0,
    teacher_temperature: Positive | None = None,
    squared: bool = True,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Forward KL to a student mixed with the teacher: KL(p_t || skew * p_t + (1 - skew) * p_s).

    At most -log(skew), where plain KL has no bound.
    Source: Ko et al. 2024 (DistiLLM), arXiv:2402.03898.
    """
    log_s, log_t = _distributions(student, teacher, valid, temperature, teacher_temperature)
    return _mean(_kl(log_t, _log_mixture(log_t, log_s, skew)), valid, temperature, squared, row_weights)


def dkd(
    student: Tensor,
    teacher: Tensor,
    positive: Tensor,
    valid: Tensor,
    alpha: NonNegative = 1.0,
    beta: NonNegative = 1.0,
    temperature: Positive = 1.0,
    teacher_temperature: Positive | None = None,
    squared: bool = True,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Decoupled distillation: how much goes to the positives, and how the rest is spread.

    alpha * KL between the two-way distributions [positives, others] + beta * KL between the
    distributions over the others alone. Forward KL has the teacher's share of the others, which a
    certain teacher makes tiny, in place of beta. How positives share among them is not compared.
    The mean over the rows with a valid positive and another valid candidate.
    Source: Zhao et al. 2022, arXiv:2203.08679.
    """
    positive = positive & valid
    others = valid & ~positive
    log_s, log_t = _distributions(student, teacher, valid, temperature, teacher_temperature)
    both = torch.ones(len(valid), 2, dtype=torch.bool, device=valid.device)
    split_s, split_t = (
        log_softmax(torch.stack([log_sum_exp(side, positive), log_sum_exp(side, others)], 1), both)
        for side in (log_s, log_t)
    )
    rows = alpha * _kl(split_t, split_s) + beta * _kl(log_softmax(log_t, others), log_softmax(log_s, others))
    value = mean(rows, positive.any(1) & others.any(1), row_weights)
    return temperature**2 * value if squared else value


def listnet(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    temperature: Positive = 1.0,
    teacher_temperature: Positive | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the student's distribution under the teacher's: -sum of p_t log p_s.

    The gradient of forward KL; the value is larger by the teacher's entropy. No temperature factor.
    Source: Cao et al. 2007, "Learning to rank: from pairwise approach to listwise approach".
    """
    log_s, log_t = _distributions(student, teacher, valid, temperature, teacher_temperature)
    return _mean(-(log_t.exp() * log_s).sum(1), valid, temperature, False, row_weights)


def confidence_nce(
    student: Tensor,
    teacher: Tensor,
    positive: Tensor,
    valid: Tensor,
    temperature: Positive = 1.0,
    row_weights: Tensor | None = None,
) -> Tensor:
    """InfoNCE in which every candidate counts by how sure the teacher is of its label (contrastive imitation).

    The teacher's scores are log-odds (yes minus no). With r = sigmoid(t) for positives and
    1 - sigmoid(t) for the others, `info_nce` of s / temperature + log r: a negative that the teacher
    takes for relevant weighs next to nothing. The released code multiplies, r * s, which turns the
    meaning of r around where s < 0; log r added to s weighs exp(s) by r whatever its sign. A
    positive the teacher doubts is pushed harder, not less: drop it where that is not wanted.
    The mean over the rows with a valid positive; no temperature factor.
    Source: Liao et al. 2024 (D2LLM), arXiv:2406.17262, with the product replaced as above.
    """
    odds = fill(teacher, valid)
    logits = fill(student, valid) / temperature + F.logsigmoid(torch.where(positive, odds, -odds))
    return info_nce(logits, positive, valid, row_weights=row_weights)


def _distributions(
    student: Tensor, teacher: Tensor, valid: Tensor, temperature: float, teacher_temperature: float | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher, each (R, C), 0 where invalid."""
    divisor = temperature if teacher_temperature is None else teacher_temperature
    return log_softmax(student / temperature, valid), log_softmax(teacher / divisor, valid)


def _mean(rows: Tensor, valid: Tensor, temperature: float, squared: bool, row_weights: Tensor | None) -> Tensor:
    """The mean over rows with something to compare, with the temperature factor."""
    value = mean(rows, valid.sum(1) >= 2, row_weights)
    return temperature**2 * value if squared else value


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row; places where both logarithms are 0, the invalid ones, add nothing."""
    return (log_p.exp() * (log_p - log_q)).sum(1)


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(1)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share * p + (1 - share) * q), where p or q may be too small for a float."""
    if share in (0, 1):
        return log_p if share == 1 else log_q
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
