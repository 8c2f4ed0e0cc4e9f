"""Inference-free students: documents are encoded, queries are looked up in a table of one weight a term.

A query's vector holds the table's weights of the terms that it consists of, each once; the table starts with the
inverse document frequencies of the collection, in the student's own tokens, and may learn.
Source: Geng et al. 2024, arXiv:2411.04403.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

from retrieval_kd.sparse_student import (
    SparseOptions,
    SparseStudent,
    change_tower,
    lexical_tower,
    load_tower,
    set_dropout,
    starts_lexically,
)
from retrieval_kd.sparse_towers import has_head, join_towers, load_sparse_towers
from retrieval_kd.types import InputError
from retrieval_kd.weights import locate_model

TEACHER = "sparse_encoder"  # the kind that reads a saved student
VECTORS = True  # whether each text has one
SEARCHES = True  # its vectors can be indexed
GIVES = "sparse"  # what they are


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
        load_sparse_towers(options.model, options.revision)  # says what is missing
    return starts_lexically(options) or not table


def begin(options: Options, documents: Sequence[str], folder: Path) -> None:
    """Save the model that starts from the collection: its table of queries, and its head where that is lexical."""
    if starts_lexically(options):
        prompt = options.document_prompt or ""
        tower = lexical_tower(options, prompt, documents, 1, folder / "head")
    else:
        loaded = load_tower(options, None, options.document_prompt)
        tower, prompt = list(loaded.document), loaded.document_prompt
    first: Any = tower[0]
    table = SparseStaticEmbedding(first.tokenizer, torch.from_numpy(inverse_frequencies(first.tokenizer, documents)))
    towers = join_towers([table], tower, "", prompt, None)
    towers.model.save(str(folder / "model"), create_model_card=False)


def load(options: Options) -> SparseStudent:
    """Load an inference-free model, one that `begin` made or a published one."""
    if options.start != "model":
        raise InputError(f'student.start = "{options.start}" begins with a collection; it is made by `rkd train`.')
    loaded = load_sparse_towers(options.model, options.revision, options.max_length, "", options.document_prompt)
    table: Any = loaded.query[0]
    if not isinstance(table, SparseStaticEmbedding):
        raise InputError(f"model {options.model!r} has no table of query weights; it is made by `rkd train`.")
    change_tower(loaded.document, options)
    table.frozen = not options.train_table
    table.weight.requires_grad_(options.train_table)
    top_k = options.top_k or loaded.model.max_active_dims
    towers = join_towers(list(loaded.query), list(loaded.document), "", loaded.document_prompt, top_k)
    student = SparseStudent(towers)
    set_dropout(student, options.dropout)
    return student


def inverse_frequencies(tokenizer: Any, documents: Sequence[str]) -> NDArray[np.float32]:
    """log(1 + (N - n + 0.5) / (n + 0.5)) of each term (V,), n the documents that have it; 0 of special tokens.

    Source: Robertson and Zaragoza 2009 in Lucene's form, which is not negative.
    """
    counts = np.zeros(len(tokenizer), np.int64)
    for start in range(0, len(documents), 1024):
        encoded = tokenizer(list(documents[start : start + 1024]), add_special_tokens=False, verbose=False)
        for ids in encoded["input_ids"]:
            counts[np.unique(np.asarray(ids, np.int64))] += 1
    weights = np.log1p((len(documents) - counts + 0.5) / (counts + 0.5))
    weights[tokenizer.all_special_ids] = 0.0
    return weights.astype(np.float32)
