"""A tiny run: a collection of 20 documents and 8 queries, a model, and a recipe with BM25 as teacher."""

from __future__ import annotations

from pathlib import Path

from tiny import tiny_masked_lm, tiny_sentence_transformer
from toy import draw_texts, own_document, write_beir

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
    data = write_beir(folder / "toy", *draw_texts(), {"train": own_document(), "test": own_document()})
    recipe = folder / "tiny.toml"
    recipe.write_text(RECIPE.format(data=data, kind=kind, model=folder / "model"))
    return recipe
