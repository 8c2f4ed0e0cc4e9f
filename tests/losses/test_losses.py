"""Losses against numbers by hand, against numpy and scipy, and against the contract that all of them keep."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp, rel_entr, softmax
from torch import Tensor

from retrieval_kd.losses import FAMILIES, find_loss, takes
from retrieval_kd.losses.labels import info_nce
from retrieval_kd.losses.scores import kl, margin_mse, ranknet
from retrieval_kd.losses.vectors import embedding_mse
from retrieval_kd.types import InputError

S = torch.tensor([[2, 1, 0, -1], [0.5, 1.5, -0.5, 0]], dtype=torch.float64)
T = torch.tensor([[3, 2.5, -1, 0], [1, 0, 2, -2]], dtype=torch.float64)
ALL = torch.ones(2, 4, dtype=torch.bool)
FIRST = torch.tensor([[True, False, False, False]] * 2)

LOSSES = [
    (family, name) for family in FAMILIES for name in importlib.import_module(f"retrieval_kd.losses.{family}").__all__
]


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (lambda: margin_mse(S, T, ALL), 3.083333),
        (lambda: kl(S, T, ALL), 0.658291),
        (lambda: kl(S, T, ALL, temperature=2.0), 0.846452),
        (lambda: ranknet(S, T, ALL), 0.720437),
        (lambda: info_nce(S, FIRST, ALL), 0.993098),
    ],
    ids=["margin_mse", "kl", "kl-2", "ranknet", "info_nce"],
)
def test_golden_numbers(got: Callable[[], Tensor], expected: float) -> None:
    """Section 31 of the specification, computed there with numpy."""
    assert got().item() == pytest.approx(expected, abs=5e-7)


def test_embedding_mse_golden() -> None:
    student = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)
    teacher = torch.tensor([[2, 0], [0, 1], [1, 2]], dtype=torch.float64)
    assert embedding_mse(student, teacher).item() == pytest.approx(2 / 3)  # 1 + 0 + 1 over three rows
    left, right = (torch.nn.functional.normalize(vectors) for vectors in (student, teacher))
    assert embedding_mse(left, right).item() == pytest.approx(0.034211, abs=5e-7)
    assert embedding_mse(left, right).item() == pytest.approx((2 - 2 * (left * right).sum(1)).mean().item())


def test_margin_mse_by_hand() -> None:
    student = torch.tensor([[3.0, 1.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[9.0, 8.0, torch.nan]])  # the third was never scored
    loss = margin_mse(student, teacher, teacher.isfinite())
    loss.backward()
    assert loss.item() == 1.0  # ((3 - 1) - (9 - 8)) ** 2
    assert student.grad.tolist() == [[2.0, -2.0, 0.0]]


def test_info_nce_of_several_positives_by_hand() -> None:
    student = torch.tensor([[math.log(1), math.log(2), math.log(3), math.log(4)]])
    positive = torch.tensor([[True, True, False, False]])
    assert info_nce(student, positive, ALL[:1]).item() == pytest.approx(-math.log(3 / 10))
    valid = torch.tensor([[True, True, True, False]])
    assert info_nce(student, positive, valid).item() == pytest.approx(-math.log(3 / 6))
    # at temperature 0.5 every exponential is squared
    assert info_nce(student, positive, ALL[:1], temperature=0.5).item() == pytest.approx(-math.log(5 / 30))


@pytest.fixture
def grids() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """student, teacher (NaN and -inf where invalid), valid and positive, each (6, 5)."""
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=(2, 6, 5)) * 2
    valid = rng.random((6, 5)) < 0.75
    valid[:, 0] = True
    valid[4] = [False, True, False, True, True]  # column 0 missing
    valid[5] = [True, False, False, False, False]  # nothing to compare
    teacher[~valid] = rng.choice([np.nan, -np.inf], (~valid).sum())
    positive = rng.random((6, 5)) < 0.4
    positive[0] = False
    return (*(torch.tensor(array) for array in (student, teacher, valid)), torch.tensor(positive))


def rows_of(grids: tuple[Tensor, ...]) -> list[tuple[np.ndarray, ...]]:
    """Student, teacher and positive of each row's valid places alone."""
    student, teacher, valid, positive = (grid.numpy() for grid in grids)
    return [(s[v], t[v], p[v]) for s, t, v, p in zip(student, teacher, valid, positive, strict=True)]


@pytest.mark.parametrize(("temperature", "teacher_temperature"), [(1.0, None), (2.0, None), (0.5, 3.0)])
def test_kl_agrees_with_scipy(grids: tuple[Tensor, ...], temperature: float, teacher_temperature: float | None) -> None:
    values = [
        rel_entr(softmax(t / (teacher_temperature or temperature)), softmax(s / temperature)).sum()
        for s, t, _ in rows_of(grids)
        if len(s) >= 2
    ]
    got = kl(*grids[:3], temperature=temperature, teacher_temperature=teacher_temperature)
    assert got.item() == pytest.approx(temperature**2 * np.mean(values), rel=1e-10)


def test_margin_mse_agrees_with_loops(grids: tuple[Tensor, ...]) -> None:
    student, teacher, valid, _ = (grid.tolist() for grid in grids)
    errors = [
        ((s[0] - s[c]) - (t[0] - t[c])) ** 2
        for s, t, v in zip(student, teacher, valid, strict=True)
        for c in range(1, 5)
        if v[0] and v[c]
    ]
    assert margin_mse(*grids[:3]).item() == pytest.approx(np.mean(errors), rel=1e-10)


