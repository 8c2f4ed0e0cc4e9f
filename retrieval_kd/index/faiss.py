"""Dense indexes: any FAISS factory string, compared by inner product."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval_kd.index import in_order
from retrieval_kd.tables import Positive, Table
from retrieval_kd.types import Hits, InputError

VECTORS = ("dense",)
_VECTORS = "index.faiss"
_TOGETHER = 8  # measured: fewer are faster one by one


class Options(Table):
    """What FAISS builds, and how widely it searches; absent: what FAISS does by itself."""

    factory: str = "Flat"  # for example "IVF256,Flat", "HNSW32", "OPQ16,IVF256,PQ16"
    nprobe: Positive | None = None  # lists visited, for IVF
    ef_search: Positive | None = None  # candidates kept, for HNSW


def write(vectors: NDArray[np.float32], folder: Path, options: Options, document_ids: Sequence[str]) -> dict[str, Any]:
    """Index vectors (N, D) into a folder.

    InputError for a factory string that FAISS does not know, for search parameters that it does not have, and for too
    few vectors to train on.
    """
    vectors = np.ascontiguousarray(vectors, np.float32)
    try:
        index = faiss.index_factory(vectors.shape[1], options.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(f"index.factory: FAISS cannot build {options.factory!r} ({_reason(error)}).") from None
    _set_search(index, options)  # saved with the index
    if not index.is_trained:
        _train(index, vectors, options.factory)
    try:
        index.add(vectors)
    except RuntimeError as error:
        raise InputError(f"index.factory: FAISS cannot fill {options.factory!r} ({_reason(error)}).") from None
    faiss.write_index(index, str(folder / _VECTORS))
    return {}


class FaissIndex:
    """A built index, in memory."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> None:
        try:
            self._index = faiss.read_index(str(folder / _VECTORS))
        except RuntimeError as error:
            raise InputError(f"{folder / _VECTORS} cannot be read ({_reason(error)}); build it again.") from None
        if self._index.ntotal != manifest["documents"]:
            raise InputError(
                f"{folder}: {self._index.ntotal} vectors and a manifest of {manifest['documents']} documents do not "
                "belong together; build it again."
            )
        self._threads = threads
        # So many queries read the vectors once for all, in one matrix product; FAISS 1.15 does so from some 300 on.
        together = _TOGETHER * manifest["dimension"]
        faiss.cvar.distance_compute_blas_threshold = min(together, faiss.cvar.distance_compute_blas_threshold)

    def search(self, vectors: NDArray[np.float32], k: int) -> Hits:
        """The best `k` documents of each query by inner product; an approximate index may find fewer."""
        with _using(self._threads):
            scores, rows = self._index.search(np.ascontiguousarray(vectors, np.float32), k)
        return in_order(rows, scores)


load = FaissIndex


def _set_search(index: Any, options: Options) -> None:
    """Set the search parameters that are given; InputError if the index has no such parameter."""
    for key, name in (("nprobe", "nprobe"), ("ef_search", "efSearch")):
        value = getattr(options, key)
        if value is None:
            continue
        try:
            faiss.ParameterSpace().set_index_parameter(index, name, value)
        except RuntimeError:
            raise InputError(f"index.{key}: the factory {options.factory!r} has no such parameter; drop it.") from None


def _train(index: Any, vectors: NDArray[np.float32], factory: str) -> None:
    try:
        index.train(vectors)
    except RuntimeError as error:
        needed = re.search(r"number of (?:clusters|centroids) \((\d+)\)", str(error))
        why = f"at least {needed[1]} are needed" if needed else _reason(error)
        raise InputError(
            f"index.factory: {factory!r} cannot be trained on {len(vectors)} vectors: {why}; "
            "choose fewer lists or centroids, or the factory 'Flat'."
        ) from None


def _reason(error: RuntimeError) -> str:
    """What FAISS says, without the place in its source."""
    return str(error).strip().splitlines()[-1].split(": ", 1)[-1].removeprefix("Error: ")


@contextmanager
def _using(threads: int) -> Iterator[None]:
    """Let FAISS use so many threads, and put the process's number back."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
