"""What every loss keeps to, whatever it computes; a new loss is tried by being there."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from grids import ALL, CASES, SCORES, VECTORS, S, T, case_name, inputs, make_grids, value_of
from torch import Tensor

from retrieval_kd.losses import find_loss, loss_names

BETWEEN_ROWS = {"rkd_angle", "rkd_distance", "sinkhorn"}  # these compare rows with one another
OF_CELLS = {"bce", "huber", "mse"}  # these have something to say of one candidate alone
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=map(case_name, CASES))


def learned(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Student and teacher, as leaves with gradients."""
    return {key: given[key].clone().requires_grad_() for key in ("student", "teacher") if key in given}


@every_case
def test_a_finite_scalar_with_no_gradient_where_masked(name: str, options: dict[str, Any]) -> None:
    """NaN and -inf stand in the invalid places of both sides."""
    given = inputs(name)
    sides = learned(given)
    loss = value_of(name, {**given, **sides}, options)
    assert loss.shape == ()
    assert loss.isfinite()
    loss.backward()
    assert sides["student"].grad.abs().sum() > 0 or options in ({"beta": 1.0},)
    for side in sides.values():
        if side.grad is not None:
            assert side.grad.isfinite().all()
            if name not in VECTORS:
                assert side.grad[~given["valid"]].abs().sum() == 0


@every_case
def test_rows_are_averaged_not_summed(name: str, options: dict[str, Any]) -> None:
    given = inputs(name)
    twice = {key: torch.cat([grid, grid]) for key, grid in given.items()}
    assert value_of(name, twice, options).item() == pytest.approx(value_of(name, given, options).item(), rel=1e-9)


@every_case
def test_float32_is_close_to_float64(name: str, options: dict[str, Any]) -> None:
    given = inputs(name)
    single = {key: grid.float() if grid.is_floating_point() else grid for key, grid in given.items()}
    got = value_of(name, single, options)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(value_of(name, given, options).item(), rel=2e-4, abs=1e-6)


@every_case
def test_weights_of_rows(name: str, options: dict[str, Any]) -> None:
    """Equal weights are none; a weight of 3 is the row three times; a weight of 0 takes it out."""
    given = inputs(name)
    count = len(given["student"])
    plain = value_of(name, given, options).item()
    same = value_of(name, given, options, row_weights=torch.full((count,), 0.3))
    assert same.item() == pytest.approx(plain, rel=1e-6)
    nothing = value_of(name, given, options, row_weights=torch.zeros(count))
    assert nothing.item() == 0.0
    if name in BETWEEN_ROWS:
        return
    times = torch.tensor([1, 3, 0, 2, 1, 1, 4])[:count]
    repeated = {key: grid.repeat_interleave(times, 0) for key, grid in given.items()}
    got = value_of(name, given, options, row_weights=times.double())
    assert got.item() == pytest.approx(value_of(name, repeated, options).item(), rel=1e-9)


@every_case
def test_the_order_of_rows_and_candidates_does_not_count(name: str, options: dict[str, Any]) -> None:
    """When all that is given is permuted alike; column 0 leads for margin_mse and stays."""
    given = inputs(name)
    value = value_of(name, given, options).item()
    rows = torch.randperm(len(given["student"]), generator=torch.Generator().manual_seed(0))
    shuffled = {key: grid[rows] for key, grid in given.items()}
    assert value_of(name, shuffled, options).item() == pytest.approx(value, rel=1e-9)
    if name in VECTORS:
        return
    places = [0, 3, 1, 4, 2] if name == "margin_mse" else [4, 3, 1, 0, 2]
    moved = {key: grid[:, places] for key, grid in given.items()}
    if "preference" in moved:
        moved["preference"] = moved["preference"][:, :, places]
    assert value_of(name, moved, options).item() == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("name", SCORES)
