"""What ties the losses to one another: special cases, limits, and what each is blind to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from grids import ALL, FIRST, SCORES, VECTORS, S, T, inputs, make_grids, value_of
from scipy.special import softmax
from scipy.stats import entropy, zscore
from torch import Tensor

from retrieval_kd.losses.choice import bd_kl, confidence_nce, dkd, js, kl, listnet, mixed_kl, reverse_kl, skew_kl
from retrieval_kd.losses.labels import bce, info_nce
from retrieval_kd.losses.orders import listmle, p_listmle, partial_pl, pld, rank_distil
from retrieval_kd.losses.pairs import preference_kl, ranknet, ranknet_soft
from retrieval_kd.losses.regression import huber, margin_mse, margin_mse_all, mse
from retrieval_kd.losses.vectors import embedding_cosine, embedding_mse

GRIDS = make_grids()
STUDENT, TEACHER, VALID, POSITIVE = (GRIDS[name] for name in ("student", "teacher", "valid", "positive"))
ONE = VALID & (torch.arange(5) == 0)  # column 0 is the only positive
GOLD_FIRST = torch.where(ONE, 9.0, TEACHER)  # a teacher that puts it first


def gradient(value: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(value, student)[0]


# 1
def test_info_nce_is_the_first_stage_of_a_ranking_with_the_positive_first() -> None:
    rows = VALID[:, 0] & (VALID.sum(1) >= 2)
    grids = STUDENT[rows], ONE[rows], VALID[rows]
    assert partial_pl(STUDENT, GOLD_FIRST, VALID & rows[:, None], depth=1).item() == pytest.approx(
        info_nce(*grids).item(), rel=1e-12
    )


# 2
def test_listnet_is_kl_and_the_teachers_entropy() -> None:
    student = S.clone().requires_grad_()
    listwise, divergence = listnet(student, T, ALL), kl(student, T, ALL)
    assert listwise.item() - divergence.item() == pytest.approx(entropy(softmax(T.numpy(), axis=1), axis=1).mean())
    torch.testing.assert_close(gradient(listwise, student), gradient(divergence, student))


# 3
def test_pairs_with_soft_targets() -> None:
    """Hard 0 and 1 as preferences are RankNet; sigmoid(t_i - t_j) is soft RankNet but for a constant."""
    student = torch.where(VALID, STUDENT, 0.0).requires_grad_()
    gaps = TEACHER[:, :, None] - TEACHER[:, None, :]
    first = torch.where(gaps > 0, 1.0, torch.nan).double()
    assert preference_kl(student, first, VALID).item() == pytest.approx(ranknet(student, TEACHER, VALID).item())
    soft, stated = ranknet_soft(student, TEACHER, VALID), preference_kl(student, torch.sigmoid(gaps), VALID)
    assert soft.item() > stated.item()
    torch.testing.assert_close(gradient(soft, student), gradient(stated, student))


def test_ranknet_by_gap_of_probabilities_is_the_rank_imitation_of_d2llm() -> None:
    odds = torch.sigmoid(T)
    wanted = [
        max(0.0, (odds[r, i] - odds[r, j]).item()) * math.log1p(math.exp(S[r, j] - S[r, i]))
        for r in range(2)
        for i in range(4)
        for j in range(4)
    ]
    assert ranknet(S, odds, ALL, weights="gap").item() == pytest.approx(sum(wanted) / 12)  # 6 ordered pairs a row


# 4
def test_rankings_with_other_weights() -> None:
    count = VALID.sum(1)
    assert partial_pl(STUDENT, TEACHER, VALID, depth=5).item() == pytest.approx(listmle(STUDENT, TEACHER, VALID).item())
    # an undecided teacher weighs all stages alike: ListMLE by the list's length
    equal = VALID & (count == 4)[:, None]
    flat = pld(STUDENT, TEACHER, torch.zeros_like(VALID), equal, teacher_temperature=1e12)
    assert flat.item() == pytest.approx(listmle(STUDENT, TEACHER, equal).item() / 4, rel=1e-6)
    # a saturated one has eyes for the first alone: cross-entropy
    rows = VALID & VALID[:, :1] & (count >= 2)[:, None]
    sure = pld(STUDENT, 100 * GOLD_FIRST, POSITIVE & False, rows)
    assert sure.item() == pytest.approx(info_nce(STUDENT, ONE & rows, rows).item())
    # of two candidates position weights leave the first stage: 2^1 - 1 against 2^0 - 1
    two = ALL[:, :2]
    assert p_listmle(S[:, :2], T[:, :2], two).item() == pytest.approx(listmle(S[:, :2], T[:, :2], two).item())


def test_positives_lead_the_ranking_of_pld() -> None:
    """The teacher's own favourite comes after them, and its scores still give the weights."""
    low = torch.tensor([[0.0, 5.0, 1.0, 2.0]])
    positive = torch.tensor([[True, False, True, False]])
    student = torch.zeros(1, 4, dtype=torch.float64)
    weights = softmax(low.numpy()[0])
    stages = [math.log(4), math.log(3), math.log(2), 0.0]
    wanted = sum(weights[place] * stage for place, stage in zip([2, 0, 1, 3], stages, strict=True))
    assert pld(student, low, positive, ALL[:1]).item() == pytest.approx(wanted)


