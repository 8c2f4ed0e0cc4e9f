"""Export a query tower that is a table: the rows of a static or lexical student, the terms of an inference-free one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
from torch import nn

from retrieval_kd.encoder import TABLE, TOKENIZER
from retrieval_kd.export import Exported, Quality, parse, write_checked
from retrieval_kd.lexical_embedding import LexicalEmbedding
from retrieval_kd.served_table import Precision, table_arrays
from retrieval_kd.static_start import plain_tokenizer
from retrieval_kd.towers import BAGS, bag_length
from retrieval_kd.types import InputError

TABLES = (*BAGS, SparseStaticEmbedding)  # first modules of the towers that are one

Arrays = Callable[[Precision], dict[str, NDArray[Any]]]


def export_table(
    modules: Sequence[nn.Module],
    folder: Path,
    form: str,
    *,
    identity: Mapping[str, Any],
    document_identity: Mapping[str, Any],
    check_texts: Sequence[str],
    vector_tolerance: float = 1e-4,
    quality: Quality | None = None,
) -> dict[str, Any]:
    """Write the table of a query tower into `folder` and return its manifest.

    `modules` are a StaticEmbedding or LexicalEmbedding, and Normalize, of which there are fp32 and int8; or a
    SparseStaticEmbedding, of which there is fp32. The table passes the gate (`export.write_checked`) on `check_texts`,
    an empty text and all of them as one; what fails is an InputError, and no folder.
    """
    made = parse(form)
    first: Any = modules[0]
    kinds = [type(module) for module in modules]
    if not isinstance(first, TABLES) or kinds[1:] != ([Normalize] if isinstance(first, BAGS) else []):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise InputError(
            "a table is made of a static or lexical embedding and Normalize, or of a sparse static embedding, "
            f"not of {names}."
        )
    arrays, facts, forms = _bag(first) if isinstance(first, BAGS) else _terms(first)
    if form not in forms:
        raise InputError(
            f"{kinds[0].__name__} has no form {form!r}; a table of it is {' or '.join(forms)} (export.forms)."
        )
    tokenizer = first.tokenizer if isinstance(first, BAGS) else plain_tokenizer(first.tokenizer, facts["max_length"])

    def write(scratch: Path, precision: Precision = "fp32") -> None:
        tokenizer.save(str(scratch / TOKENIZER))
        np.savez(scratch / TABLE, allow_pickle=False, **arrays(precision))

    def convert(scratch: Path) -> dict[str, Any]:
        write(scratch, "int8")
        return {"precision": "int8"}

    facts |= {
        "runtime": "table",
        "widths": [],
        "prompt": "",
        "identity": identity,
        "document_identity": document_identity,
        "parameters": sum(parameter.numel() for parameter in first.parameters()),
    }
    texts = [*check_texts, "", " ".join(check_texts)]
    exported = Exported(made, facts, texts, _torch_vectors(modules, texts), write, None if form == "fp32" else convert)
    return write_checked(exported, folder, vector_tolerance, quality)


def _bag(first: Any) -> tuple[Arrays, dict[str, Any], tuple[str, ...]]:
    """What makes the arrays of a static or lexical module, its facts, and its forms."""
    keys, layers, settings = None, [], {}
    weight = first.embedding.weight if not isinstance(first, LexicalEmbedding) else first.table.weight
    if isinstance(first, LexicalEmbedding):
        keys, layers = first.keys, [layer.detach().numpy() for layer in first.layers]
        settings = {"longest": first.longest, "residual": first.residual}
    facts = {"vectors": "dense", "table": settings, "max_length": bag_length(first)}
    return lambda precision: table_arrays(weight.detach().numpy(), precision, keys, layers), facts, ("fp32", "int8")


def _terms(first: Any) -> tuple[Arrays, dict[str, Any], tuple[str, ...]]:
    """The same of an inference-free student's table of weights."""
    facts = {"vectors": "sparse", "table": {}, "max_length": first.max_seq_length}
    return lambda _: {"weights": first.weight.detach().numpy()}, facts, ("fp32",)


def _torch_vectors(modules: Sequence[Any], texts: Sequence[str]) -> NDArray[np.float32]:
    with torch.inference_mode():
        features = modules[0].preprocess(list(texts))
        for module in modules:
            features = module(features)
        vectors: NDArray[np.float32] = features["sentence_embedding"].numpy()
    return vectors
