"""A trained pair_head student as a teacher: its own scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import collection_of, tiny_sentence_transformer

from retrieval_kd.students import Batch, load_student
from retrieval_kd.tables import Component
from retrieval_kd.teachers import load_teacher, pair_head
from retrieval_kd.types import InputError

QUERIES = ["sort a list", "read", "open the file"]
DOCUMENTS = ["read a file line by line and close it", "set", "a map, a key: a value", "path " * 30]


@pytest.mark.parametrize(
    "options",
    [{}, {"pooling": "pma", "features": "concat", "query_prompt": "find: ", "max_length": 9}, {"top_layers": 2}],
    ids=str,
)
def test_scores_are_the_students(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_sentence_transformer(tmp_path / "t").save(str(tmp_path / "model"))
    component = Component(kind="pair_head", model=str(tmp_path / "model"), hidden=[8], **options)
    student: Any = load_student(component, 0).eval()
    tokens = [
        [np.array(ids, np.int32) for ids in student.tokenize(texts, side)]
        for texts, side in ((QUERIES, "query"), (DOCUMENTS, "document"))
    ]
    with torch.no_grad():
        grid = student(Batch(*tokens, torch.arange(4).repeat(3, 1))).grid.numpy()
    (tmp_path / "saved").mkdir()
    student.save(tmp_path / "saved")
    monkeypatch.setattr(pair_head, "CHUNK", 5)
    teacher = load_teacher(Component(kind="pair_head", model=str(tmp_path / "saved"), batch_size=2), collection_of([]))
    queries = teacher.render([query for query in QUERIES for _ in DOCUMENTS], "query")
    documents = teacher.render(DOCUMENTS * len(QUERIES), "document")
    np.testing.assert_allclose(teacher.score(queries, documents).reshape(3, 4), grid, atol=1e-5)


def test_a_model_without_a_head(tmp_path: Path) -> None:
    tiny_sentence_transformer(tmp_path / "t").save(str(tmp_path / "model"))
    with pytest.raises(InputError, match=r"has no pair_head\.json"):
        load_teacher(Component(kind="pair_head", model=str(tmp_path / "model")), collection_of([]))
