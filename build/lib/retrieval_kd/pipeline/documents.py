"""The vectors of the collection's documents by the trained student, and where they are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.corpus_vectors import CorpusVectors, Form, bytes_a_vector, check_disk, encode_corpus, encoded
from retrieval_kd.index import Vectors
from retrieval_kd.pipeline.workspace import Workspace
from retrieval_kd.scoring import fill_vectors
from retrieval_kd.sparse_towers import encode_sparse
from retrieval_kd.teachers.bi_encoder import BiEncoder

LARGE = 250_000  # documents from which a dense student's vectors are kept in shards, unless the recipe says where
VECTORS = "vectors.npz"  # the documents' sparse vectors
SHARDS = "shards"  # the folder of their dense vectors in a large collection


def corpus_form(workspace: Workspace) -> Form | None:
    """The form in which shards keep the vectors of a dense student's documents; None where the store does."""
    kept = workspace.recipe.corpus.vectors
    if workspace.sparse or kept == "store" or (kept is None and len(workspace.collection) <= LARGE):
        return None
    return kept or "fp16"


def document_vectors(workspace: Workspace) -> NDArray[np.float32] | CorpusVectors:
    """The vectors of the documents by a dense student; those that the store or the shards lack are encoded."""
    student, render = workspace.trained, workspace.recipe.student.render
    assert isinstance(student, BiEncoder)
    documents, form = workspace.document_texts(render), corpus_form(workspace)
    if form is None:
        return fill_vectors(workspace.store, "student", student, documents, "document")
    folder, shards = workspace.folder / SHARDS, shards_of(workspace, form)
    missing = len(documents) - encoded(folder, documents, **shards)
    if missing:
        width = student.embed(student.render(documents[:1], "document"), "document").shape[1]
        needed = missing * bytes_a_vector(form, width)
        check_disk(
            folder, needed, f"the vectors of {missing:,} documents", 'keep smaller ones (corpus.vectors = "int8")'
        )
    return encode_corpus(
        folder, documents, lambda texts: student.embed(student.render(texts, "document"), "document"), **shards
    )


def shards_of(workspace: Workspace, form: Form) -> dict[str, Any]:
    """What says which shards the documents' vectors are in."""
    prompt = workspace.trained.render([""], "document")
    identity = {"tower": workspace.tower_identity("document"), "prompt": prompt}
    return {"form": form, "identity": identity, "shard": workspace.recipe.corpus.shard}


def encode_documents(workspace: Workspace, documents: Sequence[str], advance: Callable[[int], object] = int) -> Vectors:
    """The vectors of any documents by the trained student; dense ones are kept in the store."""
    if workspace.sparse:
        towers, precision = workspace.sparse_towers, workspace.recipe.precision
        return encode_sparse(towers, towers.render(documents, "document"), "document", precision, advance=advance)
    student = workspace.trained
    assert isinstance(student, BiEncoder)
    return fill_vectors(workspace.store, "student", student, documents, "document")
