"""The train set: everything a stage reads, in memory-mapped arrays.

rows.npy       (Q, K) int32     candidates, -1 where there is none
scores.npy     (T, Q, K) float32  teacher scores, NaN where a teacher gave no answer
positive.npy   (Q, K) bool      judged relevant
ranks.npy      (S, Q, K) int32  rank from 1 that each of `sources` gave a candidate, 0 where it did not find it
query_tokens/, document_tokens/   ids.npy int32 end to end, starts.npy int64
query_vectors-NAME.npy, document_vectors-NAME.npy   (Q, D), (N, D) float32 of a teacher
frozen.npy     (N, D) float32   document vectors of a frozen tower
preference_pairs.npy (Q, P, 2) int32, preferences.npy (Q, P) float32   places i, j and P(i beats j); NaN beyond the last
clusters.npy   (Q,) int32       cluster of each query
live/NAME/     tokens of both sides, as a live teacher reads the texts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.files import forget, read_json, save_array, write_json
from retrieval_kd.types import SIDES, Hits

_ARRAYS = ("positive", "ranks", "scores", "frozen", "preference_pairs", "preferences", "clusters")


@dataclass(frozen=True)
class Tokens:
    """Token ids of many texts, end to end; text i has ids[starts[i]:starts[i + 1]]."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]

    @classmethod
    def pack(cls, lists: Sequence[Sequence[int]]) -> Tokens:
        """Put token lists end to end."""
        starts = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(ids) for ids in lists], out=starts[1:])
        flat = np.fromiter((token for ids in lists for token in ids), np.int32, count=int(starts[-1]))
        return cls(flat, starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, place: int) -> NDArray[np.int32]:
        return self.ids[self.starts[place] : self.starts[place + 1]]


@dataclass(frozen=True, eq=False)
class TrainSet:
    """See the module's table. `hits` and what goes with it are absent where no loss needs candidates."""

    query_tokens: Tokens
    document_tokens: Tokens | None = None  # absent when no document is encoded
    hits: Hits | None = None
    teachers: Sequence[str] = ()
    scores: NDArray[np.float32] | None = None
    positive: NDArray[np.bool_] | None = None
    sources: Sequence[str] = ()
    ranks: NDArray[np.int32] | None = None
    query_vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    document_vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    frozen: NDArray[np.float32] | None = None
    preference_pairs: NDArray[np.int32] | None = None
    preferences: NDArray[np.float32] | None = None
    clusters: NDArray[np.int32] | None = None
    live: dict[str, tuple[Tokens, Tokens]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.query_tokens)

    def save(self, folder: Path) -> None:
        """Write into an existing folder."""
        sides = {"query_tokens": self.query_tokens, "document_tokens": self.document_tokens}
        for name, both in self.live.items():
            sides |= {f"live/{name}/{side}_tokens": tokens for side, tokens in zip(SIDES, both, strict=True)}
        for name, tokens in sides.items():
            if tokens is not None:
                (folder / name).mkdir(parents=True)
                save_array(folder / name / "ids.npy", tokens.ids)
                save_array(folder / name / "starts.npy", tokens.starts)
        arrays: dict[str, NDArray[Any] | None] = {name: getattr(self, name) for name in _ARRAYS}
        if self.hits is not None:
            arrays |= {"rows": self.hits.rows, "hit_scores": self.hits.scores}
        arrays |= {f"query_vectors-{name}": vectors for name, vectors in self.query_vectors.items()}
        arrays |= {f"document_vectors-{name}": vectors for name, vectors in self.document_vectors.items()}
        for name, array in arrays.items():
            if array is not None:
                save_array(folder / f"{name}.npy", array)
        write_json(folder / "teachers.json", list(self.teachers))
        if self.sources:
            write_json(folder / "sources.json", list(self.sources))

    @classmethod
    def load(cls, folder: Path) -> TrainSet:
        """Open what `save` wrote, memory-mapped."""

        def array(name: str) -> NDArray[Any] | None:
            path = folder / f"{name}.npy"
            return np.load(path, mmap_mode="r") if path.exists() else None

        def tokens(name: str) -> Tokens | None:
            ids, starts = array(f"{name}/ids"), array(f"{name}/starts")
            return None if ids is None or starts is None else Tokens(ids, starts)

        def both(name: str) -> tuple[Tokens, Tokens]:
            query, document = (tokens(f"live/{name}/{side}_tokens") for side in SIDES)
            assert query is not None
            assert document is not None
            return query, document

        def vectors(side: str) -> dict[str, NDArray[np.float32]]:
            prefix = f"{side}_vectors-"
            found = sorted(folder.glob(f"{prefix}*.npy"))
            return {path.stem.removeprefix(prefix): np.load(path, mmap_mode="r") for path in found}

        rows, hit_scores, query_tokens = array("rows"), array("hit_scores"), tokens("query_tokens")
        assert query_tokens is not None
        arrays: dict[str, Any] = {name: array(name) for name in _ARRAYS}
        return cls(
            query_tokens=query_tokens,
            document_tokens=tokens("document_tokens"),
            hits=None if rows is None or hit_scores is None else Hits(rows, hit_scores),
            teachers=read_json(folder / "teachers.json"),
            sources=read_json(folder / "sources.json") if (folder / "sources.json").exists() else (),
            query_vectors=vectors("query"),
            document_vectors=vectors("document"),
            live={path.name: both(path.name) for path in sorted((folder / "live").glob("*"))},
            **arrays,
        )


def mark_positives(hits: Hits, qrels: Sequence[Mapping[int, int]]) -> NDArray[np.bool_]:
    """(Q, K), True where the candidate is judged relevant; queries beyond `qrels` have none."""
    positive = np.zeros(hits.rows.shape, bool)
    for number, grades in enumerate(qrels):
        relevant = [row for row, grade in grades.items() if grade > 0]
        if relevant:
            positive[number] = np.isin(hits.rows[number], relevant)
        if number % 2**14 == 0:
            forget(hits.rows)
    return positive
