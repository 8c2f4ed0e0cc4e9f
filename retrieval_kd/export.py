"""Export one tower of a student as a single ONNX graph, and refuse a graph that is not the student.

Token ids go in and vectors come out: pooling, projection and normalisation are inside. The graph is
loaded as it will be served (`retrieval_kd.encoder`) and compared with torch before the folder appears.
"""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic
from tokenizers import Tokenizer
from torch import Tensor, nn

from retrieval_kd.encoder import FORMAT, GRAPH, MANIFEST, TOKENIZER, Encoder
from retrieval_kd.files import atomic, read_json, sha256, write_json
from retrieval_kd.types import InputError

Form = Literal["fp32", "int8"]
_UNLIMITED = 1_000_000  # tokenizers without a limit say 1e30
_BATCH = 32


def export_encoder(
    modules: Iterable[nn.Module],
    folder: Path,
    form: Form,
    *,
    prompt: str = "",
    identity: Mapping[str, Any],
    document_identity: Mapping[str, Any] | None = None,
    check_texts: Sequence[str],
    vector_tolerance: float = 1e-4,
) -> dict[str, Any]:
    """Write the encoder of one side into `folder` and return its manifest.

    `modules` are the Sentence Transformers modules of the side: a Transformer, Pooling, perhaps Dense
    and Normalize. `identity` describes this tower, `document_identity` the one whose vectors it is
    to be compared with (the same where absent).

    Both forms pass the gate: on `check_texts`, an empty text and one beyond the longest, in batches and
    one by one, no coordinate of the fp32 graph may differ from torch by more than `vector_tolerance`;
    otherwise InputError, and no folder. int8 is then made from that graph; how far it is from torch is
    in the manifest, and whether it retrieves well enough is for the evaluation to say.
    """
    tower = [copy.deepcopy(module).cpu().float().eval() for module in modules]
    transformer: Any = tower[0]
    if not hasattr(transformer, "auto_model"):
        raise InputError(f"export needs a Transformer as first module, this one is {type(transformer).__name__}.")
    if prompt and not all(getattr(module, "include_prompt", True) for module in tower):
        raise InputError(
            "the pooling leaves the prompt out (include_prompt = false), which the exported graph cannot; "
            "train and export with include_prompt = true, or without a prompt."
        )
    limit = transformer.max_seq_length
    max_length = None if limit is None or limit > _UNLIMITED else int(limit)
    texts = _with_borders(check_texts, max_length)
    expected = _torch_vectors(tower, texts, prompt)  # (2, n, D)
    if not np.isfinite(expected).all():
        raise InputError("the student's own vectors are not finite numbers; its training diverged.")
    with atomic(folder) as scratch:
        scratch.mkdir()
        _write_tokenizer(transformer.tokenizer, max_length, scratch / TOKENIZER)
        _write_graph(tower, prompt, scratch / GRAPH)
        manifest = {
            "format": FORMAT,
            "form": "fp32",
            "dimension": expected.shape[-1],
            "max_length": max_length,
            "prompt": prompt,
            "pad_id": transformer.tokenizer.pad_token_id or 0,
            "padding_side": transformer.tokenizer.padding_side,
            "identity": identity,
            "document_identity": identity if document_identity is None else document_identity,
            "parameters": sum(parameter.numel() for module in tower for parameter in module.parameters()),
        }
        _describe_files(scratch, manifest)
        vectors = _served_vectors(scratch, texts)
        fp32_error = _max_error(vectors, expected)
        if not fp32_error <= vector_tolerance:  # also when it is NaN
            worst = texts[int(np.abs(vectors - expected).max(axis=(0, 2)).argmax())]
            raise InputError(
                f"{folder}: not written, because the exported graph differs from torch by {fp32_error:.2e} in a "
                f"coordinate and {vector_tolerance:.2e} is allowed; it is worst on {worst[:60]!r}. Pooling or a "
                "module of your own may behave differently when it is traced."
            )
        if form == "int8":
            _quantize(scratch / GRAPH)
            manifest["form"] = form
            _describe_files(scratch, manifest)
            vectors = _served_vectors(scratch, texts)
        cosines = _cosines(vectors, expected)
        manifest["parity"] = {
            "texts": len(texts),
            "tolerance": vector_tolerance,
            "fp32_max_error": fp32_error,
            "max_error": _max_error(vectors, expected),
            "min_cosine": float(cosines.min()),
            "mean_cosine": float(cosines.mean()),
        }
        write_json(scratch / MANIFEST, manifest)
    return dict(read_json(folder / MANIFEST))


