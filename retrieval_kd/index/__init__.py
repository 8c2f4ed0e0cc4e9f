"""Indexes: a folder of vectors that is searched. Each kind is one module, which fills such a folder and opens it.

A module declares `VECTORS`, the forms of vectors that it takes:

- "dense": an array (N, D) float32.
- "sparse": a `scipy.sparse.csr_array` (N, V) float32 with sorted column indices, each once, and weights of
  at least 0. A document that shares no term with a query is not a result: row -1, score -inf.

Its other names are `Options` (the keys of a recipe's `[index]`); `write(vectors, folder, options, document_ids) ->
facts`, which puts the kind's files into an existing folder and returns what the manifest is to say of them; and
`load(folder, manifest, threads) -> Opened`. What all kinds have in common is here: sparse vectors reach `write` without
zeros, and a search has queries that fit and 1 <= k <= N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.files import atomic, read_json, size_bytes, write_json
from retrieval_kd.tables import Component, kind_module, options
from retrieval_kd.types import Hits, InputError

Vectors: TypeAlias = Any  # NDArray[np.float32] or scipy.sparse.csr_array, which has no types
MANIFEST = "index.json"
FORMAT = 3
_IDS = "document_ids.json"


class Opened(Protocol):
    """What a kind's `load` gives."""

    def search(self, vectors: Vectors, k: int) -> Hits:
        """The best `k` documents of each query; Hits (Q, k)."""
        ...


def build_index(
    component: Component,
    vectors: Vectors,
    folder: Path,
    *,
    document_ids: Sequence[str],
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Index the documents' vectors into `folder` and return the manifest; what fails leaves `folder` as it was.

    `identity` describes the tower that made the vectors. InputError for vectors that cannot be compared, for ids that
    occur twice, and for what the kind cannot build.

    Shapes: vectors (N, D) or (N, V), row i belongs to `document_ids[i]`.
    """
    module, chosen, start = kind_module("index", component.kind), options("index", component), perf_counter()
    check_documents(vectors, document_ids)
    form = "dense" if isinstance(vectors, np.ndarray) else "sparse"
    if form not in module.VECTORS:
        raise InputError(f"index kind {component.kind!r} does not take {form} vectors.")
    if form == "sparse" and not vectors.data.all():
        vectors = vectors.copy()
        vectors.eliminate_zeros()
    with atomic(folder) as scratch:
        scratch.mkdir()
        facts = module.write(vectors, scratch, chosen, document_ids)
        write_json(scratch / _IDS, list(document_ids))
        manifest = {
            "format": FORMAT,
            "kind": component.kind,
            **chosen.model_dump(),
            "vectors": form,
            "documents": vectors.shape[0],
            "dimension": vectors.shape[1],
            "identity": identity,
            **facts,
            "bytes": size_bytes(scratch),
            "seconds": round(perf_counter() - start, 3),
        }
        write_json(scratch / MANIFEST, manifest)
    return read_manifest(folder)


class Index:
    """An opened index, whichever its kind; row i is the document `document_ids[i]`."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        """Open what `build_index` made; a search may use `threads`."""
        self.manifest = read_manifest(folder)
        self.document_ids = _read_ids(folder, self.manifest["documents"])
        self._opened: Opened = kind_module("index", self.manifest["kind"]).load(folder, self.manifest, threads)

    def search(self, vectors: Vectors, k: int) -> Hits:
        """The best `k` documents of each query by inner product; equal scores in the order of rows.

        Shapes: vectors (Q, D) or (Q, V); Hits (Q, min(k, N)), row -1 where fewer documents are found.
        """
        check_queries(vectors, self.manifest)
        k = max(0, min(k, self.manifest["documents"]))
        return self._opened.search(vectors, k) if k and vectors.shape[0] else Hits.none(vectors.shape[0], k)


open_index = Index


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


def _read_ids(folder: Path, documents: int) -> list[str]:
    """The document ids of an index folder; InputError unless they are as many as the manifest says."""
    document_ids = cast(list[str], read_json(folder / _IDS))
    if len(document_ids) != documents:
        raise InputError(
            f"{folder}: {len(document_ids)} document ids and a manifest of {documents} documents do not belong "
            "together; build it again."
        )
    return document_ids


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


def check_queries(vectors: Vectors, manifest: Mapping[str, Any]) -> None:
    """InputError for query vectors that do not fit the index: another form or width, or weights below 0."""
    sparse = not isinstance(vectors, np.ndarray)
    takes, width = manifest["vectors"], manifest["dimension"]
    if sparse != (takes == "sparse") or vectors.ndim != 2 or vectors.shape[1] != width:
        raise InputError(
            f"{'sparse' if sparse else 'dense'} query vectors of shape {vectors.shape} cannot be searched in "
            f"an index of width {width} that takes {takes} ones; "
            "encode the queries with the student whose documents are indexed."
        )
    if sparse and vectors.nnz and not (vectors.data.min() >= 0 and np.isfinite(vectors.data).all()):
        raise InputError("the query vectors have weights below 0 or not finite, which a sparse index does not take.")


def quantise(weights: NDArray[np.float32]) -> tuple[NDArray[np.uint8], float]:
    """Weights as max(1, round(w / scale)), so that no term is lost, and the scale: the largest weight / 255."""
    scale = float(weights.max(initial=0)) / 255 or 1.0
    return np.maximum(np.rint(weights / np.float32(scale)), 1).astype(np.uint8), scale


def row_span(vectors: Vectors, row: int) -> slice:
    """Where a row's terms and weights are in the arrays `indices` and `data` of sparse vectors."""
    return slice(vectors.indptr[row], vectors.indptr[row + 1])


def in_order(rows: NDArray[Any], scores: NDArray[Any]) -> Hits:
    """Hits of (Q, K) rows and scores, sorted by score and then by row; row -1 is missing and stands last."""
    scores = np.where(rows < 0, -np.inf, scores)
    order = np.lexsort((rows, -scores))
    rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
    return Hits(rows.astype(np.int32), scores.astype(np.float32))
