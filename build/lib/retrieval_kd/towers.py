"""Towers: the Sentence Transformers modules that encode one side, queries or documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module, Normalize, Router
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
from torch import Tensor, nn

from retrieval_kd.decoder_transformer import DecoderTransformer
from retrieval_kd.engines import EnginePrecision, compile_module
from retrieval_kd.files import hash_texts
from retrieval_kd.gather import encode_sorted
from retrieval_kd.lexical_embedding import LexicalEmbedding
from retrieval_kd.types import SIDES, InputError, Side
from retrieval_kd.weights import hash_weights, locate_model

Encode = Callable[[Sequence[str], int], NDArray[np.float32]]
EXAMPLE = ("a text of a few words", "another")  # what a graph is traced with
BAGS = (StaticEmbedding, LexicalEmbedding)  # modules that look up rows, instead of a transformer
DECODER = "decoder_transformer.DecoderTransformer"  # as a saved model names it, in whose folder its code lies
_OURS = {f"{LexicalEmbedding.__module__}.{LexicalEmbedding.__name__}": LexicalEmbedding, DECODER: DecoderTransformer}


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

    @property
    def layers(self) -> bool:
        """Whether the vectors of every layer are wanted."""
        ...


@dataclass(frozen=True)
class Towers:
    """Both sides of a bi-encoder, which may be the same object, and the text put before each."""

    model: Any  # the SentenceTransformer that holds both
    query: nn.ModuleList
    document: nn.ModuleList
    query_prompt: str
    document_prompt: str

    def side(self, side: Side) -> nn.ModuleList:
        """The modules of one side."""
        return self.query if side == "query" else self.document

    @property
    def normalized(self) -> bool:
        """Whether both towers end by giving vectors unit length."""
        return all(isinstance(list(tower)[-1], Normalize) for tower in (self.query, self.document))

    def render(self, texts: Sequence[str], side: Side) -> list[str]:
        """The texts as the model reads them: with the side's prompt."""
        prompt = self.query_prompt if side == "query" else self.document_prompt
        return [prompt + text for text in texts]


def load_towers(
    name: str,
    revision: str | None = None,
    max_length: int | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    form: Any = SentenceTransformer,
) -> Towers:
    """Load a Sentence Transformers model, or any transformer (mean pooling), as two towers.

    `max_length` is in tokens and can only shorten. Prompts default to those saved with the model. `form` is the class
    of Sentence Transformers that the model is.
    """
    folder = locate_model(name, revision)
    if _names_ours(folder):  # our module needs no trust_remote_code here, and no other package's is trusted for it
        model: Any = form._load_with_module_classes(str(folder), _OURS, device="cpu", local_files_only=True)
    else:
        model = form(str(folder), device="cpu", local_files_only=True)
    model.float().eval()  # files may hold halves, and `precision` says what products are computed in
    modules: list[Any] = list(model)
    if isinstance(modules[0], Router):
        routes: Any = modules[0].sub_modules
        if len(modules) > 1 or set(routes) != set(SIDES):
            raise InputError(f"model {name!r} routes {sorted(routes)}; expected the routes query and document alone.")
        query, document = (nn.ModuleList(routes[side]) for side in SIDES)
        readers = [routes[side][0] for side in SIDES]
    else:
        query = document = nn.ModuleList(modules)
        readers = modules[:1]
    for reader in readers:
        if max_length is not None and isinstance(reader, BAGS):
            reader.tokenizer.enable_truncation(min(max_length, bag_length(reader) or max_length))
        elif max_length is not None:
            reader.max_seq_length = min(max_length, reader.max_seq_length or max_length)
            if not hasattr(reader, "auto_model"):  # static embeddings go by their tokenizer's
                reader.tokenizer.model_max_length = reader.max_seq_length
    prompts = model.prompts
    return Towers(
        model,
        query,
        document,
        prompts.get("query") or "" if query_prompt is None else query_prompt,
        prompts.get("document") or "" if document_prompt is None else document_prompt,
    )


def _names_ours(folder: Path) -> bool:
    """Whether a saved model has a module of this package."""
    files = [folder / name for name in ("modules.json", "router_config.json")]
    return any(name in file.read_text(encoding="utf-8") for file in files if file.exists() for name in _OURS)


def bag_length(reader: Any) -> int | None:
    """Tokens at which a static or lexical module's tokenizer cuts a text; None where it reads all."""
    found = reader.tokenizer.truncation
    return None if found is None else int(found["max_length"])


