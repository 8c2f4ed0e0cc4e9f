"""Sparse encoders: towers whose vectors are weights of vocabulary terms, and what trains and encodes with them.

A tower is a language model with its head and SPLADE pooling, or a table that gives each term of a query
one weight (inference-free). Both are modules of Sentence Transformers, whose SparseEncoder loads what is saved here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling
from torch import Tensor, nn

from retrieval_kd.files import read_json
from retrieval_kd.gather import encode_sorted
from retrieval_kd.progress import progress
from retrieval_kd.tables import Precision
from retrieval_kd.towers import Side, Towers, autocast, load_towers, pad, tokenize
from retrieval_kd.types import InputError
from retrieval_kd.vocabulary_head import head_of, pool_vocabulary, without_head
from retrieval_kd.weights import locate_model

BATCH_TOKENS = 2048  # encoded at once where there is no gradient, padding included


class Reading(Protocol):
    """How texts are encoded in training; a Batch is one."""

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens encoded at once, padding included."""
        ...

    @property
    def gradient_caching(self) -> bool:
        """Whether texts are encoded again for their gradient, to save memory."""
        ...


def load_sparse_towers(
    name: str,
    revision: str | None = None,
    max_length: int | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
) -> Towers:
    """Load a SparseEncoder, or a masked language model, as two towers.

    Raises InputError for a model without a head over its vocabulary, which would be a random one.
    """
    if not has_head(locate_model(name, revision)):
        raise _no_head(name)
    towers = load_towers(name, revision, max_length, query_prompt, document_prompt, SparseEncoder)
    for tower in (towers.query, towers.document):
        kinds = [type(module) for module in tower]
        if kinds == [SparseStaticEmbedding]:
            continue
        if kinds[1:] != [SpladePooling] or not issubclass(kinds[0], Transformer):
            raise _no_head(name)
        first: Any = tower[0]
        head_of(first.auto_model)
    return towers


def has_head(folder: Path) -> bool:
    """Whether a model folder is a sparse encoder, or a masked language model with its head."""
    if (folder / "modules.json").exists():
        kinds = [path.read_text(encoding="utf-8") for path in folder.glob("*.json") if path.name in _MODULES]
        return any("SpladePooling" in text for text in kinds)
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    return any(str(name).endswith("ForMaskedLM") for name in config.get("architectures") or ())


_MODULES = ("modules.json", "router_config.json")


def _no_head(name: str) -> InputError:
    return InputError(
        f"model {name!r} has no language model's head that would give its tokens weights of vocabulary terms; start "
        'from one that has, or say start = "lexical", which makes a head from the collection.'
    )


def join_towers(
    query: Sequence[Any], document: Sequence[Any], query_prompt: str, document_prompt: str, top_k: int | None
) -> Towers:
    """One SparseEncoder of both sides: plain when they are the same modules, routed when not."""
    modules = list(query) if query is document else [Router.for_query_document(list(query), list(document))]
    prompts = {"query": query_prompt, "document": document_prompt}
    model = SparseEncoder(
        modules=modules, prompts=prompts, similarity_fn_name="dot", device="cpu", max_active_dims=top_k
    )
    query_list = nn.ModuleList(query)
    document_list = query_list if query is document else nn.ModuleList(document)
    return Towers(model, query_list, document_list, query_prompt, document_prompt)


def run_sparse_tower(
    modules: nn.ModuleList, token_ids: Sequence[NDArray[np.int32]], reading: Reading, top_k: int | None = None
) -> Tensor:
    """Encode tokenised texts with gradient, in the order given: (n, V) float32, the `top_k` largest weights of each."""
    first: Any = modules[0]
    device = next(modules.parameters()).device

    def encode(token_ids: list[NDArray[np.int32]]) -> Tensor:
        features = pad(token_ids, first.tokenizer.pad_token_id or 0, device)
        if isinstance(first, SparseStaticEmbedding):
            return cast(Tensor, first(features)["sentence_embedding"])
        pooling: Any = modules[1]
        with without_head(first.auto_model) as head:
            states = first.auto_model(**features).logits  # (n, L, D)
        double = pooling.activation_function == "log1p_relu"
        mask = features["attention_mask"]
        return pool_vocabulary(states, mask, head.weight, head.bias, pooling.pooling_strategy, double)

    if not token_ids:
        return torch.zeros(0, vocabulary_size(modules), device=device)
    lengths = [len(ids) for ids in token_ids]
    weights = encode_sorted(token_ids, lengths, encode, reading.micro_batch_tokens, reading.gradient_caching)
    return weights if top_k is None else keep_largest(weights, top_k)


def keep_largest(weights: Tensor, k: int) -> Tensor:
    """The weights (n, V) with all but the `k` largest of each text set to 0."""
    best = weights.detach().topk(min(k, weights.shape[1]), dim=1).indices
    return weights * torch.zeros_like(weights).scatter_(1, best, 1.0)


def vocabulary_size(modules: nn.ModuleList) -> int:
    """How many terms a tower's vectors have."""
    first: Any = modules[0]
    if isinstance(first, SparseStaticEmbedding):
        return int(first.num_dimensions)
    return int(head_of(first.auto_model).out_features)


class _Batch:
    micro_batch_tokens, gradient_caching = BATCH_TOKENS, False


def encode_sparse(towers: Towers, texts: Sequence[str], side: Side, precision: Precision) -> scipy.sparse.csr_array:
    """Encode rendered texts (the prompt is part of them): (n, V) float32, in the order given."""
    modules = towers.side(side)
    tokens = [np.array(ids, np.int32) for ids in tokenize(modules, texts)]
    order = np.argsort([-len(ids) for ids in tokens], kind="stable")  # little padding
    pieces: list[Any] = []
    chunk = 256
    with progress(f"encode {side} sparse", len(texts)) as advance, torch.inference_mode(), autocast(precision):
        for start in range(0, len(order), chunk):
            batch = [tokens[place] for place in order[start : start + chunk]]
            found = run_sparse_tower(modules, batch, _Batch(), towers.model.max_active_dims)
            pieces.append(scipy.sparse.csr_array(found.cpu().numpy()))
            advance(len(batch))
    if not pieces:
        return scipy.sparse.csr_array((0, vocabulary_size(modules)), dtype=np.float32)
    vectors = scipy.sparse.vstack(pieces, format="csr")[np.argsort(order)]
    return scipy.sparse.csr_array(vectors, dtype=np.float32)
