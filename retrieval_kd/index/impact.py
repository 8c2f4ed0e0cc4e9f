"""Our exact inverted index: memory-mapped arrays, and block-max pruning that never loses a result.

Rows are cut into blocks of consecutive documents. A term has a list of blocks, each with the largest weight in
it, and the postings of each block. A query first sums the largest weights of every block: what no document of
the block can exceed. Blocks are then visited in falling order of this bound, a batch at a time, until the next
bound is below the k-th score. Sums run over a query's terms in one order everywhere, and rounding is monotone,
so a bound is never below a score that it bounds, and equal documents have equal scores.
Source: Mallia, Suel and Tonellotto 2024, arXiv:2405.01117; the batches, whose sums stay in the processor's
cache, are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numba
import numpy as np
from numpy.typing import NDArray

from retrieval_kd.index import quantise
from retrieval_kd.tables import Table
from retrieval_kd.types import Hits, InputError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

VECTORS = ("sparse",)
_BUCKETS = 1024  # of bounds, to visit blocks in falling order without sorting them all
_FIRST, _BATCHES = 16, 4  # blocks in the first batch, and how many batches there are, each twice as large
_WINDOW = 8192  # documents whose sums are in the processor's nearest cache
_DENSE = 0.25  # the share of a window's blocks from which all its postings are added
# Term t has the entries first[t] : first[t + 1]; entry e is the block blocks[e] with the largest weight maxima[e]
# and the postings starts[e] : starts[e + 1]; posting p is a document, modulo 2**16 places[p], with weights[p].
_ARRAYS = ("first", "blocks", "maxima", "starts", "places", "weights")
Array = NDArray[Any]


class Options(Table):
    """How weights are kept, and how many documents share a bound."""

    weights: Literal["uint8", "float32"] = "uint8"  # uint8: 255 levels up to the collection's largest weight
    block: Literal[8, 16, 32, 64, 128, 256] = 32  # smaller: tighter bounds, a larger index


def write(vectors: csr_array, folder: Path, options: Options, document_ids: Sequence[str]) -> dict[str, Any]:
    """Index vectors (N, V) into a folder."""
    by_term = vectors.tocsc()  # rows rise within a term
    weights, scale, largest = by_term.data, 1.0, float(by_term.data.max(initial=0))
    if options.weights == "uint8":
        weights, scale = quantise(weights)
    arrays = _cut(by_term.indptr.astype(np.int64), by_term.indices, weights, options.block)
    for name, array in zip(_ARRAYS, arrays, strict=True):
        np.save(folder / f"{name}.npy", _narrow(array) if name in ("blocks", "starts") else array)
    return {"scale": scale, "largest": largest, "postings": len(weights)}


class ImpactIndex:
    """A built index, memory-mapped; a search spreads its queries over `threads`."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> None:
        try:
            arrays = [np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in _ARRAYS]
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} cannot be read ({error}); build it again.") from None
        first, blocks, maxima, starts, places, weights = arrays
        if not (
            len(first) == manifest["dimension"] + 1
            and first[-1] == len(blocks) == len(maxima) == len(starts) - 1
            and starts[-1] == len(places) == len(weights) == manifest["postings"]
        ):
            raise InputError(f"{folder}: its arrays do not belong together; build it again.")
        self._arrays, self._manifest, self._threads = arrays, manifest, threads

    def search(self, vectors: csr_array, k: int) -> Hits:
        """The best `k` documents of each query by inner product, those that share a term with it."""
        hits, queries = Hits.none(vectors.shape[0], k), vectors.shape[0]
        query = (vectors.indptr.astype(np.int64), vectors.indices.astype(np.int32))
        if vectors.data.sum(dtype=np.float64) * self._manifest["largest"] > np.finfo(np.float32).max:
            raise InputError("the query vectors have weights so large that scores are no float32 numbers; divide them.")
        factors = vectors.data.astype(np.float32) * np.float32(self._manifest["scale"])
        size = (self._manifest["documents"], self._manifest["block"])

        def run(begin: int, end: int) -> None:
            search: Any = _search  # numba's types know no *
            search(*query, factors, begin, end, *self._arrays, *size, hits.rows, hits.scores)

        if self._threads == 1 or queries == 1:
            run(0, queries)
            return hits
        cuts = np.linspace(0, queries, min(self._threads, queries) + 1).astype(int)
        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(run, cuts[:-1], cuts[1:]))
        return hits


load = ImpactIndex


def _narrow(array: Array) -> Array:
    """Unsigned integers of the fewest bytes that hold the values (a block 2, as a rule; a start 4)."""
    return array.astype(np.min_scalar_type(max(array.max(initial=0), 2**8)))