def keep_layers(transformer: Any, layers: Sequence[int]) -> None:
    """Keep only the given layers of a transformer, in the given order, and say so in its configuration."""
    for path in ("encoder.layer", "transformer.layer", "layers", "encoder.layers", "h"):
        owner: Any = transformer
        *parents, last = path.split(".")
        for name in parents:
            owner = getattr(owner, name, None)
        found = getattr(owner, last, None)
        if isinstance(found, nn.ModuleList):
            break
    else:
        raise InputError(f"{type(transformer).__name__} keeps its layers where `layers` cannot find them.")
    if bad := [number for number in layers if not 0 <= number < len(found)]:
        raise InputError(f"student.layers names layer {bad[0]}; the model has layers 0 to {len(found) - 1}.")
    setattr(owner, last, nn.ModuleList(found[number] for number in layers))
    transformer.config.num_hidden_layers = len(layers)


def join_towers(
    query: Sequence[Any],
    document: Sequence[Any],
    query_prompt: str,
    document_prompt: str,
    form: Any = SentenceTransformer,
    **settings: Any,
) -> Towers:
    """One model of both sides, whose scores are dot products: plain when they are the same modules, routed when not.

    `form` is its class, of Sentence Transformers, and `settings` are further ones of that class.
    """
    modules = list(query) if query is document else [Router.for_query_document(list(query), list(document))]
    prompts = {"query": query_prompt, "document": document_prompt}
    model = form(modules=modules, prompts=prompts, similarity_fn_name="dot", device="cpu", **settings)
    query_list = nn.ModuleList(query)
    document_list = query_list if query is document else nn.ModuleList(document)
    return Towers(model, query_list, document_list, query_prompt, document_prompt)


def set_dropout(modules: nn.Module, dropout: float | None) -> None:
    """The rate of every dropout layer, where one is given."""
    for module in modules.modules():
        if dropout is not None and isinstance(module, nn.Dropout):
            module.p = dropout


def describe(modules: nn.ModuleList, precision: str) -> dict[str, Any]:
    """What decides a tower's vectors: kinds of modules, their settings, a hash of their weights."""
    first: Any = modules[0]
    bags = isinstance(first, BAGS)
    return {
        "modules": [_settings(module) for module in modules],
        "weights": hash_weights(modules),
        "max_length": bag_length(first) if bags else getattr(first, "max_seq_length", None),
        "precision": precision,
        # which rows a text has is all in the tokenizer
        **({"tokenizer": hash_texts([first.tokenizer.to_str()])} if bags else {}),
    }


