"""The one reduction, and how invalid places are taken out."""

from __future__ import annotations

import pytest
import torch
from scipy.special import log_softmax as scipy_log_softmax

from retrieval_kd.losses.primitives import differences, log_softmax, log_sum_exp, mean, order_by, pairs

NAN = torch.nan
VALUES = torch.tensor([[1.0, NAN, 3.0], [5.0, torch.inf, -torch.inf], [NAN, NAN, NAN]], requires_grad=True)
COUNTED = torch.tensor([[True, False, True], [True, False, False], [False, False, False]])


def test_mean_leaves_out_what_does_not_count() -> None:
    value = mean(VALUES, COUNTED)
    assert value.item() == 3.0
    (slope,) = torch.autograd.grad(value, VALUES)
    torch.testing.assert_close(slope, COUNTED / 3)
    assert mean(VALUES, COUNTED, torch.tensor([1.0, 2.0, 9.0])).item() == (1 + 3 + 2 * 5) / 4
    assert mean(VALUES, COUNTED, torch.zeros(3)).item() == 0.0
    assert mean(VALUES, COUNTED & False).item() == 0.0


def test_mean_of_rows_and_of_pairs() -> None:
    weights = torch.tensor([0.5, 0.0, 1.5])
    rows = torch.tensor([2.0, 7.0, 4.0])
    assert mean(rows, torch.ones(3, dtype=torch.bool), weights).item() == 3.5
    grid = rows[:, None, None].expand(3, 4, 4)
    assert mean(grid, torch.ones_like(grid, dtype=torch.bool), weights).item() == 3.5


def test_distributions_over_valid_places() -> None:
    got = log_softmax(VALUES, COUNTED)
    assert got[0, [0, 2]].tolist() == pytest.approx(scipy_log_softmax([1.0, 3.0]).tolist())
    assert got[1].tolist() == [0.0, 0.0, 0.0]
    assert got[2].tolist() == [0.0, 0.0, 0.0]
    assert log_sum_exp(VALUES, COUNTED)[1].item() == 5.0
    assert log_sum_exp(VALUES, COUNTED).isfinite().all()


def test_pairs_and_orders() -> None:
    assert pairs(COUNTED).nonzero().tolist() == [[0, 0, 2], [0, 2, 0]]
    assert differences(torch.tensor([[1.0, 4.0]])).tolist() == [[[0.0, -3.0], [3.0, 0.0]]]
    assert order_by(VALUES, COUNTED)[0].tolist() == [2, 0, 1]
    assert order_by(VALUES, COUNTED)[1].tolist() == [0, 1, 2]
