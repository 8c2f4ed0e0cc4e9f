"""The sparse student: two towers of term weights (or one, twice), trained through the vocabulary head in parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling
from torch import nn

from retrieval_kd.lexical_start import make_lexical_model
from retrieval_kd.lora import Lora, merged
from retrieval_kd.sparse_towers import has_head, is_causal, load_sparse_towers, run_sparse_tower, save_sparse
from retrieval_kd.students import Batch, Outputs, own_scores
from retrieval_kd.tables import Positive, Precision, Table
from retrieval_kd.towers import Towers, join_towers, keep_layers, set_dropout, tokenize
from retrieval_kd.types import InputError, Side
from retrieval_kd.vocabulary_head import Pooling
from retrieval_kd.weights import locate_model


class SparseTower(Table):
    """One encoder with a head over its vocabulary: where it starts from, and how it pools."""

    model: str
    revision: str | None = None
    layers: tuple[int, ...] = ()  # numbers of the layers to keep, in this order; none given: all
    pooling: Pooling | None = None  # of tokens; absent: the model's own, max where it has none
    double_log: bool | None = None  # log(1 + log(1 + relu(x))) for log(1 + relu(x)); absent: as the model does
    max_length: Positive | None = None  # tokens; absent: the model's own
    echo: bool = False  # a causal model reads a text twice, and its second copy is pooled; or as a saved one does
    lora: Lora | None = None  # train low-rank updates of the transformer alone; saved, they are part of its weights


class SparseOptions(SparseTower):
    """What all sparse students have."""

    start: Literal["model", "lexical"] = "model"  # lexical: a new encoder, BM25 in the model's tokens
    top_k: Positive | None = None  # so many terms a text are kept, the heaviest, of documents and queries alike
    dropout: float | None = Field(default=None, ge=0, lt=1)  # absent: the model's own


class SparseStudent(nn.Module):
    """Two towers as modules of a SparseEncoder; vectors are (n, V), scores are dot products."""

    frozen_documents = False  # a frozen tower encodes documents anew each step: their vectors are as wide as V

    def __init__(self, towers: Towers, frozen: bool = False) -> None:
        super().__init__()
        self.towers = towers
        self.top_k = towers.model.max_active_dims
        self.query = towers.query
        if towers.document is not towers.query:
            self.document = towers.document
        self.frozen = frozen
        if frozen:
            towers.document.requires_grad_(False)

    def train(self, mode: bool = True) -> SparseStudent:
        """Set the mode of all but a frozen tower, in which nothing drops out."""
        super().train(mode)
        if self.frozen:
            self.towers.document.eval()
        return self

    def tokenize(self, texts: Sequence[str], side: Side) -> list[list[int]]:
        """Token ids of texts as the student reads them, prompts included."""
        return tokenize(self.towers.side(side), self.towers.render(texts, side))

    def forward(self, batch: Batch) -> Outputs:
        self._keep_positive()
        queries = run_sparse_tower(self.towers.query, batch.queries, batch, self.top_k)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            documents = run_sparse_tower(self.towers.document, batch.documents, batch, self.top_k)
        with torch.autocast(queries.device.type, enabled=False):
            grid = queries @ documents.T  # (B, U)
            return Outputs(own_scores(grid, batch.columns), grid, queries, documents)

    def save(self, folder: Path) -> None:
        """Save into an existing folder, as a SparseEncoder."""
        self._keep_positive()
        save_sparse(merged(self.towers.model), folder)

    def _keep_positive(self) -> None:
        """Set to 0 what a step has taken below it in a table that learns: no index takes weights below 0."""
        table: Any = self.towers.query[0]
        if isinstance(table, SparseStaticEmbedding) and table.weight.requires_grad:
            with torch.no_grad():
                table.weight.clamp_(min=0)


def load_start(options: SparseOptions, query_prompt: str | None, document_prompt: str | None) -> Towers:
    """The towers that a student starts from; InputError where they are still to be made from a collection."""
    if options.start != "model":
        raise InputError(f'student.start = "{options.start}" begins with a collection; it is made by `rkd train`.')
    return load_tower(options, query_prompt, document_prompt)


def make_student(
    options: SparseOptions, loaded: Towers, query: Sequence[Any], document: Sequence[Any], frozen: bool = False
) -> SparseStudent:
    """The student of these modules (the same ones for a tied one), with the prompts of `loaded`."""
    top_k = options.top_k or loaded.model.max_active_dims
    prompts = loaded.query_prompt, loaded.document_prompt
    student = SparseStudent(join_towers(query, document, *prompts, SparseEncoder, max_active_dims=top_k), frozen)
    set_dropout(student, options.dropout)
    return student


def load_tower(tower: SparseTower, query_prompt: str | None = None, document_prompt: str | None = None) -> Towers:
    """Load one tower's model, with its own head, and change it as told."""
    prompts = query_prompt, document_prompt
    towers = load_sparse_towers(tower.model, tower.revision, tower.max_length, *prompts, tower.echo)
    for modules in {id(one): one for one in (towers.query, towers.document)}.values():
        change_tower(modules, tower)
    return towers


def change_tower(modules: nn.ModuleList, tower: SparseTower) -> None:
    """Keep the layers and set the pooling that the options name; a table is left as it is."""
    if not isinstance(modules[-1], SpladePooling):
        return
    first: Any = modules[0]
    if tower.layers:
        keep_layers(first.auto_model.base_model, tower.layers)
    if tower.pooling is not None:
        modules[-1].pooling_strategy = tower.pooling
    if tower.double_log is not None:
        modules[-1].activation_function = "log1p_relu" if tower.double_log else "relu"


def starts_lexically(options: SparseOptions) -> bool:
    """Whether a head is to be made from the collection; InputError if the model has one already."""
    if options.start == "model":
        return False
    folder = locate_model(options.model, options.revision)
    if has_head(folder) and not is_causal(folder):
        raise InputError(f'student.start = "lexical" makes a new head, and {options.model!r} has one; leave it out.')
    if options.layers or options.pooling == "sum" or options.echo:
        raise InputError(
            'student.start = "lexical" makes an encoder of one layer and pools by max; leave `layers`, `pooling` and '
            "`echo` out."
        )
    return True


def lexical_tower(
    options: SparseOptions, prompt: str, texts: Sequence[str], sides: int, precision: Precision
) -> list[Any]:
    """A tower that gives a text the weights of BM25; see `make_lexical_model`."""
    source = locate_model(options.model, options.revision)
    rendered = [prompt + text for text in texts]
    double = bool(options.double_log)
    transformer = make_lexical_model(source, rendered, options.max_length, sides, double, precision)
    return [transformer, SpladePooling(options.pooling or "max", "log1p_relu" if double else "relu")]