# 5
def test_margins_of_hot_distributions_are_what_kl_compares() -> None:
    limit = margin_mse_all(S, T, ALL).item()
    assert limit == pytest.approx(np.mean(2 * (T - S).numpy().var(axis=1)))
    for temperature, expected in [(10.0, 4.009774), (100.0, 4.087586), (1000.0, 4.093157)]:
        assert 4 * kl(S, T, ALL, temperature=temperature).item() == pytest.approx(expected, abs=2e-6)
        assert abs(expected - limit) < 1 / temperature


# 6
def test_kl_of_two_near_ties() -> None:
    two = torch.tensor([[0.2, 0.0]], dtype=torch.float64), torch.tensor([[-0.1, 0.0]], dtype=torch.float64)
    got = kl(two[1], two[0], ALL[:1, :2]).item()
    assert got == pytest.approx(0.011208, abs=5e-7)
    assert got == pytest.approx(0.3**2 / 8, rel=0.01)


# 7
def test_correlation_and_cosine_are_distances() -> None:
    given = {"student": S, "teacher": T, "valid": ALL}
    half = np.mean((zscore(S.numpy(), axis=1) - zscore(T.numpy(), axis=1)) ** 2) / 2
    assert value_of("pearson", given).item() == pytest.approx(half)
    assert half == pytest.approx(0.682171, abs=5e-7)
    vectors = inputs("embedding_mse")
    unit = (torch.nn.functional.normalize(side) for side in vectors.values())
    assert embedding_cosine(**vectors).item() == pytest.approx(embedding_mse(*unit).item() / 2)


# 8
KEEPS_SHIFT = {*SCORES} - {"mse", "huber", "bce"}
KEEPS_SCALE = {"pearson"}


@pytest.mark.parametrize("name", SCORES)
def test_shift_and_scale_of_the_student(name: str) -> None:
    """Which losses see a constant added to a row, or the row multiplied."""
    given = inputs(name)
    value = value_of(name, given).item()
    shifted = {**given, "student": given["student"] + torch.arange(7.0).double()[:, None]}
    scaled = {**given, "student": 3 * given["student"]}
    assert (value_of(name, shifted).item() == pytest.approx(value, rel=1e-9)) == (name in KEEPS_SHIFT)
    assert (value_of(name, scaled).item() == pytest.approx(value, rel=1e-9)) == (name in KEEPS_SCALE)


@pytest.mark.parametrize("name", VECTORS)
def test_what_losses_of_vectors_are_blind_to(name: str) -> None:
    """Relations do not see a rotation of the student, nor its scale; the cosine sees the rotation alone."""
    given = inputs(name)
    value = value_of(name, given).item()
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    turned = value_of(name, {**given, "student": given["student"] @ turn + 1})
    scaled = value_of(name, {**given, "student": 3 * given["student"]})
    assert (turned.item() == pytest.approx(value, rel=1e-9)) == name.startswith("rkd")
    assert (scaled.item() == pytest.approx(value, rel=1e-9)) == (name != "embedding_mse")


def test_relations_know_no_width() -> None:
    given = inputs("rkd_angle")
    wide = {**given, "student": torch.nn.functional.pad(given["student"], (0, 3))}
    for name in ("rkd_angle", "rkd_distance"):
        assert value_of(name, wide).item() == pytest.approx(value_of(name, given).item())


