"""Served tables, with numpy alone: a text is its terms, each with its weight, or a sum of rows.

One file holds the arrays. Terms: `weights` (V,) float32. Rows: `rows` (V, D) float32, or int8 with `scales` (V,)
float32; for n-grams their `keys` (V,) uint64, rising; and `layer0`, `layer1`, ... (E, D) float32 of a small network
that the sum goes through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.ngrams import find_ngrams

Precision = Literal["fp32", "int8"]
Vector = NDArray[np.float32]
Terms = tuple[NDArray[np.int64], Vector]  # those of one text, rising, and their weights


def open_table(path: Path, settings: Mapping[str, Any]) -> Callable[[Sequence[Sequence[int]]], Any]:
    """What a table makes of the token ids of texts; `settings` are those of n-grams and network.

    The function gives vectors (n, D) float32, or, of a table of weights, the Terms of each text.
    """
    with np.load(path, allow_pickle=False) as arrays:
        found = dict(arrays)
    return TermTable(found["weights"]).terms if "weights" in found else StaticTable(found, **settings).vectors


class TermTable:
    """The query side of an inference-free student: the weight of each term that a text consists of, once."""

    def __init__(self, weights: Vector) -> None:
        self._weights = weights

    def terms(self, token_ids: Sequence[Sequence[int]]) -> list[Terms]:
        """The terms of texts given by their token ids, less those of weight 0."""
        return [self._look_up(ids) for ids in token_ids]

    def _look_up(self, ids: Sequence[int]) -> Terms:
        terms = np.array(sorted(set(ids)), np.int64)
        weights = self._weights[terms]
        active = weights != 0
        return (terms, weights) if active.all() else (terms[active], weights[active])


class StaticTable:
    """The rows of tokens or n-grams, and what is made of their sum; see `LexicalEmbedding` for the network."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]], longest: int = 1, residual: bool = False) -> None:
        self._rows, self._scales, self._keys = arrays["rows"], arrays.get("scales"), arrays.get("keys")
        self._layers = [arrays[f"layer{number}"] for number in range(sum(name.startswith("layer") for name in arrays))]
        self._longest, self._residual = longest, residual

    def vectors(self, token_ids: Sequence[Sequence[int]]) -> Vector:
        """Vectors of unit length (n, D) of texts given by their token ids; of none that is known, zeros."""
        width = len(self._layers[-1]) if self._layers else self._rows.shape[1]
        vectors = np.empty((len(token_ids), width), np.float32)  # np.stack takes 6 microseconds for one
        for place, ids in enumerate(token_ids):
            vectors[place] = self._vector(np.array(ids, np.int64))
        return vectors

    def _vector(self, ids: NDArray[np.int64]) -> Vector:
        places = ids if self._keys is None else find_ngrams(ids, self._keys, self._longest)
        rows = self._rows[places]
        x = _unit(rows.sum(0) if self._scales is None else self._scales[places] @ rows.astype(np.float32))
        hidden = x
        for number, layer in enumerate(self._layers):
            if number or not self._residual:
                hidden = _unit(np.maximum(hidden, 0.0))
            hidden = layer @ hidden
        return _unit(x + hidden if self._residual else hidden) if self._layers else x


def _unit(vector: Vector) -> Vector:
    length = float(vector @ vector) ** 0.5
    return vector / np.float32(max(length, 1e-12))


def table_arrays(
    rows: Vector, form: Precision, keys: NDArray[np.uint64] | None = None, layers: Sequence[Vector] = ()
) -> dict[str, NDArray[Any]]:
    """The arrays of a table; int8 rows have each a scale, so that its largest number is 127."""
    arrays: dict[str, NDArray[Any]] = {"rows": rows}
    if form == "int8":
        scales = (np.abs(rows).max(1) / 127).astype(np.float32)
        whole = np.rint(rows / np.where(scales > 0, scales, 1)[:, None])
        arrays = {"rows": whole.astype(np.int8), "scales": scales}
    arrays |= {} if keys is None else {"keys": keys}
    return arrays | {f"layer{number}": layer for number, layer in enumerate(layers)}
