"""Sparse indexes: queries a second on one thread, bytes a document, time to build, and what they find.

    python scripts/bench_index.py                                    # 200,000 synthetic documents
    python scripts/bench_index.py --documents 1000000 --kinds impact seismic
    RKD_DATA=... python scripts/bench_index.py --data msmarco-dl-pool  # BM25 vectors of a collection

The synthetic vectors have SPLADE's statistics (about 120 terms a document, Zipf, V = 30,522), documents of 2,000
topics in random order; queries of about 40 terms, and of 8 whose weights are IDF, as inference-free encoders give
them. Every kind searches one query at a time; `overlap` is with the exact results of 32-bit weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array, vstack

TERMS, TOPICS, OWN, DRAWN = 30_522, 2_000, 400, 200


def main() -> None:
    """Build and search every kind, and print the table, then one JSON line."""
    arguments = _arguments()
    documents, queries = _bm25(arguments.data) if arguments.data else _synthetic(arguments.documents, arguments.queries)
    figures: dict[str, Any] = {"data": arguments.data or "synthetic", "documents": documents.shape[0], "k": arguments.k}
    figures["terms_a_document"] = round(documents.nnz / documents.shape[0], 1)
    print("| index | queries | build s | bytes/document | q/s | p50 ms | p95 | p99 | overlap@10 |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as scratch:
        exact = _build("impact", documents, Path(scratch) / "exact", {"weights": "float32"})
        truth = {name: exact.search(asked, arguments.k).rows for name, asked in queries.items()}
        for kind in arguments.kinds:
            index = _build(kind, documents, Path(scratch) / kind, {})
            for name, asked in queries.items():
                figures[f"{kind} {name}"] = found = _measure(index, asked, arguments.k, truth[name])
                print(f"| {kind} | {name} | " + " | ".join(f"{value:g}" for value in found.values()) + " |", flush=True)
    if {"impact", "lucene"} <= set(arguments.kinds):
        for name in queries:
            ours, theirs = (figures[f"{kind} {name}"]["queries_per_second"] for kind in ("impact", "lucene"))
            figures[f"impact over lucene, {name}"] = round(ours / theirs, 2)
            print(f"impact over lucene, {name}: {ours / theirs:.1f}")
    figures |= {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    packages = {"impact": "numba", "lucene": "pyserini", "seismic": "pyseismic-lsr", "milvus": "pymilvus"}
    figures |= {"versions": {packages[kind]: version(packages[kind]) for kind in arguments.kinds}}
    print(json.dumps(figures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="a folder of RKD_DATA or an ir_datasets id, for its BM25 vectors")
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--kinds", nargs="+", default=["impact", "lucene", "seismic"])
    parser.add_argument("--k", type=int, default=10)
    return parser.parse_args()


def _build(kind: str, documents: csr_array, folder: Path, options: dict[str, Any]) -> Any:
    from retrieval_kd.index import build_index, open_index
    from retrieval_kd.tables import Component

    ids = [str(row) for row in range(documents.shape[0])]
    build_index(Component(kind=kind, **options), documents, folder, document_ids=ids, identity={})
    return open_index(folder, threads=1)


def _measure(index: Any, queries: csr_array, k: int, truth: np.ndarray) -> dict[str, float]:
    one_by_one = [queries[[row]] for row in range(queries.shape[0])]
    for _ in range(5):  # Java compiles what it runs often
        for query in one_by_one:
            index.search(query, k)
    seconds, rows = [], []
    for query in one_by_one:
        start = time.perf_counter()
        hits = index.search(query, k)
        seconds.append(time.perf_counter() - start)
        rows.append(hits.rows[0])
    pairs = [({*one[:10]}, {*best[:10]} - {-1}) for one, best in zip(rows, truth, strict=True)]  # -1 is no result
    shared = [len(one & best) / len(best) for one, best in pairs if best]
    p50, p95, p99 = np.quantile(seconds, [0.5, 0.95, 0.99]) * 1000
    return {
        "build_seconds": index.manifest["seconds"],
        "bytes_a_document": round(index.manifest["bytes"] / len(index.document_ids)),
        "queries_per_second": round(1 / float(np.mean(seconds)), 1),
        "p50_ms": round(p50, 3),
        "p95_ms": round(p95, 3),
        "p99_ms": round(p99, 3),
        "overlap": round(float(np.mean(shared)), 4),
    }


def _synthetic(count: int, asked: int) -> tuple[csr_array, dict[str, csr_array]]:
    rng = np.random.default_rng(0)
    share = 1 / (np.arange(TERMS) + 20.0) ** 0.9
    everywhere = rng.choice(TERMS, 2**20, p=share / share.sum()).astype(np.int32)
    rarity = np.log(np.arange(TERMS) / 20 + 1) / np.log(TERMS / 20 + 1)
    topics = everywhere[rng.integers(2**20, size=(TOPICS, OWN))]

    def draw(topic: np.ndarray, drawn: int, wanted: np.ndarray) -> csr_array:
        """Terms of the topic (60%) or of everywhere, about `wanted` of them, each once."""
        shape = (len(topic), drawn)
        own = topics[topic[:, None], (OWN * rng.random(shape) ** 1.5).astype(int)]
        terms = np.where(rng.random(shape) < 0.6, own, everywhere[rng.integers(2**20, size=shape)])
        terms.sort(axis=1)
        keep = rng.random(shape) < wanted[:, None] / drawn
        keep[:, 1:] &= terms[:, 1:] != terms[:, :-1]
        weights = np.minimum(rng.gamma(2.0, 0.25, size=shape) * (0.5 + rarity[terms]), 3.5).astype(np.float32)
        indptr = np.concatenate([[0], np.cumsum(keep.sum(axis=1))])
        return csr_array((weights[keep], terms[keep], indptr), shape=(len(topic), TERMS))

    topic_of = np.array_split(rng.integers(TOPICS, size=count), count // 50_000 + 1)
    parts = [draw(topic, DRAWN, np.clip(rng.normal(145, 35, len(topic)), 20, DRAWN)) for topic in topic_of]
    documents, topic = csr_array(vstack(parts, format="csr")), rng.integers(TOPICS, size=asked)
    long, short = draw(topic, 60, np.full(asked, 46.0)), draw(topic, 10, np.full(asked, 9.0))
    found = np.bincount(documents.indices, minlength=TERMS)
    short.data = np.log(1 + count / (1 + found))[short.indices].astype(np.float32)
    return documents, {"splade": long, "inference-free": short}


def _bm25(data: str) -> tuple[csr_array, dict[str, csr_array]]:
    """BM25 (k1 0.9, b 0.4) of a collection as inner products: its weights in documents, counts in queries."""
    from sklearn.feature_extraction.text import CountVectorizer

    from retrieval_kd.data import load_collection

    collection = load_collection(data)
    counter = CountVectorizer(stop_words="english", token_pattern=r"(?u)\b\w+\b", dtype=np.float32)
    counts = csr_array(counter.fit_transform(collection.documents))
    length, holding = counts.sum(axis=1), np.bincount(counts.indices, minlength=counts.shape[1])
    idf = np.log(1 + (len(collection) - holding + 0.5) / (holding + 0.5))
    row_of = np.repeat(np.arange(len(collection)), np.diff(counts.indptr))
    saturation = 0.9 * (0.6 + 0.4 * length / length.mean())[row_of]
    counts.data = (idf[counts.indices] * counts.data / (counts.data + saturation)).astype(np.float32)
    counts.sort_indices()
    queries = csr_array(counter.transform(collection.split("test").texts))
    queries.sort_indices()
    return counts, {"bm25": queries}


if __name__ == "__main__":
    main()
