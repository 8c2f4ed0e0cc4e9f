"""The terms of a stage's loss: which grids are compared, against what, with which loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrieval_kd.losses import Loss, find_loss
from retrieval_kd.recipe import Stage, Term
from retrieval_kd.students import Outputs
from retrieval_kd.targets import fuse
from retrieval_kd.train.batches import Draw
from retrieval_kd.trainset import TrainSet
from retrieval_kd.types import InputError


@dataclass(frozen=True)
class Needs:
    """What a stage's terms read besides the queries."""

    candidates: bool  # some term compares scores
    labels: bool  # some term learns from judgements
    query_vectors: frozenset[str]  # teachers whose query vectors are targets
    document_vectors: frozenset[str]

    @property
    def documents(self) -> bool:
        """Whether documents take part at all."""
        return self.candidates or bool(self.document_vectors)


def needs(stages: Sequence[Stage]) -> Needs:
    """What the stages need together; InputError for terms that cannot work."""
    candidates = labels = False
    queries: set[str] = set()
    documents: set[str] = set()
    for number, stage in enumerate(stages):
        for place, term in enumerate(stage.terms):
            where = f"stages[{number}].terms[{place}]"
            loss = find_loss(term.loss)
            _check(term, loss, where)
            candidates |= loss.of == "scores"
            labels |= "positive" in loss.needs
            if loss.of == "vectors":
                (queries if term.side == "query" else documents).update(term.teachers)
    return Needs(candidates, labels, frozenset(queries), frozenset(documents))


def _check(term: Term, loss: Loss, where: str) -> None:
    scored = loss.of == "scores" and "teacher" in loss.needs
    if "preference" in loss.needs:
        raise InputError(f"{where}: {term.loss} learns from preferences between two documents, which are not stored.")
    if scored and not term.teachers:
        raise InputError(f"{where}: {term.loss} compares with teachers; name them in `teachers`.")
    if "teacher" not in loss.needs and term.teachers:
        raise InputError(f"{where}: {term.loss} learns from labels alone; it takes no `teachers`.")
    if loss.of == "vectors" and len(term.teachers) != 1:
        raise InputError(f"{where}: {term.loss} imitates the vectors of exactly one teacher, not {len(term.teachers)}.")
    if term.relation == "batch" and "teacher" in loss.needs:
        raise InputError(
            f"{where}: {term.loss} with relation 'batch' would need teacher scores for other queries' candidates, "
            "which are not stored; use relation 'own'."
        )
    if term.temperature != 1.0 and "temperature" not in loss.options:
        raise InputError(f"{where}: {term.loss} has no temperature; use `scale` to stretch its target.")
    if term.teacher_temperature is not None and "teacher_temperature" not in loss.options:
        raise InputError(f"{where}: {term.loss} has no teacher_temperature.")
    if (term.normalize != "none" or term.scale != 1.0) and not scored:
        raise InputError(f"{where}: `normalize` and `scale` change teacher scores; {term.loss} reads none.")
    if len(term.teachers) > 1 and term.normalize == "none" and scored:
        raise InputError(
            f"{where}: scores of {len(term.teachers)} teachers are averaged as they are, though their scales "
            "differ; set normalize = 'minmax' or 'zscore'."
        )


def loss_of(term: Term, outputs: Outputs, drawn: Draw, trainset: TrainSet) -> Tensor:
    """The unweighted value of one term for one batch."""
    loss = find_loss(term.loss)
    given: dict[str, Any] = {
        option: getattr(term, option)
        for option in ("temperature", "teacher_temperature")
        if option in loss.options and option in term.model_fields_set
    }
    if loss.of == "vectors":
        student = outputs.queries if term.side == "query" else outputs.documents
        known = trainset.query_vectors if term.side == "query" else trainset.document_vectors
        places = drawn.queries if term.side == "query" else drawn.rows
        if student is None:
            raise InputError(f"{term.loss} needs a student that makes vectors; this one scores pairs.")
        return loss.function(student, _tensor(known[term.teachers[0]][places], student), **given)
    if term.relation == "batch":
        scores, positive, valid = _in_batch(outputs, drawn, trainset)
        return loss.function(scores, positive=positive, valid=valid, **given)
    valid = torch.from_numpy(drawn.columns >= 0).to(outputs.scores.device)
    if "positive" in loss.needs:
        given["positive"] = _positive(drawn, trainset).to(valid.device)
    if "teacher" in loss.needs:
        teachers = [list(trainset.teachers).index(name) for name in term.teachers]
        assert trainset.scores is not None
        lists = np.stack([trainset.scores[teacher, drawn.queries] for teacher in teachers])  # (T, B, K)
        target = np.take_along_axis(fuse(lists, term.normalize, term.shares, term.scale), drawn.places, axis=1)
        valid = valid & torch.from_numpy(np.isfinite(target)).to(valid.device)
        given["teacher"] = _tensor(target, outputs.scores)
    return loss.function(outputs.scores, valid=valid, **given)


def _positive(drawn: Draw, trainset: TrainSet) -> Tensor:
    """(B, C), True where the candidate exists and is judged relevant."""
    assert trainset.positive is not None
    marked = np.take_along_axis(trainset.positive[drawn.queries], drawn.places, axis=1)
    return torch.from_numpy(marked & (drawn.columns >= 0))


def _in_batch(outputs: Outputs, drawn: Draw, trainset: TrainSet) -> tuple[Tensor, Tensor, Tensor]:
    """Every query against every document of the batch: scores, positives and valid places, each (B, U).

    All of a query's judged positives count as such, whichever query brought them: none is its negative.
    """
    if outputs.queries is None or outputs.documents is None:
        raise InputError("relation 'batch' needs a student that encodes queries and documents apart.")
    assert trainset.hits is not None
    assert trainset.positive is not None
    scores = outputs.queries @ outputs.documents.T
    positive = [
        np.isin(drawn.rows, rows[marked])
        for rows, marked in zip(trainset.hits.rows[drawn.queries], trainset.positive[drawn.queries], strict=True)
    ]
    grid = torch.from_numpy(np.stack(positive)).to(scores.device)
    return scores, grid, torch.ones_like(grid)


def _tensor(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.array(array, np.float32)).to(like.device)
