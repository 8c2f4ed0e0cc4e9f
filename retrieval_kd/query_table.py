"""Served queries of an inference-free model: a tokenizer and a table of weights, without torch.

A folder holds `tokenizer.json` (truncation inside), `weights.npy` (V,) float32 and `table.json`, the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from retrieval_kd.files import read_json, write_json
from retrieval_kd.types import InputError

FORMAT = 2
TOKENIZER, WEIGHTS, MANIFEST = "tokenizer.json", "weights.npy", "table.json"


class QueryTable:
    """Query vectors by look-up: the weight of each term that a query consists of, once."""

    def __init__(self, tokenizer: Tokenizer, weights: NDArray[np.float32], manifest: dict[str, Any]) -> None:
        self.weights = weights
        self.manifest = manifest
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> QueryTable:
        """Open what `save_table` wrote; InputError if the folder is no table, or of an unknown format."""
        if not (folder / MANIFEST).is_file():
            raise InputError(f"{folder} is not a table of query weights: it has no {MANIFEST}; run `rkd export`.")
        manifest = read_json(folder / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise InputError(
                f"{folder / MANIFEST}: format {manifest.get('format')!r} is unknown, this version reads {FORMAT}; "
                "export it again."
            )
        return cls(Tokenizer.from_file(str(folder / TOKENIZER)), np.load(folder / WEIGHTS), manifest)

    def look_up(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Terms, rising, and their weights: the places of one query's vector that are not 0."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        terms = np.array(sorted(set(ids)), np.int64)
        weights = self.weights[terms]
        active = weights != 0
        return (terms, weights) if active.all() else (terms[active], weights[active])

    def encode(self, texts: Sequence[str]) -> Any:
        """The vectors of `texts` in their order: scipy.sparse.csr_array (n, V) float32."""
        import scipy.sparse

        found = [self.look_up(text) for text in texts]
        starts = np.cumsum([0, *(len(terms) for terms, _ in found)])
        terms = np.concatenate([np.zeros(0, np.int64), *(terms for terms, _ in found)])
        weights = np.concatenate([np.zeros(0, np.float32), *(weights for _, weights in found)])
        return scipy.sparse.csr_array((weights, terms, starts), shape=(len(texts), len(self.weights)))


def save_table(
    folder: Path,
    tokenizer: Tokenizer,
    max_length: int,
    weights: NDArray[np.float32],
    identity: Mapping[str, Any],
    document_identity: Mapping[str, Any],
) -> None:
    """Write a table into an existing folder; the identities describe the tower that it is, and the documents'."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    tokenizer.save(str(folder / TOKENIZER))
    np.save(folder / WEIGHTS, weights)
    towers = {"identity": identity, "document_identity": document_identity}
    facts = {"format": FORMAT, "max_length": max_length, "dimension": len(weights)}
    write_json(folder / MANIFEST, {**facts, **towers})
