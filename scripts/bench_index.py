"""Sparse indexes: queries a second on one thread, bytes a document, time to build, and what they find.

    python scripts/bench_index.py                                          # 200,000 synthetic documents
    python scripts/bench_index.py --documents 1000000 --kinds impact lucene --keep work/bench
    python scripts/bench_index.py --recipe scripts/recipes/R.toml --copies 6  # the vectors of a recipe that was run
    python scripts/bench_index.py --vectors documents.npz queries.npz      # saved by scipy.sparse.save_npz
    RKD_DATA=... python scripts/bench_index.py --data msmarco-dl-pool      # BM25 vectors of a collection

The synthetic vectors have SPLADE's statistics (about 120 terms a document, Zipf, V = 30,522), documents of 2,000
topics in random order; queries of about 40 terms, and of 8 whose weights are IDF, as inference-free encoders give
them. Indexes are built as `indexes/*.toml` say, and search one query at a time. `overlap@10` is the share of what is
found that the product in float32 puts among the ten best, or level with the tenth. `--keep` names a folder where
vectors, indexes and figures stay, so that a run may be cut into several; `--table indexes/README.md` writes all figures
kept there between the marks of that file. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, load_npz, save_npz, vstack

TERMS, TOPICS, OWN, DRAWN = 30_522, 2_000, 400, 200
K = 10
INDEXES = Path(__file__).parents[1] / "indexes"
PACKAGES = {"impact": "numba", "lucene": "pyserini", "seismic": "pyseismic-lsr", "milvus": "milvus-lite"}
COLUMNS = {
    "build_seconds": "build s",
    "bytes_a_document": "bytes/document",
    "queries_per_second": "queries/s",
    "p50_ms": "p50 ms",
    "p95_ms": "p95",
    "p99_ms": "p99",
    "overlap": "overlap@10",
}
MARKS = "<!-- bench_index.py begin -->", "<!-- bench_index.py end -->"
Vectors = tuple[csr_array, dict[str, csr_array]]


def main() -> None:
    """Build and search every kind; print the table, then one line of JSON."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as scratch:
        keep = arguments.keep or Path(scratch)
        label, vectors = _wanted(arguments)
        figures = _bench(keep / label.replace("/", "-").replace(" ", "-"), label, vectors, arguments)
        every = _kept(keep)
    print(table := _table(every if arguments.table else [figures]))
    if arguments.table:
        _write_table(arguments.table, table)
    print(json.dumps(figures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=200_000, help="how many synthetic ones")
    parser.add_argument("--data", help="a folder of RKD_DATA or an ir_datasets id, for its BM25 vectors")
    parser.add_argument("--recipe", type=Path, help="one of a sparse student that was run")
    parser.add_argument("--work", type=Path, help="the recipe's folder, if it is not work/NAME")
    parser.add_argument("--vectors", type=Path, nargs=2, metavar=("DOCUMENTS", "QUERIES"))
    parser.add_argument("--label", help="what the table calls the vectors of --vectors")
    parser.add_argument("--copies", type=int, default=1, help="of each document, each with weights a little different")
    parser.add_argument("--kinds", nargs="*", default=["impact", "lucene", "seismic"], choices=PACKAGES)
    parser.add_argument("--build", action="store_true", help="make what is not kept yet, and search nothing")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--table", type=Path)
    return parser.parse_args()


def _wanted(arguments: argparse.Namespace) -> tuple[str, Callable[[], Vectors]]:
    """What the vectors are called, and how to make them."""
    copies = arguments.copies
    suffix = f" x{copies}" if copies > 1 else ""
    if arguments.data:
        return f"BM25 {arguments.data}{suffix}", lambda: _copied(_bm25(arguments.data), copies)
    if arguments.recipe:
        return f"{arguments.recipe.stem}{suffix}", lambda: _copied(_student(arguments.recipe, arguments.work), copies)
    if arguments.vectors:
        label = arguments.label or arguments.vectors[0].stem
        return f"{label}{suffix}", lambda: _copied(_loaded(*arguments.vectors), copies)
    return f"synthetic {arguments.documents}", lambda: _synthetic(arguments.documents, 200)


def _bench(folder: Path, label: str, make: Callable[[], Vectors], arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one set of vectors, with those kept from earlier runs."""
    documents, queries = _vectors(folder, make)
    path = folder / "figures.json"
    figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"found": {}}
    figures |= {"data": label, "documents": documents.shape[0], "k": K}
    figures["terms_a_document"] = round(documents.nnz / documents.shape[0], 1)
    figures["terms_a_query"] = {name: round(asked.nnz / asked.shape[0], 1) for name, asked in queries.items()}
    figures["machine"] = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    figures.setdefault("versions", {}).update({PACKAGES[kind]: version(PACKAGES[kind]) for kind in arguments.kinds})
    tenth = {name: _tenth(folder / f"tenth-{name}.npy", documents, asked) for name, asked in queries.items()}
    for kind in arguments.kinds:
        index = _index(kind, documents, folder / kind)
        for name, asked in {} if arguments.build else queries.items():
            figures["found"][f"{kind}, {name}"] = _measure(index, documents, asked, tenth[name])
    for name in queries:
        rates = [figures["found"].get(f"{kind}, {name}", {}).get("queries_per_second") for kind in ("impact", "lucene")]
        if all(rates):
            figures[f"impact over lucene, {name}"] = round(rates[0] / rates[1], 2)
    path.write_text(json.dumps(figures, indent=1))
    return figures


def _vectors(folder: Path, make: Callable[[], Vectors]) -> Vectors:
    """The vectors, from the folder if it keeps them."""
    if not (folder / "documents.npz").exists():
        folder.mkdir(parents=True, exist_ok=True)
        documents, queries = make()
        for name, asked in queries.items():
            save_npz(folder / f"queries-{name}.npz", asked, compressed=False)
        save_npz(folder / "documents.npz", documents, compressed=False)
    names = sorted(path.stem.removeprefix("queries-") for path in folder.glob("queries-*.npz"))
    queries = {name: csr_array(load_npz(folder / f"queries-{name}.npz")) for name in names}
    return csr_array(load_npz(folder / "documents.npz")), queries


def _index(kind: str, documents: csr_array, folder: Path) -> Any:
    """The index of a kind, as its recipe says; built unless it is there."""
    from retrieval_kd.index import build_index, open_index
    from retrieval_kd.tables import Component

    if not folder.exists():
        options = tomllib.loads((INDEXES / f"{kind}.toml").read_text())["index"]
        ids = [str(row) for row in range(documents.shape[0])]
        build_index(Component(**options), documents, folder, document_ids=ids, identity={})
    return open_index(folder, threads=1)


def _tenth(path: Path, documents: csr_array, queries: csr_array) -> NDArray[np.float32]:
    """(Q,): the K-th best score of each query by the matrix product, 0 where fewer documents share a term."""
    if not path.exists():
        best = np.zeros((queries.shape[0], K), np.float32)
        for begin in range(0, documents.shape[0], 50_000):
            full = (queries @ documents[begin : begin + 50_000].T).toarray()
            best = -np.sort(-np.concatenate([best, -np.partition(-full, K, axis=1)[:, :K]], axis=1), axis=1)[:, :K]
        np.save(path, best[:, -1])
    tenth: NDArray[np.float32] = np.load(path)
    return tenth


def _measure(index: Any, documents: csr_array, queries: csr_array, tenth: NDArray[np.float32]) -> dict[str, float]:
    one_by_one = [queries[[row]] for row in range(queries.shape[0])]
    until = time.perf_counter() + 10  # Java compiles what it runs often
    for _ in range(5):
        for query in one_by_one:
            index.search(query, K)
        if time.perf_counter() > until:
            break
    seconds, shares = [], []
    for query, needed in zip(one_by_one, tenth, strict=True):
        start = time.perf_counter()
        hits = index.search(query, K)
        seconds.append(time.perf_counter() - start)
        if needed > 0:
            scores = (documents[hits.rows[0][hits.valid[0]]] @ query.T).toarray()
            shares.append((scores >= needed * (1 - 1e-6)).sum() / K)
    p50, p95, p99 = np.quantile(seconds, [0.5, 0.95, 0.99]) * 1000
    return {
        "build_seconds": index.manifest["seconds"],
        "bytes_a_document": round(index.manifest["bytes"] / len(index.document_ids)),
        "queries_per_second": round(1 / float(np.mean(seconds)), 1),
        "p50_ms": round(p50, 3),
        "p95_ms": round(p95, 3),
        "p99_ms": round(p99, 3),
        "overlap": round(float(np.mean(shares)), 4),
    }


def _kept(keep: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(keep.glob("*/figures.json"))]


def _table(figures: list[dict[str, Any]]) -> str:
    """A Markdown table of what was measured."""
    head = ["documents", "index", "queries", *COLUMNS.values()]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * 3 + "---:|" * len(COLUMNS)]
    for one in figures:
        for key, found in sorted(one["found"].items(), key=lambda item: item[0].split(", ")[::-1]):
            kind, name = key.split(", ")
            values = [
                f"{found[column]:,.4g}" if found[column] < 1000 else f"{found[column]:,.0f}" for column in COLUMNS
            ]
            what = f"{one['documents']:,} {one['data'].split(' ')[0]}"
            lines.append(
                "| " + " | ".join([what, kind, f"{name}, {one['terms_a_query'][name]:g} terms", *values]) + " |"
            )
    return "\n".join(lines)


def _write_table(path: Path, table: str) -> None:
    before, rest = path.read_text(encoding="utf-8").split(MARKS[0])
    path.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")


def _student(recipe: Path, work: Path | None) -> Vectors:
    """The documents' vectors of a recipe that was run, and its test queries by its exported encoder."""
    from retrieval_kd.pipeline import Workspace
    from retrieval_kd.pipeline.documents import VECTORS
    from retrieval_kd.pipeline.exporting import open_served

    workspace = Workspace(recipe, work, dry=True)
    workspace.made("vectors", "index")
    texts = workspace.query_texts("test", workspace.recipe.student.render)
    documents = csr_array(load_npz(workspace.folder / "vectors" / VECTORS))
    return documents, {"test": csr_array(open_served(workspace, threads=1)[0].encode(texts))}


def _loaded(documents: Path, queries: Path) -> Vectors:
    return csr_array(load_npz(documents)), {"test": csr_array(load_npz(queries))}


def _copied(vectors: Vectors, copies: int) -> Vectors:
    """Each document `copies` times: as it is, and with each weight changed by up to a fifth."""
    documents, queries = vectors
    rng, every = np.random.default_rng(0), [documents]
    for _ in range(copies - 1):
        other = documents.copy()
        other.data *= rng.uniform(0.8, 1.2, len(other.data)).astype(np.float32)
        every.append(other)
    return csr_array(vstack(every, format="csr")), queries


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
