"""Losses that compare the student's vectors with a teacher's vectors of the same texts.

Every function takes student (R, D) and teacher (R, E) and returns a scalar; `row_weights` (R,)
weigh the rows in the mean. The embedding losses want equal widths, the relational ones (RKD) do not.
Losses on similarities between texts are those of scores, on a grid of such similarities.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retrieval_kd.losses.primitives import mean

__all__ = ["embedding_cosine", "embedding_mse", "rkd_angle", "rkd_distance"]


def embedding_mse(student: Tensor, teacher: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """Squared Euclidean distance to the teacher's vector, summed over coordinates; the mean over rows.

    For vectors of unit length this is 2 - 2 cos. Vectors are compared as both sides emit them: let
    the student normalise if the teacher does. This is LEAF's alignment: the student lives in the
    teacher's space, so documents may stay encoded by the teacher. Where the texts are translations
    of what the teacher reads, it is multilingual distillation.
    Source: Vujanic and Rueckstiess 2025 (LEAF), arXiv:2509.12539; Reimers and Gurevych 2020,
    arXiv:2004.09813.
    """
    return _mean((student - teacher).square().sum(1), row_weights)


def embedding_cosine(student: Tensor, teacher: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """1 - cosine with the teacher's vector, the mean over rows: lengths do not count.

    Half of `embedding_mse` of the normalised vectors.
    Source: one of the losses of MinishLab/tokenlearn.
    """
    return _mean(1 - F.cosine_similarity(student, teacher), row_weights)


def rkd_distance(student: Tensor, teacher: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """Match the distances between the batch's texts, each side's divided by its own mean distance.

    The mean over all ordered pairs, i = j included, of the Huber loss (delta 1) of the difference. The
    mean distance is that of the strictly positive ones, and the student's has a gradient. Neither scale,
    rotation nor width counts. Memory grows with R^2.
    Source: Park et al. 2019, arXiv:1904.05068.
    """
    return _mean(F.huber_loss(_distances(student), _distances(teacher), reduction="none"), row_weights)


def rkd_angle(student: Tensor, teacher: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """Match the cosines of the angles that any two texts make at a third.

    The mean over all ordered triples (i, j, k) of the Huber loss (delta 1) between the cosines of the
    angle at i; an edge without length gives 0. Memory grows with R^3: batches up to about 128.
    Source: Park et al. 2019, arXiv:1904.05068.
    """
    return _mean(F.huber_loss(_angles(student), _angles(teacher), reduction="none"), row_weights)


def _mean(values: Tensor, row_weights: Tensor | None) -> Tensor:
    return mean(values, torch.ones_like(values, dtype=torch.bool), row_weights)


def _distances(vectors: Tensor) -> Tensor:
    """(R, R) Euclidean distances divided by the mean of the positive ones."""
    # by differences, not by products: exactly 0 for equal vectors, where cdist's gradient is 0
    distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    count = (distances > 0).sum().clamp(min=1)
    average = distances.sum() / count
    return distances / torch.where(average > 0, average, 1.0)


def _angles(vectors: Tensor) -> Tensor:
    """(R, R, R), at (i, j, k) the cosine of the angle at i between j and k."""
    edges = vectors[None] - vectors[:, None]  # (R, R, D), at (i, j) from i to j
    squares = edges.square().sum(2, keepdim=True)
    directions = edges / torch.where(squares > 0, squares, 1.0).sqrt()
    return directions @ directions.transpose(1, 2)
