"""Dense indexes: any FAISS factory string, compared by inner product; of signs alone, by Hamming distance."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval_kd.index import BLOCK, Vectors, in_order
from retrieval_kd.sample import spread
from retrieval_kd.tables import Positive, Table
from retrieval_kd.types import Hits, InputError

VECTORS = ("dense", "binary")
_VECTORS = "index.faiss"
TRAINED = 2**18  # vectors of a large collection that quantisers and centroids are fitted to ...
_A_LIST = 64  # ... or so many for each list of IVF, if that is more
# So many queries read the vectors once for all, in one matrix product; FAISS 1.15 itself does so from some 300 on.
_TOGETHER = 8  # measured: fewer are faster one by one


class Options(Table):
    """What FAISS builds, and how widely it searches; absent: what FAISS does by itself."""

    factory: str = "Flat"  # for example "IVF256,Flat", "HNSW32", "OPQ16,IVF256,PQ16"; of binary vectors "IVF256"
    nprobe: Positive | None = None  # lists visited, for IVF
    ef_search: Positive | None = None  # candidates kept, for HNSW
    k_factor: Positive | None = None  # candidates a result that are scored again, for Refine


def write(vectors: Vectors, folder: Path, options: Options, document_ids: Sequence[str]) -> dict[str, Any]:
    """Index vectors (N, D) float32 or (N, D / 8) uint8 into a folder, BLOCK at a time: memory is that of the index.

    InputError for a factory string that FAISS does not know, for search parameters that it does not have, and for too
    few vectors to train on.
    """
    binary = getattr(vectors, "dtype", None) == np.uint8
    index = _make_binary(8 * vectors.shape[1], options.factory) if binary else _make(vectors.shape[1], options.factory)
    _set_search(index, options)  # saved with the index
    if not index.is_trained:
        _train(index, vectors, options.factory)
    try:
        for start in range(0, vectors.shape[0], BLOCK):
            index.add(np.ascontiguousarray(vectors[start : start + BLOCK], np.uint8 if binary else np.float32))
    except RuntimeError as error:
        raise InputError(f"index.factory: FAISS cannot fill {options.factory!r} ({_reason(error)}).") from None
    write_index: Any = faiss.write_index_binary if binary else faiss.write_index
    write_index(index, str(folder / _VECTORS))
    return {}


def estimate_bytes(options: Options, documents: int, width: int) -> int | None:
    """About the bytes of an index, on disk and in memory, before it is built; None where its kind is not known here."""
    index = _make(width, options.factory)
    fixed, each = _parts(faiss.downcast_index(index), width)
    return None if each is None else fixed + each * documents


def _parts(index: Any, width: int) -> tuple[int, int | None]:
    """Bytes that an index takes whatever its size (without small tables), and for each vector."""
    if isinstance(index, faiss.IndexPreTransform):
        inside = faiss.downcast_index(index.index)
        fixed, each = _parts(inside, inside.d)
        return fixed + 4 * width * inside.d, each
    if isinstance(index, faiss.IndexRefine):
        (fixed, each), (more, again) = (
            _parts(faiss.downcast_index(one), width) for one in (index.base_index, index.refine_index)
        )
        return fixed + more, None if each is None or again is None else each + again
    if isinstance(index, faiss.IndexHNSW):
        fixed, each = _parts(faiss.downcast_index(index.storage), width)
        hnsw: Any = index.hnsw
        links = 4 * hnsw.cum_nb_neighbors(1) + 12  # of the lowest level, and where they begin
        return fixed, None if each is None else each + links
    if isinstance(index, faiss.IndexIVF):
        return 4 * width * index.nlist, index.code_size + 8
    if isinstance(index, faiss.IndexFlatCodes):
        return 0, index.code_size
    return 0, None


def _make(width: int, factory: str) -> Any:
    try:
        return faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(f"index.factory: FAISS cannot build {factory!r} ({_reason(error)}).") from None


def _make_binary(bits: int, factory: str) -> Any:
    try:
        return faiss.index_binary_factory(bits, f"B{factory}")
    except RuntimeError as error:
        raise InputError(f"index.factory: FAISS cannot build {factory!r} ({_reason(error)}).") from None


class FaissIndex:
    """A built index, in memory."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> None:
        self._bits = manifest["dimension"] if manifest["vectors"] == "binary" else None
        try:
            read = faiss.read_index if self._bits is None else faiss.read_index_binary
            self._index = read(str(folder / _VECTORS))
        except RuntimeError as error:
            raise InputError(f"{folder / _VECTORS} cannot be read ({_reason(error)}); build it again.") from None
        if self._index.ntotal != manifest["documents"]:
            raise InputError(
                f"{folder}: {self._index.ntotal} vectors and a manifest of {manifest['documents']} documents do not "
                "belong together; build it again."
            )
        self._threads = threads
        self._together = _TOGETHER * manifest["dimension"]

    def search(self, vectors: NDArray[Any], k: int) -> Hits:
        """The best `k` documents of each query by inner product, of signs as +1 and -1; an approximate index may find
        fewer.
        """
        with _using(self._threads, self._together):
            if self._bits is None:
                scores, rows = self._index.search(np.ascontiguousarray(vectors, np.float32), k)
                return in_order(rows, scores)
            distances, rows = self._index.search(np.ascontiguousarray(vectors), k)
        return in_order(rows, (self._bits - 2 * distances).astype(np.float32))


