"""A tiny run: a collection of 20 documents and 8 queries, a model, and a recipe with BM25 as teacher."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tiny import WORDS, tiny_masked_lm, tiny_sentence_transformer

RECIPE = """
[data]
collection = "{data}"

[candidates]
depth = 8

[[teachers]]
name = "bm25"
kind = "bm25"

[student]
kind = "{kind}"
model = "{model}"

[[stages]]
steps = 3
batch_size = 4
candidates = 4
learning_rate = 1e-3
terms = [{{ loss = "kl", teachers = ["bm25"] }}]

[evaluation]
depth = 15
latency_queries = 2
fused = false

[export]
quality_tolerance = 1.0
"""


def write_tiny_run(folder: Path, kind: str = "dense") -> Path:
    """Write collection, model and recipe into `folder`; the recipe's path."""
    if kind == "dense":
        tiny_sentence_transformer(folder / "transformer").save(str(folder / "model"))
    else:
        tiny_masked_lm(folder / "model")
    rng = np.random.default_rng(1)
    data = folder / "toy"
    (data / "qrels").mkdir(parents=True)
    documents = [" ".join(rng.choice(WORDS[7:], 9, replace=False)) for _ in range(20)]
    queries = [" ".join(rng.choice(documents[number].split(), 3, replace=False)) for number in range(8)]
    for file, prefix, texts in (("corpus", "d", documents), ("queries", "q", queries)):
        lines = [json.dumps({"_id": f"{prefix}{n}", "text": text}) for n, text in enumerate(texts)]
        (data / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    for split in ("train", "test"):
        judged = [f"q{n}\td{n}\t1" for n in range(8)]
        (data / f"qrels/{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(judged) + "\n")
    recipe = folder / "tiny.toml"
    recipe.write_text(RECIPE.format(data=data, kind=kind, model=folder / "model"))
    return recipe
