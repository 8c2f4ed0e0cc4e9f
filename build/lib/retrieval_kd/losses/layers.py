"""Weights for a sum of losses over layers."""

from __future__ import annotations

from torch import Tensor


def layer_weights(cross_entropies: Tensor, temperature: float = 10.0) -> Tensor:
    """How much each teacher layer counts: softmax(-cross_entropy / temperature), cut from the gradient.

    `cross_entropies` (layers,) are the teacher's losses on the labels when it ranks by one layer's
    features: layers that rank well count for more. Returns (layers,), of sum 1.
    Source: Sun et al. 2023 (LEAD), arXiv:2212.05225.
    """
    return (-cross_entropies.detach() / temperature).softmax(0)
