"""Keys of texts: what the score store knows a query or a document by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def text_keys(texts: Iterable[str]) -> NDArray[np.uint64]:
    """The 64-bit blake2b hash of each text, as the teacher reads it (prompt and title included).

    Shapes: returns (n,) uint64. Two of 100 million texts share a key with a probability of 0.03%.
    """
    keys = bytearray()
    for text in texts:
        keys += hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.frombuffer(keys, dtype="<u8").astype(np.uint64)


def first_of_each(left: NDArray[np.uint64], right: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The places, in order, where a pair of keys stands that stands nowhere before. Shapes: (n,), (n,) to (m,)."""
    order = np.lexsort((right, left))  # stable
    left, right = left[order], right[order]
    fresh = np.ones(len(order), np.bool_)
    fresh[1:] = (left[1:] != left[:-1]) | (right[1:] != right[:-1])
    return np.sort(order[fresh])
