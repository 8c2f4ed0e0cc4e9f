"""ONNX graphs: a tower traced as one function from token ids to vectors, and its weights made 8-bit integers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quant_pre_process,
    quantize_dynamic,
    quantize_static,
)
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import Tensor, nn

from retrieval_kd.engines import SMOOTHING
from retrieval_kd.types import InputError

Inputs = dict[str, Any]  # the arrays of one batch by the names of the graph's inputs


class _Dense(nn.Module):
    """The modules as one function of (input_ids, attention_mask), both (B, L); token types are zero."""

    def __init__(self, modules: Sequence[nn.Module], token_types: bool, width: int | None) -> None:
        super().__init__()
        self.steps = nn.ModuleList(modules)
        self.token_types = token_types
        self.width = width

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.token_types:
            features["token_type_ids"] = torch.zeros_like(input_ids)
        for step in self.steps:
            features = step(features)
        vectors: Tensor = features["sentence_embedding"]  # (B, D)
        if self.width is None:
            return vectors
        vectors = vectors[:, : self.width]
        return nn.functional.normalize(vectors, dim=1) if isinstance(self.steps[-1], Normalize) else vectors


class _Splade(nn.Module):
    """A language model with SPLADE pooling; the logarithm, which keeps the order, is taken after the maximum."""

    def __init__(self, modules: Sequence[Any], token_types: bool, top_k: int | None) -> None:
        super().__init__()
        self.transformer = modules[0]
        self.pooling = modules[1].pooling_strategy
        self.twice = modules[1].activation_function == "log1p_relu"
        self.token_types = token_types
        self.top_k = top_k

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.token_types:
            features["token_type_ids"] = torch.zeros_like(input_ids)
        features = self.transformer(features)
        logits, mask = features["token_embeddings"], features["attention_mask"]  # (B, L, V), (B, L)
        logits = logits.masked_fill(mask[..., None] == 0, 0.0)  # no weight, and no maximum beyond it
        weights = self._activate(logits.amax(1)) if self.pooling == "max" else self._activate(logits).sum(1)
        if self.top_k is None or self.top_k >= weights.shape[1]:
            return weights
        best = weights.topk(self.top_k, dim=1)
        return torch.zeros_like(weights).scatter(1, best.indices, best.values)

    def _activate(self, logits: Tensor) -> Tensor:
        weights = torch.log1p(torch.relu(logits))
        return torch.log1p(weights) if self.twice else weights


def write_graph(tower: Sequence[Any], prompt: str, path: Path, width: int | None, top_k: int | None) -> None:
    """Trace the modules with any batch size and length.

    Vectors are cut to `width` coordinates, and to unit length again where the last module gives it; those of SPLADE
    pooling keep their `top_k` largest weights. Attention is written out ("eager"): onnxruntime then has fewer nodes to
    run than with torch's own kernel. Its offline optimiser for BERT was measured too and gains nothing on a CPU.
    """
    tower[0].auto_model.set_attn_implementation("eager")
    features = tower[0].preprocess(["one", "two three four"], prompt=prompt)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    typed = "token_type_ids" in features
    splade = isinstance(tower[-1], SpladePooling)
    graph = (_Splade(tower, typed, top_k) if splade else _Dense(tower, typed, width)).eval()
    with torch.no_grad(), quiet():
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


def quantize(path: Path, calibration: Sequence[Inputs] | None = None) -> None:
    """Turn the graph's weights into 8-bit integers, in place.

    Each output channel of a matrix has its own scale. Weights use 7 of the 8 bits: processors without VNNI
    instructions add pairs of products in 16 bits, which overflow otherwise and give wrong vectors on that machine
    alone. The scale of an activation goes by the values at hand (dynamic), or, with `calibration`, by those that the
    graph has of these batches, after SmoothQuant (static). Products of two activations, in attention, stay as they
    are, and so do sums and what else is between products.
    """
    prepared = path.with_suffix(".prepared")
    options = {"per_channel": True, "reduce_range": True, "weight_type": QuantType.QInt8}
    with quiet():
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        if calibration is None:
            quantize_dynamic(prepared, path, op_types_to_quantize=["MatMul", "Gather"], **options)
        else:
            _smooth(prepared, calibration)
            quantize_static(
                prepared,
                path,
                _Batches(calibration),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul", "Gather"],
                activation_type=QuantType.QUInt8,
                nodes_to_exclude=_products_of_activations(prepared),
                extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gather"]},
                **options,
            )
    prepared.unlink()
    onnx.checker.check_model(path)


def _products_of_activations(path: Path) -> list[str]:
    graph = onnx.load(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and weights.isdisjoint(node.input)]


def _smooth(path: Path, batches: Sequence[Inputs]) -> None:
    """Move the spread of activations into weights, in place: X W = (X / s) (s W), which changes no product.

    s of a coordinate is max |X| ** a / max |W| ** (1 - a), a = `SMOOTHING`, over these batches and over the products
    that read X. Source: Xiao et al. 2022, arXiv:2211.10438.
    """
    model = onnx.load(path)
    graph = model.graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            readers.setdefault(node.input[0], []).append(node)
    for name, largest in _largest(model, list(readers), batches).items():
        spread = np.max([np.abs(weights[node.input[1]]).max(1) for node in readers[name]], axis=0)
        scale = np.maximum(largest, 1e-5) ** SMOOTHING / np.maximum(spread, 1e-5) ** (1 - SMOOTHING)
        smooth = f"{name}_smooth"
        graph.initializer.append(numpy_helper.from_array((1 / scale).astype(np.float32), f"{smooth}_factors"))
        place = min(list(graph.node).index(node) for node in readers[name])
        graph.node.insert(place, helper.make_node("Mul", [name, f"{smooth}_factors"], [smooth], name=smooth))
        for number, node in enumerate(readers[name]):
            scaled = (weights[node.input[1]] * scale[:, None]).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(scaled, f"{smooth}_weights_{number}"))
            node.input[0], node.input[1] = smooth, f"{smooth}_weights_{number}"
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    onnx.save(model, path)


def _largest(model: onnx.ModelProto, names: Sequence[str], batches: Sequence[Inputs]) -> dict[str, NDArray[np.float32]]:
    """The largest absolute value of each coordinate of these tensors (..., D) in the batches: (D,) each."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    found: dict[str, NDArray[np.float32]] = {}
    for batch in batches:
        for name, values in zip(names, session.run(list(names), batch), strict=True):
            largest = np.abs(values).reshape(-1, values.shape[-1]).max(0)
            found[name] = np.maximum(found[name], largest) if name in found else largest
    return found


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    """Batches as onnxruntime asks for them."""

    def __init__(self, batches: Sequence[Inputs]) -> None:
        self._rest = iter(batches)

    def get_next(self) -> Inputs | None:
        return next(self._rest, None)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the exporters' notes on what they do."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
