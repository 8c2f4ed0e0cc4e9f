"""Rates that a plan for a large collection needs: shards written and read, indexes built and searched, on one thread.

    OMP_NUM_THREADS=1 python scripts/bench_corpus.py --documents 200000 --width 384

The vectors are made up: unit vectors around 1,000 centres. What encoding takes, the larger part by far, is for
`rkd index --dry-run` to say, since it is the student's and the texts' own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.corpus_vectors import encode_corpus
from retrieval_kd.evaluate.cost import machine
from retrieval_kd.files import size_bytes
from retrieval_kd.index import build_index, estimate_bytes, open_index
from retrieval_kd.tables import Component

FACTORIES = ("Flat", "SQ8", "IVF1024,SQ8", "IVF1024,PQ48", "HNSW32,SQ8")


def main() -> None:
    """Write shards, build and search every index, and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--factories", nargs="+", default=FACTORIES)
    arguments = parser.parse_args()
    count, width = arguments.documents, arguments.width
    centres = np.random.default_rng(0).normal(size=(1000, width)).astype(np.float32)

    def vectors(texts: Sequence[str]) -> NDArray[np.float32]:
        rng = np.random.default_rng(int(texts[0]))
        found = centres[rng.integers(1000, size=len(texts))] + rng.normal(size=(len(texts), width)).astype(np.float32)
        unit: NDArray[np.float32] = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
        return unit

    ids, queries = [str(row) for row in range(count)], vectors([str(count)] * arguments.queries)
    figures: dict[str, object] = {"documents": count, "width": width, "machine": machine()}
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        shards = encode_corpus(Path(scratch) / "shards", ids, vectors, form="fp16", identity={})
        print(f"shards, fp16: {count / (time.perf_counter() - began):,.0f} vectors a second, made up and written")
        began = time.perf_counter()
        for start in range(0, count, 2**14):
            shards[start : start + 2**14]
        print(f"shards, fp16: {count / (time.perf_counter() - began):,.0f} vectors a second read")
        print("| index | build s | vectors/s | bytes/vector | foreseen | search p50 ms |")
        print("|---|---:|---:|---:|---:|---:|")
        for factory in arguments.factories:
            component = Component.model_validate({"kind": "faiss", "factory": factory, **_wide(factory)})
            folder = Path(scratch) / "index"
            seconds = build_index(component, shards, folder, document_ids=ids, identity={})["seconds"]
            opened, times = open_index(folder), []
            for query in queries:
                began = time.perf_counter()
                opened.search(query[None], 10)
                times.append(time.perf_counter() - began)
            size, foreseen = size_bytes(folder / "index.faiss"), estimate_bytes(component, count, width) or 0
            row = [seconds, count / seconds, size / count, foreseen / count, float(np.median(times)) * 1e3]
            figures[factory] = row
            print(f"| {factory} | " + " | ".join(f"{value:,.4g}" for value in row) + " |", flush=True)
    print(json.dumps(figures))


def _wide(factory: str) -> dict[str, int]:
    return {"nprobe": 16} if "IVF" in factory else {"ef_search": 64} if "HNSW" in factory else {}


if __name__ == "__main__":
    main()
