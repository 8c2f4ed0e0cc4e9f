"""The terms of a stage's loss: which grids are compared, against what, with which loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrieval_kd import relations
from retrieval_kd.losses import find_loss
from retrieval_kd.losses.labels import info_nce
from retrieval_kd.losses.layers import layer_weights
from retrieval_kd.regularizers import find_regularizer
from retrieval_kd.relations import Grid
from retrieval_kd.stages import LayerPairs, Regularizer, Soften, Term
from retrieval_kd.students import Outputs
from retrieval_kd.targets import fuse, interpolate, soften_power, soften_top, soften_uniform, softmax
from retrieval_kd.train.batches import Draw
from retrieval_kd.train.controllers import TermState
from retrieval_kd.train.selection import selection_features
from retrieval_kd.trainset import TrainSet
from retrieval_kd.types import InputError

SAME_SPACE = {"embedding_mse", "embedding_cosine"}  # losses whose vectors have the same coordinates
FAR = 1e4  # below a list's best score: probability 0


@dataclass(frozen=True)
class Step:
    """One step as its terms see it: what was drawn, and what each model made of it.

    `views` holds the student's outputs, those of live teachers, and those of the `snapshot`.
    """

    drawn: Draw
    trainset: TrainSet
    views: Mapping[str, Outputs]
    seed: tuple[int, ...]  # run, stage, step
    width: int | None = None  # Matryoshka: how many coordinates the student's vectors were cut to


def loss_of(term: Term, step: Step, state: TermState) -> Tensor:
    """The unweighted value of one term for one batch."""
    if term.layers is None:
        return _compare(term, step, state)
    teacher = term.teachers[0]
    learner, judge = step.views[term.of].layers, step.views[teacher].layers
    values, errors = [], []
    for below, above in _layer_pairs(term.layers, len(learner), len(judge), step.seed):
        views = {**step.views, term.of: learner[below], teacher: judge[above]}
        layer = replace(step, views=views)
        values.append(_compare(term, layer, state))
        grid = _grid(term, views[teacher], layer, state)
        errors.append(info_nce(grid.values.detach(), grid.positive, grid.valid))
    weights = layer_weights(torch.stack(errors), term.layers.temperature)
    return (weights * torch.stack(values)).sum()


def _compare(term: Term, step: Step, state: TermState) -> Tensor:
    loss = find_loss(term.loss)
    given = {"temperature": term.temperature, "teacher_temperature": term.teacher_temperature}
    options = {name: value for name, value in given.items() if value is not None} | term.options
    learner = step.views[term.of]
    if loss.of == "vectors":
        student = _vectors_of(learner, term.side, term)
        teacher = _target_vectors(term, step, student)
        return loss.function(student, teacher, **options)
    grid = _grid(term, learner, step, state)
    if term.guide is not None:
        guide = _judged(term.guide.teacher, term, grid, step, state)
        grid = relations.deny(grid, guide, term.guide.below_positive, term.guide.relative, term.guide.max_score)
    inputs: dict[str, Tensor] = {"student": grid.values, "valid": grid.valid}
    if "teacher" in loss.needs:
        target = _target(term, grid, step, state)
        inputs |= {"teacher": target, "valid": grid.valid & target.isfinite()}
        if term.row_weights != "none":
            inputs["row_weights"] = _row_weights(term, inputs)
    if "positive" in loss.needs:
        inputs["positive"] = grid.positive
    if "preference" in loss.needs:
        inputs["preference"] = _preferences(step.drawn, step.trainset).to(grid.values.device)
    return loss.function(**inputs, **options)


def _grid(term: Term, outputs: Outputs, step: Step, state: TermState) -> Grid:
    """One model's grid in the term's relation."""
    drawn, trainset = step.drawn, step.trainset
    columns = torch.from_numpy(drawn.columns)
    if term.relation == "own":
        return relations.own(outputs.scores, columns, _own_positives(drawn, trainset))
    if term.relation == "batch":
        if outputs.grid is None:
            raise InputError("relation 'batch' needs a student that encodes queries and documents apart.")
        return relations.batch(outputs.grid, columns, _batch_positives(drawn, trainset), term.others_only)
    vectors, texts = _vectors_of(outputs, term.side, term), _texts(drawn, term.side).to(outputs.scores.device)
    if term.relation == "gram":
        return relations.gram(vectors, texts)
    assert state.queue is not None
    teacher = _target_vectors(term, step, vectors)
    queue = state.queue.read(teacher)
    state.queue.push(teacher, texts)
    return relations.cross(vectors, teacher, texts, *queue)


def _target(term: Term, grid: Grid, step: Step, state: TermState) -> Tensor:
    """The teachers' target (R, C), NaN where there is none."""
    if not term.detach:  # one live teacher, as it is: the loss trains it too
        return term.scale * _grid(term, step.views[term.teachers[0]], step, state).values
    lists, places = _judgements(term, grid, step, state)  # (T, R, K)
    chosen = _select(term, lists, grid, step, state) if state.selection is not None else None
    target = fuse(lists, term.normalize, term.shares, term.scale, chosen)
    if places is not None:
        target = np.take_along_axis(target, places, axis=1)
    if term.soften is not None:
        target = _soften(target, term.soften)
    values = _tensor(target, grid.values)
    return values if state.taid is None else interpolate(grid.values.detach(), values, state.taid.tau)


