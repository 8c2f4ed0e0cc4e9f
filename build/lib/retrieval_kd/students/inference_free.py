"""Inference-free students: documents are encoded, queries are looked up in a table of one weight a term.

A query's vector holds the table's weights of the terms that it consists of, each once; the table starts with the
inverse document frequencies of the collection, in the student's own tokens, and may learn.
Source: Geng et al. 2024, arXiv:2411.04403.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

from retrieval_kd.lexical_start import fit_vocabulary, inverse_frequencies
from retrieval_kd.lora import add_lora
from retrieval_kd.sparse_student import (
    SparseOptions,
    SparseStudent,
    lexical_tower,
    load_start,
    load_tower,
    make_student,
    starts_lexically,
)
from retrieval_kd.sparse_towers import has_head, no_head, save_sparse, vocabulary_size
from retrieval_kd.tables import Precision
from retrieval_kd.towers import join_towers
from retrieval_kd.types import InputError
from retrieval_kd.weights import locate_model

TEACHER = "sparse_encoder"  # the kind that reads a saved student
VECTORS = "sparse"  # those of a text
SEARCHES = True  # its vectors can be indexed
FORMS = ("fp32",)  # of its query tower, which is a table


class Options(SparseOptions):
    """The document tower, and whether the queries' table learns."""

    train_table: bool = False
    document_prompt: str | None = None  # absent: the one saved with the model


def reads_collection(options: Options) -> bool:
    """Whether head or table are to be made from the collection: not where the model is inference-free already."""
    folder = locate_model(options.model, options.revision)
    routes = folder / "router_config.json"
    table = routes.exists() and "SparseStaticEmbedding" in routes.read_text(encoding="utf-8")
    if not has_head(folder) and options.start == "model":
        raise no_head(options.model)
    return starts_lexically(options) or not table


def begin(options: Options, documents: Sequence[str], folder: Path, precision: Precision = "fp32") -> None:
    """Save the model that starts from the collection: its table of queries, and its head where that is lexical."""
    if starts_lexically(options):
        prompt = options.document_prompt or ""
        tower = lexical_tower(options, prompt, documents, 1, precision)
    else:
        loaded = load_tower(options, None, options.document_prompt)
        tower, prompt = list(loaded.document), loaded.document_prompt
    first: Any = tower[0]
    fit_vocabulary(first.auto_model, first.tokenizer)
    table = SparseStaticEmbedding(first.tokenizer, torch.from_numpy(query_weights(first.tokenizer, documents)))
    towers = join_towers([table], tower, "", prompt, SparseEncoder)
    save_sparse(towers.model, folder / "model")


def load(options: Options) -> SparseStudent:
    """Load an inference-free model, one that `begin` made or a published one."""
    loaded = load_start(options, "", options.document_prompt)
    table: Any = loaded.query[0]
    if not isinstance(table, SparseStaticEmbedding):
        raise InputError(f"model {options.model!r} has no table of query weights; it is made by `rkd train`.")
    sizes = [vocabulary_size(modules) for modules in (loaded.query, loaded.document)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"model {options.model!r}: its table weighs {sizes[0]} terms and its documents have {sizes[1]}, so that "
            "there is no score; let `rkd train` make the table anew, from the document encoder alone."
        )
    table.frozen = not options.train_table
    table.weight.requires_grad_(options.train_table)
    student = make_student(options, loaded, list(loaded.query), list(loaded.document))
    if options.lora is not None:
        add_lora(student.towers.document, options.lora)
    return student


def query_weights(tokenizer: Any, documents: Sequence[str]) -> NDArray[np.float32]:
    """The inverse document frequency of each term (V,) in the tokenizer's terms; 0 of special tokens."""
    batches = (list(documents[start : start + 1024]) for start in range(0, len(documents), 1024))
    read = (tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"] for batch in batches)
    weights = inverse_frequencies(chain.from_iterable(read), len(tokenizer))
    weights[tokenizer.all_special_ids] = 0.0
    return weights
