"""Indexes: a folder of vectors that is searched. Each kind is one module, which fills such a folder and opens it.

A module declares `VECTORS`, the forms of vectors that it takes:

- "dense": an array (N, D) float32, or what gives one when it is sliced, and has its `shape`.
- "binary": an array (N, D / 8) uint8, the signs of D coordinates packed (numpy.packbits), compared as +1 and -1.
- "sparse": a `scipy.sparse.csr_array` (N, V) float32 with sorted column indices, each once, and weights of
  at least 0. A document that shares no term with a query is not a result: row -1, score -inf.

Its other names are `Options` (the keys of a recipe's `[index]`); `write(vectors, folder, options, document_ids) ->
facts`, which puts the kind's files into an existing folder and returns what the manifest is to say of them;
`load(folder, manifest, threads) -> Opened`; and, where it can be known, `estimate_bytes(options, documents, width)`,
the size of an index before there is one, or None. What all kinds have in common is here: sparse vectors reach `write`
without zeros, and a search has queries that fit and 1 <= k <= N.
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

Vectors: TypeAlias = Any  # NDArray of float32 or uint8, CorpusVectors, or scipy.sparse.csr_array, which has no types
BLOCK = 2**14  # documents of a large collection that are looked at at once
RESULTS = 2**22  # results of queries that are searched at once
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

    Shapes: vectors (N, D), (N, D / 8) or (N, V), row i belongs to `document_ids[i]`.
    """
    module, chosen, start = kind_module("index", component.kind), options("index", component), perf_counter()
    check_documents(vectors, document_ids)
    form = _form(vectors)
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
            "dimension": _dimension(vectors),
            "identity": identity,
            **facts,
            "bytes": size_bytes(scratch),
            "seconds": round(perf_counter() - start, 3),
        }
        write_json(scratch / MANIFEST, manifest)
    return read_manifest(folder)


def estimate_bytes(component: Component, documents: int, width: int) -> int | None:
    """About the bytes that an index will have, on disk and, unless it is memory-mapped, in memory; None: not known."""
    module = kind_module("index", component.kind)
    if not hasattr(module, "estimate_bytes"):
        return None
    estimate: int | None = module.estimate_bytes(options("index", component), documents, width)
    return estimate


class Index:
    """An opened index, whichever its kind; row i is the document `document_ids[i]`."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        """Open what `build_index` made; a search may use `threads`."""
        self.manifest = read_manifest(folder)
        self.document_ids = _read_ids(folder, self.manifest["documents"])
        self._opened: Opened = kind_module("index", self.manifest["kind"]).load(folder, self.manifest, threads)

    def search(self, vectors: Vectors, k: int) -> Hits:
        """The best `k` documents of each query by inner product; equal scores in the order of rows.

        Queries are searched in portions, so that memory is that of the results and of RESULTS more.
        Shapes: vectors (Q, D), (Q, D / 8) or (Q, V); Hits (Q, min(k, N)), row -1 where fewer documents are found.
        """
        check_queries(vectors, self.manifest)
        k = max(0, min(k, self.manifest["documents"]))
        if not k or not vectors.shape[0]:
            return Hits.none(vectors.shape[0], k)
        portion = max(1, RESULTS // k)
        if vectors.shape[0] <= portion:
            return self._opened.search(vectors, k)
        hits = Hits.none(vectors.shape[0], k)
        for start in range(0, vectors.shape[0], portion):
            found = self._opened.search(vectors[start : start + portion], k)
            hits.rows[start : start + portion], hits.scores[start : start + portion] = found.rows, found.scores
        return hits


open_index = Index


def _form(vectors: Vectors) -> str:
    """Which of the forms of vectors these are."""
    if is_sparse(vectors):
        return "sparse"
    return "binary" if getattr(vectors, "dtype", None) == np.uint8 else "dense"


def _dimension(vectors: Vectors) -> int:
    """Coordinates of a vector, of which a binary one has eight a byte."""
    return int(vectors.shape[1]) * (8 if _form(vectors) == "binary" else 1)


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
    if is_sparse(vectors):
        assert vectors.has_canonical_format, "each term once, in order"
        for bad, what in (
            (~np.isfinite(vectors.data), "values that are not finite numbers."),
            (vectors.data < 0, "weights below 0, which a sparse index does not take."),
        ):
            if bad.any():
                row = int(np.searchsorted(vectors.indptr, np.flatnonzero(bad)[0], side="right")) - 1
                raise InputError(f"the vector of document {document_ids[row]!r} has {what}")
    else:
        for start in range(0, vectors.shape[0], BLOCK):
            finite = np.isfinite(vectors[start : start + BLOCK]).all(axis=1)
            if not finite.all():
                row = start + int(np.argmin(finite))
                raise InputError(
                    f"the vector of document {document_ids[row]!r} has values that are not finite numbers."
                )
    if len(set(document_ids)) < len(document_ids):
        raise InputError("document ids occur twice; a result could not be told from another.")


def is_sparse(vectors: Vectors) -> bool:
    """Whether vectors are a matrix in compressed rows."""
    return hasattr(vectors, "indptr")


def check_queries(vectors: Vectors, manifest: Mapping[str, Any]) -> None:
    """InputError for query vectors that do not fit the index: another form or width, or weights below 0."""
    form = _form(vectors)
    takes, width = manifest["vectors"], manifest["dimension"]
    if form != takes or vectors.ndim != 2 or _dimension(vectors) != width:
        raise InputError(
            f"{form} query vectors of shape {vectors.shape} cannot be searched in "
            f"an index of width {width} that takes {takes} ones; "
            "encode the queries with the student whose documents are indexed."
        )
    if form == "sparse" and vectors.nnz and not (vectors.data.min() >= 0 and np.isfinite(vectors.data).all()):
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
