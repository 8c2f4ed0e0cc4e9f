"""What the losses are built of: cutting out invalid places, distributions, orders, and the one reduction.

Shapes: R rows (queries, or texts), C places of a row. Invalid places may hold NaN or -inf; `fill`
takes them out before anything is computed, so that their gradient is exactly 0.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

# Types of options, with the ranges that a recipe is held to.
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


def mean(values: Tensor, counted: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """The mean of `values` over the `counted` places, each with the weight of its row; 0 when none counts.

    Shapes: values (R, ...) float and counted, the same, bool; row_weights (R,) float. Equal weights
    give the plain mean: the sum of weight * value is divided by the sum of the weights.
    """
    weights = counted.to(values.dtype)
    if row_weights is not None:
        weights = weights * row_weights.to(values.dtype).reshape(-1, *[1] * (values.ndim - 1))
    total = weights.sum()
    return (weights * torch.where(counted, values, 0.0)).sum() / torch.where(total > 0, total, 1.0)


def fill(values: Tensor, valid: Tensor, value: float = 0.0) -> Tensor:
    """`values` with invalid places set to `value` and cut from the gradient."""
    return torch.where(valid, values, value)


def lowest(values: Tensor) -> float:
    """The lowest finite number of the type: no share in a softmax, and no NaN where a row is empty."""
    return torch.finfo(values.dtype).min


def log_softmax(values: Tensor, valid: Tensor) -> Tensor:
    """Row-wise log-softmax over the valid places; 0 elsewhere. Shapes: (R, C) to (R, C)."""
    return fill(F.log_softmax(fill(values, valid, lowest(values)), dim=1), valid)


def log_sum_exp(values: Tensor, valid: Tensor) -> Tensor:
    """Row-wise log-sum-exp over the valid places; without one, about the lowest number. (R, C) to (R,)."""
    return torch.logsumexp(fill(values, valid, lowest(values)), dim=1)


def differences(values: Tensor) -> Tensor:
    """values[i] - values[j] within each row. Shapes: (R, C) to (R, C, C)."""
    return values[:, :, None] - values[:, None, :]


def pairs(valid: Tensor) -> Tensor:
    """Ordered pairs of two different valid places. Shapes: (R, C) to (R, C, C)."""
    apart = ~torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    return valid[:, :, None] & valid[:, None, :] & apart


def order_by(scores: Tensor, valid: Tensor) -> Tensor:
    """Places by descending score, invalid ones last; equal scores keep their order. (R, C) to (R, C) int."""
    return torch.where(valid, scores, -torch.inf).argsort(dim=1, descending=True, stable=True)
