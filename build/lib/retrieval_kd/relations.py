"""Relations: which texts meet which, as grids of scores with masks.

A loss sees a grid and nothing else, so any loss goes with any relation:

    own     a query and its own candidates (B, C)
    batch   a query and every document of the batch (B, U)
    gram    texts of one side and themselves (n, n), the diagonal left out
    cross   student vectors and teacher vectors of the same texts, and of a queue of earlier ones (n, n + queue)

A column that is the same text as the row's positive is never its negative.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Scores of rows against columns. Shapes: values (R, C) float; valid, positive (R, C) bool.

    `valid` marks the places that take part: a text exists there, and it is not denied. Row and column
    numbers stand for the same texts in student's and teacher's grids of one batch.
    """

    values: Tensor
    valid: Tensor
    positive: Tensor


def own(scores: Tensor, columns: Tensor, positive: Tensor) -> Grid:
    """Every query's candidates. Shapes: scores (B, C); columns (B, C), -1 where none; positive (B, C)."""
    exists = columns.to(scores.device) >= 0
    return Grid(scores, exists, positive.to(scores.device) & exists)


def batch(scores: Tensor, columns: Tensor, positive: Tensor, others_only: bool = False) -> Grid:
    """Every document of the batch. Shapes: scores (B, U), columns (B, C) into U, positive (B, U).

    With `others_only` a query meets its positives and the candidates of other queries, but not its
    own negatives (PairDistill's in-batch term, arXiv:2410.01383).
    """
    valid = torch.ones_like(scores, dtype=torch.bool)
    positive = positive.to(scores.device)
    if others_only:
        columns = columns.to(scores.device)
        mine = torch.zeros_like(valid)
        rows = torch.arange(len(columns), device=scores.device)[:, None].expand_as(columns)
        mine[rows[columns >= 0], columns[columns >= 0]] = True
        valid &= positive | ~mine
    return Grid(scores, valid, positive)


def gram(vectors: Tensor, texts: Tensor) -> Grid:
    """Products of vectors with each other. Shapes: vectors (n, D); texts (n,), equal numbers for equal texts."""
    different = texts[:, None] != texts[None, :]
    return Grid(vectors @ vectors.T, different, torch.zeros_like(different))


def cross(student: Tensor, teacher: Tensor, texts: Tensor, queue: Tensor, queue_texts: Tensor) -> Grid:
    """Student vectors against the teacher's vectors of the batch and of the queue; a text's own is its positive.

    Shapes: student, teacher (n, D), texts (n,), queue (m, D), queue_texts (m,).
    Source: CKD, Gao et al. 2021 (DistilCSE), arXiv:2112.05638.
    """
    values = student @ torch.cat([teacher, queue]).T  # (n, n + m)
    same = texts[:, None] == torch.cat([texts, queue_texts])[None, :]
    positive = torch.zeros_like(same)
    positive.fill_diagonal_(True)
    return Grid(values, ~same | positive, positive)


def deny(
    grid: Grid, guide: Tensor, margin: float | None, relative: bool = False, max_score: float | None = None
) -> Grid:
    """The grid without the negatives that `guide` scores nearly as high as the row's best positive, or higher.

    Denied: guide > guide(positive) - margin; relative: guide > guide(positive) - |guide(positive)| * margin, the same
    as guide > guide(positive) * (1 - margin) above 0; and whatever the positive has, guide > max_score. No margin
    denies in a row without a scored positive. Shapes: guide (R, C), NaN where unknown.
    Source: GISTEmbed, arXiv:2402.16829; margin 3 of a cross-encoder's logits: Sentence Transformers' MS MARCO recipe.
    """
    known = guide.isfinite() & grid.valid
    if max_score is not None:
        grid = replace(grid, valid=grid.valid & (grid.positive | ~(known & (guide > max_score))))
    if margin is None:
        return grid
    best = torch.where(grid.positive & known, guide, -torch.inf).amax(1, keepdim=True)
    limit = best - best.abs() * margin if relative else best - margin
    too_good = known & ~grid.positive & best.isfinite() & (guide > limit)
    return replace(grid, valid=grid.valid & ~too_good)
