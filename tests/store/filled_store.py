"""Small stores whose judgements stand in three parts a kind, and all that can be asked of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from retrieval_kd.store.operations import KINDS
from retrieval_kd.store.parts import Kind
from retrieval_kd.store.store import Store

TEACHER = {"kind": "cross_encoder", "model": "tiny"}
WIDTH = 6


def keys(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def filled(root: Path, seed: int = 0, kinds: Sequence[Kind] = KINDS, identity: dict[str, str] = TEACHER) -> Store:
    """A store of three parts a kind, in which some judgements stand twice, equal and not."""
    rng = np.random.default_rng(seed)
    store = Store.open(root, "ce", identity)
    some = rng.integers(0, 2**64, 4, dtype=np.uint64)  # few keys, so that they meet again
    for _ in range(3):
        if "scores" in kinds:
            scores = rng.choice(np.array([np.nan, -1.5, 0.25, 3.0], np.float32), 12)
            store.append_scores(rng.choice(some, 12), rng.choice(some, 12), scores)
        if "preferences" in kinds:
            chance = rng.choice(np.array([0.25, 0.5], np.float32), 20)
            store.append_preferences(rng.choice(some, 20), rng.choice(some, 20), rng.choice(some, 20), chance)
        if "rankings" in kinds:
            store.append_rankings(rng.choice(some, 8), [rng.permutation(some)[: rng.integers(1, 3)] for _ in range(8)])
        if "embeddings" in kinds:
            store.append_embeddings(rng.permutation(some)[:3], rng.normal(size=(3, WIDTH)).astype(np.float32))
    store.record(pairs=36, texts=0, tokens=None, seconds=1.5)
    return store


def answers(store: Store) -> dict[str, object]:
    """All that can be asked of a store: scores and vectors of every key, distinct preferences and rankings in order."""
    every = {key for kind in KINDS for path in store.parts(kind) for key in all_keys(path)}
    some = np.array(sorted(every), np.uint64)
    pairs = np.repeat(some, len(some)), np.tile(some, len(some))
    scores, found = store.find_scores(*pairs)
    vectors, known = store.find_embeddings(some)
    preferred: dict[tuple[int, ...], list[float]] = {}
    for row in store.preferences().to_pylist():
        seen = preferred.setdefault((row["query_key"], row["first_key"], row["second_key"]), [])
        seen += [row["probability"]] if row["probability"] not in seen else []
    ranked: dict[int, list[list[int]]] = {}
    for row in store.rankings().to_pylist():
        seen = ranked.setdefault(row["query_key"], [])
        seen += [row["document_keys"]] if row["document_keys"] not in seen else []
    return {
        "scores": (scores.tobytes(), found.tobytes()),
        "vectors": (vectors.tobytes(), known.tobytes()),
        "preferences": preferred,
        "rankings": ranked,
    }


def all_keys(path: Path) -> list[int]:
    table = pq.read_table(path)
    return [int(key) for name in table.column_names if name.endswith("_key") for key in table.column(name).to_pylist()]


def rows(path: Path) -> list[dict[str, object]]:
    return pq.read_table(path).to_pylist()


class Killed(BaseException):
    """What nothing catches."""
