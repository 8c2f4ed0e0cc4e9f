"""Penalties on sparse representations, which keep posting lists short: tensors in, scalar out.

Activations are (n, V) tensors of n texts over a vocabulary of V, as a student makes them; the
number returned is multiplied by a weight that grows from 0, as a sudden penalty kills all activations.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import cast

from torch import Tensor

from retrieval_kd.types import InputError

__all__ = ["anti_zero", "flops", "l1"]


def flops(activations: Tensor, column_weights: Tensor | None = None, threshold: int = 0, groups: int = 1) -> Tensor:
    """The sum over the vocabulary of the squared mean activation: the expected work of a dot product.

    `column_weights` (V,) multiply the squares. With 1 / idf^2 on weights that hold the idf, it is the
    IDF-aware penalty, which is plain FLOPS on the weights without it. Rows with at most `threshold`
    non-zero places are counted as empty, though still in the mean: short enough is left alone.
    `groups` is the number of texts a query has in the batch, one after the other: each place among
    them is averaged by itself, and the places are summed.

    Shapes: activations (n, V), n a multiple of `groups`.
    Source: Paria et al. 2020, arXiv:2004.05665; for SPLADE, Formal et al. 2021, arXiv:2107.05720;
    IDF-aware, Geng et al. 2024, arXiv:2411.04403; threshold, Shen et al. 2025, arXiv:2504.14839.
    """
    assert len(activations) % groups == 0, f"{len(activations)} texts are no whole number of groups of {groups}"
    sizes = activations.abs()
    if threshold:
        sizes = sizes * ((activations != 0).sum(1, keepdim=True) > threshold)
    squares = sizes.reshape(-1, groups, sizes.shape[1]).mean(0).square()  # (groups, V)
    if column_weights is not None:
        squares = squares * column_weights
    return squares.sum()


def l1(activations: Tensor) -> Tensor:
    """The mean over texts of the sum of absolute activations. Shapes: (n, V).

    Source: for queries, Lassance and Clinchant 2022 (Efficient SPLADE), arXiv:2207.03834.
    """
    return activations.abs().sum(1).mean()


def anti_zero(queries: Tensor, documents: Tensor) -> Tensor:
    """1 / (sum of all query activations)^2 + the same of documents: pushes away from empty vectors.

    Infinite once either side is empty altogether, from where no gradient would lead back.
    Shapes: (n, V) and (m, V), not negative.
    Source: the trainer of naver/splade (`anti_zero`).
    """
    return queries.sum().square().reciprocal() + documents.sum().square().reciprocal()


def find_regularizer(name: str) -> Callable[..., Tensor]:
    """The function of the regularizer called `name`; InputError with the nearest name."""
    if name not in __all__:
        near = difflib.get_close_matches(name, __all__, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise InputError(f"there is no regularizer {name!r}{hint} known: {', '.join(__all__)}.")
    return cast(Callable[..., Tensor], globals()[name])
