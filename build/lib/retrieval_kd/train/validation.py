"""Quality during training: the student re-ranks the candidates of a validation split."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from retrieval_kd.evaluate.quality import per_query
from retrieval_kd.scoring import rerank
from retrieval_kd.tables import Precision
from retrieval_kd.towers import autocast
from retrieval_kd.train.batches import Draw
from retrieval_kd.train.loop import make_batch
from retrieval_kd.trainset import TrainSet
from retrieval_kd.types import Queries

QUERIES = 16  # at once


def make_validation(
    trainset: TrainSet, queries: Queries, document_ids: Sequence[str], precision: Precision
) -> Callable[[nn.Module], float]:
    """A function from a student to its nDCG@10 on the candidates (`trainset.hits`) of `queries`."""
    hits = trainset.hits
    assert hits is not None

    def validate(student: nn.Module) -> float:
        scores = np.full(hits.rows.shape, -np.inf, np.float32)
        device = next(student.parameters()).device.type
        with torch.inference_mode(), autocast(precision, device):
            for start in range(0, len(hits), QUERIES):
                rows = np.asarray(hits.rows[start : start + QUERIES], np.int64)
                distinct = np.unique(rows[rows >= 0])
                columns = np.where(rows >= 0, np.searchsorted(distinct, rows), -1)
                numbers = np.arange(start, start + len(rows))
                drawn = Draw(numbers, distinct, columns, np.broadcast_to(np.arange(rows.shape[1]), rows.shape))
                outputs = student(make_batch(student, drawn, trainset))
                scores[start : start + len(rows)] = outputs.scores.float().cpu().numpy()
        return float(per_query(rerank(hits, scores), queries, document_ids, ["nDCG@10"])["nDCG@10"].mean())

    return validate