@pytest.mark.parametrize("name", sorted({*SCORES} - {"bce", "info_nce", "preference_kl"}))
def test_a_perfect_student_has_nothing_to_learn(name: str) -> None:
    """Where scores are equal the gradient is 0 for all that compare values; orders may still be pressed apart."""
    pressing = {"approx_rank_mse", "confidence_nce", "lambda_rank", "listmle", "p_listmle", "partial_pl", "pld"}
    student = torch.where(VALID, TEACHER, 0.0).requires_grad_()
    value = value_of(name, {**inputs(name), "student": student})
    still = gradient(value, student).abs().max().item() < 1e-9
    assert still == (name not in pressing | {"ranknet", "sinkhorn"})


# more
def test_one_positive_makes_all_ways_to_combine_the_same() -> None:
    values = {info_nce(STUDENT, ONE, VALID, combine=way).item() for way in ("sum_exp", "sum_logits", "each")}  # type: ignore[arg-type]
    assert max(values) == pytest.approx(min(values), rel=1e-12)


def test_mixtures_and_their_ends() -> None:
    forward, reverse = kl(STUDENT, TEACHER, VALID), reverse_kl(STUDENT, TEACHER, VALID)
    assert mixed_kl(STUDENT, TEACHER, VALID, forward=1.0, reverse=0.0).item() == pytest.approx(forward.item())
    assert reverse_kl(TEACHER, STUDENT, VALID).item() == pytest.approx(forward.item())
    both = bd_kl(STUDENT, TEACHER, VALID, favoured=1.0).item()
    assert both == pytest.approx((forward + reverse).item())
    ways = [bd_kl(STUDENT, TEACHER, VALID, favoured=2.0, uncertain=way).item() for way in ("reverse", "forward")]  # type: ignore[arg-type]
    assert sum(ways) == pytest.approx(3 * both)
    assert skew_kl(STUDENT, TEACHER, VALID, skew=0.0).item() == pytest.approx(forward.item())
    assert skew_kl(STUDENT, TEACHER, VALID, skew=1.0).item() == 0.0
    for beta in (0.0, 1.0):
        assert js(STUDENT, TEACHER, VALID, beta=beta).item() == pytest.approx(0.0, abs=1e-12)
    assert js(STUDENT, TEACHER, VALID).item() == pytest.approx(js(TEACHER, STUDENT, VALID).item())
    # small beta: js / beta tends to forward KL
    assert js(STUDENT, TEACHER, VALID, beta=1e-7).item() / 1e-7 == pytest.approx(forward.item(), rel=1e-4)


def test_dkd_with_the_teachers_share_of_the_others_is_kl() -> None:
    for row in range(4):
        grids = STUDENT[row : row + 1], TEACHER[row : row + 1], ONE[row : row + 1], VALID[row : row + 1]
        others = 1 - softmax(grids[1][grids[3]].numpy())[0]
        assert dkd(*grids, beta=float(others)).item() == pytest.approx(kl(grids[0], grids[1], grids[3]).item())


def test_a_sure_teacher_makes_confidence_nce_info_nce() -> None:
    sure = torch.where(POSITIVE, 99.0, -99.0).double()
    got = confidence_nce(STUDENT, sure, POSITIVE, VALID, temperature=0.5)
    assert got.item() == pytest.approx(info_nce(STUDENT, POSITIVE, VALID, temperature=0.5).item())


def test_rank_distil_of_the_whole_list_is_kl() -> None:
    assert rank_distil(STUDENT, TEACHER, VALID, depth=5).item() == pytest.approx(kl(STUDENT, TEACHER, VALID).item())


def test_margins_of_two_and_of_all() -> None:
    """Of two candidates, two of the four ordered pairs are the margin."""
    two = S[:, :2], T[:, :2], ALL[:, :2]
    assert margin_mse_all(*two).item() == pytest.approx(margin_mse(*two).item() / 2)


def test_huber_is_half_of_mse_near_and_linear_far() -> None:
    assert huber(S, T, ALL, delta=99.0).item() == pytest.approx(mse(S, T, ALL).item() / 2)
    assert huber(S, T, ALL, delta=1e-9).item() / 1e-9 == pytest.approx((S - T).abs().mean().item(), rel=1e-6)


def test_bce_is_ranknet_against_a_score_of_zero() -> None:
    zero = torch.zeros(2, 1, dtype=torch.float64)
    total = sum(
        ranknet(torch.cat([S[:, [c]], zero], 1), torch.cat([FIRST[:, [c]] * 2.0 - 1, zero], 1), ALL[:, :2]).item()
        for c in range(4)
    )
    assert bce(S, FIRST, ALL).item() == pytest.approx(total / 4)
