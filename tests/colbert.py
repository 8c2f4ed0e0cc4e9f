"""Tiny late-interaction checkpoints, in the forms that the field publishes them."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_sentence_transformer

MARKERS = {"thread": "[unused0]", "lock": "[unused1]"}  # words of the tiny vocabulary that give their place to markers


def transformer(folder: Path, seed: int = 0) -> Path:
    """A plain transformer, whose vocabulary has the two markers that BERT's has, as ordinary tokens."""
    tiny_sentence_transformer(folder, seed=seed)
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    for word, marker in MARKERS.items():
        text = text.replace(f'"{word}"', f'"{marker}"')
    path.write_text(text, encoding="utf-8")
    return folder


def projection(width: int = 32, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(dim, width, generator=torch.Generator().manual_seed(seed))


def stanford(folder: Path, **metadata: object) -> Path:
    """As `colbert-ir/colbertv2.0`: the projection among the weights, settings in artifact.metadata."""
    transformer(folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {f"bert.{name}": tensor for name, tensor in weights.items()}
    save_file({**renamed, "linear.weight": projection()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["HF_ColBERT"]}), encoding="utf-8")
    settings = {
        "query_token_id": "[unused0]",
        "doc_token_id": "[unused1]",
        "query_maxlen": 12,
        "doc_maxlen": 16,
        "mask_punctuation": True,
        "attend_to_mask_tokens": False,
    }
    (folder / "artifact.metadata").write_text(json.dumps({**settings, **metadata}), encoding="utf-8")
    return folder


def pylate(folder: Path) -> Path:
    """As PyLate saves: modules.json with its own Dense, settings beside the prompts."""
    transformer(folder)
    dense = folder / "1_Dense"
    dense.mkdir()
    shape = {"in_features": 32, "out_features": 8, "bias": False}
    activation = "torch.nn.modules.linear.Identity"
    write(dense / "config.json", {**shape, "activation_function": activation})
    save_file({"linear.weight": projection()}, dense / "model.safetensors")
    types = ("sentence_transformers.models.Transformer", "pylate.models.Dense.Dense")
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(zip(("", "1_Dense"), types, strict=True))
    ]
    write(folder / "modules.json", modules)
    write(folder / "sentence_bert_config.json", {"max_seq_length": 16, "do_lower_case": False})
    settings = {
        "model_type": "ColBERT",
        "prompts": {},
        "similarity_fn_name": "MaxSim",
        "query_prefix": "[unused0] ",
        "document_prefix": "[unused1] ",
        "query_length": 12,
        "document_length": 16,
        "attend_to_expansion_tokens": False,
        "skiplist_words": list(string.punctuation),
    }
    write(folder / "config_sentence_transformers.json", settings)
    return folder


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
