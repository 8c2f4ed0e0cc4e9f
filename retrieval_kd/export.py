"""Export one tower of a student as a single graph, and refuse a graph that is not the student.

Token ids go in and vectors come out: pooling, projection, SPLADE head and normalisation are inside. The graph is
loaded as it will be served (`retrieval_kd.encoder`) and compared with torch before the folder appears.
"""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sparse_encoder.modules import SpladePooling
from tokenizers import Tokenizer

from retrieval_kd.encoder import FORMAT, GRAPH, MANIFEST, TOKENIZER, Encoder
from retrieval_kd.export_onnx import quantize, write_graph
from retrieval_kd.export_openvino import convert_graph
from retrieval_kd.files import atomic, hash_texts, read_json, sha256, write_json
from retrieval_kd.forms import Form, parse_form
from retrieval_kd.sparse_towers import keep_largest
from retrieval_kd.types import InputError

_UNLIMITED = 1_000_000  # tokenizers without a limit say 1e30
_BATCH = 32
_SPARSE_BATCH = 4  # the logits of a batch are texts x tokens x vocabulary


@dataclass(frozen=True)
class Quality:
    """What retrieval with a form is compared with: nDCG@10 of torch's query vectors, of which a share may be lost.

    `measure` takes the vectors of `queries`, as `Encoder.encode` gives them; `facts` say what it searches.
    """

    queries: Sequence[str]
    measure: Callable[[Any], float]
    expected: float
    tolerance: float  # relative
    facts: Mapping[str, Any] = field(default_factory=dict)


