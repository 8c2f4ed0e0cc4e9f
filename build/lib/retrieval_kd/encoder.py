"""Served encoders: text to vectors with numpy, tokenizers and onnxruntime or OpenVINO, without torch.

A folder holds one graph from token ids to vectors, pooling, head and normalisation inside (`model.onnx`, or
`model.xml` and `model.bin`), or the `table.npz` of a student that is one (see `served_table`), `tokenizer.json`
(truncation inside) and `encoder.json`, the manifest that `export` wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from retrieval_kd.extras import missing_extra
from retrieval_kd.files import read_json, sha256
from retrieval_kd.served_table import Terms, open_table
from retrieval_kd.types import InputError

FORMAT = 3
GRAPH, OPENVINO_GRAPH, OPENVINO_WEIGHTS = "model.onnx", "model.xml", "model.bin"
TABLE, TOKENIZER, MANIFEST = "table.npz", "tokenizer.json", "encoder.json"
NO_TERMS: Terms = (np.zeros(0, np.int64), np.zeros(0, np.float32))
_CHUNK = 2048  # texts tokenised at once, and by a graph sorted by length among themselves

# (input_ids, attention_mask), both (B, L) int64, to what the graph gives, (B, D) or (B, V) float32
Session = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
# The token ids of B texts to their vectors, (B, D) float32, or to the Terms of each
Run = Callable[[Sequence[Sequence[int]]], Any]


class Encoder:
    """One tower of a student; `manifest` says which, in which form, and what it was checked against."""

    def __init__(self, run: Run, tokenizer: Tokenizer, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self.dimension: int = manifest["dimension"]
        self._run = run
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path, threads: int = 1) -> Encoder:
        """Open an exported folder; `threads` are those of one matrix product.

        Raises InputError if the folder is not an encoder, is of an unknown format, holds files other than those that
        were checked when it was exported, or is of a form that this machine cannot run.
        """
        manifest = _read_manifest(folder)
        run: Run
        match manifest["runtime"]:
            case "onnx":
                run = _batched(_open_onnx(folder, threads), manifest)
            case "openvino":
                run = _batched(_open_openvino(folder, manifest["precision"], threads), manifest)
            case "table":
                run = open_table(folder / TABLE, manifest["table"])
            case other:
                raise InputError(f"{folder / MANIFEST}: runtime {other!r} is unknown; export it again.")
        return cls(run, Tokenizer.from_file(str(folder / TOKENIZER)), manifest)

    def encode(self, texts: Sequence[str]) -> Any:
        """The vectors of `texts`, in their order; the prompt is put before each.

        Shapes: (n, D) float32; of a sparse student scipy.sparse.csr_array (n, V) float32; of a binary form
        (n, D / 8) uint8, the signs of eight coordinates a byte.
        """
        if self.manifest["vectors"] == "sparse":
            return matrix_of(self.terms(texts), self.dimension)
        binary = self.manifest["vectors"] == "binary"
        width, dtype = (self.dimension // 8, np.uint8) if binary else (self.dimension, np.float32)
        vectors = np.empty((len(texts), width), dtype)
        for start, found in self._chunks(texts):
            vectors[start : start + len(found)] = np.packbits(found > 0, axis=1) if binary else found
        return vectors

    def terms(self, texts: Sequence[str]) -> list[Terms]:
        """Of a sparse student: the terms of each text, rising, and their weights, none of which is 0."""
        return [one for _, found in self._chunks(texts) for one in found]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens that the graph reads of each text: prompt and special tokens included, after truncation."""
        return [len(token_ids) for token_ids in self.tokenize(texts)]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids that the graph reads of each text, after the prompt is put before it and what is too long cut."""
        if isinstance(texts, str):
            raise InputError("encode takes a list of texts, not a single one; put it in a list.")
        prompt = self.manifest["prompt"]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast([prompt + text for text in texts])]

    def _chunks(self, texts: Sequence[str]) -> Iterator[tuple[int, Any]]:
        """What is made of some texts at a time, and the place of their first."""
        for start in range(0, len(texts), _CHUNK):
            yield start, self._run(self.tokenize(texts[start : start + _CHUNK]))


def matrix_of(found: Sequence[Terms], dimension: int) -> Any:
    """The vectors of terms and weights: scipy.sparse.csr_array (n, dimension) float32."""
    try:
        import scipy.sparse
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
    starts = np.cumsum([0, *(len(terms) for terms, _ in found)])
    terms, weights = (np.concatenate(arrays) for arrays in zip(NO_TERMS, *found, strict=True))
    return scipy.sparse.csr_array((weights, terms, starts), shape=(len(found), dimension))


def _terms_of(vectors: NDArray[np.float32]) -> list[Terms]:
    found = [np.flatnonzero(vector) for vector in vectors]
    return [(terms, vector[terms]) for terms, vector in zip(found, vectors, strict=True)]


def _batched(session: Session, manifest: Mapping[str, Any]) -> Run:
    """A graph at work on token ids of any lengths, in batches of texts of similar length."""
    size, sparse = manifest["batch_size"], manifest["vectors"] == "sparse"

    def run(token_ids: Sequence[Sequence[int]]) -> Any:
        found: list[Any] = [None] * len(token_ids)
        order = sorted(range(len(token_ids)), key=lambda place: len(token_ids[place]))
        for first in range(0, len(order), size):
            places = order[first : first + size]
            vectors = session(*_pad([token_ids[place] for place in places], manifest))
            for place, one in zip(places, _terms_of(vectors) if sparse else vectors, strict=True):
                found[place] = one
        return found if sparse else np.stack(found)

    return run


def _pad(
    token_ids: Sequence[Sequence[int]], manifest: Mapping[str, Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Input ids and attention mask, both (B, L)."""
    longest = max(map(len, token_ids))
    input_ids = np.full((len(token_ids), longest), manifest["pad_id"], np.int64)
    attention_mask = np.zeros_like(input_ids)
    for row, ids in enumerate(token_ids):
        used = slice(longest - len(ids), None) if manifest["padding_side"] == "left" else slice(len(ids))
        input_ids[row, used] = ids
        attention_mask[row, used] = 1
    return input_ids, attention_mask