@numba.njit(cache=True, nogil=True)
def _cut(indptr: Array, rows: Array, weights: Array, block: int) -> tuple[Array, Array, Array, Array, Array, Array]:
    """The index's arrays (_ARRAYS) from postings in the order of terms, then rows."""
    terms = len(indptr) - 1
    first = np.zeros(terms + 1, np.int64)
    for term in range(terms):
        last, count = -1, 0
        for posting in range(indptr[term], indptr[term + 1]):
            if rows[posting] // block != last:
                last = rows[posting] // block
                count += 1
        first[term + 1] = first[term] + count
    entries = first[terms]
    blocks, starts = np.empty(entries, np.uint32), np.empty(entries + 1, np.int64)
    maxima, places = np.zeros(entries, weights.dtype), np.empty(len(rows), np.uint16)
    entry = -1
    for term in range(terms):
        last = -1
        for posting in range(indptr[term], indptr[term + 1]):
            if rows[posting] // block != last:
                last = rows[posting] // block
                entry += 1
                blocks[entry], starts[entry] = last, posting
            maxima[entry] = max(maxima[entry], weights[posting])
            places[posting] = rows[posting] & 0xFFFF
    starts[entries] = len(rows)
    return first, blocks, maxima, starts, places, weights


@numba.njit(cache=True, nogil=True)
def _search(
    query_indptr: Array,
    query_terms: Array,
    factors: Array,
    begin: int,
    end: int,
    first: Array,
    blocks: Array,
    maxima: Array,
    starts: Array,
    places: Array,
    weights: Array,
    documents: int,
    block: int,
    rows: Array,
    scores: Array,
) -> None:
    """Fill rows and scores (Q, K) of the queries begin : end."""
    count, k, wide = (documents + block - 1) // block, rows.shape[1], _WINDOW // block
    bounds = np.empty(count, np.float32)
    order = np.empty(count, np.int32)
    batch = np.empty(max(_first(k, block) << (_BATCHES - 1), wide), np.int32)
    sums = np.empty(len(batch) * block, np.float32)
    for query in range(begin, end):
        span = slice(query_indptr[query], query_indptr[query + 1])
        terms, factor, best_rows, best = query_terms[span], factors[span], rows[query], scores[query]
        bounds[:] = 0
        for place in range(len(terms)):
            for entry in range(first[terms[place]], first[terms[place] + 1]):
                bounds[blocks[entry]] += factor[place] * np.float32(maxima[entry])
        upto, visited, found = _falling(bounds, order), 0, 0
        # The most promising blocks first: they make the k-th score high.
        for number in range(_BATCHES):
            needed = best[0] if found == k else np.float32(0)
            taken = 0
            while visited < upto and taken < _first(k, block) << number:
                if bounds[order[visited]] >= needed:  # at the k-th score itself a lower row may be better
                    batch[taken] = order[visited]
                    bounds[order[visited]] = -1
                    taken += 1
                visited += 1
            batch[:taken].sort()
            cursors = first[terms]
            _sum(terms, factor, batch[:taken], sums, cursors, first, blocks, starts, places, weights, block)
            found = _collect(batch[:taken], sums, False, best_rows, best, found, block)
        # Then whatever may still matter, in the order of rows.
        cursors = first[terms]
        for window in range(0, count if visited < upto else 0, wide):
            needed = best[0] if found == k else np.float32(0)
            taken = 0
            for number in range(window, min(window + wide, count)):
                if bounds[number] >= needed and bounds[number] > 0:
                    batch[taken] = number
                    taken += 1
            if taken > _DENSE * wide:
                _sum_all(terms, factor, window, window + wide, sums, cursors, first, blocks, starts, places, weights)
                found = _collect(batch[:taken], sums, True, best_rows, best, found, block)
            elif taken:
                _sum(terms, factor, batch[:taken], sums, cursors, first, blocks, starts, places, weights, block)
                found = _collect(batch[:taken], sums, False, best_rows, best, found, block)
        _sort(best_rows, best, found)


