"""Dense students: a transformer with pooling on each side, tied or apart; scores are dot products.

Started from any model, perhaps keeping only chosen layers of it. A document tower of its own may be
frozen: then a small query tower learns to live in the space of a large document tower, whose
vectors need not be made again (LEAF, arXiv:2509.12539).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from sentence_transformers.base.modules import Dense as Projection
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

from retrieval_kd.lora import Lora, add_lora, merged
from retrieval_kd.students import Batch, Outputs, own_scores
from retrieval_kd.tables import Positive, Table
from retrieval_kd.towers import Towers, join_towers, keep_layers, load_towers, run_tower, set_dropout, tokenize
from retrieval_kd.types import InputError, Side

TEACHER = "bi_encoder"  # the kind that reads a saved student
VECTORS = "dense"  # those of a text
SEARCHES = True  # its vectors can be indexed


class Tower(Table):
    """One encoder: where it starts from and what is kept of it."""

    model: str
    revision: str | None = None
    layers: tuple[int, ...] = ()  # numbers of the layers to keep, in this order; none given: all
    pooling: Literal["cls", "max", "mean", "lasttoken"] | None = None  # absent: the model's own
    normalize: bool | None = None  # vectors of unit length; absent: as the model does
    project: Positive | None = None  # width of a linear layer after pooling
    max_length: Positive | None = None  # tokens; absent: the model's own
    lora: Lora | None = None  # train low-rank updates of the transformer alone; saved, they are part of its weights


class Document(Tower):
    """A document tower of its own."""

    frozen: bool = False


class Options(Tower):
    """The query tower; it reads documents too unless they have a tower of their own."""

    document: Document | None = None
    freeze_embeddings: bool = False  # keep the token table of the query tower as it is
    dropout: float | None = Field(default=None, ge=0, lt=1)  # absent: the model's own
    query_prompt: str | None = None  # absent: the one saved with the model
    document_prompt: str | None = None


class DenseStudent(nn.Module):
    """Two towers (or one, twice) as Sentence Transformers modules."""

    def __init__(self, towers: Towers, frozen_documents: bool) -> None:
        super().__init__()
        self.towers = towers
        self.frozen_documents = frozen_documents
        # Registered once when tied, and not at all when frozen: what is registered is trained and kept in
        # checkpoints.
        self.query = towers.query
        if towers.document is not towers.query and not frozen_documents:
            self.document = towers.document

    def tokenize(self, texts: Sequence[str], side: Side) -> list[list[int]]:
        return tokenize(self.towers.side(side), self.towers.render(texts, side))

    def forward(self, batch: Batch) -> Outputs:
        queries = run_tower(self.query, batch.queries, batch)  # (B, layers, D), the last one alone unless asked
        if batch.document_vectors is not None:
            documents = batch.document_vectors.to(queries.device)[:, None]
        elif batch.documents:
            documents = run_tower(self.towers.document, batch.documents, batch)
        else:
            documents = queries.new_zeros(0, *queries.shape[1:])
        with torch.autocast(queries.device.type, enabled=False):  # scores in float32 even where towers run in bf16
            layers = [
                _outputs(queries[:, number], documents[:, min(number, documents.shape[1] - 1)], batch.columns)
                for number in range(queries.shape[1])
            ]
        return replace(layers[-1], layers=layers if batch.layers else ())

    def save(self, folder: Path) -> None:
        merged(self.towers.model).save(str(folder), create_model_card=False)


def _outputs(queries: Tensor, documents: Tensor, columns: Tensor) -> Outputs:
    grid = queries @ documents.T  # (B, U)
    return Outputs(own_scores(grid, columns), grid, queries, documents)


def load(options: Options) -> DenseStudent:
    """Build the towers that the options describe."""
    query = _modules(options, options.query_prompt, options.document_prompt)
    if options.freeze_embeddings:
        first: Any = query.query[0]
        first.model.get_input_embeddings().weight.requires_grad_(False)
    if options.document is None:
        towers = query
    else:
        document = _modules(options.document, options.query_prompt, options.document_prompt)
        widths = [_width(modules) for modules in (query.query, document.document)]
        if widths[0] != widths[1]:
            raise InputError(
                f"the query tower gives {widths[0]} numbers and the document tower {widths[1]}; "
                f"set student.project = {widths[1]}."
            )
        unit = [isinstance(tower[-1], Normalize) for tower in (query.query, document.document)]
        if options.document.frozen and unit[0] != unit[1]:
            raise InputError(
                "of the query tower and the frozen document tower one gives unit vectors and the other does not, so "
                "that the one cannot live in the other's space; set `normalize` alike for both."
            )
        towers = _join(query, document)
        if options.document.frozen:
            towers.document.requires_grad_(False)
    set_dropout(towers.query, options.dropout)
    if options.lora is not None:
        add_lora(towers.query, options.lora)
    if options.document is not None and options.document.lora is not None:
        if options.document.frozen:
            raise InputError("student.document is frozen, so that student.document.lora would train nothing.")
        add_lora(towers.document, options.document.lora)
    return DenseStudent(towers, options.document is not None and options.document.frozen)


def _modules(tower: Tower, query_prompt: str | None, document_prompt: str | None) -> Towers:
    """Load one tower's model and change it as told."""
    loaded = load_towers(tower.model, tower.revision, tower.max_length, query_prompt, document_prompt)
    if loaded.query is not loaded.document:
        raise InputError(f"model {tower.model!r} has two towers; start a student from a model that has one.")
    modules: list[Any] = list(loaded.query)
    if tower.layers:
        keep_layers(modules[0].model, tower.layers)
    width = modules[0].get_embedding_dimension()
    if tower.pooling is not None:
        modules = [Pooling(width, tower.pooling) if isinstance(module, Pooling) else module for module in modules]
    if tower.project is not None:
        at = next(place for place, module in enumerate(modules) if isinstance(module, Pooling)) + 1
        modules.insert(at, Projection(width, tower.project, bias=False, activation_function=nn.Identity()))
    if tower.normalize is not None:
        modules = [module for module in modules if not isinstance(module, Normalize)]
        modules += [Normalize()] if tower.normalize else []
    return join_towers(modules, modules, loaded.query_prompt, loaded.document_prompt)


def _join(query: Towers, document: Towers) -> Towers:
    return join_towers(list(query.query), list(document.document), query.query_prompt, document.document_prompt)


def _width(modules: nn.ModuleList) -> int:
    return next(
        int(width)
        for module in reversed(modules)
        if (width := getattr(module, "get_embedding_dimension", lambda: None)()) is not None
    )
