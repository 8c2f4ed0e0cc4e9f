"""Section 31 of the specification, computed there with numpy, and numbers by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grids import ALL, FIRST, S, T, X, Y, value_of
from torch import Tensor

from retrieval_kd.losses.choice import confidence_nce, kl, listnet
from retrieval_kd.losses.labels import info_nce
from retrieval_kd.losses.layers import layer_weights
from retrieval_kd.losses.orders import listmle, partial_pl, pld
from retrieval_kd.losses.pairs import preference_kl
from retrieval_kd.losses.regression import margin_mse
from retrieval_kd.losses.transport import sinkhorn
from retrieval_kd.losses.vectors import embedding_cosine, embedding_mse, rkd_angle, rkd_distance
from retrieval_kd.targets import interpolate

TEACHER = {"student": S, "teacher": T, "valid": ALL}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("mse", {}, 2.25),
        ("margin_mse", {}, 3.083333),
        ("margin_mse_all", {}, 4.09375),
        ("pearson", {}, 0.682171),
        ("kl", {}, 0.658291),
        ("kl", {"temperature": 2.0}, 0.846452),
        ("reverse_kl", {}, 0.664908),
        ("reverse_kl", {"temperature": 2.0}, 0.844116),
        ("mixed_kl", {}, (0.658291 + 0.664908) / 2),
        ("js", {}, 0.141717),
        ("listnet", {}, 1.516876),
        ("listmle", {}, 3.186423),
        ("ranknet", {}, 0.720437),
        ("ranknet", {"weights": "gap"}, 1.344904),
    ],
)
def test_of_scores(name: str, options: dict[str, Any], expected: float) -> None:
    assert value_of(name, TEACHER, options).item() == pytest.approx(expected, abs=6e-7)


def test_of_labels_and_orders() -> None:
    assert info_nce(S, FIRST, ALL).item() == pytest.approx(0.993098, abs=5e-7)
    assert pld(S, T, FIRST, ALL).item() == pytest.approx(1.178528, abs=5e-7)
    order = torch.tensor([[2.0, 1.0, 0.0, 0.0]] * 2)  # 0, 1, then the rest, of which nothing is asked
    assert partial_pl(S, order, ALL, depth=2).item() == pytest.approx(1.350079, abs=5e-7)


def test_of_preferences() -> None:
    preference = torch.full((2, 4, 4), torch.nan, dtype=torch.float64)
    preference[0, 0, 1], preference[0, 2, 3], preference[1, 0, 1] = 0.8, 0.3, 0.6
    assert preference_kl(S, preference, ALL).item() == pytest.approx(0.218502, abs=5e-7)


def test_the_mean_over_elements_of_fid_is_kl_by_the_columns() -> None:
    assert kl(S, T, ALL).item() / 4 == pytest.approx(0.164573, abs=5e-7)


def test_taid() -> None:
    """Towards a target between student and teacher: as cross-entropy, and without the target's entropy."""
    target = interpolate(S, T, 0.4)
    assert listnet(S, target, ALL).item() == pytest.approx(1.179374, abs=5e-7)
    assert kl(S, target, ALL).item() == pytest.approx(0.109080, abs=5e-7)


def test_sinkhorn() -> None:
    """The specification's sum over the two rows is twice the mean."""
    assert 2 * sinkhorn(S, T, ALL, slots="column").item() == pytest.approx(0.976842, abs=5e-7)


def test_layer_weights_of_lead() -> None:
    losses = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    weights = layer_weights(losses, temperature=10.0)
    assert weights.tolist() == pytest.approx([0.377978, 0.342009, 0.280013], abs=5e-7)
    assert not weights.requires_grad
    assert layer_weights(losses, temperature=1e9).tolist() == pytest.approx([1 / 3] * 3)


def test_of_vectors() -> None:
    assert embedding_mse(X, Y).item() / 2 == pytest.approx(0.333333, abs=5e-7)  # a mean over coordinates there
    left, right = F.normalize(X), F.normalize(Y)
    assert embedding_mse(left, right).item() == pytest.approx(0.034211, abs=5e-7)
    assert embedding_mse(left, right).item() / 2 == pytest.approx(0.017106, abs=5e-7)
    assert embedding_cosine(X, Y).item() == pytest.approx(0.034211 / 2, abs=5e-7)
    assert rkd_distance(X, Y).item() == pytest.approx(0.011516, abs=5e-7)
    assert rkd_angle(X, Y).item() == pytest.approx(0.009682, abs=5e-7)


