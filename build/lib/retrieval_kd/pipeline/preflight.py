"""What `rkd index` would encode, write and hold in memory, before it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.corpus_vectors import bytes_a_vector, disk_free, encoded
from retrieval_kd.evaluate.cost import memory_bytes, memory_free
from retrieval_kd.index import BLOCK, estimate_bytes
from retrieval_kd.pipeline.documents import SHARDS, corpus_form, shards_of
from retrieval_kd.pipeline.workspace import Workspace
from retrieval_kd.pricing import time_sample
from retrieval_kd.sparse_towers import encode_sparse
from retrieval_kd.store.keys import text_keys
from retrieval_kd.store.store import Store
from retrieval_kd.teachers.bi_encoder import BiEncoder
from retrieval_kd.types import InputError


@dataclass(frozen=True)
class Preflight:
    """What the index stage takes. What nobody can say is None; `notes` say where numbers come from.

    Disk: what is still to be written. Memory: of this process at its peak, texts and student included.
    """

    documents: int
    encoded: int  # whose vectors are kept already
    seconds: float  # of encoding the others, at the rate of a sample
    documents_per_second: float | None
    vector_bytes: int
    index_bytes: int | None
    text_bytes: int
    disk_free_bytes: int
    store_bytes: int  # of `vector_bytes`, what goes to the disk of the store
    store_free_bytes: int
    memory_bytes: int
    memory_free_bytes: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """What would not fit."""
        found = []
        here = self.vector_bytes - self.store_bytes + (self.index_bytes or 0) + self.text_bytes
        for where, needed, free in (
            ("the run's disk", here, self.disk_free_bytes),
            ("the store's disk", self.store_bytes, self.store_free_bytes),
            ("memory", self.memory_bytes, self.memory_free_bytes),
        ):
            if free is not None and needed > free:
                found.append(f"{where} has {free / 1e9:,.3g} GB free, and {needed / 1e9:,.3g} GB are needed")
        return found


@dataclass(frozen=True)
class _Plan:
    """The part of a preflight that the student's kind decides."""

    there: int
    seconds: float
    vector_bytes: int  # of one document
    index_bytes: int | None
    working_bytes: int  # in memory, beside what the process has
    notes: list[str]


def preflight(workspace: Workspace) -> Preflight:
    """Look ahead at the index stage: a sample of the documents is encoded and thrown away; nothing is written."""
    if workspace.reranks:
        raise InputError("this student re-ranks, so that it has no index.")
    workspace.made("student", "train")
    documents = workspace.document_texts(workspace.recipe.student.render)
    before, count = memory_bytes()[0], len(documents)
    plan = _sparse_plan(workspace, documents) if workspace.sparse else _dense_plan(workspace, documents)
    missing, free = count - plan.there, memory_free()
    stored = not workspace.sparse and corpus_form(workspace) is None
    rate = ["rate from a sample of the documents, with the threads of this process"] if missing else []
    return Preflight(
        documents=count,
        encoded=plan.there,
        seconds=plan.seconds,
        documents_per_second=missing / plan.seconds if plan.seconds else None,
        vector_bytes=plan.vector_bytes * missing,
        index_bytes=plan.index_bytes,
        text_bytes=sum(map(len, documents)),
        disk_free_bytes=disk_free(workspace.folder),
        store_bytes=plan.vector_bytes * missing if stored else 0,
        store_free_bytes=disk_free(workspace.store),
        memory_bytes=max(before, memory_bytes()[0]) + plan.working_bytes,
        memory_free_bytes=None if free is None else free + memory_bytes()[0],
        notes=[*plan.notes, *rate],
    )


def _dense_plan(workspace: Workspace, documents: Sequence[str]) -> _Plan:
    student, form, count = workspace.trained, corpus_form(workspace), len(documents)
    assert isinstance(student, BiEncoder)
    assert workspace.recipe.index is not None

    def embed(places: Sequence[int]) -> NDArray[np.float32]:
        return student.embed(student.render([documents[place] for place in places], "document"), "document")

    there = 0
    if form is not None:
        there = encoded(workspace.folder / SHARDS, documents, **shards_of(workspace, form))
    elif (store := Store.find(workspace.store, workspace.tower_identity("document"))) is not None:
        there = int(store.find_embeddings(text_keys(student.render(documents, "document")))[1].sum())
    seconds = time_sample(count - there, embed) if there < count else 0.0
    width = embed([0]).shape[1]
    each = bytes_a_vector(form or "fp32", width)
    size = estimate_bytes(workspace.recipe.index, count, width)
    # Of the store: the vectors as they are read and as they are returned. Of shards: one, and what is encoded of it.
    working = 2 * each * count if form is None else 4 * width * (BLOCK + workspace.recipe.corpus.shard)
    notes = [f"vectors of width {width}: {each:,} bytes each, {'in the store' if form is None else f'{form} shards'}"]
    if size is None:
        notes.append(f"the size of this index ({workspace.recipe.index.kind}) is not known before it is built")
    return _Plan(there, seconds, each, size, working + (size or 0), notes)


def _sparse_plan(workspace: Workspace, documents: Sequence[str]) -> _Plan:
    towers, precision, terms = workspace.sparse_towers, workspace.recipe.precision, [0.0]

    def encode(places: Sequence[int]) -> None:
        texts = towers.render([documents[place] for place in places], "document")
        terms.append(encode_sparse(towers, texts, "document", precision).nnz / max(1, len(texts)))

    made = (workspace.folder / "vectors/manifest.json").exists()
    seconds = time_sample(len(documents), encode)
    each = round(8 * terms[-1])  # a term and its weight, of 4 bytes each
    notes = [f"vectors of {terms[-1]:.0f} terms; the index is about as large as they are, which is not known before"]
    if made:
        notes.append("vectors are there, and made again only if their inputs changed")
    return _Plan(0, seconds, each, None, 3 * each * len(documents), notes)  # parts, the whole, and the whole by term
