"""Losses of the same name in sentence-transformers, for cross-encoders, on lists of different lengths."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sentence_transformers.cross_encoder import losses as peers
from torch import Tensor, nn

from retrieval_kd.losses.choice import listnet
from retrieval_kd.losses.orders import listmle, p_listmle
from retrieval_kd.losses.pairs import lambda_rank, ranknet

GENERATOR = torch.Generator().manual_seed(0)
STUDENT = torch.randn(4, 6, generator=GENERATOR) * 2
TEACHER = torch.stack([torch.randperm(6, generator=GENERATOR) for _ in range(4)]).float()  # grades, one of them 0
LENGTHS = [6, 6, 4, 2]
VALID = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
TEACHER[2], TEACHER[3] = torch.tensor([2.0, 0, 3, 1, 9, 9]), torch.tensor([0.0, 1, 9, 9, 9, 9])


class Model(nn.Module):
    """A cross-encoder whose texts are row and column of its scores."""

    num_labels = 1
    device = torch.device("cpu")

    def preprocess(self, pairs: list[tuple[str, str]], **_: Any) -> dict[str, Tensor]:
        return {"places": torch.tensor([[int(row), int(column)] for row, column in pairs])}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"scores": STUDENT[features["places"][:, 0], features["places"][:, 1]]}


def theirs(loss: type[nn.Module], **options: Any) -> float:
    texts = [[str(row) for row in range(4)], [[str(column) for column in range(length)] for length in LENGTHS]]
    labels = [row[:length] for row, length in zip(TEACHER, LENGTHS, strict=True)]
    return loss(Model(), mini_batch_size=-1, **options)(texts, labels).item()


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (lambda: lambda_rank(STUDENT, TEACHER, VALID), lambda: theirs(peers.LambdaLoss)),
        (
            lambda: lambda_rank(STUDENT, TEACHER, VALID, scheme="ndcg2", k=2),
            lambda: theirs(peers.LambdaLoss, weighting_scheme=peers.NDCGLoss2Scheme(), k=2),
        ),
        (
            lambda: lambda_rank(STUDENT, TEACHER, VALID, scheme="lambda", k=3),
            lambda: theirs(peers.LambdaLoss, weighting_scheme=peers.LambdaRankScheme(), k=3),
        ),
        (lambda: ranknet(STUDENT, TEACHER, VALID) / math.log(2), lambda: theirs(peers.RankNetLoss)),  # log2 there
        (lambda: listnet(STUDENT, TEACHER, VALID), lambda: theirs(peers.ListNetLoss)),
        (lambda: listmle(STUDENT, TEACHER, VALID), lambda: theirs(peers.ListMLELoss, respect_input_order=False)),
        (lambda: p_listmle(STUDENT, TEACHER, VALID), lambda: theirs(peers.PListMLELoss, respect_input_order=False)),
    ],
    ids=["ndcg2++", "ndcg2@2", "lambda@3", "ranknet", "listnet", "listmle", "p_listmle"],
)
def test_agrees_with_sentence_transformers(ours: Callable[[], Tensor], expected: Callable[[], float]) -> None:
    assert ours().item() == pytest.approx(expected(), rel=1e-5)
