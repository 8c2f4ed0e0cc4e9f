"""Terms against the same loss on grids made by hand: relations, missing scores, guides, layers, widths, who learns."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from tiny_training import IN_BATCH, MARGIN, value_of

from retrieval_kd.losses.choice import kl
from retrieval_kd.losses.labels import info_nce
from retrieval_kd.losses.layers import layer_weights
from retrieval_kd.losses.regression import margin_mse
from retrieval_kd.stages import Guide, LayerPairs, Regularizer, Soften, Stage, Term
from retrieval_kd.students import Outputs, own_scores
from retrieval_kd.train.batches import Draw, draw
from retrieval_kd.train.controllers import TermState
from retrieval_kd.train.terms import Step, active_terms, cut, loss_of, penalty
from retrieval_kd.trainset import Tokens, TrainSet
from retrieval_kd.types import Hits, InputError

RNG = np.random.default_rng(2)
LISTS = np.array([[0, 1, 2], [2, 3, -1]], np.int32)  # candidates; the first is the positive
SCORES = np.array([[[3.0, 1.0, 2.0], [np.nan, 0.5, -np.inf]]], np.float32)
POSITIVE = np.array([[True, False, False], [True, False, False]])
QUERY, DOCUMENT = (torch.from_numpy(RNG.normal(size=(n, 4)).astype(np.float32)) for n in (2, 4))
DRAWN = Draw(np.array([0, 1]), np.arange(4), np.array([[0, 1, 2], [2, 3, -1]]), np.array([[0, 1, 2]] * 2))
TEACHER = {"query": RNG.normal(size=(2, 4)).astype(np.float32), "document": RNG.normal(size=(4, 4)).astype(np.float32)}


def outputs(queries: torch.Tensor = QUERY, documents: torch.Tensor = DOCUMENT) -> Outputs:
    grid = queries @ documents.T
    return Outputs(own_scores(grid, torch.from_numpy(DRAWN.columns)), grid, queries, documents)


@pytest.fixture
def trainset() -> TrainSet:
    return TrainSet(
        query_tokens=Tokens.pack([[1], [2]]),
        hits=Hits(LISTS, np.where(LISTS >= 0, 0, -np.inf).astype(np.float32)),
        teachers=["ce"],
        scores=SCORES,
        positive=POSITIVE,
        query_vectors={"two": TEACHER["query"]},
        document_vectors={"two": TEACHER["document"]},
        preference_pairs=np.array([[[2, 1], [0, 2]], [[0, 1], [0, 0]]], np.int32),
        preferences=np.array([[0.9, 0.6], [0.2, np.nan]], np.float32),
    )


def value(term: Term, trainset: TrainSet, **views: Outputs) -> torch.Tensor:
    return loss_of(term, Step(DRAWN, trainset, {"student": outputs(), **views}, (0, 0, 5)), TermState(term))


def test_a_positive_without_a_score_takes_the_best_of_its_list(trainset: TrainSet) -> None:
    term = Term(loss="margin_mse", teachers=("ce",), missing="list_maximum")
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.5, 0.5, 0.0]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    assert value(term, trainset).item() == pytest.approx(margin_mse(outputs().scores, scores, valid).item())
    dropped = value(Term(loss="margin_mse", teachers=("ce",)), trainset).item()
    assert dropped == pytest.approx(margin_mse(outputs().scores[:1], scores[:1], valid[:1]).item())


def test_stored_scores_in_batch(trainset: TrainSet) -> None:
    """Query 0 has scores for documents 0, 1, 2; query 1 for document 3 alone."""
    full = torch.tensor([[3.0, 1.0, 2.0, torch.nan], [torch.nan, torch.nan, torch.nan, 0.5]])
    dropped = value(Term(loss="kl", teachers=("ce",), relation="batch", missing="drop"), trainset)
    assert dropped.item() == pytest.approx(kl(outputs().grid, full, full.isfinite()).item())
    zero = value(Term(loss="kl", teachers=("ce",), relation="batch", missing="zero_probability"), trainset).item()
    student = outputs().grid.numpy()
    target = np.array([[*softmax([3.0, 1.0, 2.0]), 0], [0, 0, 0, 1]])
    assert zero == pytest.approx(rel_entr(target, softmax(student, axis=1)).sum(1).mean(), rel=1e-5)


def test_a_teacher_s_vectors_give_the_whole_batch_and_the_gram(trainset: TrainSet) -> None:
    every = torch.ones(2, 4, dtype=torch.bool)
    batch = value(Term(loss="kl", teachers=("two",), relation="batch", temperature=2.0), trainset)
    grid = torch.from_numpy(TEACHER["query"] @ TEACHER["document"].T)
    assert batch.item() == pytest.approx(kl(outputs().grid, grid, every, temperature=2.0).item(), rel=1e-5)
    gram = value(Term(loss="kl", teachers=("two",), relation="gram", side="document"), trainset)
    vectors = torch.from_numpy(TEACHER["document"])
    apart = ~torch.eye(4, dtype=torch.bool)
    expected = kl(DOCUMENT @ DOCUMENT.T, vectors @ vectors.T, apart)
    assert gram.item() == pytest.approx(expected.item(), rel=1e-5)


def test_cross_keeps_a_queue(trainset: TrainSet) -> None:
    term = Term(loss="info_nce", teachers=("two",), relation="cross", queue=3)
    state, teacher = TermState(term), torch.from_numpy(TEACHER["query"])
    step = Step(DRAWN, trainset, {"student": outputs()}, (0, 0, 0))
    first = loss_of(term, step, state)
    own = torch.eye(2, dtype=torch.bool)
    assert first.item() == pytest.approx(info_nce(QUERY @ teacher.T, positive=own, valid=own | ~own).item(), rel=1e-5)
    assert state.queue is not None
    assert state.queue.texts.tolist() == [0, 1]
    # the same texts again: a text in the queue is no negative of itself, and one more of the other text
    valid = torch.tensor([[True, True, False, True], [True, True, True, False]])
    positive = torch.cat([own, torch.zeros_like(own)], dim=1)
    expected = info_nce(QUERY @ torch.cat([teacher, teacher]).T, positive=positive, valid=valid)
    assert loss_of(term, step, state).item() == pytest.approx(expected.item(), rel=1e-6)
    loss_of(term, step, state)
    assert state.queue.texts.tolist() == [1, 0, 1]


def test_guide_denies_what_it_holds_for_relevant(trainset: TrainSet) -> None:
    term = Term(loss="info_nce", guide=Guide(teacher="ce", margin=1.5))
    valid = torch.tensor([[True, True, False], [True, True, False]])  # 2.0 is within 1.5 of 3.0
    expected = info_nce(outputs().scores, positive=torch.from_numpy(POSITIVE), valid=valid)
    assert value(term, trainset).item() == pytest.approx(expected.item(), rel=1e-6)


def test_preferences_follow_the_drawn_places(trainset: TrainSet) -> None:
    term = Term(loss="preference_kl", teachers=("ce",))

    def pair(query: int, i: int, j: int, chance: float) -> float:
        scores = outputs().scores[query, [i, j]].numpy()
        return float(rel_entr([chance, 1 - chance], softmax(scores)).sum())

    pairs = [pair(0, 2, 1, 0.9), pair(0, 0, 2, 0.6), pair(1, 0, 1, 0.2)]
    assert value(term, trainset).item() == pytest.approx(np.mean(pairs), rel=1e-5)


def test_live_teachers_are_fixed_unless_the_term_says_so(trainset: TrainSet) -> None:
    vectors = torch.from_numpy(TEACHER["query"]).requires_grad_()
    live = outputs(vectors, torch.from_numpy(TEACHER["document"]))
    fixed = value(Term(loss="kl", teachers=("tutor",), relation="batch"), trainset, tutor=live)
    assert not fixed.requires_grad
    moving = value(Term(loss="kl", teachers=("tutor",), relation="batch", detach=False), trainset, tutor=live)
    assert moving.item() == pytest.approx(fixed.item(), rel=1e-6)
    moving.backward()
    assert vectors.grad.abs().sum() > 0
    of_tutor = value(Term(loss="info_nce", of="tutor", relation="batch"), trainset, tutor=live)
    positive = torch.tensor([[True, False, False, False], [False, False, True, False]])
    expected = info_nce(live.grid, positive=positive, valid=torch.ones_like(positive))
    assert of_tutor.item() == pytest.approx(expected.item(), rel=1e-6)


def test_layers_are_paired_in_order_and_weighed_by_the_teacher_s_own_loss(trainset: TrainSet) -> None:
    """As many layers as there are on both sides: every one, in order."""
    layers = [outputs(QUERY * factor) for factor in (0.5, 1.0)]
    above = [outputs(torch.from_numpy(TEACHER["query"]) * factor) for factor in (1.0, 2.0)]
    student, tutor = (dataclasses.replace(found[-1], layers=found) for found in (layers, above))
    term = Term(loss="kl", teachers=("tutor",), relation="batch", layers=LayerPairs(count=5, temperature=10.0))
    got = loss_of(term, Step(DRAWN, trainset, {"student": student, "tutor": tutor}, (0, 0, 3)), TermState(term))
    positive = torch.tensor([[True, False, False, False], [False, False, True, False]])
    every = torch.ones_like(positive)
    errors = torch.stack([info_nce(one.grid, positive=positive, valid=every) for one in above])
    values = torch.stack([kl(low.grid, high.grid, every) for low, high in zip(layers, above, strict=True)])
    assert got.item() == pytest.approx((layer_weights(errors, 10.0) * values).sum().item(), rel=1e-5)


def test_softened_and_weighted_targets(trainset: TrainSet) -> None:
    plain = Term(loss="kl", teachers=("ce",), teacher_temperature=2.0)
    soft = Term(loss="kl", teachers=("ce",), soften=Soften(power=2.0))
    assert value(soft, trainset).item() == pytest.approx(value(plain, trainset).item(), rel=1e-5)
    trainset.scores[0, 1] = [2.0, -2.0, -np.inf]
    weighted = Term(loss="kl", teachers=("ce",), row_weights="teacher_confidence")
    chances = [softmax([3.0, 1.0, 2.0]), softmax([2.0, -2.0])]
    weights = [1 + (chance * np.log(chance)).sum() / np.log(len(chance)) for chance in chances]
    rows = [
        rel_entr(chance, softmax(outputs().scores[row, : len(chance)].numpy())).sum()
        for row, chance in enumerate(chances)
    ]
    expected = np.average(rows, weights=weights)
    assert value(weighted, trainset).item() == pytest.approx(expected, rel=1e-5)


def test_widths_cut_both_sides_and_make_them_unit_again(trainset: TrainSet) -> None:
    vectors = torch.tensor([[3.0, 4.0, 12.0]])
    assert cut(vectors, 2).tolist() == [[3.0, 4.0]]
    unit = cut(vectors / 13, 2)
    np.testing.assert_allclose(unit.numpy(), [[0.6, 0.8]], rtol=1e-6)
    term = Term(loss="embedding_mse", teachers=("two",))
    short = outputs(QUERY[:, :2], DOCUMENT[:, :2])
    step = Step(DRAWN, trainset, {"student": short}, (0, 0, 0), width=2)
    expected = ((QUERY[:, :2].numpy() - TEACHER["query"][:, :2]) ** 2).sum(1).mean()
    assert loss_of(term, step, TermState(term)).item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match=r"have 2 coordinates, those of teacher 'two' 4; set student\.project = 4"):
        loss_of(term, dataclasses.replace(step, width=None), TermState(term))


def test_penalties_by_side() -> None:
    activations, columns = outputs(QUERY.abs(), DOCUMENT.abs()), torch.tensor([[0, 1], [2, -1]])
    expected = {
        side: float((vectors.abs().mean(0) ** 2).sum()) for side, vectors in (("query", QUERY), ("document", DOCUMENT))
    }
    for side, number in {**expected, "both": sum(expected.values())}.items():
        found = penalty(Regularizer(name="flops", side=side, weight=1.0), activations, columns)
        assert found.item() == pytest.approx(number, rel=1e-5)
    both = penalty(Regularizer(name="anti_zero", side="both", weight=1.0), activations, columns)
    assert both.item() == pytest.approx(QUERY.abs().sum().item() ** -2 + DOCUMENT.abs().sum().item() ** -2, rel=1e-5)
    by_place = penalty(Regularizer(name="flops", weight=1.0, by_place=True), activations, columns)
    first, second = (DOCUMENT[[0, 2]].abs().mean(0) ** 2).sum(), ((DOCUMENT[1].abs() / 2) ** 2).sum()
    assert by_place.item() == pytest.approx(float(first + second), rel=1e-5)


def test_active_terms_are_counted() -> None:
    vectors = torch.tensor([[0.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.5, 0.0]])
    found = Outputs(torch.zeros(2, 1), None, torch.zeros(3, 4), vectors)
    assert active_terms("document", found) == (1.5, 4)
    assert active_terms("query", found) == (0.0, 4)


def test_in_batch_positives_by_hand() -> None:
    """Document 2, which query 1 brings, is a positive of query 0 as well: never its negative."""
    rows = np.array([[0, 1, 2], [2, 3, -1]], np.int32)
    positive = np.array([[True, False, True], [True, False, False]])
    hits = Hits(rows, np.where(rows >= 0, 0, -np.inf).astype(np.float32))
    trainset = TrainSet(Tokens.pack([[1], [1]]), hits=hits, positive=positive)
    stage = Stage(steps=9, batch_size=2, candidates=2, sampling="top", terms=(IN_BATCH,))
    drawn = next(
        found
        for step in range(50)
        if (found := draw(trainset, stage, (0, 0), step)).rows.tolist() == [0, 1, 2, 3]
        and found.queries.tolist() == [0, 1]
        and 2 not in rows[0][found.places[0]]
    )
    queries = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]]).log()
    documents = torch.eye(4)
    own = torch.einsum("bd,bcd->bc", queries, documents[torch.from_numpy(drawn.columns)])
    outputs = Outputs(own, queries @ documents.T, queries, documents)
    got = value_of(IN_BATCH, outputs, drawn, trainset)
    assert got.item() == pytest.approx((-math.log((1 + 3) / 10) - math.log(2 / 10)) / 2)
    own_list = value_of(Term(loss="info_nce"), outputs, drawn, trainset)
    assert own_list.item() == pytest.approx((-math.log(1 / 3) - math.log(2 / 3)) / 2)


def test_teacher_scores_are_normalised_over_the_whole_list() -> None:
    """Not over the drawn candidates: the target of a pair does not depend on who was drawn beside it."""
    rows = np.arange(4, dtype=np.int32)[None]
    hits = Hits(rows, np.zeros((1, 4), np.float32))
    scores = np.array([[[10.0, 4.0, 6.0, 0.0]], [[1.0, 3.0, 2.0, np.nan]]], np.float32)
    trainset = TrainSet(Tokens.pack([[1]]), hits=hits, teachers=["a", "b"], scores=scores, positive=rows == 0)
    stage = Stage(steps=9, batch_size=1, candidates=2, sampling="top", terms=(MARGIN,))
    drawn = draw(trainset, stage, (0, 0), 0)
    assert drawn.places.tolist() == [[0, 1]]
    term = Term(loss="margin_mse", teachers=("b", "a"), shares=(1.0, 3.0), normalize="minmax", scale=10.0)
    got = value_of(term, Outputs(torch.zeros(1, 2)), drawn, trainset)
    # b: 0 and 1; a: 1 and 0.4; shares 1 to 3 of 10
    assert got.item() == pytest.approx((10 * (0.75 * 1 - (0.25 * 1 + 0.75 * 0.4))) ** 2, rel=1e-4)
