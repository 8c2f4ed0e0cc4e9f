"""A train set, terms and stages for a tiny student, which the tests of training share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tiny import WORDS
from torch import nn

from retrieval_kd.stages import Stage, Term, Training
from retrieval_kd.students import Outputs
from retrieval_kd.train.batches import Draw
from retrieval_kd.train.controllers import TermState
from retrieval_kd.train.loop import train
from retrieval_kd.train.terms import Step, loss_of
from retrieval_kd.trainset import Tokens, TrainSet
from retrieval_kd.types import Hits

QUERIES, DOCUMENTS, WIDTH = 10, 24, 6


def texts(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(2, 9))) for _ in range(count)]


def make_trainset(student: nn.Module) -> TrainSet:
    """Two teachers whose scores hold NaN, one positive a query, and vectors of 16 numbers."""
    rng = np.random.default_rng(0)
    rows = np.stack([rng.choice(DOCUMENTS, WIDTH, replace=False) for _ in range(QUERIES)]).astype(np.int32)
    rows[3, 4:] = -1
    scores = rng.normal(0, 3, (2, QUERIES, WIDTH)).astype(np.float32)
    scores[0, 5, 2] = np.nan
    scores[:, rows < 0] = -np.inf
    positive = np.zeros(rows.shape, bool)
    positive[:, 1] = True
    return TrainSet(
        query_tokens=Tokens.pack(student.tokenize(texts(QUERIES, 1), "query")),
        document_tokens=Tokens.pack(student.tokenize(texts(DOCUMENTS, 2), "document")),
        hits=Hits(rows, np.where(rows >= 0, 0, -np.inf).astype(np.float32)),
        teachers=["a", "b"],
        scores=scores,
        positive=positive,
        query_vectors={"a": rng.normal(size=(QUERIES, 16)).astype(np.float32)},
        document_vectors={"a": rng.normal(size=(DOCUMENTS, 16)).astype(np.float32)},
        preference_pairs=rng.integers(0, WIDTH, (QUERIES, 9, 2)).astype(np.int32),
        preferences=rng.random((QUERIES, 9)).astype(np.float32),
    )


def stage_of(*terms: Term, **settings: object) -> Stage:
    known = {"steps": 40, "batch_size": QUERIES, "candidates": WIDTH, "learning_rate": 3e-3, "schedule": "constant"}
    return Stage(terms=terms, **{**known, **settings})


MARGIN = Term(loss="margin_mse", teachers=("a",))
FUSED = Term(loss="kl", teachers=("a", "b"), normalize="minmax", scale=5.0)
IN_BATCH = Term(loss="info_nce", relation="batch")
IMITATE = Term(loss="embedding_mse", teachers=("a",))
SETTINGS = Training(seed=4, checkpoint_steps=100, micro_batch_tokens=64)


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def value_of(term: Term, outputs: Outputs, drawn: Draw, trainset: TrainSet) -> torch.Tensor:
    return loss_of(term, Step(drawn, trainset, {"student": outputs}, (0, 0, 0)), TermState(term))


RESUMED = Training(seed=4, checkpoint_steps=2, micro_batch_tokens=64)


def train_stages(
    student: nn.Module, stages: Sequence[Stage], settings: Training, folder: Path, key: str
) -> list[dict[str, float]]:
    """One stage after the other, each with checkpoints of its own; a stage that is done is taken from its last one."""
    log, trainset = [], make_trainset(student)
    for number, stage in enumerate(stages):
        log += train(student, trainset, stage, settings, folder / str(number), key, number=number)
    return log
