"""Late-interaction students: a vector a token, scores by MaxSim (ColBERT, arXiv:2004.12832).

Saved, they are what Sentence Transformers' MultiVectorEncoder loads. They re-rank; there is no
index of token vectors here.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense as Projection
from sentence_transformers.base.modules import Normalize
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from torch import Tensor, nn

from retrieval_kd.gather import encode_sorted
from retrieval_kd.lora import Lora, add_lora, merged
from retrieval_kd.students import Batch, Outputs, Tokens, own_scores
from retrieval_kd.tables import Positive, Table
from retrieval_kd.token_vectors import load_token_encoder, set_query_length
from retrieval_kd.towers import pad
from retrieval_kd.types import InputError, Side

TEACHER = "late_interaction"  # the kind that reads a saved student
VECTORS = None  # a text has not one of its own
SEARCHES = False  # it re-ranks and nothing else


class Options(Table):
    """A ColBERT model, or any transformer, which gets a new projection; what is absent is as the model has it."""

    model: str
    revision: str | None = None
    dim: Positive | None = None  # width of a new projection; absent: 128
    normalize: bool | None = None  # token vectors of unit length; with a new projection they are
    query_length: Positive | None = None  # tokens, special ones included
    document_length: Positive | None = None
    query_expansion: bool | None = None  # fill queries up to query_length with [MASK] tokens, which are scored
    attend_to_expansion_tokens: bool | None = None  # whether the other tokens see them
    skip_punctuation: bool | None = None  # leave punctuation of documents out of the scores
    query_prompt: str | None = None  # "[unused0] " or "[Q] " for a marker that the vocabulary has
    document_prompt: str | None = None
    lora: Lora | None = None


class LateInteractionStudent(nn.Module):
    """A MultiVectorEncoder that reads both sides."""

    frozen_documents = False

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def tokenize(self, texts: Sequence[str], side: Side) -> list[list[int]]:
        first = self.model[0]
        limit = first.query_length if side == "query" else first.document_length
        if side == "query" and first.query_expansion is not None and first.query_expansion["strategy"] == "fixed":
            limit = first.query_expansion["length"]
        rendered = [self.model.prompts[side] + text for text in texts]
        encoded = first.tokenizer(rendered, truncation=True, max_length=limit or first.max_seq_length)
        return cast(list[list[int]], encoded["input_ids"])

    def forward(self, batch: Batch) -> Outputs:
        queries, query_mask = self._encode(batch.queries, "query", batch)  # (B, layers, L, D), (B, L)
        if not batch.documents:
            grid = queries.new_zeros(len(queries), 0)
            return Outputs(own_scores(grid, batch.columns), grid)
        documents, document_mask = self._encode(batch.documents, "document", batch)
        layers = []
        with torch.autocast(queries.device.type, enabled=False):  # scores in float32 even where texts run in bf16
            for number in range(queries.shape[1]):
                # Of the products (B, U, L, L) a chunk is held at once; the gradient keeps the places of their maxima.
                grid = self.model.similarity(
                    queries[:, number], documents[:, number], a_mask=query_mask, b_mask=document_mask
                )
                layers.append(Outputs(own_scores(grid, batch.columns), grid))
        return replace(layers[-1], layers=layers if batch.layers else ())

    def save(self, folder: Path) -> None:
        merged(self.model).save(str(folder), create_model_card=False)

    def _encode(self, token_ids: Tokens, side: Side, batch: Batch) -> tuple[Tensor, Tensor]:
        """Token vectors (n, layers, L, D) float32, the last layer alone unless asked, and which count (n, L)."""
        first, *others = list(self.model)
        whole = self._features(token_ids, side)
        for module in others:
            if isinstance(module, MultiVectorMask):
                whole = module(whole, task=side)
        mask = whole["attention_mask"].bool()  # (n, L)
        following = [module for module in others if not isinstance(module, MultiVectorMask)]

        def encode(token_ids: list[Any]) -> Tensor:
            features = self._features(token_ids, side)
            if batch.layers:
                read = {key: features[key] for key in ("input_ids", "attention_mask")}
                states = first.auto_model(**read, output_hidden_states=True).hidden_states[1:]
            else:
                states = (first(dict(features))["token_embeddings"],)
            vectors = []
            for state in states:
                projected = {**features, "token_embeddings": state}
                for module in following:
                    projected = module(projected)
                vectors.append(projected["token_embeddings"].float())
            stacked = torch.stack(vectors, dim=1)  # (n, layers, longest of these, D)
            return nn.functional.pad(stacked, (0, 0, 0, mask.shape[1] - stacked.shape[2]))

        lengths = [len(ids) for ids in token_ids]
        return encode_sorted(token_ids, lengths, encode, batch.micro_batch_tokens, batch.gradient_caching), mask

    def _features(self, token_ids: Tokens, side: Side) -> dict[str, Tensor]:
        """What the transformer and the mask read: tokens padded to one length, queries expanded."""
        first = self.model[0]
        tokenizer = first.tokenizer
        features = pad(token_ids, tokenizer.pad_token_id or 0, next(self.parameters()).device)
        expansion = first.query_expansion if side == "query" else None
        if expansion is None:
            return features
        missing = max(0, expansion["length"] - features["input_ids"].shape[1])
        ids, attention = (nn.functional.pad(features[key], (0, missing)) for key in ("input_ids", "attention_mask"))
        added = (attention == 0) & (torch.arange(ids.shape[1], device=ids.device) < expansion["length"])
        if expansion["token"] is not None:
            filler = tokenizer.convert_tokens_to_ids(expansion["token"])
        else:  # as Sentence Transformers and PyLate have it
            filler = tokenizer.eos_token_id if tokenizer.mask_token_id is None else tokenizer.mask_token_id
        return {
            "input_ids": ids.masked_fill(added, filler),
            "attention_mask": attention.masked_fill(added, 1) if expansion["attend"] else attention,
            "query_expansion_positions": added,
        }


def load(options: Options) -> LateInteractionStudent:
    """Load the model and change it as told; a new projection is drawn."""
    model, projects = load_token_encoder(options.model, options.revision, options.query_prompt, options.document_prompt)
    set_query_length(model, options.query_length, options.query_expansion, options.attend_to_expansion_tokens)
    modules = list(model)
    if options.document_length is not None:
        modules[0].document_length = options.document_length
    width = model.get_embedding_dimension()
    if options.dim is not None and options.dim != width:
        if projects:
            raise InputError(f"student.dim is {options.dim}; model {options.model!r} projects to {width} already.")
        new = Projection(
            modules[0].get_embedding_dimension(),
            options.dim,
            bias=False,
            activation_function=nn.Identity(),
            module_input_name="token_embeddings",
        )
        modules = [new if isinstance(module, Projection) else module for module in modules]
    if options.normalize is not None:
        modules = [module for module in modules if not isinstance(module, Normalize)]
        modules += [Normalize(module_input_name="token_embeddings")] if options.normalize else []
    if options.skip_punctuation is not None:
        modules = [module for module in modules if not isinstance(module, MultiVectorMask)]
        modules.append(MultiVectorMask(list(string.punctuation) if options.skip_punctuation else []))
    if options.lora is not None:
        add_lora(modules, options.lora)
    return LateInteractionStudent(
        MultiVectorEncoder(
            modules=modules, prompts=model.prompts, similarity_fn_name=model.similarity_fn_name, device="cpu"
        )
    )
