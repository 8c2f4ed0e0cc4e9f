"""SPLADE students: a language model's head gives each text weights of vocabulary terms; scores are dot products.

One encoder reads both sides, or each has its own (Efficient SPLADE, arXiv:2207.03834). A document encoder of its own
may be frozen: then a query encoder learns to live with an index that is there (DiSCo, arXiv:2410.14609).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retrieval_kd.sparse_student import (
    SparseOptions,
    SparseStudent,
    SparseTower,
    lexical_tower,
    load_tower,
    set_dropout,
    starts_lexically,
)
from retrieval_kd.sparse_towers import join_towers, vocabulary_size
from retrieval_kd.types import InputError

TEACHER = "sparse_encoder"  # the kind that reads a saved student
VECTORS = True  # whether each text has one
SEARCHES = True  # its vectors can be indexed
GIVES = "sparse"  # what they are
reads_collection = starts_lexically


class Document(SparseTower):
    """A document tower of its own, which starts from a model with a head."""

    frozen: bool = False


class Options(SparseOptions):
    """The query tower; it reads documents too unless they have a tower of their own."""

    document: Document | None = None
    query_prompt: str | None = None  # absent: the one saved with the model
    document_prompt: str | None = None


def begin(options: Options, documents: Sequence[str], folder: Path) -> None:
    """Save the model that a lexical start makes from the collection's documents, for `load` to start from."""
    tower = lexical_tower(options, options.document_prompt or "", documents, 2, folder / "head")
    towers = join_towers(tower, tower, options.query_prompt or "", options.document_prompt or "", None)
    towers.model.save(str(folder / "model"), create_model_card=False)


def load(options: Options) -> SparseStudent:
    """Build the towers that the options describe."""
    if options.start != "model":
        raise InputError(f'student.start = "{options.start}" begins with a collection; it is made by `rkd train`.')
    loaded = load_tower(options, options.query_prompt, options.document_prompt)
    if loaded.query is not loaded.document:
        raise InputError(f"model {options.model!r} has two towers; start a splade student from a model that has one.")
    query: list[Any] = list(loaded.query)
    document = query
    if options.document is not None:
        other = load_tower(options.document)
        document = list(other.document)
        sizes = [vocabulary_size(modules) for modules in (loaded.query, other.document)]
        if sizes[0] != sizes[1] or query[0].tokenizer.get_vocab() != document[0].tokenizer.get_vocab():
            raise InputError(
                f"the query tower weighs {sizes[0]} terms and the document tower {sizes[1]}, and they are not the same "
                "ones; both towers need one vocabulary."
            )
    top_k = options.top_k or loaded.model.max_active_dims
    towers = join_towers(query, document, loaded.query_prompt, loaded.document_prompt, top_k)
    student = SparseStudent(towers, options.document is not None and options.document.frozen)
    set_dropout(student, options.dropout)
    return student
