"""Our exact inverted index: memory-mapped arrays of postings, searched by our own loops (numba).

Weights are quantised to 8 bits, or kept; results are those of the full product with the weights as they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.lib.format import open_memmap
from pydantic import Field

from retrieval_kd import postings as kernels
from retrieval_kd.index import quantise
from retrieval_kd.postings import Postings
from retrieval_kd.tables import Table
from retrieval_kd.types import Hits, InputError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

VECTORS = ("sparse",)


class Options(Table):
    """How weights are kept, and how many documents a window has."""

    weights: Literal["uint8", "float32"] = "uint8"  # uint8: 255 levels up to the collection's largest weight
    window: Annotated[int, Field(ge=1, le=2**16)] = 2**16  # documents that are added up at once


def write(vectors: csr_array, folder: Path, options: Options, document_ids: Sequence[str]) -> dict[str, Any]:
    """Index vectors (N, V) into a folder; the arrays are filled on disk."""
    weights, scale = quantise(vectors.data) if options.weights == "uint8" else (vectors.data, 1.0)
    segments, counts = kernels.count(vectors.indptr, vectors.indices, options.window, vectors.shape[1])
    starts, firsts = (np.concatenate([[0], np.cumsum(sizes)]) for sizes in (segments, counts))
    arrays = {
        "starts": (len(starts), np.int64),
        "windows": (starts[-1], np.int32),
        "firsts": (starts[-1] + 1, np.int64),
        "peaks": (starts[-1], weights.dtype),
        "places": (len(weights), np.uint16),
        "weights": (len(weights), weights.dtype),
    }
    made = Postings(
        **{
            name: np.asarray(open_memmap(folder / f"{name}.npy", "w+", dtype, (int(size),)))
            for name, (size, dtype) in arrays.items()
        }
    )
    made.starts[:] = starts
    kernels.fill(vectors.indptr, vectors.indices, weights, options.window, firsts[:-1], made)
    return {"scale": scale, "largest": float(vectors.data.max(initial=0)), "postings": len(weights)}


class ImpactIndex:
    """A built index, memory-mapped; a search spreads its queries over `threads`."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> None:
        try:
            # as arrays: numba would look up the type of a memmap anew at each call
            arrays = [np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in Postings._fields]
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} cannot be read ({error}); build it again.") from None
        starts, windows, firsts, peaks, places, weights = self._postings = Postings(*arrays)
        if not (
            len(starts) == manifest["dimension"] + 1
            and starts[-1] == len(windows) == len(peaks) == len(firsts) - 1
            and firsts[-1] == len(places) == len(weights) == manifest["postings"]
        ):
            raise InputError(f"{folder}: its arrays do not belong together; build it again.")
        self._manifest, self._threads = manifest, threads

    def search(self, vectors: csr_array, k: int) -> Hits:
        """The best `k` documents of each query by inner product, those that share a term with it."""
        hits, queries = Hits.none(vectors.shape[0], k), vectors.shape[0]
        if vectors.data.sum(dtype=np.float64) * self._manifest["largest"] > np.finfo(np.float32).max:
            raise InputError("the query vectors have weights so large that scores are no float32 numbers; divide them.")
        indptr, columns = vectors.indptr.astype(np.int64), vectors.indices.astype(np.int32)
        factors = vectors.data.astype(np.float32) * np.float32(self._manifest["scale"])
        size = (self._manifest["documents"], self._manifest["window"])

        def run(begin: int, end: int) -> None:
            kernels.search(indptr, columns, factors, begin, end, *size, self._postings, hits.rows, hits.scores)

        if self._threads == 1 or queries == 1:
            run(0, queries)
            return hits
        cuts = np.linspace(0, queries, min(self._threads, queries) + 1).astype(int)
        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(run, cuts[:-1], cuts[1:]))
        return hits


load = ImpactIndex
