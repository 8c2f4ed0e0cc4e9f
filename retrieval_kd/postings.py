"""Postings in windows of documents, and the exact search through them.

A term's postings are in the order of rows and cut into segments, one for each window of documents in which the term
occurs, with the largest weight of each. A posting is the document's place in its window and a weight: 3 bytes when
weights are quantised. A search adds up one window at a time, in sums that stay in the processor's cache:

1. A window whose largest weights cannot reach the k-th best score so far is left out.
2. Terms are added in the order of what they can contribute at most, until a document that none of them has cannot win.
3. Once few documents still can, the other terms are looked up for those alone.

What is left out could not have been among the results, so that they are those of the full product. Every document's
terms are added in one order, in float32, so that equal documents have equal scores.
Source: windows and their bounds: Mallia, Suel and Tonellotto 2024, arXiv:2405.01117 (BMP, whose blocks are much
smaller); terms that need not be added: Turtle and Flood 1995 (MaxScore).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

_LEAST = np.nextafter(np.float32(0), np.float32(1))  # the smallest score of a result
_EPSILON = 2.0**-23  # of float32
_LOOK_UP = 100  # additions that a look-up counts as, chosen by the time of whole queries
_SCAN = 8  # documents still able to win are looked for once this part of a window was added since
_FIRST = 4  # windows that are searched first, to find a high k-th score
_BLOCK = 128  # sums that are compared with the k-th score at once
Array = NDArray[Any]


class Postings(NamedTuple):
    """The arrays of an index of V terms, with P postings in E segments.

    Shapes: starts (V + 1,) int64, a term's first segment; windows (E,) int32, the segment's window; firsts (E + 1,)
    int64, its first posting; peaks (E,) its largest weight; places (P,) uint16, the document's place in its window;
    weights (P,) uint8 or float32, all above 0.
    """

    starts: NDArray[np.int64]
    windows: NDArray[np.int32]
    firsts: NDArray[np.int64]
    peaks: Array
    places: NDArray[np.uint16]
    weights: Array


@numba.njit(nogil=True, cache=True)
def count(indptr: Array, columns: Array, window: int, terms: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Segments (V,) and postings (V,) of each term, of document vectors in CSR form."""
    segments, postings, last = np.zeros(terms, np.int64), np.zeros(terms, np.int64), np.full(terms, -1, np.int64)
    for row in range(len(indptr) - 1):
        for term in columns[indptr[row] : indptr[row + 1]]:
            postings[term] += 1
            if last[term] != row // window:
                last[term] = row // window
                segments[term] += 1
    return segments, postings


@numba.njit(nogil=True, cache=True)
def fill(
    indptr: Array, columns: Array, values: Array, window: int, next_posting: NDArray[np.int64], postings: Postings
) -> None:
    """Fill `windows`, `firsts`, `peaks`, `places` and `weights`, whose sizes `count` gave.

    `next_posting` (V,) is each term's first posting, and is used up.
    """
    starts, windows, firsts, peaks, places, weights = postings
    segment, last = starts[:-1] - 1, np.full(len(starts) - 1, -1, np.int64)
    for row in range(len(indptr) - 1):
        for place in range(indptr[row], indptr[row + 1]):
            term = columns[place]
            posting = next_posting[term]
            next_posting[term] += 1
            if last[term] != row // window:
                last[term] = row // window
                segment[term] += 1
                windows[segment[term]] = row // window
                firsts[segment[term]] = posting
                peaks[segment[term]] = 0
            places[posting] = row % window
            weights[posting] = values[place]
            peaks[segment[term]] = max(peaks[segment[term]], values[place])
    firsts[-1] = len(weights)


