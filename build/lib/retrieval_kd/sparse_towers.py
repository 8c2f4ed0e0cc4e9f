"""Sparse encoders: towers whose vectors are weights of vocabulary terms, and what trains and encodes with them.

A tower is a language model with its head, masked or causal, and SPLADE pooling, or a table that gives each term of a
query one weight (inference-free). All are modules of Sentence Transformers, whose SparseEncoder loads what is saved
here; a causal one with `trust_remote_code=True`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling
from torch import Tensor, nn

from retrieval_kd import decoder_transformer
from retrieval_kd.decoder_transformer import DecoderTransformer
from retrieval_kd.files import read_json
from retrieval_kd.gather import encode_sorted, micro_batches
from retrieval_kd.tables import Precision
from retrieval_kd.towers import DECODER, Reading, Towers, autocast, load_towers, pad, tokenize
from retrieval_kd.types import InputError, Side
from retrieval_kd.vocabulary_head import head_of, pool_vocabulary, without_head
from retrieval_kd.weights import locate_model

BATCH_TOKENS = 2048  # encoded at once where there is no gradient, padding included


def load_sparse_towers(
    name: str,
    revision: str | None = None,
    max_length: int | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    echo: bool = False,
) -> Towers:
    """Load a SparseEncoder, or a language model, as two towers; with `echo`, a causal one reads each text twice.

    Raises InputError for a model without a head over its vocabulary, which would be a random one, and for `echo` of
    one that is not causal or was saved without.
    """
    folder = locate_model(name, revision)
    if not has_head(folder):
        raise no_head(name)
    form = sparse_form(folder, echo)
    towers = load_towers(name, revision, max_length, query_prompt, document_prompt, form)
    for tower in (towers.query, towers.document):
        kinds = [type(module) for module in tower]
        if kinds == [SparseStaticEmbedding]:
            continue
        if kinds[1:] != [SpladePooling] or not issubclass(kinds[0], Transformer):
            raise no_head(name)
        first: Any = tower[0]
        head_of(first.auto_model)
        if echo and not (isinstance(first, DecoderTransformer) and first.echo):
            raise InputError(
                f"echo = true has a causal language model read each text twice, and model {name!r} is none, or was "
                "trained to read it once; leave echo out."
            )
    return towers


def sparse_form(folder: Path, echo: bool = False) -> Any:
    """What makes a SparseEncoder of a model folder: its class, or, for a causal language model, a function like it."""
    if not is_causal(folder):
        return SparseEncoder

    def make(path: str, **_: Any) -> SparseEncoder:
        return SparseEncoder(modules=[DecoderTransformer(path, echo=echo), SpladePooling("max")], device="cpu")

    return make


def has_head(folder: Path) -> bool:
    """Whether a model folder is a sparse encoder, or a language model, masked or causal, with its head."""
    if (folder / "modules.json").exists():
        kinds = [path.read_text(encoding="utf-8") for path in folder.glob("*.json") if path.name in _MODULES]
        return any("SpladePooling" in text for text in kinds)
    return is_causal(folder) or any(name.endswith("ForMaskedLM") for name in _architectures(folder))


def is_causal(folder: Path) -> bool:
    """Whether a model folder is a causal language model with its head, and no module of Sentence Transformers yet."""
    names = () if (folder / "modules.json").exists() else _architectures(folder)
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def _architectures(folder: Path) -> list[str]:
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    return [str(name) for name in config.get("architectures") or ()]


_MODULES = ("modules.json", "router_config.json")


def save_sparse(model: Any, folder: Path) -> None:
    """Save a SparseEncoder into a folder, with the code of the module that Sentence Transformers lacks."""
    model.save(str(folder), create_model_card=False)
    ours = f"{DecoderTransformer.__module__}.{DecoderTransformer.__name__}"
    for path in (folder / name for name in _MODULES):
        if path.exists() and ours in (text := path.read_text(encoding="utf-8")):
            path.write_text(text.replace(ours, DECODER), encoding="utf-8")
            shutil.copy(decoder_transformer.__file__, folder)


def no_head(name: str) -> InputError:
    """What is wrong with a model without a language model's head."""
    return InputError(
        f"model {name!r} has no language model's head that would give its tokens weights of vocabulary terms; start "
        'from one that has, or say start = "lexical", which makes a head from the collection.'
    )