def test_padding_does_not_count(name: str) -> None:
    """Three columns of NaN that are not valid change nothing."""
    given = inputs(name)
    wider = {
        key: torch.cat([grid, torch.full((7, 3), False if grid.dtype == torch.bool else torch.nan)], 1)
        for key, grid in given.items()
        if key != "preference"
    }
    if "preference" in given:
        wider["preference"] = torch.full((7, 8, 8), torch.nan, dtype=torch.float64)
        wider["preference"][:, :5, :5] = given["preference"]
    assert value_of(name, wider).item() == pytest.approx(value_of(name, given).item(), rel=1e-12)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("kept", [0, 1])
def test_nothing_to_compare_is_zero(name: str, kept: int) -> None:
    """Rows without valid places, or with one only: 0, and no NaN in the gradient."""
    if kept and name in OF_CELLS:
        pytest.skip("compares each candidate by itself")
    valid = torch.zeros_like(ALL)
    valid[:, :kept] = True
    hidden = torch.where(valid, T, torch.nan)
    whole = {"teacher": hidden, "valid": valid, "positive": ~valid, "preference": torch.sigmoid(T[:, :, None] - 1)}
    whole["preference"] = whole["preference"].expand(2, 4, 4)
    given = {key: grid for key, grid in whole.items() if key in {"valid", *find_loss(name).needs}}
    sides = learned({**given, "student": torch.where(valid, S, torch.nan)})
    loss = value_of(name, {**given, **sides})
    loss.backward()
    assert loss.item() == 0.0
    for side in sides.values():
        assert side.grad is None or side.grad.tolist() == torch.zeros_like(S).tolist()


@pytest.mark.parametrize("name", SCORES)
def test_no_rows_is_zero(name: str) -> None:
    given = {key: grid[:0] for key, grid in inputs(name).items()}
    assert value_of(name, given).item() == 0.0


@pytest.mark.parametrize("name", SCORES)
def test_a_list_of_equal_scores_stays_finite(name: str) -> None:
    """Of the student as training begins, of the teacher, and of both."""
    for flat in ({"student"}, {"teacher"}, {"student", "teacher"}):
        given = {key: torch.ones_like(grid) if key in flat else grid for key, grid in inputs(name).items()}
        sides = learned({**given, "student": torch.where(given["valid"], given["student"], torch.nan)})
        loss = value_of(name, {**given, **sides})
        loss.backward()
        assert loss.isfinite()
        assert all(side.grad is None or side.grad.isfinite().all() for side in sides.values())


@pytest.mark.parametrize("name", SCORES)
def test_extreme_scores_stay_finite(name: str) -> None:
    """What a cold start of a dot-product student or a saturated teacher sends, in float32."""
    whole = {
        "student": torch.tensor([[3e3, -3e3, 0.0, 1.0]]),
        "teacher": torch.tensor([[-3e3, 3e3, 0.0, 1.0]]),
        "valid": ALL[:1],
        "positive": torch.tensor([[False, True, True, False]]),
        "preference": torch.tensor([[[0.0, 1.0, 0.0, 1.0]] * 4]),
    }
    given = {key: grid for key, grid in whole.items() if key in {"student", "valid", *find_loss(name).needs}}
    sides = learned(given)
    loss = value_of(name, {**given, **sides})
    loss.backward()
    assert loss.isfinite()
    assert all(side.grad is None or side.grad.isfinite().all() for side in sides.values())


def test_inputs_are_not_modified() -> None:
    before = make_grids()
    for name in SCORES:
        given = inputs(name)
        value_of(name, given)
        for key, grid in given.items():
            assert torch.equal(grid.nan_to_num(7), before[key].nan_to_num(7)), name


@pytest.mark.parametrize("name", loss_names())
def test_the_docstring_says_what_and_whence(name: str) -> None:
    text = inspect.getdoc(find_loss(name).function)
    assert text
    first, *rest = text.splitlines()
    assert first.endswith((".", ":")) or ":" in first
    assert "Source:" in "\n".join(rest)
