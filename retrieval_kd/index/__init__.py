"""Indexes: each kind is one module that can `build` a folder from vectors and `load` it for searching.

A module declares `TAKES`, the form of the vectors that it indexes and is asked with:

- "dense": an array (N, D) float32.
- "sparse": a `scipy.sparse.csr_array` (N, V) float32 with sorted column indices, each once, and weights of
  at least 0. A document that shares no term with a query is not a result: row -1, score -inf.
- a tuple of both: either.

Its other names are `Options` (the keys of a recipe's `[index]`), `build(vectors, folder, options, *,
document_ids, identity) -> manifest` and `load(folder, threads) -> Index`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.files import atomic, read_json, size_bytes, write_json
from retrieval_kd.tables import Table, kind_module
from retrieval_kd.types import Hits, InputError

Vectors: TypeAlias = Any  # NDArray[np.float32] or scipy.sparse.csr_array, which has no types
MANIFEST = "index.json"
FORMAT = 1
_IDS = "document_ids.json"


class Index(Protocol):
    """An opened index; row i is the document `document_ids[i]`."""

    document_ids: Sequence[str]
    manifest: dict[str, Any]

    def search(self, vectors: Vectors, k: int) -> Hits:
        """The best `k` documents of each query vector, in the form that the kind takes; Hits (Q, min(k, N))."""
        ...


def open_index(folder: Path, threads: int = 1) -> Index:
    """Open the index in `folder`, whichever its kind."""
    return cast(Index, kind_module("index", read_manifest(folder)["kind"]).load(folder, threads))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index folder; InputError if it has none, or one of an unknown format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} is not an index: it has no {MANIFEST}; make one with `rkd index`.")
    manifest = read_json(path)
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise InputError(f"{path}: format {version!r} is unknown, this version reads {FORMAT}; build it again.")
    return cast(dict[str, Any], manifest)


def read_ids(folder: Path, count: int) -> list[str]:
    """The document ids of an index folder; InputError unless they are as many as its vectors and its manifest's."""
    document_ids = cast(list[str], read_json(folder / _IDS))
    documents = read_manifest(folder)["documents"]
    if not count == len(document_ids) == documents:
        raise InputError(
            f"{folder}: {count} vectors, {len(document_ids)} document ids and a manifest of "
            f"{documents} documents do not belong together; build it again."
        )
    return document_ids


@contextmanager
def writing(
    folder: Path, kind: str, options: Table, vectors: Vectors, document_ids: Sequence[str], identity: Mapping[str, Any]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a scratch folder for the kind's files, and the manifest, to which the block may add; then put it in place.

    The time of the block is the manifest's `seconds`; one that fails leaves `folder` as it was.
    """
    start = perf_counter()
    with atomic(folder) as scratch:
        scratch.mkdir()
        manifest = {
            "format": FORMAT,
            "kind": kind,
            **options.model_dump(),
            "documents": vectors.shape[0],
            "dimension": vectors.shape[1],
            "identity": identity,
        }
        yield scratch, manifest
        write_json(scratch / _IDS, list(document_ids))
        manifest |= {"bytes": size_bytes(scratch), "seconds": round(perf_counter() - start, 3)}
        write_json(scratch / MANIFEST, manifest)


def check_documents(vectors: Vectors, document_ids: Sequence[str]) -> None:
    """InputError for document vectors with values that cannot be compared, and for ids that occur twice."""
    assert vectors.ndim == 2, "vectors (N, D)"
    assert vectors.shape[0] == len(document_ids), "one vector a document"
    sparse = not isinstance(vectors, np.ndarray)
    if sparse:
        assert vectors.has_canonical_format, "each term once, in order"
    bad = ~np.isfinite(vectors.data if sparse else vectors)
    if bad.any():
        raise InputError(
            f"the vector of document {document_ids[_row(vectors, bad)]!r} has values that are not finite numbers."
        )
    if sparse and (bad := vectors.data < 0).any():
        raise InputError(
            f"the vector of document {document_ids[_row(vectors, bad)]!r} has weights below 0, "
            "which a sparse index does not take."
        )
    if len(set(document_ids)) < len(document_ids):
        raise InputError("document ids occur twice; a result could not be told from another.")


def _row(vectors: Vectors, bad: NDArray[np.bool_]) -> int:
    """The first row with a value that is `bad`."""
    if isinstance(vectors, np.ndarray):
        return int(np.flatnonzero(bad.any(axis=1))[0])
    return int(np.searchsorted(vectors.indptr, np.flatnonzero(bad)[0], side="right")) - 1


def check_queries(vectors: Vectors, index: Index, takes: str) -> None:
    """InputError for query vectors that do not fit the index: another form or width, or weights below 0."""
    sparse = not isinstance(vectors, np.ndarray)
    if sparse != (takes == "sparse") or vectors.ndim != 2 or vectors.shape[1] != index.manifest["dimension"]:
        raise InputError(
            f"{'sparse' if sparse else 'dense'} query vectors of shape {vectors.shape} cannot be searched in "
            f"an index of width {index.manifest['dimension']} that takes {takes} ones; "
            "encode the queries with the student whose documents are indexed."
        )
    if sparse and vectors.nnz and not (vectors.data.min() >= 0 and np.isfinite(vectors.data).all()):
        raise InputError("the query vectors have weights below 0 or not finite, which a sparse index does not take.")


def quantise(weights: NDArray[np.float32]) -> tuple[NDArray[np.uint8], float]:
    """Weights as max(1, round(w / scale)), so that no term is lost, and the scale: the largest weight / 255."""
    scale = float(weights.max(initial=0)) / 255 or 1.0
    return np.maximum(np.rint(weights / np.float32(scale)), 1).astype(np.uint8), scale


def no_hits(queries: int, k: int) -> Hits:
    """Hits (queries, k) with every place missing, to be filled."""
    return Hits(np.full((queries, k), -1, np.int32), np.full((queries, k), -np.inf, np.float32))


def in_order(rows: NDArray[Any], scores: NDArray[Any]) -> Hits:
    """Hits of (Q, K) rows and scores, sorted by score and then by row; row -1 is missing and stands last."""
    scores = np.where(rows < 0, -np.inf, scores)
    order = np.lexsort((rows, -scores))
    rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
    return Hits(rows.astype(np.int32), scores.astype(np.float32))
