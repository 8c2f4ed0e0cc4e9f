"""Mined negatives as training data: what a stage of a recipe would read, written in a published layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.candidates import Candidates, provenance
from retrieval_kd.layouts import Record, find_writer
from retrieval_kd.pipeline.scores import short
from retrieval_kd.pipeline.steps import mine, score_splits
from retrieval_kd.pipeline.training import stage_trainset
from retrieval_kd.pipeline.workspace import Workspace
from retrieval_kd.stages import Stage
from retrieval_kd.tables import did_you_mean, kind_module
from retrieval_kd.train.batches import choose
from retrieval_kd.train.curate import Curated, curate, keep_places, negatives_of, take
from retrieval_kd.trainset import Tokens, TrainSet, mark_positives
from retrieval_kd.types import InputError

BLOCK = 4096  # queries that negatives are drawn for at once


def write_negatives(
    workspace: Workspace,
    layout: str,
    path: Path,
    number: int = 0,
    teacher: str | None = None,
    count: int | None = None,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """Mine, score, filter, and write what stage `number` would read: each query's positives and negatives.

    Candidates are the stage's (`mine`) or the recipe's; its `filter` and `deny` say what is left of them, and where
    `count` limits the negatives of a query, its `sampling` chooses. Scores are those of `teacher`, by default the one
    that denies, or the only one; stored pairs are not paid for again, and a document without a score is left out. Texts
    are as the student reads them. A query without a positive is an InputError, or left out and counted with
    `allow_missing`; one without a negative is left out and counted. Returns counts, and who found the negatives.
    """
    write = find_writer(layout)
    if "scores" not in getattr(kind_module("layouts", layout), "USES", ("scores",)):
        raise InputError(f"layout {layout!r} holds no scores and no labels, which is what mined negatives have.")
    stages = workspace.recipe.stages
    if not 0 <= number < len(stages):
        raise InputError(f"{workspace.path} has {len(stages)} stages, numbered from 0, and no stage {number}.")
    stage = stages[number]
    judge = _judge(workspace, stage, teacher)
    if stage.mine is None:
        if not workspace.needs.sources:
            raise InputError(
                f"stages[{number}] of {workspace.path} reads no candidates, so there are no negatives to write; add "
                "`mine`, `deny` or a term that compares scores."
            )
        mine(workspace)
        score_splits(workspace, ["train"])
        whole, ranks = _own(workspace), np.zeros(len(workspace.train_queries), np.int64)
    else:
        whole, ranks, _ = stage_trainset(workspace, number)
    curated = curate(whole, stage, ranks)
    data, known = curated.data, _known(curated.data, judge)
    assert data.positive is not None
    assert data.ranks is not None
    positives, negatives = data.positive & known, negatives_of(data) & known
    if count is not None:
        negatives = _limit(data, negatives, stage.model_copy(update={"candidates": count + 1}), workspace)
    once = curated.queries < len(workspace.train_queries) // workspace.repeats  # each query in one rendering
    led, followed = positives.any(1), negatives.any(1)
    if (missing := np.flatnonzero(once & ~led)).size and not allow_missing:
        first = workspace.train_queries.ids[curated.queries[missing[0]]]
        raise InputError(
            f"query {first!r} has no relevant document that is judged"
            f"{'' if judge is None else f' and scored by {judge}'}, so that nothing is its negative; to leave such "
            "queries out, give --allow-missing."
        )
    places = np.flatnonzero(once & led & followed)
    positives, negatives = positives[places], negatives[places]
    written = Curated(take(data, places), curated.queries[places])
    write(path, _records(workspace, written, positives, negatives, judge))
    return {
        "stage": number,
        "teacher": judge,
        "queries": len(places),
        "positives": int(positives.sum()),
        "negatives": int(negatives.sum()),
        "denied": curated.denied,
        "without_positive": len(missing),
        "without_negative": int((once & led & ~followed).sum()),
        "provenance": provenance(data.ranks[:, places], data.sources, negatives),
    }


def _judge(workspace: Workspace, stage: Stage, teacher: str | None) -> str | None:
    """Whose scores are written; None where the recipe has no teacher."""
    names = [one.name for one in workspace.recipe.teachers]
    if teacher is None and stage.deny is not None:
        return stage.deny.teacher
    if teacher is None and len(names) > 1:
        raise InputError(f"{workspace.path} has {len(names)} teachers; name the one whose scores to write: --teacher.")
    if teacher is not None and teacher not in names:
        raise InputError(f"{workspace.path} has no teacher {teacher!r}{did_you_mean(teacher, names)}.")
    return teacher or (names[0] if names else None)


def _own(workspace: Workspace) -> TrainSet:
    """The recipe's own training candidates, without the tokens that training reads."""
    found = Candidates.load(workspace.folder / "candidates/train")
    queries = workspace.train_queries
    return TrainSet(
        query_tokens=Tokens.pack([[]] * len(queries)),
        hits=found.hits,
        teachers=list(workspace.teachers),
        scores=np.load(workspace.folder / "scores/train/scores.npy", mmap_mode="r"),
        positive=mark_positives(found.hits, queries.qrels),
        sources=list(workspace.named_sources),
        ranks=found.ranks,
    )