def _with_borders(texts: Sequence[str], max_length: int | None) -> list[str]:
    """`texts`, an empty text, and one longer than `max_length` tokens."""
    if max_length is None:
        return [*texts, ""]
    words = itertools.cycle(" ".join([*texts, "word"]).split())
    return [*texts, "", " ".join(itertools.islice(words, max_length + 1))]


def _torch_vectors(tower: Sequence[Any], texts: Sequence[str], prompt: str) -> NDArray[np.float32]:
    """The vectors in padded batches, and one by one: (2, n, D)."""

    def encode(size: int) -> NDArray[np.float32]:
        vectors = []
        for start in range(0, len(texts), size):
            features = tower[0].preprocess(texts[start : start + size], prompt=prompt)
            for module in tower:
                features = module(features)
            vectors.append(features["sentence_embedding"].numpy())
        return np.concatenate(vectors)

    with torch.inference_mode():
        return np.stack([encode(_BATCH), encode(1)])


def _served_vectors(folder: Path, texts: Sequence[str]) -> NDArray[np.float32]:
    """The vectors of the encoder in `folder`, together and one by one: (2, n, D)."""
    encoder = Encoder.load(folder)
    return np.stack([encoder.encode(texts), np.concatenate([encoder.encode([text]) for text in texts])])


def _max_error(vectors: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(vectors - expected).max())


def _cosines(vectors: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(vectors, axis=-1) * np.linalg.norm(expected, axis=-1)
    return np.asarray((vectors * expected).sum(-1) / norms)


class _Graph(nn.Module):
    """The modules as one function of (input_ids, attention_mask), both (B, L); token types are zero."""

    def __init__(self, modules: Sequence[nn.Module], token_types: bool) -> None:
        super().__init__()
        self.steps = nn.ModuleList(modules)
        self.token_types = token_types

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.token_types:
            features["token_type_ids"] = torch.zeros_like(input_ids)
        for step in self.steps:
            features = step(features)
        vectors: Tensor = features["sentence_embedding"]  # (B, D)
        return vectors


def _write_graph(tower: Sequence[Any], prompt: str, path: Path) -> None:
    """Trace the modules with any batch size and length.

    Attention is written out ("eager"): onnxruntime then has fewer nodes to run than with torch's own
    kernel. Its offline optimiser for BERT was measured too and gains nothing on a CPU.
    """
    tower[0].auto_model.set_attn_implementation("eager")
    features = tower[0].preprocess(["one", "two three four"], prompt=prompt)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    graph = _Graph(tower, "token_type_ids" in features).eval()
    with torch.no_grad(), _quiet():
        try:
            program = torch.onnx.export(
                graph,
                (features["input_ids"], features["attention_mask"]),
                dynamo=True,
                dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
                input_names=["input_ids", "attention_mask"],
                output_names=["vectors"],
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise InputError(f"torch cannot export these modules as one graph: {error}") from error
        assert program is not None
        program.save(path, external_data=False)


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


def _quantize(path: Path) -> None:
    """Turn the graph's weights into 8-bit integers, in place.

    Each output channel of a matrix has its own scale. Weights use 7 of the 8 bits: processors without
    VNNI instructions add pairs of products in 16 bits, which overflow otherwise and give wrong vectors
    on that machine alone.
    """
    prepared = path.with_suffix(".prepared")
    with _quiet():
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_dynamic(
            prepared,
            path,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
    prepared.unlink()
    onnx.checker.check_model(path)


def _describe_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Put fingerprints and size of the other files into the manifest, and write it."""
    files = [folder / name for name in (GRAPH, TOKENIZER)]
    manifest["fingerprints"] = {file.name: sha256(file) for file in files}
    manifest["bytes"] = sum(file.stat().st_size for file in files)
    write_json(folder / MANIFEST, manifest)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporters' notes on what they do."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
