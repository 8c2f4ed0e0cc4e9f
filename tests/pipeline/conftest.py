"""A tiny whole run, made once for all that look at it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_classifier, tiny_sentence_transformer
from toy import draw_texts, write_beir
from whole_run import RECIPE, RERANKER, workspace

from retrieval_kd import pipeline


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BEIR collection (20 documents, 8 queries), two models, and recipes."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_sentence_transformer(folder / "transformer").save(str(folder / "model"))
    tiny_classifier(folder / "classifier", width=16)
    train, test = ({n: {n: 2, n + 9: 1} for n in numbers} for numbers in (range(5), range(4, 8)))
    data = write_beir(folder / "toy", *draw_texts(), {"train": train, "test": test})
    names = {"data": data, "model": folder / "model", "classifier": folder / "classifier"}
    (folder / "tiny.toml").write_text(RECIPE.format(**names))
    (folder / "reranker.toml").write_text(RERANKER.format(**names))
    return folder


@pytest.fixture(scope="session")
def report(place: Path) -> dict[str, object]:
    return pipeline.run(workspace(place))