def export_encoder(
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

    Every form passes the gate: on `check_texts`, an empty text and one beyond the longest, in batches and one by one,
    no coordinate of the fp32 graph may differ from torch by more than `vector_tolerance`. Other precisions are then
    made from that graph; how far they are from torch is in the manifest, and whether they retrieve well enough
    `quality` says. What fails is an InputError, and no folder.
    """
    made = parse(form)
    tower = [copy.deepcopy(module).cpu().float().eval() for module in modules]
    _check(tower, made, prompt, calibration)
    transformer: Any = tower[0]
    limit = transformer.max_seq_length
    max_length = None if limit is None or limit > _UNLIMITED else int(limit)
    texts = _with_borders(check_texts, max_length)
    sparse = isinstance(tower[-1], SpladePooling)
    expected = _torch_vectors(tower, texts, prompt, made, top_k)  # (2, n, D)
    if not np.isfinite(expected).all():
        raise InputError("the student's own vectors are not finite numbers; its training diverged.")
    with atomic(folder) as scratch:
        scratch.mkdir()
        _write_tokenizer(transformer.tokenizer, max_length, scratch / TOKENIZER)
        graph = scratch / GRAPH if traced is None else traced / f"{made.width or 'whole'}.onnx"
        if not graph.exists():
            write_graph(tower, prompt, graph, made.width, top_k)
        if traced is not None:
            shutil.copy(graph, scratch / GRAPH)
        manifest = {
            "format": FORMAT,
            "form": "fp32",
            "runtime": "onnx",
            "precision": "fp32",
            "vectors": "sparse" if sparse else "dense",
            "dimension": expected.shape[-1],
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
        _describe_files(scratch, manifest)
        vectors = _served_vectors(scratch, texts)
        fp32_error = _max_error(vectors, expected)
        _check_error(vectors, expected, vector_tolerance, folder, "graph", texts)
        manifest |= {"form": made.name, "runtime": made.runtime, "precision": made.precision}
        if (made.runtime, made.precision) != ("onnx", "fp32"):
            _convert(scratch, made, manifest, calibration)
            _describe_files(scratch, manifest)
            vectors = _served_vectors(scratch, texts)
            if made.precision == "fp32":
                _check_error(vectors, expected, vector_tolerance, folder, "OpenVINO graph", texts)
        cosines = _cosines(vectors, expected)
        manifest["parity"] = {
            "texts": len(texts),
            "tolerance": vector_tolerance,
            "fp32_max_error": fp32_error,
            "max_error": _max_error(vectors, expected),
            "min_cosine": float(cosines.min()),
            "mean_cosine": float(cosines.mean()),
        }
        if made.binary:
            manifest |= {"vectors": "binary"}
            manifest["parity"]["equal_bits"] = float(((vectors > 0) == (expected > 0)).mean())
        write_json(scratch / MANIFEST, manifest)
        if quality is not None:
            manifest["quality"] = check_quality(Encoder.load(scratch), made, quality, folder)
            write_json(scratch / MANIFEST, manifest)
    return dict(read_json(folder / MANIFEST))


def parse(form: str) -> Form:
    """The form of this name; InputError if there is none."""
    try:
        return parse_form(form)
    except ValueError as error:
        raise InputError(f"{error}.") from None


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


def _convert(folder: Path, form: Form, manifest: dict[str, Any], calibration: Sequence[str]) -> None:
    """Turn the fp32 ONNX graph in `folder` into the form's, in place, and say in the manifest how."""
    batches: list[dict[str, Any]] | None = None
    if form.calibrated:
        arrays = [np.array([ids], np.int64) for ids in Encoder.load(folder).tokenize(calibration)]
        batches = [{"input_ids": array, "attention_mask": np.ones_like(array)} for array in arrays]
        manifest["calibration"] = {"texts": len(calibration), "hash": hash_texts(calibration)}
    if form.runtime == "openvino":
        convert_graph(folder / GRAPH, form.precision, batches or [])
    elif form.precision != "fp32":
        quantize(folder / GRAPH, batches)
        if batches is None:
            # Activations are scaled by their largest value in the batch, so that a text's vector would depend on its
            # neighbours; one by one it does not, and on a CPU that costs no time.
            manifest["batch_size"] = 1


def _check_error(
    vectors: NDArray[np.float32],
    expected: NDArray[np.float32],
    tolerance: float,
    folder: Path,
    what: str,
    texts: Sequence[str],
) -> None:
    """InputError where a coordinate of the graph's vectors is further from torch than allowed."""
    error = _max_error(vectors, expected)
    if not error <= tolerance:  # also when it is NaN
        worst = texts[int(np.abs(vectors - expected).max(axis=(0, 2)).argmax())]
        raise InputError(
            f"{folder}: not written, because the exported {what} differs from torch by {error:.2e} in a "
            f"coordinate and {tolerance:.2e} is allowed; it is worst on {worst[:60]!r}. Pooling or a "
            "module of your own may behave differently when it is traced."
        )


def check_quality(encoder: Encoder, form: Form, quality: Quality, folder: Path) -> dict[str, Any]:
    """What the manifest says of retrieval with the form; InputError where it loses more than it may."""
    found = quality.measure(encoder.encode(quality.queries))
    change = found / quality.expected - 1 if quality.expected else 0.0
    if change < -quality.tolerance:
        raise InputError(
            f"{folder}: not written, because the form {form.name!r} has nDCG@10 {found:.4f} against "
            f"{quality.expected:.4f} in torch, more than {quality.tolerance:.1%} lost; leave it out of "
            "export.forms, or allow it (export.quality_tolerance)."
        )
    return {
        **quality.facts,
        "queries": len(quality.queries),
        "torch_ndcg_10": round(quality.expected, 6),
        "ndcg_10": round(found, 6),
        "change": round(change, 6),
        "tolerance": quality.tolerance,
    }


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


def _served_vectors(folder: Path, texts: Sequence[str]) -> NDArray[np.float32]:
    """The vectors of the encoder in `folder`, together and one by one: (2, n, D)."""
    encoder = Encoder.load(folder)
    found = [encoder.encode(texts), *(encoder.encode([text]) for text in texts)]
    if encoder.manifest["vectors"] == "sparse":
        found = [vectors.toarray() for vectors in found]
    return np.stack([found[0], np.concatenate(found[1:])])


def _max_error(vectors: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(vectors - expected).max())


def _cosines(vectors: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosines of the last axis; 1 where both are zeros, as of a query without any term."""
    norms = np.linalg.norm(vectors, axis=-1) * np.linalg.norm(expected, axis=-1)
    empty = ~vectors.any(-1) & ~expected.any(-1)
    return np.where(empty, 1.0, (vectors * expected).sum(-1) / np.maximum(norms, 1e-12))


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


def _describe_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Put fingerprints and size of the other files into the manifest, and write it."""
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    manifest["fingerprints"] = {file.name: sha256(file) for file in files}
    manifest["bytes"] = sum(file.stat().st_size for file in files)
    write_json(folder / MANIFEST, manifest)