def cosines(left: Tensor, right: Tensor) -> Tensor:
    return F.normalize(left) @ F.normalize(right).T


@pytest.mark.parametrize(("temperature", "expected"), [(3.0, 0.012536), (0.05, 0.000577)])
def test_kl_of_similarities_within_a_batch(temperature: float, expected: float) -> None:
    """Luxical and static word embeddings: each text's similarities to all others, itself left out."""
    others = ~torch.eye(3, dtype=torch.bool)
    got = kl(cosines(X, X), cosines(Y, Y), others, temperature=temperature)
    assert got.item() == pytest.approx(expected, abs=5e-7)


def test_info_nce_of_student_against_teacher_vectors() -> None:
    """DistilCSE: a student's vector finds its own text's among the teacher's, at scale 20."""
    own = torch.eye(3, dtype=torch.bool)
    got = info_nce(cosines(X, Y), own, torch.ones_like(own), temperature=1 / 20)
    assert got.item() == pytest.approx(0.043372, abs=5e-7)


def test_margin_mse_by_hand() -> None:
    student = torch.tensor([[3.0, 1.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[9.0, 8.0, torch.nan]])  # the third was never scored
    loss = margin_mse(student, teacher, teacher.isfinite())
    loss.backward()
    assert loss.item() == 1.0  # ((3 - 1) - (9 - 8)) ** 2
    assert student.grad.tolist() == [[2.0, -2.0, 0.0]]


def test_column_0_leads_margin_mse() -> None:
    assert margin_mse(S[:, [1, 0, 2, 3]], T[:, [1, 0, 2, 3]], ALL).item() != pytest.approx(3.083333, abs=0.01)


def test_info_nce_of_several_positives_by_hand() -> None:
    student = torch.tensor([[math.log(1), math.log(2), math.log(3), math.log(4)]])
    positive = torch.tensor([[True, True, False, False]])
    assert info_nce(student, positive, ALL[:1]).item() == pytest.approx(-math.log(3 / 10))
    valid = torch.tensor([[True, True, True, False]])
    assert info_nce(student, positive, valid).item() == pytest.approx(-math.log(3 / 6))
    # at temperature 0.5 every exponential is squared
    assert info_nce(student, positive, ALL[:1], temperature=0.5).item() == pytest.approx(-math.log(5 / 30))
    together = info_nce(student, positive, ALL[:1], combine="sum_logits")
    assert together.item() == pytest.approx(-math.log(2 / 9))  # 1 * 2 against 3 and 4
    each = info_nce(student, positive, ALL[:1], combine="each")
    assert each.item() == pytest.approx(-(math.log(1 / 8) + math.log(2 / 9)) / 2)


def test_a_likely_false_negative_weighs_next_to_nothing() -> None:
    """D2LLM's contrastive imitation, with the teacher's odds of yes at 1 : 3, 1 : 1 and 99 : 1."""
    student = torch.tensor([[math.log(2), math.log(3), math.log(5)]], requires_grad=True)
    teacher = torch.tensor([[math.log(1 / 3), 0.0, math.log(99)]])
    loss = confidence_nce(student, teacher, FIRST[:1, :3], ALL[:1, :3])
    # 2 * 1/4 against 3 * 1/2 and 5 * 1/100
    assert loss.item() == pytest.approx(-math.log(0.5 / (0.5 + 1.5 + 0.05)), rel=1e-5)
    loss.backward()
    assert student.grad[0].tolist() == pytest.approx([0.5 / 2.05 - 1, 1.5 / 2.05, 0.05 / 2.05], rel=1e-4)


def test_ties_of_the_teacher_teach_ranknet_nothing() -> None:
    assert value_of("ranknet", {**TEACHER, "teacher": torch.ones_like(S)}).item() == 0.0


def test_equal_teacher_scores_stand_in_the_order_of_the_list() -> None:
    student = torch.randn(1, 999, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    every = torch.ones(1, 999, dtype=torch.bool)
    in_order = listmle(student, -torch.arange(999.0)[None], every)
    assert listmle(student, torch.zeros_like(student), every).item() == pytest.approx(in_order.item(), rel=1e-12)


def test_extreme_scores_by_hand() -> None:
    student, teacher = torch.tensor([[3e4, -3e4, 0.0, 1.0]]), torch.tensor([[-3e4, 3e4, 0.0, 1.0]])
    assert kl(student, teacher, ALL[:1]).item() == pytest.approx(6e4)
    assert info_nce(student / 100, FIRST[:1].roll(1, 1), ALL[:1], temperature=0.05).item() == pytest.approx(12000)