def test_ranknet_agrees_with_loops(grids: tuple[Tensor, ...]) -> None:
    errors = [
        math.log1p(math.exp(-(s[i] - s[j])))
        for s, t, _ in rows_of(grids)
        for i in range(len(s))
        for j in range(len(s))
        if t[i] > t[j]
    ]
    assert ranknet(*grids[:3]).item() == pytest.approx(np.mean(errors), rel=1e-10)


def test_ties_of_the_teacher_teach_ranknet_nothing() -> None:
    assert ranknet(S, torch.ones_like(S), ALL).item() == 0.0


@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_info_nce_agrees_with_scipy(grids: tuple[Tensor, ...], temperature: float) -> None:
    student, _, valid, positive = grids
    values = [-logsumexp(log_softmax(s / temperature)[p]) for s, _, p in rows_of(grids) if p.any()]
    assert len(values) < len(student)  # rows without a positive do not count
    got = info_nce(student, positive, valid, temperature)
    assert got.item() == pytest.approx(np.mean(values), rel=1e-10)


def test_margins_of_hot_distributions_are_what_kl_compares() -> None:
    """4 T^2 KL tends to the mean over all ordered pairs (i, j) of the squared margin error."""
    error = (S - T).numpy()
    limit = ((error[:, :, None] - error[:, None, :]) ** 2).mean()
    assert limit == pytest.approx(4.09375)
    for temperature, expected in [(10.0, 4.009774), (100.0, 4.087586), (1000.0, 4.093157)]:
        assert 4 * kl(S, T, ALL, temperature=temperature).item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("loss", [margin_mse, kl, ranknet])
def test_order_and_zero_point_do_not_count(loss: Callable[..., Tensor], grids: tuple[Tensor, ...]) -> None:
    student, teacher, valid, _ = grids
    value = loss(student, teacher, valid).item()
    order = [0, 3, 1, 4, 2] if loss is margin_mse else [4, 3, 1, 0, 2]  # column 0 leads for margin_mse
    assert loss(student[:, order], teacher[:, order], valid[:, order]).item() == pytest.approx(value, rel=1e-10)
    rows = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    assert loss(student[rows], teacher[rows], valid[rows]).item() == pytest.approx(value, rel=1e-10)
    shift = torch.arange(6.0).double()[:, None]
    assert loss(student + shift, teacher - 2 * shift, valid).item() == pytest.approx(value, rel=1e-10)


def test_column_0_leads_margin_mse() -> None:
    assert margin_mse(S[:, [1, 0, 2, 3]], T[:, [1, 0, 2, 3]], ALL).item() != pytest.approx(3.083333, abs=0.01)


def call(family: str, name: str, grids: tuple[Tensor, ...], student: Tensor) -> Tensor:
    """The loss of `student` against a teacher or labels; of vectors, 0 for the teacher's invalid places."""
    _, loss = find_loss(name)
    _, teacher, valid, positive = grids
    if family == "scores":
        return loss(student, teacher, valid)
    if family == "labels":
        return loss(student, positive, valid)
    return loss(student, torch.where(valid, teacher, 0.0))


@pytest.mark.parametrize(("family", "name"), LOSSES)
def test_contract(family: str, name: str, grids: tuple[Tensor, ...]) -> None:
    """A finite scalar, a finite gradient that is exactly 0 where masked, and a mean, not a sum."""
    student = grids[0].clone().requires_grad_()
    loss = call(family, name, grids, student)
    loss.backward()
    assert loss.shape == ()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0
    if family != "vectors":
        assert student.grad[~grids[2]].abs().sum() == 0
    twice = tuple(torch.cat([grid, grid]) for grid in grids)
    assert call(family, name, twice, twice[0]).item() == pytest.approx(loss.item(), rel=1e-10)
    single = tuple(grid.float() if grid.is_floating_point() else grid for grid in grids)
    value = call(family, name, single, single[0])
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss.item(), rel=1e-4)
    assert inspect.getdoc(find_loss(name)[1])


@pytest.mark.parametrize(("family", "name"), [pair for pair in LOSSES if pair[0] != "vectors"])
@pytest.mark.parametrize("kept", [0, 1])
def test_nothing_to_compare_is_zero(family: str, name: str, kept: int) -> None:
    """Rows without valid places, or with one only: 0, and no NaN in the gradient."""
    student = S.clone().requires_grad_()
    valid = torch.zeros_like(ALL)
    valid[:, :kept] = True
    grids = (S, torch.where(valid, T, torch.nan), valid, ~valid)  # the positives are not valid
    loss = call(family, name, grids, student)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.tolist() == torch.zeros_like(S).tolist()


def test_extreme_scores_stay_finite() -> None:
    student = torch.tensor([[3e4, -3e4, 0.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[-3e4, 3e4, 0.0, 1.0]])
    for loss in (kl(student, teacher, ALL[:1]), ranknet(student, teacher, ALL[:1])):
        assert loss.isfinite()
    assert kl(student, teacher, ALL[:1]).item() == pytest.approx(6e4)
    assert info_nce(student / 100, FIRST[:1].roll(1, 1), ALL[:1], temperature=0.05).item() == pytest.approx(12000)


def test_names() -> None:
    assert find_loss("kl") == ("scores", kl)
    assert (takes(kl, "temperature"), takes(margin_mse, "temperature")) == (True, False)
    with pytest.raises(InputError, match=r"no loss 'margin_msa'; did you mean 'margin_mse'\?"):
        find_loss("margin_msa")