@numba.njit(cache=True, nogil=True)
def _first(k: int, block: int) -> int:
    """Blocks in the first batch."""
    return max(_FIRST, 2 * k // block)


@numba.njit(cache=True, nogil=True)
def _falling(bounds: Array, order: Array) -> int:
    """Write the blocks with a bound above 0 into `order`, by bucket of falling bound; return their number."""
    largest = bounds.max()
    if largest <= 0:
        return 0
    places = np.zeros(_BUCKETS + 1, np.int64)
    for block in range(len(bounds)):
        if bounds[block] > 0:
            places[_BUCKETS - int(bounds[block] / largest * (_BUCKETS - 1))] += 1
    places[1:] = np.cumsum(places)[:-1]
    total = 0
    for block in range(len(bounds)):
        if bounds[block] > 0:
            bucket = _BUCKETS - int(bounds[block] / largest * (_BUCKETS - 1))
            order[places[bucket]] = block
            places[bucket] += 1
            total += 1
    return total


@numba.njit(cache=True, nogil=True)
def _sum(
    terms: Array,
    factor: Array,
    batch: Array,
    sums: Array,
    cursors: Array,
    first: Array,
    blocks: Array,
    starts: Array,
    places: Array,
    weights: Array,
    block: int,
) -> None:
    """Write the scores of the blocks `batch` (rising) into `sums`, one after another; cursors move on."""
    sums[: len(batch) * block] = 0
    for term in range(len(terms)):
        entry, stop = cursors[term], first[terms[term] + 1]
        weight = factor[term]
        for place in range(len(batch)):
            entry = _seek(blocks, entry, stop, batch[place])
            if entry == stop:
                break
            if blocks[entry] == batch[place]:
                for posting in range(starts[entry], starts[entry + 1]):
                    sums[place * block + (places[posting] & (block - 1))] += weight * np.float32(weights[posting])
        cursors[term] = entry


@numba.njit(cache=True, nogil=True)
def _sum_all(
    terms: Array,
    factor: Array,
    window: int,
    upto: int,
    sums: Array,
    cursors: Array,
    first: Array,
    blocks: Array,
    starts: Array,
    places: Array,
    weights: Array,
) -> None:
    """Write the scores of a window, the blocks window : upto, into `sums`; cursors move on."""
    sums[:_WINDOW] = 0
    for term in range(len(terms)):
        stop = first[terms[term] + 1]
        begin = _seek(blocks, cursors[term], stop, window)
        end = _seek(blocks, begin, stop, upto)
        weight = factor[term]
        for posting in range(starts[begin], starts[end]):
            sums[places[posting] & (_WINDOW - 1)] += weight * np.float32(weights[posting])
        cursors[term] = end


@numba.njit(cache=True, nogil=True)
def _collect(batch: Array, sums: Array, whole: bool, rows: Array, scores: Array, found: int, block: int) -> int:
    """Keep the best documents of the blocks `batch`, whose sums are one after another or a whole window's."""
    k = len(rows)
    for place in range(len(batch)):
        base = (batch[place] * block) % _WINDOW if whole else place * block
        needed = scores[0] if found == k else np.float32(0)
        near = False
        for inside in range(base, base + block):
            near |= sums[inside] >= needed
        if near:
            for inside in range(block):
                score = sums[base + inside]
                if score > 0 and (found < k or score >= scores[0]):
                    found = _keep(rows, scores, found, batch[place] * block + inside, score)
    return found


@numba.njit(cache=True, nogil=True)
def _seek(blocks: Array, entry: int, stop: int, wanted: int) -> int:
    """The first entry from `entry` on whose block is not below `wanted`, or `stop`: gallops, then halves."""
    if entry == stop or blocks[entry] >= wanted:
        return entry
    step = 1
    while entry + step < stop and blocks[entry + step] < wanted:
        entry += step
        step *= 2
    low, high = entry + 1, min(entry + step, stop)
    while low < high:
        middle = (low + high) // 2
        if blocks[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@numba.njit(cache=True, nogil=True)
def _worse(score: float, row: int, other_score: float, other_row: int) -> bool:
    return score < other_score or (score == other_score and row > other_row)


@numba.njit(cache=True, nogil=True)
def _keep(rows: Array, scores: Array, found: int, row: int, score: float) -> int:
    """Put a document into the heap, whose root is the worst; return how many it has then."""
    if found == len(rows):
        if _worse(scores[0], rows[0], score, row):
            _sink(rows, scores, found, row, score)
        return found
    place = found
    while place > 0 and _worse(score, row, scores[(place - 1) // 2], rows[(place - 1) // 2]):
        parent = (place - 1) // 2
        rows[place], scores[place] = rows[parent], scores[parent]
        place = parent
    rows[place], scores[place] = row, score
    return found + 1


@numba.njit(cache=True, nogil=True)
def _sink(rows: Array, scores: Array, size: int, row: int, score: float) -> None:
    """Put a document in the place of the root, and let it sink to its own."""
    place = 0
    while 2 * place + 1 < size:
        child = 2 * place + 1
        if child + 1 < size and _worse(scores[child + 1], rows[child + 1], scores[child], rows[child]):
            child += 1
        if not _worse(scores[child], rows[child], score, row):
            break
        rows[place], scores[place] = rows[child], scores[child]
        place = child
    rows[place], scores[place] = row, score


@numba.njit(cache=True, nogil=True)
def _sort(rows: Array, scores: Array, found: int) -> None:
    """Turn the heap into the list, best first: the worst goes to the end, again and again."""
    for size in range(found - 1, 0, -1):
        row, score = rows[size], scores[size]
        rows[size], scores[size] = rows[0], scores[0]
        _sink(rows, scores, size, row, score)
