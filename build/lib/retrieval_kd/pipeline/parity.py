"""The same teacher on two engines: over a sample of a recipe's candidates, or over what two stores share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast, get_args

import duckdb
import numpy as np
from numpy.typing import NDArray

from retrieval_kd.candidates import Candidates
from retrieval_kd.diagnostics.parity import Parity, compare
from retrieval_kd.pipeline.workspace import Split, Workspace
from retrieval_kd.sample import spread
from retrieval_kd.scoring import fill_scores
from retrieval_kd.store.keys import text_keys
from retrieval_kd.store.lookup import database, find_places, make_table
from retrieval_kd.store.store import Store, read_all
from retrieval_kd.tables import did_you_mean
from retrieval_kd.types import Collection, Hits, InputError

# Every pair that both stores hold, of two scores the lower, as find_scores gives it.
SHARED = """
    select query_key, document_key, min(score) filter (side = 0) as one, min(score) filter (side = 1) as other
    from parts join files using (filename) group by all
    having count(*) filter (side = 0) > 0 and count(*) filter (side = 1) > 0 order by query_key, document_key
"""


def check_engines(
    workspace: Workspace, teacher: str, changes: dict[str, str], pairs: int, split: str = "test"
) -> Parity:
    """Compare a teacher of the recipe with itself under changed options (engine, precision).

    Both score the candidates of as many queries, taken at equal distances, as it takes to have `pairs` pairs. Their
    scores are kept in their own stores. Needs the candidates of the split.
    """
    if split not in get_args(Split):
        raise InputError(f"a recipe has the splits {', '.join(get_args(Split))}, not {split!r}.")
    side = cast(Split, split)
    names = [one.name for one in workspace.recipe.teachers]
    if teacher not in names:
        raise InputError(f"{workspace.path} has no teacher {teacher!r}{did_you_mean(teacher, names)}; it has {names}.")
    component = workspace.recipe.teachers[names.index(teacher)]
    changed = component.model_copy(update=changes)
    workspace.made(f"candidates/{split}", "mine")
    one, other = workspace.load_teacher(component), workspace.load_teacher(changed)
    if one.identity == other.identity:
        raise InputError(f"teacher {teacher!r} has {changes} already; give another engine or precision.")
    every = Candidates.load(workspace.folder / "candidates" / split).hits
    places = _sample(every, pairs)
    hits = Hits(every.rows[places], every.scores[places])
    texts = workspace.query_texts(side, component.render)
    read = [texts[place] for place in places], workspace.document_texts(component.render)
    first = fill_scores(workspace.store, teacher, one, *read, hits)
    second = fill_scores(workspace.store, "-".join([teacher, *changes.values()]), other, *read, hits)
    queries = workspace.queries(side).take(places)
    return compare(hits.rows, first, second, queries, list(workspace.collection.document_ids))


def _sample(hits: Hits, pairs: int) -> list[int]:
    """Queries at equal distances whose lists hold at least `pairs` pairs together, or all of them."""
    filled = np.flatnonzero(hits.valid.any(1))
    if not len(filled):
        raise InputError("no query has a candidate, so there is nothing to score.")
    mean = hits.valid.sum() / len(filled)
    count = min(len(filled), int(np.ceil(pairs / mean)))
    return [int(filled[place]) for place in spread(len(filled), count)]


def check_stores(
    first: Store,
    second: Store,
    collection: Collection | None = None,
    split: str = "test",
    prompts: tuple[str, str] = ("", ""),
) -> Parity:
    """Compare the scores of the pairs that two stores share: all, or those of a collection's split.

    The prompts are what the teacher read before each query and each document.
    """
    if first.folder.resolve() == second.folder.resolve():
        raise InputError(f"{first.folder} is given twice; give the stores of two engines.")

    def read(parts: list[list[Path]]) -> dict[str, Any]:
        if not all(parts):
            raise InputError(f"{first.folder} and {second.folder} share no pair: one of them holds no score.")
        paths = [path for some in parts for path in some]
        sides = np.repeat([0, 1], [len(some) for some in parts])
        with database(paths) as connection:
            make_table(connection, "files", {"filename": list(map(str, paths)), "side": sides})
            return connection.sql(SHARED).fetchnumpy()

    try:
        found = read_all([first, second], "scores", read)
    except duckdb.Error as error:
        raise InputError(f"the stores cannot be read: {error}; run `rkd scores verify` on them.") from error
    columns = [np.asarray(found[name]) for name in ("query_key", "document_key", "one", "other")]
    if collection is None:
        _, query_of = np.unique(columns[0], return_inverse=True)
        return compare(*_grids(query_of, np.arange(len(query_of)), *columns[2:]))
    queries = collection.split(split)
    query_of, has_query = find_places(text_keys([prompts[0] + text for text in queries.texts]), columns[0])
    rows, has_row = find_places(text_keys([prompts[1] + text for text in collection.documents]), columns[1])
    inside = has_query & has_row
    if not inside.any():
        raise InputError(
            f"the stores share no pair of split {split!r} of {collection.name!r}; if the teacher reads prompts before "
            "the texts, give them (--query-prompt, --document-prompt)."
        )
    kept, query_of = np.unique(query_of[inside], return_inverse=True)
    grids = _grids(query_of, rows[inside], columns[2][inside], columns[3][inside])
    return compare(*grids, queries.take(kept.tolist()), list(collection.document_ids))


def _grids(
    query_of: NDArray[np.int64], rows: NDArray[np.int64], *scores: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """Lists of pairs as grids (Q, K) of rows and of two scores."""
    order = np.argsort(query_of, kind="stable")
    query_of = query_of[order]
    counts = np.bincount(query_of)
    column = np.arange(len(query_of)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = len(counts), int(counts.max())
    grid = np.full(shape, -1, np.int32)
    grid[query_of, column] = rows[order]
    one, two = (np.full(shape, np.nan, np.float32) for _ in range(2))
    one[query_of, column], two[query_of, column] = scores[0][order], scores[1][order]
    return grid, one, two
