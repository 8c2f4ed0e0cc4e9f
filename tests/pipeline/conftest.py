"""A tiny whole run, made once for all that look at it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import WORDS, tiny_sentence_transformer
from transformers import BertConfig, BertForSequenceClassification
from whole_run import RECIPE, RERANKER, workspace

from retrieval_kd import pipeline


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BEIR collection (20 documents, 8 queries), two models, and recipes."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_sentence_transformer(folder / "transformer").save(str(folder / "model"))
    tower = tiny_sentence_transformer(folder / "classifier", width=16)
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig.from_pretrained(folder / "classifier", num_labels=1)).save_pretrained(
        folder / "classifier"
    )
    tower.tokenizer.save_pretrained(folder / "classifier")
    rng = np.random.default_rng(1)
    data = folder / "toy"
    (data / "qrels").mkdir(parents=True)
    documents = [" ".join(rng.choice(WORDS[7:], 9, replace=False)) for _ in range(20)]
    queries = [" ".join(rng.choice(documents[number].split(), 3, replace=False)) for number in range(8)]
    lines = [json.dumps({"_id": f"d{n}", "title": "", "text": text}) for n, text in enumerate(documents)]
    (data / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    lines = [json.dumps({"_id": f"q{n}", "text": text}) for n, text in enumerate(queries)]
    (data / "queries.jsonl").write_text("\n".join(lines) + "\n")
    for split, numbers in (("train", range(5)), ("test", range(4, 8))):
        judged = [f"q{n}\td{n}\t2\nq{n}\td{n + 9}\t1" for n in numbers]
        (data / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(judged) + "\n")
    names = {"data": data, "model": folder / "model", "classifier": folder / "classifier"}
    (folder / "tiny.toml").write_text(RECIPE.format(**names))
    (folder / "reranker.toml").write_text(RERANKER.format(**names))
    return folder


@pytest.fixture(scope="session")
def report(place: Path) -> dict[str, object]:
    return pipeline.run(workspace(place))
