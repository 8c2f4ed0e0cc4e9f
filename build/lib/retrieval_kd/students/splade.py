"""SPLADE students: a language model's head gives each text weights of vocabulary terms; scores are dot products.

One encoder reads both sides, or each has its own (Efficient SPLADE, arXiv:2207.03834). A document encoder of its own
may be frozen: then a query encoder learns to live with an index that is there (DiSCo, arXiv:2410.14609). A causal
language model may read each text twice (Mistral-SPLADE, arXiv:2408.11119).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import SparseEncoder

from retrieval_kd.lora import add_lora
from retrieval_kd.sparse_student import (
    SparseOptions,
    SparseStudent,
    SparseTower,
    lexical_tower,
    load_start,
    load_tower,
    make_student,
    starts_lexically,
)
from retrieval_kd.sparse_towers import save_sparse, vocabulary_size
from retrieval_kd.tables import Precision
from retrieval_kd.towers import join_towers
from retrieval_kd.types import InputError

TEACHER = "sparse_encoder"  # the kind that reads a saved student
VECTORS = "sparse"  # those of a text
SEARCHES = True  # its vectors can be indexed
reads_collection = starts_lexically


class Document(SparseTower):
    """A document tower of its own, which starts from a model with a head."""

    frozen: bool = False


class Options(SparseOptions):
    """The query tower; it reads documents too unless they have a tower of their own."""

    document: Document | None = None
    query_prompt: str | None = None  # absent: the one saved with the model
    document_prompt: str | None = None


def begin(options: Options, documents: Sequence[str], folder: Path, precision: Precision = "fp32") -> None:
    """Save the model that a lexical start makes from the collection's documents, for `load` to start from."""
    tower = lexical_tower(options, options.document_prompt or "", documents, 2, precision)
    towers = join_towers(tower, tower, options.query_prompt or "", options.document_prompt or "", SparseEncoder)
    save_sparse(towers.model, folder / "model")


def load(options: Options) -> SparseStudent:
    """Build the towers that the options describe."""
    loaded = load_start(options, options.query_prompt, options.document_prompt)
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
    frozen = options.document is not None and options.document.frozen
    student = make_student(options, loaded, query, document, frozen)
    if options.lora is not None:
        add_lora(student.towers.query, options.lora)
    if options.document is not None and options.document.lora is not None:
        if frozen:
            raise InputError("student.document is frozen, so that student.document.lora would train nothing.")
        add_lora(student.towers.document, options.document.lora)
    return student
