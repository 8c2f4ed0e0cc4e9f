"""Penalties on sparse representations: the specification's numbers, by hand, and as identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retrieval_kd.regularizers import anti_zero, flops, l1

R = torch.tensor([[0, 1, 2, 0, 0.5], [0, 0, 1, 3, 0], [0.2, 0, 0, 0, 0]], dtype=torch.float64)


def test_golden_numbers() -> None:
    """Section 31 of the specification."""
    assert flops(R).item() == pytest.approx(2.143333, abs=5e-7)
    assert flops(R, threshold=2).item() == pytest.approx(0.583333, abs=5e-7)
    assert l1(R).item() == pytest.approx(2.566667, abs=5e-7)


def test_anti_zero_by_hand() -> None:
    documents = torch.tensor([[0.5, 0.0], [0.0, 1.5]], requires_grad=True)
    value = anti_zero(R, documents)
    assert value.item() == pytest.approx(1 / 7.7**2 + 1 / 4)
    value.backward()
    assert documents.grad.tolist() == [[-0.25, -0.25], [-0.25, -0.25]]  # -2 / 2^3: away from zero
    assert anti_zero(R, torch.zeros(2, 2)).item() == float("inf")


def test_scale() -> None:
    assert flops(3 * R).item() == pytest.approx(9 * flops(R).item())
    assert flops(-R).item() == pytest.approx(flops(R).item())
    assert l1(-3 * R).item() == pytest.approx(3 * l1(R).item())
    assert flops(R, threshold=0).item() == flops(R).item()
    assert flops(torch.cat([R, R])).item() == pytest.approx(flops(R).item())


def test_rows_that_are_short_enough_are_left_alone() -> None:
    reps = R.clone().requires_grad_()
    flops(reps, threshold=2).backward()
    assert reps.grad[1:].abs().sum() == 0
    assert reps.grad[0].abs().sum() > 0
    assert flops(R, threshold=3).item() == 0.0


def test_idf_weights_are_flops_without_the_idf() -> None:
    """Impacts v = idf * w weighted by 1 / idf^2 are penalised as w is."""
    idf = torch.tensor([1.0, 2.0, 0.5, 3.0, 4.0], dtype=torch.float64)
    assert flops(R * idf, column_weights=1 / idf**2).item() == pytest.approx(flops(R).item())


def test_each_place_of_a_group_is_averaged_by_itself() -> None:
    """Two texts a query: all first ones, and all second ones."""
    reps = torch.tensor(np.random.default_rng(0).random((6, 4)))
    wanted = flops(reps[::2]) + flops(reps[1::2])
    assert flops(reps, groups=2).item() == pytest.approx(wanted.item())
    with pytest.raises(AssertionError, match="6 texts are no whole number of groups of 4"):
        flops(reps, groups=4)


def test_gradients() -> None:
    reps = (R + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda given: flops(given, threshold=2), reps)
    assert torch.autograd.gradcheck(l1, reps)
    assert torch.autograd.gradcheck(anti_zero, (reps, reps.detach().clone().requires_grad_()))