def run_sparse_tower(
    modules: nn.ModuleList, token_ids: Sequence[NDArray[np.int32]], reading: Reading, top_k: int | None = None
) -> Tensor:
    """Encode tokenised texts with gradient, in the order given: (n, V) float32, the `top_k` largest weights of each."""
    if not token_ids:
        return torch.zeros(0, vocabulary_size(modules), device=_device(modules))
    encode, lengths = partial(encode_batch, modules), _lengths(modules, token_ids)
    weights = encode_sorted(token_ids, lengths, encode, reading.micro_batch_tokens, reading.gradient_caching)
    return weights if top_k is None else keep_largest(weights, top_k)


def encode_batch(modules: nn.ModuleList, token_ids: Sequence[NDArray[np.int32]]) -> Tensor:
    """Encode tokenised texts at once, with gradient: (n, V) float32, weights of at least 0 from SPLADE pooling."""
    first: Any = modules[0]
    pooling: Any = modules[-1]
    features = pad(token_ids, first.tokenizer.pad_token_id or 0, _device(modules))
    if not isinstance(pooling, SpladePooling):
        for module in modules:
            features = module(features)
        return cast(Tensor, features["sentence_embedding"]).float()
    with without_head(first.auto_model) as head:
        features = first(features)
    states, mask = features["token_embeddings"], features["attention_mask"]  # (n, L, D), (n, L)
    double = pooling.activation_function == "log1p_relu"
    return pool_vocabulary(states, mask, head.weight, head.bias, pooling.pooling_strategy, double)


def _lengths(modules: nn.ModuleList, token_ids: Sequence[NDArray[np.int32]]) -> list[int]:
    """Tokens that a tower reads of each text, of one with echo both copies; at least 1, for a table may find none."""
    first: Any = modules[0]
    copies = 2 if isinstance(first, DecoderTransformer) and first.echo else 1
    return [max(1, copies * len(ids)) for ids in token_ids]


def _device(modules: nn.ModuleList) -> torch.device:
    return next(modules.parameters()).device


def keep_largest(weights: Tensor, k: int) -> Tensor:
    """The weights (n, V) with all but the `k` largest of each text set to 0."""
    best = weights.detach().topk(min(k, weights.shape[1]), dim=1).indices
    return weights * torch.zeros_like(weights).scatter_(1, best, 1.0)


def vocabulary_size(modules: nn.ModuleList) -> int:
    """How many terms a tower's vectors have."""
    first: Any = modules[0]
    last: Any = modules[-1]
    return int(
        head_of(first.auto_model).out_features if isinstance(last, SpladePooling) else last.get_embedding_dimension()
    )


def encode_sparse(
    towers: Towers,
    texts: Sequence[str],
    side: Side,
    precision: Precision,
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[int], object] = int,
) -> csr_array:
    """Encode rendered texts (the prompt is part of them): (n, V) float32, in the order given.

    Texts of similar length share a batch of at most `batch_tokens`, padding included; `advance` is told how many are
    done. Processes share nothing, so that one may encode while the others wait.
    """
    modules, top_k = towers.side(side), towers.model.max_active_dims
    tokens = [np.array(ids, np.int32) for ids in tokenize(modules, texts)]
    lengths = np.array(_lengths(modules, tokens), np.int64)
    order, pieces = np.argsort(lengths, kind="stable"), [csr_array((0, vocabulary_size(modules)), dtype=np.float32)]
    with torch.inference_mode(), autocast(precision):
        for places in micro_batches(order, lengths[order].tolist(), batch_tokens):
            found = encode_batch(modules, [tokens[place] for place in places])
            pieces.append(csr_array((found if top_k is None else keep_largest(found, top_k)).cpu().numpy()))
            advance(len(places))
    return csr_array(scipy.sparse.vstack(pieces, format="csr")[np.argsort(order)])
