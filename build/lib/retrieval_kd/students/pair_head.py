"""Bi-encoders with a learned head: each side is encoded once, an MLP on both vectors scores the pair.

DSE (arXiv:1908.05161) is `features = "products"`, `top_layers = 4`, `hidden = [512]`; D2LLM (arXiv:2406.17262)
is `features = "concat"`, `pooling = "pma"`, `hidden = [512, 512]` and LoRA. Such scores are no product of
vectors: the student re-ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

from retrieval_kd.gather import process
from retrieval_kd.lora import Lora, add_lora, merged
from retrieval_kd.pair_head import Features, PairHead, one_tower
from retrieval_kd.pooling import PMA, TopLayers
from retrieval_kd.students import Batch, Outputs, own_scores
from retrieval_kd.tables import Positive, Table
from retrieval_kd.towers import Towers, load_towers, run_tower, tokenize
from retrieval_kd.types import InputError, Side

TEACHER = "pair_head"  # the kind that reads a saved student
VECTORS = "dense"  # those of a text
SEARCHES = False  # it re-ranks and nothing else


class Options(Table):
    """The encoder of both sides, and the head."""

    model: str
    revision: str | None = None
    max_length: Positive | None = None  # tokens; absent: the model's own
    pooling: Literal["cls", "max", "mean", "lasttoken", "pma"] | None = None  # absent: the model's own
    pma_heads: Positive = 4
    top_layers: Positive | None = None  # pool the states of so many layers side by side; absent: the last alone
    normalize: bool | None = None  # vectors of unit length; absent: as the model does
    query_prompt: str | None = None  # absent: the one saved with the model
    document_prompt: str | None = None
    features: Features = "products"  # what the head reads of u and v: [u; v; u*v; |u-v|], or [u; v] for "concat"
    hidden: tuple[Positive, ...] = (512,)  # widths of its hidden layers
    lora: Lora | None = None


class PairHeadStudent(nn.Module):
    """One encoder as Sentence Transformers modules, and a head over pairs of its vectors."""

    frozen_documents = False

    def __init__(self, towers: Towers, head: PairHead) -> None:
        super().__init__()
        self.towers = towers
        self.encoder = towers.query
        self.head = head
        # Every process scores the whole batch and gradients are summed over processes (gather): that of
        # the head, unlike that of an encoder's share of texts, would count once for each.
        for parameter in head.parameters():
            parameter.register_hook(lambda gradient: gradient / process()[1])  # type: ignore[no-untyped-call]

    def tokenize(self, texts: Sequence[str], side: Side) -> list[list[int]]:
        return tokenize(self.encoder, self.towers.render(texts, side))

    def forward(self, batch: Batch) -> Outputs:
        queries = run_tower(self.encoder, batch.queries, batch)  # (B, layers, D), the last one alone unless asked
        if batch.documents:
            documents = run_tower(self.encoder, batch.documents, batch)
        else:
            documents = queries.new_zeros(0, *queries.shape[1:])
        with torch.autocast(queries.device.type, enabled=False):  # scores in float32 even where texts run in bf16
            layers = [
                self._outputs(queries[:, number], documents[:, number], batch.columns)
                for number in range(queries.shape[1])
            ]
        return replace(layers[-1], layers=layers if batch.layers else ())

    def save(self, folder: Path) -> None:
        merged(self.towers.model).save(str(folder), create_model_card=False)
        self.head.save(folder)

    def _outputs(self, queries: Tensor, documents: Tensor, columns: Tensor) -> Outputs:
        grid = self.head.grid(queries, documents)  # (B, U)
        return Outputs(own_scores(grid, columns), grid, queries, documents)


def load(options: Options) -> PairHeadStudent:
    """Load the encoder, change it as told, and draw the head."""
    loaded = load_towers(
        options.model, options.revision, options.max_length, options.query_prompt, options.document_prompt
    )
    if loaded.query is not loaded.document:
        raise InputError(f"model {options.model!r} has two towers; start a student from a model that has one.")
    modules = _repool(list(loaded.query), options)
    if options.normalize is not None:
        modules = [module for module in modules if not isinstance(module, Normalize)]
        modules += [Normalize()] if options.normalize else []
    if options.lora is not None:
        add_lora(modules, options.lora)
    towers = one_tower(modules, {"query": loaded.query_prompt, "document": loaded.document_prompt})
    head = PairHead(towers.model.get_embedding_dimension(), options.features, options.hidden)
    return PairHeadStudent(towers, head)


def _repool(modules: list[Any], options: Options) -> list[Any]:
    """The modules with the pooling that the options ask for."""
    if options.pooling is None and options.top_layers is None:
        return modules
    at = next(place for place, module in enumerate(modules) if isinstance(module, Pooling))
    width = modules[0].get_embedding_dimension()
    before = []
    if options.top_layers is not None:
        config = modules[0].model.config
        if options.top_layers > config.num_hidden_layers:
            raise InputError(
                f"student.top_layers is {options.top_layers}; model {options.model!r} has "
                f"{config.num_hidden_layers} layers."
            )
        if other := [module for module in modules[at + 1 :] if not isinstance(module, Normalize)]:
            raise InputError(
                f"student.top_layers widens what {type(other[0]).__name__} of model {options.model!r} reads."
            )
        config.output_hidden_states = True
        before = [TopLayers(options.top_layers, width)]
        width = before[0].get_embedding_dimension()
    mode = options.pooling or modules[at].pooling_mode
    pooling = PMA(width, options.pma_heads) if mode == "pma" else Pooling(width, mode)
    return [*modules[:at], *before, pooling, *modules[at + 1 :]]
