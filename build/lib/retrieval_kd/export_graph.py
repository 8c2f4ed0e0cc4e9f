"""Export one tower of a student as a single graph: pooling, projection, SPLADE head and normalisation inside."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sparse_encoder.modules import SpladePooling
from tokenizers import Tokenizer

from retrieval_kd.encoder import GRAPH, TOKENIZER, Encoder
from retrieval_kd.export import Exported, Quality, parse, write_checked
from retrieval_kd.export_onnx import quantize, write_graph
from retrieval_kd.export_openvino import convert_graph
from retrieval_kd.files import hash_texts
from retrieval_kd.forms import Form
from retrieval_kd.sparse_towers import keep_largest
from retrieval_kd.types import InputError

_UNLIMITED = 1_000_000  # tokenizers without a limit say 1e30
_BATCH = 32
_SPARSE_BATCH = 4  # the logits of a batch are texts x tokens x vocabulary


def export_graph(
    modules: Iterable[Any],
    folder: Path,
    form: str,
    *,
    prompt: str = "",
    identity: Mapping[str, Any],
    document_identity: Mapping[str, Any] | None = None,
    check_texts: Sequence[str],
    vector_tolerance: float = 1e-4,
    calibration: Sequence[str] = (),
    quality: Quality | None = None,
    widths: Sequence[int] = (),
    top_k: int | None = None,
    traced: Path | None = None,
) -> dict[str, Any]:
    """Write the encoder of one side into `folder`, in a form (see `forms`), and return its manifest.

    `modules` are the Sentence Transformers modules of the side: a Transformer and Pooling, perhaps Dense and
    Normalize, or a Transformer and SpladePooling, of whose weights `top_k` are kept. `identity` describes this tower,
    `document_identity` the one whose vectors it is to be compared with (the same where absent). `calibration` are texts
    whose activations give an int8 form its ranges; `widths` are those that the student was trained with (Matryoshka).
    `traced` is a folder where the graph is kept for further forms of the same tower.

    Every form passes the gate (`export.write_checked`) on `check_texts`, an empty text and one beyond the longest.
    Other precisions are made from the graph of fp32. What fails is an InputError, and no folder.
    """
    made = parse(form)
    tower = [copy.deepcopy(module).cpu().float().eval() for module in modules]
    _check(tower, made, prompt, calibration)
    transformer: Any = tower[0]
    limit = transformer.max_seq_length
    max_length = None if limit is None or limit > _UNLIMITED else int(limit)
    sparse = isinstance(tower[-1], SpladePooling)
    texts = _with_borders(check_texts, max_length)

    def write(scratch: Path) -> None:
        _write_tokenizer(transformer.tokenizer, max_length, scratch / TOKENIZER)
        graph = scratch / GRAPH if traced is None else traced / f"{made.width or 'whole'}.onnx"
        if not graph.exists():
            write_graph(tower, prompt, graph, made.width, top_k)
        if traced is not None:
            shutil.copy(graph, scratch / GRAPH)

    facts = {
        "runtime": "onnx",
        "vectors": "sparse" if sparse else "dense",
        "widths": sorted(widths),
        "batch_size": _SPARSE_BATCH if sparse else _BATCH,
        "max_length": max_length,
        "prompt": prompt,
        "pad_id": transformer.tokenizer.pad_token_id or 0,
        "padding_side": transformer.tokenizer.padding_side,
        "identity": made.identity(identity),
        "document_identity": made.identity(identity if document_identity is None else document_identity),
        "parameters": sum(parameter.numel() for module in tower for parameter in module.parameters()),
    }
    expected = _torch_vectors(tower, texts, prompt, made, top_k)
    plain = (made.runtime, made.precision) == ("onnx", "fp32")
    convert = None if plain else partial(_convert, form=made, calibration=calibration)
    return write_checked(Exported(made, facts, texts, expected, write, convert), folder, vector_tolerance, quality)


def _check(tower: Sequence[Any], form: Form, prompt: str, calibration: Sequence[str]) -> None:
    """InputError for a tower that has no graph, and for a form that it has not."""
    form.check_installed()
    if not hasattr(tower[0], "auto_model"):
        raise InputError(f"export needs a Transformer as first module, this one is {type(tower[0]).__name__}.")
    if prompt and not all(getattr(module, "include_prompt", True) for module in tower):
        raise InputError(
            "the pooling leaves the prompt out (include_prompt = false), which the exported graph cannot; "
            "train and export with include_prompt = true, or without a prompt."
        )
    if form.calibrated and not calibration:
        raise InputError(f"the form {form.name!r} is calibrated on texts, and none are given; give some queries.")
    if isinstance(tower[-1], SpladePooling) and (form.width or form.binary):
        raise InputError(f"the form {form.name!r} cuts dense vectors; those of a sparse student have a place a term.")


def _convert(folder: Path, form: Form, calibration: Sequence[str]) -> dict[str, Any]:
    """Turn the fp32 ONNX graph in `folder` into the form's, in place; what that changes in the manifest."""
    facts: dict[str, Any] = {"runtime": form.runtime, "precision": form.precision}
    batches: list[dict[str, Any]] | None = None
    if form.calibrated:
        arrays = [np.array([ids], np.int64) for ids in Encoder.load(folder).tokenize(calibration)]
        batches = [{"input_ids": array, "attention_mask": np.ones_like(array)} for array in arrays]
        facts["calibration"] = {"texts": len(calibration), "hash": hash_texts(calibration)}
    if form.runtime == "openvino":
        convert_graph(folder / GRAPH, form.precision, batches or [])
    elif form.precision != "fp32":
        quantize(folder / GRAPH, batches)
        if batches is None:
            # Activations are scaled by their largest value in the batch, so that a text's vector would depend on its
            # neighbours; one by one it does not, and on a CPU that costs no time.
            facts["batch_size"] = 1
    return facts


def _with_borders(texts: Sequence[str], max_length: int | None) -> list[str]:
    """`texts`, an empty text, and one longer than `max_length` tokens."""
    if max_length is None:
        return [*texts, ""]
    words = itertools.cycle(" ".join([*texts, "word"]).split())
    return [*texts, "", " ".join(itertools.islice(words, max_length + 1))]


def _torch_vectors(
    tower: Sequence[Any], texts: Sequence[str], prompt: str, form: Form, top_k: int | None
) -> NDArray[np.float32]:
    """The vectors in padded batches, and one by one, cut as the form cuts them but not to bits: (2, n, D)."""
    unit, uncut = isinstance(tower[-1], Normalize), replace(form, binary=False)

    def encode(size: int) -> NDArray[np.float32]:
        vectors = []
        for start in range(0, len(texts), size):
            features = tower[0].preprocess(texts[start : start + size], prompt=prompt)
            for module in tower:
                features = module(features)
            found = features["sentence_embedding"]
            form.check_width(found.shape[1])
            vectors.append((found if top_k is None else keep_largest(found, top_k)).numpy())
        return np.asarray(uncut.cut(np.concatenate(vectors), unit), np.float32)

    with torch.inference_mode():
        return np.stack([encode(_BATCH), encode(1)])


def _write_tokenizer(tokenizer: Any, max_length: int | None, path: Path) -> None:
    """Save the fast tokenizer, cutting texts as training did; the encoder pads."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"export needs a fast tokenizer (tokenizer.json), this one is {type(tokenizer).__name__}.")
    fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    fast.no_padding()
    if max_length is None:
        fast.no_truncation()
    else:
        fast.enable_truncation(max_length, direction=tokenizer.truncation_side)
    fast.save(str(path))