load = FaissIndex


def _set_search(index: Any, options: Options) -> None:
    """Set the search parameters that are given; InputError if the index has no such parameter."""
    for key, name in (("nprobe", "nprobe"), ("ef_search", "efSearch")):
        value = getattr(options, key)
        if value is None:
            continue
        try:
            if isinstance(index, faiss.IndexBinary):
                _set_binary(index, key, name, value)
            else:
                faiss.ParameterSpace().set_index_parameter(index, name, value)
        except (RuntimeError, AttributeError):
            raise InputError(f"index.{key}: the factory {options.factory!r} has no such parameter; drop it.") from None
    if options.k_factor is not None:
        refine = faiss.downcast_index(index)
        if not isinstance(refine, faiss.IndexRefine):
            raise InputError(f"index.k_factor: the factory {options.factory!r} has no such parameter; drop it.")
        refine.k_factor = options.k_factor


def _set_binary(index: Any, key: str, name: str, value: int) -> None:
    """Set a parameter of a binary index, which FAISS's ParameterSpace does not know; AttributeError if it has none."""
    owner = index if key == "nprobe" else index.hnsw
    getattr(owner, name)  # a name that is not there would be set all the same
    setattr(owner, name, value)


def _train(index: Any, vectors: Vectors, factory: str) -> None:
    """Fit quantisers and centroids to the vectors, of a large collection to a sample at equal distances."""
    binary = isinstance(index, faiss.IndexBinary)
    inverted = index if binary else faiss.try_extract_index_ivf(index)
    rows = spread(vectors.shape[0], max(TRAINED, _A_LIST * getattr(inverted, "nlist", 0)))
    try:
        index.train(np.ascontiguousarray(vectors[np.array(rows, np.int64)], np.uint8 if binary else np.float32))
    except RuntimeError as error:
        needed = re.search(r"number of (?:clusters|centroids) \((\d+)\)", str(error))
        why = f"at least {needed[1]} are needed" if needed else _reason(error)
        raise InputError(
            f"index.factory: {factory!r} cannot be trained on {len(rows)} vectors: {why}; "
            "choose fewer lists or centroids, or the factory 'Flat'."
        ) from None


def _reason(error: RuntimeError) -> str:
    """What FAISS says, without the place in its source."""
    return str(error).strip().splitlines()[-1].split(": ", 1)[-1].removeprefix("Error: ")


@contextmanager
def _using(threads: int, together: int) -> Iterator[None]:
    """Let FAISS use so many threads, and one matrix product from `together` numbers of queries on; put both back.

    The second is one number of the process, no parameter of a search. Threads that search at once in indexes of two
    widths may meet each other's, and leave one of them set: that changes how fast a search is, not what it finds.
    """
    before = faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
    faiss.omp_set_num_threads(threads)
    faiss.cvar.distance_compute_blas_threshold = together
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before[0])
        faiss.cvar.distance_compute_blas_threshold = before[1]
