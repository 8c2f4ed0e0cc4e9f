"""Losses that need to know which candidates are positive, and no teacher.

Every function takes student (R, C) scores, positive (R, C) bool and valid (R, C) bool, and returns
a scalar: the mean over the rows with a valid positive, 0 when there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["info_nce"]


def info_nce(student: Tensor, positive: Tensor, valid: Tensor, temperature: float = 1.0) -> Tensor:
    """Contrastive cross-entropy: the positives against all valid candidates of the row.

    -log(sum over positives of exp(s / temperature) / sum over valid of exp(s / temperature)); with
    one positive, the usual cross-entropy. Cosine students want a temperature near 0.05.
    Source: van den Oord et al. 2018, arXiv:1807.03748; several positives as in Khosla et al. 2020
    (their L_in), arXiv:2004.11362.
    """
    positive = positive & valid
    rows = positive.any(1)
    lowest = torch.finfo(student.dtype).min
    logits = torch.where(valid, student / temperature, lowest)
    everything = torch.logsumexp(logits, dim=1)
    chosen = torch.logsumexp(torch.where(positive, logits, lowest), dim=1)
    return torch.where(rows, everything - chosen, 0.0).sum() / rows.sum().clamp(min=1)