@numba.njit(nogil=True, cache=True)
def search(
    indptr: Array,
    columns: Array,
    factors: NDArray[np.float32],
    begin: int,
    end: int,
    documents: int,
    window: int,
    postings: Postings,
    rows: NDArray[np.int32],
    scores: NDArray[np.float32],
) -> None:
    """Write the best documents of the queries begin : end, in CSR form, into rows and scores (Q, k); ties by row.

    A weight of a document counts `factors` times itself. `rows` and `scores` hold -1 and -inf before, and after where
    no term is shared.
    """
    size = min(window, documents)
    bits, able = np.zeros(((size + _BLOCK - 1) // _BLOCK, _BLOCK), np.int32), np.empty(size, np.uint16)
    for query in range(begin, end):
        some = slice(indptr[query], indptr[query + 1])
        found = _search_one(
            columns[some], factors[some], documents, window, postings, bits, able, rows[query], scores[query]
        )
        _sort(rows[query], scores[query], found)


@numba.njit(nogil=True, cache=True)
def _search_one(
    columns: Array,
    factors: NDArray[np.float32],
    documents: int,
    window: int,
    postings: Postings,
    bits: NDArray[np.int32],
    able: NDArray[np.uint16],
    rows: NDArray[np.int32],
    scores: NDArray[np.float32],
) -> int:
    """Make a heap of the best documents of one query, the worst first; return their number.

    `bits` (_, _BLOCK) are those of a window's sums, all 0 before and after; what the last block has too many stays 0.
    Floats from 0 on rise with their bits, of which a processor finds the largest in a third of the time.
    """
    sums = bits.view(np.float32).reshape(-1)
    starts, windows, firsts, peaks, places, weights = postings
    bounds = np.zeros(len(columns), np.float32)
    for term in range(len(columns)):
        for segment in range(starts[columns[term]], starts[columns[term] + 1]):
            bounds[term] = max(bounds[term], factors[term] * np.float32(peaks[segment]))
    order = np.argsort(-bounds)[: (bounds > 0).sum()]
    # Bounds are added in another order than weights, which makes sums differ by less than this.
    slack = np.float32(bounds.astype(np.float64).sum() * (len(order) + 2) * _EPSILON)
    ceilings = np.full((documents + window - 1) // window, slack)
    segments = np.full((len(ceilings), len(order)), -1, np.int64)
    for number, term in enumerate(order):
        for segment in range(starts[columns[term]], starts[columns[term] + 1]):
            segments[windows[segment], number] = segment
            ceilings[windows[segment]] += factors[term] * np.float32(peaks[segment])

    found, threshold = 0, _LEAST
    present, factor = np.empty(len(order), np.int64), np.empty(len(order), np.float32)
    rest = np.empty(len(order) + 1, np.float32)  # what the terms from each one on can contribute at most
    for number in _best_first(ceilings):
        if ceilings[number] < threshold:
            continue
        terms, left = 0, 0
        for term in range(len(order)):
            segment = segments[number, term]
            if segment >= 0:
                present[terms], factor[terms] = segment, factors[order[term]]
                left += firsts[segment + 1] - firsts[segment]
                terms += 1
        rest[terms] = slack
        for term in range(terms - 1, -1, -1):
            rest[term] = rest[term + 1] + factor[term] * np.float32(peaks[present[term]])

        base, length = number * window, min(window, documents - number * window)
        term, added, listed = 0, length, -1
        while term < terms:
            if rest[term] < threshold and added * _SCAN >= length:
                few = min((left - 1) // ((terms - term) * _LOOK_UP), len(able))
                listed = _list_from(bits, threshold - rest[term], able[:few])
                if listed >= 0:
                    break
                added = 0
            first, end = firsts[present[term]], firsts[present[term] + 1]
            _add(places[first:end], weights[first:end], factor[term], sums)
            added += end - first
            left -= end - first
            term += 1
        if listed < 0:
            found = _collect(bits, threshold, base, rows, scores, found)
            listed = 0
        while term < terms and listed:
            first, end = firsts[present[term]], firsts[present[term] + 1]
            _look_up(able[:listed], places[first:end], weights[first:end], factor[term], sums)
            term += 1
            listed = _keep_from(able[:listed], sums, threshold - rest[term])
        for place in able[:listed]:
            found = _keep(rows, scores, found, base + place, sums[place])
        if found == len(rows):
            threshold = scores[0]
        sums[:length] = 0
    return found


@numba.njit(nogil=True, cache=True)
def _best_first(ceilings: NDArray[np.float32]) -> NDArray[np.int64]:
    """The windows, the few most promising first and the others as they lie in memory."""
    order = np.argsort(-ceilings)
    order[_FIRST:].sort()
    return order


@numba.njit(nogil=True, cache=True)
def _add(places: NDArray[np.uint16], weights: Array, factor: Any, sums: NDArray[np.float32]) -> None:
    """Add one term's weights to the sums."""
    for posting in range(len(places)):
        sums[places[posting]] += factor * np.float32(weights[posting])


@numba.njit(nogil=True, cache=True)
def _most(block: NDArray[np.int32]) -> Any:
    """The largest bits of a block; of a length known beforehand, so that it is taken of many at once."""
    most = block[0]
    for place in range(_BLOCK):
        most = max(most, block[place])
    return most


@numba.njit(nogil=True, cache=True)
def _list_from(bits: NDArray[np.int32], need: Any, able: NDArray[np.uint16]) -> int:
    """Put the places of sums of at least `need`, above 0, into `able`; return how many, -1 if that has no room."""
    least, found = np.float32(need).view(np.int32), 0
    for number in range(len(bits)):
        if _most(bits[number]) >= least:
            for place in range(_BLOCK):
                if bits[number, place] >= least:
                    if found == len(able):
                        return -1
                    able[found] = number * _BLOCK + place
                    found += 1
    return found


@numba.njit(nogil=True, cache=True)
def _collect(
    bits: NDArray[np.int32],
    threshold: Any,
    base: int,
    rows: NDArray[np.int32],
    scores: NDArray[np.float32],
    found: int,
) -> int:
    """Put every document whose sum may be among the best into the heap; return how many that has then."""
    least = np.float32(threshold).view(np.int32)
    for number in range(len(bits)):
        if _most(bits[number]) >= least:
            for place in range(_BLOCK):
                if bits[number, place] >= least:
                    score: Any = np.int32(bits[number, place]).view(np.float32)
                    found = _keep(rows, scores, found, base + number * _BLOCK + place, score)
                    if found == len(rows):
                        least = np.float32(scores[0]).view(np.int32)
    return found


@numba.njit(nogil=True, cache=True)
def _keep_from(able: NDArray[np.uint16], sums: NDArray[np.float32], need: Any) -> int:
    """Keep the places of sums of at least `need`; return how many."""
    kept = 0
    for place in able:
        if sums[place] >= need:
            able[kept] = place
            kept += 1
    return kept


@numba.njit(nogil=True, cache=True)
def _look_up(
    able: NDArray[np.uint16], places: NDArray[np.uint16], weights: Array, factor: Any, sums: NDArray[np.float32]
) -> None:
    """Add one term's weights to the sums of the places `able`; these and `places` rise."""
    low = 0
    for place in able:
        high, step = low, 1
        while high < len(places) and places[high] < place:  # gallops, then halves
            low = high + 1
            high += step
            step *= 2
        high = min(high, len(places))
        while low < high:
            middle = (low + high) >> 1
            if places[middle] < place:
                low = middle + 1
            else:
                high = middle
        if low == len(places):
            return
        if places[low] == place:
            sums[place] += factor * np.float32(weights[low])


@numba.njit(nogil=True, cache=True)
def _worse(score: float, row: int, other_score: float, other_row: int) -> bool:
    return score < other_score or (score == other_score and row > other_row)


@numba.njit(nogil=True, cache=True)
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


@numba.njit(nogil=True, cache=True)
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


@numba.njit(nogil=True, cache=True)
def _sort(rows: Array, scores: Array, found: int) -> None:
    """Turn the heap into the list, best first: the worst goes to the end, again and again."""
    for size in range(found - 1, 0, -1):
        row, score = rows[size], scores[size]
        rows[size], scores[size] = rows[0], scores[0]
        _sink(rows, scores, size, row, score)
