"""Losses that compare the student's vectors with a teacher's vectors of the same texts.

Every function takes student (R, D) and teacher (R, D) and returns a scalar, the mean over rows.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["embedding_mse"]


def embedding_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared Euclidean distance to the teacher's vector, summed over coordinates.

    For vectors of unit length this is 2 - 2 cos. Vectors are compared as both sides emit them: let
    the student normalise if the teacher does. This is LEAF's alignment: the student lives in the
    teacher's space, so documents may stay encoded by the teacher.
    Source: Vujanic and Rueckstiess 2025 (LEAF), arXiv:2509.12539.
    """
    return (student - teacher).square().sum(1).mean()
