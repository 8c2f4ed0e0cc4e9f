"""Losses that learn from labels and no teacher: which candidates of a row are positive.

Every function takes student (R, C) scores, positive (R, C) bool and valid (R, C) bool;
`row_weights` (R,) weigh the rows in the mean. It returns a scalar, 0 when nothing counts; invalid
places have exactly zero gradient.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from retrieval_kd.losses.primitives import Positive, fill, log_sum_exp, mean

__all__ = ["bce", "info_nce"]


def info_nce(
    student: Tensor,
    positive: Tensor,
    valid: Tensor,
    temperature: Positive = 1.0,
    combine: Literal["sum_exp", "sum_logits", "each"] = "sum_exp",
    row_weights: Tensor | None = None,
) -> Tensor:
    """Contrastive cross-entropy of s / temperature: the positives against the other valid candidates of the row.

    The mean over the rows with a valid positive; no temperature factor. Cosine students want a
    temperature near 0.05. With one positive the three ways to `combine` are the same; with several,
    sum_exp: -log(sum of exp over the positives / sum of exp over all);
    sum_logits: the positives' logits are added up to one, which stands against the others;
    each: every positive stands alone against the others, and their losses are averaged.
    Source: van den Oord et al. 2018, arXiv:1807.03748; sum_exp is L_in of Khosla et al. 2020,
    arXiv:2004.11362; sum_logits is Syntriever's first stage, arXiv:2502.03824.
    """
    positive = positive & valid
    rows = positive.any(1)
    logits = fill(student, valid) / temperature
    if combine == "sum_exp":
        losses = log_sum_exp(logits, valid) - log_sum_exp(logits, positive)
        return mean(losses, rows, row_weights)
    negatives = log_sum_exp(logits, valid & ~positive)
    if combine == "sum_logits":
        together = fill(logits, positive).sum(1)
        return mean(F.softplus(negatives - together), rows, row_weights)
    each = fill(F.softplus(negatives[:, None] - logits), positive)
    return mean(each.sum(1) / positive.sum(1).clamp(min=1), rows, row_weights)


def bce(student: Tensor, positive: Tensor, valid: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of sigmoid(s) with the label of each candidate, the mean over valid places.

    The task loss of pairwise classification, to which DSE adds the regression of the teacher's scores.
    Source: Barkan et al. 2020 (Distilled Sentence Embedding), arXiv:1908.05161.
    """
    losses = F.binary_cross_entropy_with_logits(fill(student, valid), positive.to(student.dtype), reduction="none")
    return mean(losses, valid, row_weights)
