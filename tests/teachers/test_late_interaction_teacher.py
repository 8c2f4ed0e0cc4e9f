"""Late-interaction teachers: MaxSim of pairs, the same numbers as the student that made the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import colbert
import numpy as np
import pytest
import torch
from tiny import collection_of, tiny_sentence_transformer

from retrieval_kd.students import Batch, load_student
from retrieval_kd.tables import Component
from retrieval_kd.teachers import late_interaction, load_teacher
from retrieval_kd.types import InputError

QUERIES = ["sort a list", "read", "open (the) file!"]
DOCUMENTS = ["read a file line by line and close it.", "set", "a map, a key: a value", "path " * 30]
PAIRS = [(query, document) for query in QUERIES for document in DOCUMENTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colbert.stanford(tmp_path_factory.mktemp("models") / "colbert")


def load(folder: Path, **options: Any) -> late_interaction.LateInteraction:
    teacher = load_teacher(Component(kind="late_interaction", model=str(folder), **options), collection_of([]))
    assert isinstance(teacher, late_interaction.LateInteraction)
    return teacher


def score(teacher: late_interaction.LateInteraction) -> np.ndarray:
    queries, documents = (
        teacher.render([pair[place] for pair in PAIRS], side) for place, side in enumerate(("query", "document"))
    )
    return teacher.score(queries, documents).reshape(3, 4)


@pytest.mark.parametrize("options", [{}, {"query_length": 6, "document_length": 9}, {"batch_size": 1}], ids=str)
def test_scores_are_those_of_a_loop_and_of_the_student(options: dict[str, Any], folder: Path) -> None:
    teacher = load(folder, **options)
    found = score(teacher)
    model = teacher.model
    vectors = [
        [model.encode(text, task=side, prompt=model.prompts[side], convert_to_numpy=True) for text in texts]
        for texts, side in ((QUERIES, "query"), (DOCUMENTS, "document"))
    ]
    assert {len(matrix) for matrix in vectors[0]} == {options.get("query_length", 12)}
    assert len(vectors[1][3]) == options.get("document_length", 16)
    loop = [[sum(max(q @ d for d in right) for q in left) for right in vectors[1]] for left in vectors[0]]
    np.testing.assert_allclose(found, loop, atol=1e-5)
    reading = {key: value for key, value in options.items() if key != "batch_size"}
    student: Any = load_student(Component(kind="late_interaction", model=str(folder), **reading), 0).eval()
    tokens = [
        [np.array(ids, np.int32) for ids in student.tokenize(texts, side)]
        for texts, side in ((QUERIES, "query"), (DOCUMENTS, "document"))
    ]
    with torch.no_grad():
        grid = student(Batch(*tokens, torch.arange(4).repeat(3, 1))).grid
    np.testing.assert_allclose(found, grid, atol=1e-5)


def test_prompts_are_the_markers_of_the_checkpoint(folder: Path) -> None:
    assert load(folder).render(["x"], "query") == ["[unused0] x"]
    assert load(folder).render(["x"], "document") == ["[unused1] x"]
    assert load(folder, query_prompt="find: ").render(["x"], "query") == ["find: x"]


def test_every_text_is_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load(folder)
    encoded: list[str] = []
    encode = teacher.model.encode

    def counting(texts: list[str], **settings: Any) -> Any:
        encoded.extend(texts)
        return encode(texts, **settings)

    monkeypatch.setattr(teacher.model, "encode", counting)
    score(teacher)
    assert len(encoded) == len(QUERIES) + len(DOCUMENTS)


def test_what_was_not_trained_for_it_is_refused(tmp_path: Path) -> None:
    """Its projection would be a random one."""
    tiny_sentence_transformer(tmp_path / "t").save(str(tmp_path / "model"))
    for name in ("t", "model"):
        with pytest.raises(InputError, match="was not trained for late interaction"):
            load(tmp_path / name)


@pytest.mark.parametrize(
    ("expansion", "query_length", "expected"),
    [
        ("fixed", None, 3 * 6),  # shorter ones filled up, longer ones cut
        ("min", None, 6 + 6 + 9),
        ("min", 8, 6 + 6 + 8),
        ("min", 5, 6 + 6 + 6),  # the expansion's length before the query's
        (None, 8, 5 + 3 + 8),
    ],
)
def test_tokens_of_expanded_queries(
    expansion: str | None, query_length: int | None, expected: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries of 5, 3 and 9 tokens, [CLS] and [SEP] among them, expanded to 6; a document may be one of them."""
    teacher = load(folder, query_prompt="", document_prompt="")
    first = teacher.model[0]
    first.query_expansion = expansion and {"strategy": expansion, "length": 6, "attend": True}
    first.query_length = query_length
    queries = ["sort a list", "read", "open the file to read a line"]
    assert teacher.count_tokens(queries, []) == expected
    assert teacher.count_tokens(queries, queries) == expected + 5 + 3 + 9
    features = [first.preprocess([query], task="query") for query in queries]
    assert sum(int(one["attention_mask"].sum()) for one in features) == expected
