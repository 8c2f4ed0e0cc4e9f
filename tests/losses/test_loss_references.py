"""Every loss, under every option, against its reference in numpy and scipy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from grids import CASES, SCORES, VECTORS, case_name, inputs, make_grids, value_of
from references import BY_ROW, OF_VECTORS, rows_of, sinkhorn

from retrieval_kd.losses import find_loss


def reference(name: str, options: dict[str, Any]) -> list[list[float]]:
    """For each row the numbers that enter the mean."""
    if name in OF_VECTORS:
        return OF_VECTORS[name](*(side.numpy() for side in inputs(name).values()))
    rows = rows_of(make_grids())
    if name == "sinkhorn":
        return sinkhorn(rows, **options)
    return [BY_ROW[name](row, **options) if len(row) else [] for row in rows]


def weighted_mean(terms: Sequence[Sequence[float]], weights: Sequence[float]) -> float:
    total = sum(weight * sum(row) for weight, row in zip(weights, terms, strict=True))
    return total / sum(weight * len(row) for weight, row in zip(weights, terms, strict=True))


def test_every_loss_has_a_reference() -> None:
    assert {*SCORES} == {*BY_ROW, "sinkhorn"}
    assert {*VECTORS} == {*OF_VECTORS}


def test_every_option_is_tried() -> None:
    tried = {(name, option) for name, options in CASES for option in options}
    shared = {"temperature", "teacher_temperature", "squared"}  # of the divergences, which read them in one place
    wanted = {(name, option) for name, _ in CASES for option in find_loss(name).options if option not in shared}
    assert wanted - tried == set()


@pytest.mark.parametrize(("name", "options"), CASES, ids=map(case_name, CASES))
def test_value(name: str, options: dict[str, Any]) -> None:
    terms = reference(name, options)
    given = inputs(name)
    assert any(len(row) == 0 for row in terms) or name in OF_VECTORS  # some rows have nothing to compare
    assert value_of(name, given, options).item() == pytest.approx(weighted_mean(terms, [1] * len(terms)), rel=1e-9)
    weights = np.random.default_rng(1).uniform(0.1, 3, len(terms))
    weights[2] = 0
    got = value_of(name, given, options, row_weights=torch.tensor(weights))
    assert got.item() == pytest.approx(weighted_mean(terms, weights), rel=1e-9)


@pytest.mark.parametrize(("name", "options"), CASES, ids=map(case_name, CASES))
def test_gradient_is_that_of_the_value(name: str, options: dict[str, Any]) -> None:
    """Of the student, and of the teacher, which losses leave attached; by finite differences."""
    given = {key: grid[:4].clone() for key, grid in inputs(name).items()}
    inner = given["valid"] if "valid" in given else torch.ones_like(given["student"], dtype=torch.bool)
    learned = [key for key in ("student", "teacher") if key in given]
    if name.startswith("rkd"):
        given["student"][3] += 0.5  # at a distance of 0 there is a kink
    for key in learned:
        given[key][~inner] = 0.0  # finite differences know no NaN
        given[key].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *sides: value_of(name, {**given, **dict(zip(learned, sides, strict=True))}, options),
        tuple(given[key] for key in learned),
    )