def check_index(encoder: Mapping[str, Any], index: Mapping[str, Any]) -> None:
    """Refuse an index whose vectors another document tower made than the encoder was trained with.

    Both are manifests, `Encoder.manifest` and `Index.manifest`. Raises InputError that says in what they differ.
    """
    wanted, found = encoder["document_identity"], index["identity"]
    if found != wanted:
        keys = [key for key in sorted({*wanted, *found}) if wanted.get(key) != found.get(key)]
        raise InputError(
            "the index was made by another document tower than the one this encoder was trained with: "
            f"they differ in {', '.join(keys)}. Index the documents with this student, or take the encoder "
            "that belongs to the index."
        )
    if index["dimension"] != encoder["dimension"]:
        raise InputError(
            f"the index has vectors of width {index['dimension']} and the encoder gives {encoder['dimension']}."
        )


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, whose files are there and unchanged."""
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} is not an exported encoder: it has no {MANIFEST}; make one with `rkd export`.")
    manifest = read_json(folder / MANIFEST)
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise InputError(
            f"{folder / MANIFEST}: format {version!r} is unknown, this version reads {FORMAT}; export it again."
        )
    for name, digest in manifest["fingerprints"].items():
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}; export it again.")
        if sha256(folder / name) != digest:
            raise InputError(f"{folder / name} is not the file that was exported with {MANIFEST}; export it again.")
    return dict(manifest)


def _open_onnx(folder: Path, threads: int) -> Session:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    settings.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(folder / GRAPH), settings, providers=["CPUExecutionProvider"])

    def run(input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        (vectors,) = session.run(None, {"input_ids": input_ids, "attention_mask": attention_mask})
        return np.asarray(vectors, np.float32)

    return run


def _open_openvino(folder: Path, precision: str, threads: int) -> Session:
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise InputError(f"{folder}: this processor has no bf16; serve the form openvino-fp32 or openvino-int8.")
    settings = {
        # Said aloud: by itself OpenVINO takes bf16 where a processor has it, and vectors would depend on the machine.
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(str(folder / OPENVINO_GRAPH), "CPU", settings)

    def run(input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        found = compiled({"input_ids": input_ids, "attention_mask": attention_mask})
        return np.array(found[0], np.float32)

    return run