def _soften(scores: NDArray[np.float32], how: Soften) -> NDArray[np.float32]:
    """Scores whose softmax is the softened softmax of `scores`; NaN where they are."""
    known = np.isfinite(scores)
    chance = np.where(known, softmax(scores), np.nan)
    if how.power is not None:
        chance = soften_power(chance, how.power)
    if how.uniform_mix is not None:
        chance = soften_uniform(chance, how.uniform_mix)
    if how.top is not None:
        chance = soften_top(chance, how.top)
    return np.where(known, np.log(np.maximum(chance, 1e-30)), np.nan).astype(np.float32)


def _judgements(
    term: Term, grid: Grid, step: Step, state: TermState
) -> tuple[NDArray[np.float32], NDArray[np.int64] | None]:
    """The teachers' scores (T, R, K), and the places (R, C) of the grid's columns in them if they are wider.

    Stored lists are kept whole, so that a target does not depend on who was drawn beside it.
    """
    drawn, trainset = step.drawn, step.trainset
    if term.relation == "own" and not set(term.teachers) & set(step.views):
        assert trainset.scores is not None
        numbers = [list(trainset.teachers).index(name) for name in term.teachers]
        lists = np.stack([trainset.scores[number, drawn.queries] for number in numbers])
        exists = trainset.hits.rows[drawn.queries] >= 0 if trainset.hits is not None else np.isfinite(lists[0])
        positive = np.zeros(exists.shape, bool) if trainset.positive is None else trainset.positive[drawn.queries]
        return _fill(lists, exists, positive, term.missing), drawn.places
    lists = np.stack([_judged(name, term, grid, step, state).detach().cpu().numpy() for name in term.teachers])
    valid, positive = grid.valid.cpu().numpy(), grid.positive.cpu().numpy()
    lists = np.where(valid, lists, np.nan).astype(np.float32)
    return _fill(lists, valid, positive, term.missing), None


def _judged(name: str, term: Term, grid: Grid, step: Step, state: TermState) -> Tensor:
    """One teacher's scores in the grid's places (R, C), NaN where it has none."""
    drawn, trainset = step.drawn, step.trainset
    if name in step.views:
        return _grid(term, step.views[name], step, state).values
    if term.relation == "gram":
        vectors = _stored_vectors(name, term.side, step)
        return _tensor(vectors @ vectors.T, grid.values)
    if term.relation == "batch" and name in trainset.query_vectors and name in trainset.document_vectors:
        return _tensor(_stored_vectors(name, "query", step) @ _stored_vectors(name, "document", step).T, grid.values)
    assert trainset.scores is not None
    scores = trainset.scores[list(trainset.teachers).index(name), drawn.queries]  # (B, K)
    own = np.take_along_axis(scores, drawn.places, axis=1)
    if term.relation == "own":
        return _tensor(own, grid.values)
    assert trainset.hits is not None
    full = np.full(grid.values.shape, np.nan, np.float32)
    for row, rows in enumerate(trainset.hits.rows[drawn.queries]):  # all that is stored, not only what was drawn
        at = np.searchsorted(drawn.rows, rows)
        hit = (at < len(drawn.rows)) & (rows >= 0)
        hit[hit] = drawn.rows[at[hit]] == rows[hit]
        full[row, at[hit]] = scores[row, hit]
    return _tensor(full, grid.values)