def _known(data: TrainSet, judge: str | None) -> NDArray[np.bool_]:
    """(Q, K), True where there is a candidate, with a score of the judge if there is one."""
    assert data.hits is not None
    return data.hits.valid & (True if judge is None else np.isfinite(_scores(data, judge)))


def _scores(data: TrainSet, judge: str) -> NDArray[np.float32]:
    assert data.scores is not None
    return np.asarray(data.scores[list(data.teachers).index(judge)])


def _limit(data: TrainSet, chosen: NDArray[np.bool_], stage: Stage, workspace: Workspace) -> NDArray[np.bool_]:
    """As many of the chosen negatives (Q, K) as a training step of `stage` would draw beside one positive."""
    assert data.positive is not None
    led = np.asarray(data.positive)
    first = led & (np.cumsum(led, axis=1) == 1)
    drawn_from = keep_places(data, chosen | first)
    rng = np.random.default_rng(workspace.recipe.training.seed)
    limited = np.zeros_like(chosen)
    for start in range(0, len(chosen), BLOCK):
        queries = np.arange(start, min(start + BLOCK, len(chosen)))
        places = choose(drawn_from, stage, queries, rng)
        limited[queries[:, None], places] = True
    return limited & chosen


def _records(
    workspace: Workspace,
    curated: Curated,
    positives: NDArray[np.bool_],
    negatives: NDArray[np.bool_],
    judge: str | None,
) -> Iterator[Record]:
    """A record a query, its positives first. Shapes: positives, negatives (Q, K), of the curated queries."""
    data, queries = curated.data, workspace.train_queries
    assert data.hits is not None
    assert data.ranks is not None
    render = workspace.recipe.student.render
    texts, documents = workspace.query_texts("train", render), workspace.document_texts(render)
    ids = workspace.collection.document_ids
    scores = None if judge is None else _scores(data, judge)
    for place, query in enumerate(curated.queries.tolist()):
        listed = np.concatenate([np.flatnonzero(positives[place]), np.flatnonzero(negatives[place])])
        rows = data.hits.rows[place, listed].tolist()
        found = (data.ranks[:, place, listed] > 0).T  # (n, S)
        yield Record(
            query_id=queries.ids[query],
            query=texts[query],
            document_ids=[ids[row] for row in rows],
            documents=[documents[row] for row in rows],
            scores=None if scores is None else [short(score) for score in scores[place, listed]],
            positive=positives[place, listed].tolist(),
            found_by=[tuple(name for name, hit in zip(data.sources, who, strict=True) if hit) for who in found],
        )
