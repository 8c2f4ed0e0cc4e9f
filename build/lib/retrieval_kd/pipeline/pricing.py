"""What `rkd score` would ask and pay for, without asking or writing."""

from __future__ import annotations

import numpy as np

from retrieval_kd.candidates import Candidates
from retrieval_kd.pipeline.workspace import Workspace
from retrieval_kd.pricing import Price
from retrieval_kd.pricing import price as price_of
from retrieval_kd.types import Hits


def price(workspace: Workspace) -> list[Price]:
    """The price of every teacher of the recipe, over the candidates of the splits that `score` goes through.

    Raises InputError where the candidates are not mined yet, or, in a dry workspace, a teacher is yet to be trained.
    """
    splits = workspace.scored_splits
    for split in splits:
        workspace.made(f"candidates/{split}", "mine")
    hits = _stack([Candidates.load(workspace.folder / "candidates" / split).hits for split in splits])
    prices = []
    for table in workspace.recipe.teachers:
        queries = [text for split in splits for text in workspace.query_texts(split, table.render)]
        teacher = workspace.load_teacher(table)
        documents = workspace.document_texts(table.render)
        prices.append(price_of(workspace.store, table.name, teacher, queries, documents, hits))
    return prices


def _stack(lists: list[Hits]) -> Hits:
    """The hits of several splits, one after the other."""
    width = max(hits.rows.shape[1] for hits in lists)

    def wide(array: np.ndarray, fill: float) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)

    rows = np.concatenate([wide(hits.rows, -1) for hits in lists]).astype(np.int32)
    return Hits(rows, np.concatenate([wide(hits.scores, -np.inf) for hits in lists]).astype(np.float32))
