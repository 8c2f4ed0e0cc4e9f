"""Export a static or lexical student as a table, and refuse one that is not the student.

What is written is loaded as it will be served (`retrieval_kd.encoder`) and compared with torch before the folder
appears, as graphs are (`retrieval_kd.export`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.base.modules import Normalize
from torch import nn

from retrieval_kd.encoder import FORMAT, MANIFEST, TABLE, TOKENIZER, Encoder
from retrieval_kd.export import Quality, check_quality, parse
from retrieval_kd.files import atomic, read_json, sha256, write_json
from retrieval_kd.lexical_embedding import LexicalEmbedding
from retrieval_kd.static_table import Precision, table_arrays
from retrieval_kd.towers import BAGS, bag_length
from retrieval_kd.types import InputError

_BATCH = 32


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

    `modules` are a StaticEmbedding or LexicalEmbedding, and Normalize. On `check_texts`, an empty text and all of them
    as one, no coordinate in float32 may differ from torch's by more than `vector_tolerance`; otherwise InputError, and
    no folder. How far int8 is from torch is in the manifest; whether it retrieves well enough `quality` says.
    """
    made = parse(form)
    if form not in get_args(Precision):
        raise InputError(f"a static or lexical student has no form {form!r}; export fp32 or int8 (export.forms).")
    first: Any = modules[0]
    if not isinstance(first, BAGS) or [type(module) for module in modules[1:]] != [Normalize]:
        kinds = ", ".join(type(module).__name__ for module in modules)
        raise InputError(f"a table is made of a static or lexical embedding and Normalize, not of {kinds}.")
    texts = [*check_texts, "", " ".join(check_texts)]
    expected = _torch_vectors(modules, texts)
    if not np.isfinite(expected).all():
        raise InputError("the student's own vectors are not finite numbers; its training diverged.")
    with atomic(folder) as scratch:
        scratch.mkdir()
        first.tokenizer.save(str(scratch / TOKENIZER))
        manifest = {
            "format": FORMAT,
            "form": form,
            "runtime": "table",
            "precision": "fp32",
            "vectors": "dense",
            "dimension": expected.shape[-1],
            "widths": [],
            "batch_size": _BATCH,
            "max_length": bag_length(first),
            "prompt": "",
            "table": _settings(first),
            "identity": identity,
            "document_identity": document_identity,
            "parameters": sum(parameter.numel() for parameter in first.parameters()),
        }
        _write(first, scratch, "fp32", manifest)
        vectors = Encoder.load(scratch).encode(texts)
        exact = float(np.abs(vectors - expected).max())
        if not exact <= vector_tolerance:  # also when it is NaN
            worst = texts[int(np.abs(vectors - expected).max(axis=1).argmax())]
            raise InputError(
                f"{folder}: not written, because the exported table differs from torch by {exact:.2e} in a coordinate "
                f"and {vector_tolerance:.2e} is allowed; it is worst on {worst[:60]!r}."
            )
        if form == "int8":
            manifest["precision"] = form
            _write(first, scratch, "int8", manifest)
            vectors = Encoder.load(scratch).encode(texts)
        lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(expected, axis=1)
        cosines = (vectors * expected).sum(1)[lengths > 0] / lengths[lengths > 0]
        manifest["parity"] = {
            "texts": len(texts),
            "tolerance": vector_tolerance,
            "fp32_max_error": exact,
            "max_error": float(np.abs(vectors - expected).max()),
            "min_cosine": float(cosines.min(initial=1.0)),
            "mean_cosine": float(cosines.mean()) if len(cosines) else 1.0,
        }
        write_json(scratch / MANIFEST, manifest)
        if quality is not None:
            manifest["quality"] = check_quality(Encoder.load(scratch), made, quality, folder)
            write_json(scratch / MANIFEST, manifest)
    return dict(read_json(folder / MANIFEST))


def _settings(first: Any) -> dict[str, Any]:
    lexical = isinstance(first, LexicalEmbedding)
    return {"longest": first.longest, "residual": first.residual} if lexical else {}


def _write(first: Any, folder: Path, form: Precision, manifest: dict[str, Any]) -> None:
    """The table in a form, and the manifest with what the files are."""
    if isinstance(first, LexicalEmbedding):
        layers = [layer.detach().numpy() for layer in first.layers]
        arrays = table_arrays(first.table.weight.detach().numpy(), form, first.keys, layers)
    else:
        arrays = table_arrays(first.embedding.weight.detach().numpy(), form)
    np.savez(folder / TABLE, allow_pickle=False, **arrays)
    files = [folder / name for name in (TABLE, TOKENIZER)]
    manifest["fingerprints"] = {file.name: sha256(file) for file in files}
    manifest["bytes"] = sum(file.stat().st_size for file in files)
    write_json(folder / MANIFEST, manifest)


def _torch_vectors(modules: Sequence[Any], texts: Sequence[str]) -> NDArray[np.float32]:
    with torch.inference_mode():
        features = modules[0].preprocess(list(texts))
        for module in modules:
            features = module(features)
        vectors: NDArray[np.float32] = features["sentence_embedding"].numpy()
    return vectors
