"""Recipes of a tiny whole run, of two sources, two teachers and a dense student, and of a re-ranker."""

from __future__ import annotations

from pathlib import Path

from retrieval_kd.pipeline import Workspace

RECIPE = """
[data]
collection = "{data}"

[candidates]
sources = [{{ kind = "bm25" }}, {{ kind = "bi_encoder", model = "{model}" }}]
depth = 8

[[teachers]]
name = "bm25"
kind = "bm25"

[[teachers]]
name = "teacher"
kind = "bi_encoder"
model = "{model}"

[student]
kind = "dense"
model = "{model}"
layers = [1]
dropout = 0.0

[training]
seed = 3

[[stages]]
steps = 3
batch_size = 4
candidates = 4
learning_rate = 1e-3
terms = [
  {{ loss = "margin_mse", teachers = ["teacher"], scale = 3.0 }},
  {{ loss = "kl", teachers = ["bm25", "teacher"], normalize = "minmax", shares = [0.3, 0.7] }},
  {{ loss = "info_nce", relation = "batch", temperature = 0.1 }},
]

[evaluation]
depth = 10
latency_queries = 2

[export]
quality_tolerance = 1.0
"""
RERANKER = """
[data]
collection = "{data}"

[student]
kind = "cross_encoder"
model = "{classifier}"
max_length = 32

[[stages]]
steps = 2
batch_size = 4
candidates = 3
learning_rate = 1e-3
terms = [{{ loss = "info_nce" }}]

[candidates]
depth = 6

[[teachers]]
name = "bm25"
kind = "bm25"
"""
BEFORE_TRAINING = ["candidates/train", "candidates/test", "scores/test", "scores/train", "trainset"]
SINCE_TRAINING = ["stages/0", "student", "index", "served", "runs"]
BASELINES = ["baselines/bm25", "baselines/teacher"]


def workspace(place: Path, name: str = "tiny", *overrides: str) -> Workspace:
    return Workspace(place / f"{name}.toml", place / "work" / name, overrides=overrides)