def _settings(module: nn.Module) -> dict[str, Any]:
    """Class and settings of a module, less where it was loaded from and by which version."""
    settings: dict[str, Any] = {"module": type(module).__name__}
    if isinstance(module, DecoderTransformer):
        settings["echo"] = module.echo
    config = getattr(module, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        drop = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
        settings["config"] = {key: value for key, value in config.to_dict().items() if key not in drop}
    elif isinstance(module, Module):
        settings["config"] = module.get_config_dict()
    return settings


def embed(
    towers: Towers, texts: Sequence[str], side: Side, precision: str, batch_size: int = 32
) -> NDArray[np.float32]:
    """Encode rendered texts (the prompt is part of them): (n, D) float32, in the order given."""
    with autocast(precision):
        vectors = towers.model.encode(
            list(texts),
            prompt="",
            task=side,
            batch_size=batch_size,
            show_progress_bar=False,
            convert_to_numpy=True,
        )
    return np.asarray(vectors, np.float32)


def compile_tower(modules: nn.ModuleList, precision: EnginePrecision, calibration: Sequence[str] = ()) -> Encode:
    """Compile one tower with OpenVINO: a function from rendered texts to vectors (n, D), `batch_size` texts at a time.

    Texts of similar length share a batch. An int8 tower is calibrated on the texts of `calibration`. Raises InputError
    for a tower that is no transformer with pooling.
    """
    first: Any = modules[0]
    if not hasattr(first, "auto_model"):
        raise InputError(f'engine = "openvino" runs transformers; this tower begins with {type(first).__name__}.')
    pad_id = first.tokenizer.pad_token_id or 0

    def padded(token_ids: Sequence[list[int]]) -> dict[str, Any]:
        return pad([np.array(ids, np.int32) for ids in token_ids], pad_id, torch.device("cpu"))

    forward = compile_module(
        _Tower(modules),
        padded(tokenize(modules, EXAMPLE)),
        precision,
        [padded([ids]) for ids in tokenize(modules, calibration)],
    )

    width = forward(padded(tokenize(modules, EXAMPLE))).shape[1]

    def encode(texts: Sequence[str], batch_size: int) -> NDArray[np.float32]:
        token_ids = tokenize(modules, texts)
        order = sorted(range(len(texts)), key=lambda place: -len(token_ids[place]))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        vectors = [forward(padded([token_ids[place] for place in batch])) for batch in batches]
        return np.concatenate(vectors)[np.argsort(order)] if vectors else np.zeros((0, width), np.float32)

    return encode


class _Tower(nn.Module):
    """A tower as one function of token ids and mask, both (B, L), to vectors (B, D)."""

    def __init__(self, modules: nn.ModuleList) -> None:
        super().__init__()
        self.steps = modules

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        first: Any = self.steps[0]
        return _vectors(self.steps, first({"input_ids": input_ids, "attention_mask": attention_mask}))


def autocast(precision: str, device: str = "cpu") -> Any:
    """A context in which matrix products run in `precision`."""
    return torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()


def run_tower(modules: nn.ModuleList, token_ids: Sequence[NDArray[np.int32]], batch: Reading) -> Tensor:
    """Encode tokenised texts with gradient, in the order given: (n, 1, D) float32, or (n, layers, D).

    The vectors of a layer are its token states passed through the modules that follow the
    transformer. Texts of similar length share a micro-batch, so that little of it is padding.
    """

    def encode(token_ids: list[NDArray[np.int32]]) -> Tensor:
        first: Any = modules[0]
        features = pad(token_ids, first.tokenizer.pad_token_id or 0, next(modules.parameters()).device)
        if not batch.layers:
            features = first(features)
            return _vectors(modules, features)[:, None]
        states = first.auto_model(**features, output_hidden_states=True).hidden_states[1:]
        every = [_vectors(modules, {**features, "token_embeddings": state}) for state in states]
        return torch.stack(every, dim=1)

    lengths = [len(ids) for ids in token_ids]
    return encode_sorted(token_ids, lengths, encode, batch.micro_batch_tokens, batch.gradient_caching)


def _vectors(modules: nn.ModuleList, features: dict[str, Any]) -> Tensor:
    """Token states through the modules after the transformer: (n, D) float32."""
    for module in list(modules)[1:]:
        features = module(features)
    return cast(Tensor, features["sentence_embedding"]).float()


def pad(token_ids: Sequence[NDArray[np.int32]], pad_id: int, device: torch.device) -> dict[str, Any]:
    """Token lists as `input_ids` and `attention_mask`, both (n, L) int64."""
    width = max((len(ids) for ids in token_ids), default=0)
    ids = np.full((len(token_ids), width), pad_id, np.int64)
    mask = np.zeros_like(ids)
    for place, tokens in enumerate(token_ids):
        ids[place, : len(tokens)] = tokens
        mask[place, : len(tokens)] = 1
    return {
        "input_ids": torch.from_numpy(ids).to(device),
        "attention_mask": torch.from_numpy(mask).to(device),
    }


def tokenize(modules: nn.ModuleList, texts: Sequence[str]) -> list[list[int]]:
    """Token ids as a tower reads them, cut at its maximum length; tables go without special tokens.

    A lexical tower reads the rows of its n-grams.
    """
    if not texts:
        return []
    first: Any = modules[0]
    if isinstance(first, LexicalEmbedding):
        return first.find(texts)
    if isinstance(first, StaticEmbedding):
        return [one.ids for one in first.tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    encoded = first.tokenizer(
        list(texts),
        truncation=True,
        max_length=first.max_seq_length,
        add_special_tokens=not isinstance(first, SparseStaticEmbedding),
    )
    return cast(list[list[int]], encoded["input_ids"])


def count_tokens(towers: Towers, queries: Sequence[str], documents: Sequence[str]) -> int:
    """Tokens of the distinct queries and of the distinct documents, as their towers read them."""
    texts: dict[Side, list[str]] = {"query": list(dict.fromkeys(queries)), "document": list(dict.fromkeys(documents))}
    return sum(len(ids) for side in SIDES for ids in tokenize(towers.side(side), texts[side]))
