"""What `rkd score` would ask and pay for, without asking or writing."""

from __future__ import annotations

import numpy as np

from retrieval_kd.candidates import Candidates
from retrieval_kd.pipeline.workspace import Split, Workspace, with_model
from retrieval_kd.pricing import Price
from retrieval_kd.pricing import price as price_of
from retrieval_kd.recipe import Teacher as TeacherTable
from retrieval_kd.tables import Component
from retrieval_kd.teachers import Teacher, load_teacher
from retrieval_kd.types import Hits, InputError, Queries


def price(workspace: Workspace) -> list[Price]:
    """The price of every teacher of the recipe, over the candidates of the splits that `score` goes through.

    Raises InputError where the candidates are not mined yet, or a teacher is yet to be trained.
    """
    splits: list[Split] = ["test", "train"] if workspace.needs.sources else ["test"]
    for split in splits:
        workspace.made(f"candidates/{split}", "mine")
    hits = _stack([Candidates.load(workspace.folder / "candidates" / split).hits for split in splits])
    prices = []
    for table in workspace.recipe.teachers:
        queries = [text for split in splits for text in workspace.query_texts(split, table.render)]
        teacher = load_ready(workspace, table)
        documents = workspace.document_texts(table.render)
        prices.append(price_of(workspace.store, table.name, teacher, queries, documents, hits))
    return prices


def load_ready(workspace: Workspace, table: TeacherTable) -> Teacher:
    """Load a teacher of the recipe; one that another recipe trains has to be trained already."""
    component = Component(kind=table.kind, **table.options)
    if table.trained_by is not None:
        path = workspace.path.parent / table.trained_by
        folder = workspace.folder.parent / path.stem / "student"
        if not folder.is_dir():
            raise InputError(f"teacher {table.name!r} is trained by {path}; run `rkd run {path}` first.")
        component = with_model(component, str(folder))
    return load_teacher(component, workspace.read_by(table.render))


def queries_of(workspace: Workspace, split: Split) -> Queries:
    """The queries of a split, as the recipe has them."""
    return {
        "train": lambda: workspace.train_queries,
        "test": lambda: workspace.test_queries,
        "validation": lambda: workspace.validation_queries,
    }[split]()


def _stack(lists: list[Hits]) -> Hits:
    """The hits of several splits, one after the other."""
    width = max(hits.rows.shape[1] for hits in lists)

    def wide(array: np.ndarray, fill: float) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)

    rows = np.concatenate([wide(hits.rows, -1) for hits in lists]).astype(np.int32)
    return Hits(rows, np.concatenate([wide(hits.scores, -np.inf) for hits in lists]).astype(np.float32))
