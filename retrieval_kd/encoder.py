"""Served encoders: text to vectors with numpy, tokenizers and onnxruntime, without torch.

A folder holds `model.onnx` (one graph from token ids to vectors, pooling and normalisation
inside) or `table.npz` (see `static_table`), `tokenizer.json` (truncation inside) and `encoder.json`, the manifest
that `export` wrote, which says which by the file's fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from retrieval_kd.files import read_json, sha256
from retrieval_kd.static_table import StaticTable
from retrieval_kd.types import InputError

FORMAT = 1
GRAPH, TABLE, TOKENIZER, MANIFEST = "model.onnx", "table.npz", "tokenizer.json", "encoder.json"
_CHUNK = 2048  # texts tokenised at once, and sorted by length among themselves
# An int8 graph scales activations by their largest value in the batch, so that a text's vector would
# depend on its neighbours; one by one it does not, and on a CPU that costs no time.
_BATCH = {"fp32": 32, "int8": 1}


class Encoder:
    """One tower of a student; `manifest` says which, and what it was checked against."""

    def __init__(
        self,
        vectors: Callable[[Sequence[Sequence[int]]], NDArray[np.float32]],
        tokenizer: Tokenizer,
        manifest: dict[str, Any],
    ) -> None:
        """`vectors` makes (B, D) of the token ids of B texts."""
        self.manifest = manifest
        self.dimension: int = manifest["dimension"]
        self._vectors = vectors
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path, threads: int = 1) -> Encoder:
        """Open an exported folder; `threads` are those of one matrix product.

        Raises InputError if the folder is not an encoder, is of an unknown format, or holds files
        other than those that were checked when it was exported.
        """
        if not (folder / MANIFEST).is_file():
            raise InputError(f"{folder} is not an exported encoder: it has no {MANIFEST}; make one with `rkd export`.")
        manifest = read_json(folder / MANIFEST)
        version = manifest.get("format") if isinstance(manifest, dict) else None
        if version != FORMAT:
            raise InputError(
                f"{folder / MANIFEST}: format {version!r} is unknown, this version reads {FORMAT}; export it again."
            )
        for name in manifest["fingerprints"]:
            if not (folder / name).is_file():
                raise InputError(f"{folder} has no {name}; export it again.")
            if sha256(folder / name) != manifest["fingerprints"][name]:
                raise InputError(f"{folder / name} is not the file that was exported with {MANIFEST}; export it again.")
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        if TABLE in manifest["fingerprints"]:
            return cls(StaticTable.load(folder / TABLE, manifest["table"]).vectors, tokenizer, manifest)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        settings.log_severity_level = 3  # errors
        session = onnxruntime.InferenceSession(str(folder / GRAPH), settings, providers=["CPUExecutionProvider"])
        return cls(_Graph(session, manifest).vectors, tokenizer, manifest)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The vectors of `texts`, in their order; the prompt is put before each.

        Shapes: (n, D).
        """
        vectors = np.empty((len(texts), self.dimension), np.float32)
        size = _BATCH[self.manifest["form"]]
        for start in range(0, len(texts), _CHUNK):
            token_ids = self._tokenize(texts[start : start + _CHUNK])
            order = sorted(range(len(token_ids)), key=lambda place: len(token_ids[place]))
            for first in range(0, len(order), size):
                places = order[first : first + size]
                batch = self._vectors([token_ids[place] for place in places])
                vectors[[start + place for place in places]] = batch
        return vectors

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens that the graph reads of each text: prompt and special tokens included, after truncation."""
        return [len(token_ids) for token_ids in self._tokenize(texts)]

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if isinstance(texts, str):
            raise InputError("encode takes a list of texts, not a single one; put it in a list.")
        prompt = self.manifest["prompt"]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast([prompt + text for text in texts])]


class _Graph:
    """A graph at work on padded batches."""

    def __init__(self, session: onnxruntime.InferenceSession, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self._session = session

    def vectors(self, token_ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """The vectors (B, D) of one batch."""
        longest = max(map(len, token_ids))
        input_ids = np.full((len(token_ids), longest), self.manifest["pad_id"], np.int64)  # (B, L)
        attention_mask = np.zeros_like(input_ids)
        for row, ids in enumerate(token_ids):
            used = slice(longest - len(ids), None) if self.manifest["padding_side"] == "left" else slice(len(ids))
            input_ids[row, used] = ids
            attention_mask[row, used] = 1
        (vectors,) = self._session.run(None, {"input_ids": input_ids, "attention_mask": attention_mask})
        return np.asarray(vectors, np.float32)