def _fill(
    lists: NDArray[np.float32], exists: NDArray[np.bool_], positive: NDArray[np.bool_], missing: str | None
) -> NDArray[np.float32]:
    """Lists (T, R, K) with what `missing` says in the existing places without a score."""
    if missing in (None, "drop"):
        return lists
    unknown = exists & ~np.isfinite(lists)
    best = np.where(np.isfinite(lists), lists, -np.inf).max(-1, keepdims=True)
    best = np.where(np.isfinite(best), best, np.nan)
    if missing == "list_maximum":
        return np.where(unknown & positive, best, lists).astype(np.float32)
    return np.where(unknown, best - FAR, lists).astype(np.float32)


def _select(term: Term, lists: NDArray[np.float32], grid: Grid, step: Step, state: TermState) -> NDArray[np.bool_]:
    """Which teachers count for which query (T, R); rewards the choice of the step before."""
    assert state.selection is not None
    scores = grid.values.detach()
    if (grid.positive & grid.valid).any():  # without judgements there is nothing to reward
        state.selection.feedback(-float(info_nce(scores, grid.positive, grid.valid)))
    drawn = step.drawn
    if lists.shape[-1] != scores.shape[1]:
        lists = np.take_along_axis(lists, np.broadcast_to(drawn.places, (len(lists), *drawn.places.shape)), axis=2)
    features = selection_features(lists, scores.cpu().numpy(), grid.valid.cpu().numpy(), grid.positive.cpu().numpy())
    return state.selection.choose(features, np.random.default_rng([*step.seed, 3]))


def _row_weights(term: Term, inputs: Mapping[str, Tensor]) -> Tensor:
    """Weights (R,): how sure the teacher is of a list, or how unsure the student, as entropy over log length."""
    sure = term.row_weights == "teacher_confidence"
    scores = inputs["teacher" if sure else "student"].detach()
    temperature = (term.teacher_temperature if sure else None) or term.temperature or 1.0
    valid = inputs["valid"]
    log_chance = torch.log_softmax(torch.where(valid, scores / temperature, -torch.inf), 1)
    terms = torch.where(valid, log_chance.exp() * log_chance, 0.0)
    doubt = -terms.sum(1) / valid.sum(1).clamp(min=2).log()
    return (1 - doubt if sure else doubt).nan_to_num().clamp(min=0)


def _layer_pairs(layers: LayerPairs, below: int, above: int, seed: tuple[int, ...]) -> Sequence[tuple[int, int]]:
    """Pairs (student layer, teacher layer), in order on both sides, the same ones for `every` steps."""
    rng = np.random.default_rng([*seed[:-1], 2, seed[-1] // layers.every])
    count = min(layers.count, below, above)
    left, right = (np.sort(rng.choice(size, count, replace=False)).tolist() for size in (below, above))
    return list(zip(left, right, strict=True))


def _own_positives(drawn: Draw, trainset: TrainSet) -> Tensor:
    """(B, C), True where the candidate exists and is judged relevant."""
    if trainset.positive is None:
        return torch.zeros(drawn.columns.shape, dtype=torch.bool)
    marked = np.take_along_axis(trainset.positive[drawn.queries], drawn.places, axis=1)
    return torch.from_numpy(marked & (drawn.columns >= 0))


def _batch_positives(drawn: Draw, trainset: TrainSet) -> Tensor:
    """(B, U), True where the document is one of the query's judged positives, whichever query brought it."""
    if trainset.hits is None or trainset.positive is None:
        return torch.zeros(len(drawn.queries), len(drawn.rows), dtype=torch.bool)
    lists = zip(trainset.hits.rows[drawn.queries], trainset.positive[drawn.queries], strict=True)
    return torch.from_numpy(np.stack([np.isin(drawn.rows, rows[marked]) for rows, marked in lists]))


def _preferences(drawn: Draw, trainset: TrainSet) -> Tensor:
    """(B, C, C), the probability that the first candidate beats the second; NaN where nobody was asked."""
    assert trainset.preferences is not None
    assert trainset.preference_pairs is not None
    grid = np.full((*drawn.places.shape, drawn.places.shape[1]), np.nan, np.float32)
    for row, (query, places) in enumerate(zip(drawn.queries, drawn.places, strict=True)):
        column_of = {place: column for column, place in enumerate(places.tolist())}
        for (first, second), chance in zip(
            trainset.preference_pairs[query].tolist(), trainset.preferences[query].tolist(), strict=True
        ):
            if chance == chance and first in column_of and second in column_of:  # not NaN
                grid[row, column_of[first], column_of[second]] = chance
    return torch.from_numpy(grid)


def _vectors_of(outputs: Outputs, side: str, term: Term) -> Tensor:
    vectors = outputs.queries if side == "query" else outputs.documents
    if vectors is None:
        raise InputError(f"{term.loss} needs a student that makes vectors; this one scores pairs.")
    return vectors


def _target_vectors(term: Term, step: Step, like: Tensor) -> Tensor:
    """The vectors (n, D) of the term's one teacher, cut to the student's Matryoshka width and made unit again."""
    name = term.teachers[0]
    if name in step.views:
        teacher = _vectors_of(step.views[name], term.side, term).detach()
    else:
        teacher = _tensor(_stored_vectors(name, term.side, step), like)
    if step.width is not None:
        return cut(teacher, step.width)
    if teacher.shape[1] != like.shape[1] and (term.relation == "cross" or term.loss in SAME_SPACE):
        raise InputError(
            f"the student's vectors have {like.shape[1]} coordinates, those of teacher {name!r} {teacher.shape[1]}; "
            f"set student.project = {teacher.shape[1]}, or imitate relations (relation = 'gram')."
        )
    return teacher


def cut(vectors: Tensor, width: int) -> Tensor:
    """The first `width` coordinates, of unit length again where the vectors had it (Matryoshka, arXiv:2205.13147)."""
    unit = len(vectors) > 0 and bool((vectors.detach().norm(dim=1) - 1).abs().max() < 1e-3)
    short = vectors[:, :width]
    return torch.nn.functional.normalize(short, dim=1) if unit else short


def penalty(regularizer: Regularizer, outputs: Outputs, columns: Tensor) -> Tensor:
    """The unweighted value of one regularizer for one batch; of both sides, the sum, or what it makes of the two.

    Shapes: columns (B, C), the candidates' places among the documents, -1 where there is none.
    """
    function = find_regularizer(regularizer.name)
    vectors = _penalised(regularizer.side, outputs)
    if regularizer.name == "anti_zero":
        return function(*vectors, **regularizer.options)
    if regularizer.by_place:
        columns = columns.to(vectors[0].device)
        empty = vectors[0].new_zeros(1, vectors[0].shape[1])  # where -1 leads
        listed = torch.cat([vectors[0], empty])[columns.flatten()]  # (B * C, V)
        return function(listed, groups=columns.shape[1], **regularizer.options)
    return torch.stack([function(one, **regularizer.options) for one in vectors]).sum()


def active_terms(side: str, outputs: Outputs) -> tuple[float, int]:
    """How many terms of a text are not 0, on average over the batch's one text or more, and how many there are."""
    (vectors,) = _penalised(side, outputs)
    return float((vectors.detach() != 0).sum() / len(vectors)), vectors.shape[1]


def _penalised(side: str, outputs: Outputs) -> list[Tensor]:
    sides = {"query": [outputs.queries], "document": [outputs.documents]}
    return [one for one in sides.get(side, [outputs.queries, outputs.documents]) if one is not None]


def _stored_vectors(name: str, side: str, step: Step) -> NDArray[np.float32]:
    known = step.trainset.query_vectors if side == "query" else step.trainset.document_vectors
    return np.asarray(known[name][step.drawn.queries if side == "query" else step.drawn.rows])


def _texts(drawn: Draw, side: str) -> Tensor:
    return torch.from_numpy(np.asarray(drawn.queries if side == "query" else drawn.rows, np.int64))


def _tensor(array: NDArray[Any], like: Tensor) -> Tensor:
    return torch.from_numpy(np.array(array, np.float32)).to(like.device)
