"""Engines that run a local encoder: PyTorch, or OpenVINO for the CPU, which is faster and knows int8.

`precision` is that of matrix products: "fp32", "bf16", or, with OpenVINO alone, "int8". An int8 model is quantised
after training, weights and activations both, by nncf; what is no matrix product runs in bf16 where the processor has
it, and in fp32 elsewhere. Nothing of it is chosen silently: it all stands in the teacher's identity.
"""

from __future__ import annotations

import importlib.util
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from io import StringIO
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retrieval_kd.extras import missing_extra
from retrieval_kd.files import hash_texts
from retrieval_kd.sample import spread
from retrieval_kd.types import Collection, InputError

Engine = Literal["torch", "openvino"]
EnginePrecision = Literal["fp32", "bf16", "int8"]
Features = Mapping[str, Tensor]
Forward = Callable[[Features], NDArray[np.float32]]

SAMPLE = 128  # documents that an int8 model is calibrated on
HEAD_WORDS = 12  # of a document that stand for a query in calibration
SMOOTHING = 0.8  # of activations into weights: alpha of SmoothQuant, Xiao et al. 2022, arXiv:2211.10438
# Times its root mean square that an input of a product may range over: 8 bits then make steps of a quarter of it.
OUTLIERS = 64
TOLERANCE = 1e-3  # of an output, relative to the largest, between torch and the converted graph in fp32


def matrix_rates(rows: int = 1024, width: int = 768, rounds: int = 10) -> dict[str, float]:
    """Billions of operations a second that torch's matrix products reach here, by precision; the best of `rounds`.

    The product is that of a transformer's feed-forward part: (rows, width) by (width, 4 width). Processors differ in
    whether bf16 is faster than fp32 or slower.
    """
    rates = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = torch.ones(rows, width, dtype=dtype), torch.ones(width, 4 * width, dtype=dtype)
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            torch.mm(left, right)
            seconds.append(time.perf_counter() - began)
        rates[precision] = round(8e-9 * rows * width * width / min(seconds), 1)
    return rates


def check_engine(engine: Engine, precision: EnginePrecision) -> None:
    """Refuse a combination that cannot work: ValueError for a wrong one, InputError for a missing extra."""
    if precision == "int8" and engine != "openvino":
        raise ValueError('precision = "int8" needs engine = "openvino"; torch runs "fp32" and "bf16"')
    needed = {"torch": [], "openvino": ["openvino", *(["nncf"] if precision == "int8" else [])]}[engine]
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise missing_extra(ModuleNotFoundError(name=package))


def calibration_rows(count: int) -> list[int]:
    """The documents, of `count`, that an int8 model is calibrated on; of a collection of these alone they are all."""
    return spread(count, SAMPLE)


def calibration_pairs(collection: Collection) -> list[tuple[str, str]]:
    """The pairs of texts that an int8 model is calibrated on: beginnings of documents, and documents.

    Documents are taken at equal distances, and a beginning is paired with its own document or with the one before,
    in turn: related pairs and unrelated ones, whatever queries a recipe reads. Raises InputError for a
    collection without documents.
    """
    count = len(collection)
    if not count:
        raise InputError('precision = "int8" is calibrated on documents of the collection, which has none.')
    documents = [collection.documents[row] for row in calibration_rows(count)]
    heads = [" ".join(document.split()[:HEAD_WORDS]) for document in documents]
    return [(head, documents[place - place % 2]) for place, head in enumerate(heads)]


def engine_identity(engine: Engine, precision: EnginePrecision, calibration: Sequence[str]) -> dict[str, Any]:
    """What an engine adds to a teacher's identity; `calibration` are the texts that an int8 model is calibrated on."""
    if precision != "int8":
        return {"engine": engine}
    return {
        "engine": engine,
        "calibration": hash_texts(calibration),
        "quantizer": f"nncf {version('nncf')}, SmoothQuant {SMOOTHING}, outliers {OUTLIERS}",
        "rest": "bf16" if _has_bf16() else "fp32",
    }


def compile_module(
    module: nn.Module, example: Features, precision: EnginePrecision, calibration: Sequence[Features] = ()
) -> Forward:
    """Compile a module for the CPU: tensors by name in, its one output out, for any batch size and length.

    `example` is what it is traced with: several texts, some padded. The graph in fp32 has to give what torch gives on
    them, and on the first half of one of them; InputError otherwise, and where the processor lacks bf16. As many
    threads are used as torch uses.
    """
    import openvino

    if precision == "bf16" and not _has_bf16():
        raise InputError('this processor has no bf16, which precision = "bf16" asks of it; take "fp32" or "int8".')
    names = list(example)
    try:
        with _quiet(), torch.no_grad():
            graph = openvino.convert_model(_Ordered(module, names), example_input=tuple(example.values()))
    except Exception as error:  # whatever a model of any kind makes of being traced
        problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise InputError(f'OpenVINO cannot convert this model ({problem}); use engine = "torch".') from error
    for place, name in enumerate(names):
        graph.inputs[place].get_tensor().set_names({name})
    exact = _compile(graph, "f32")
    _check(module, exact, example)
    if precision == "fp32":
        return exact
    if precision == "int8":
        samples = [{name: tensor.numpy() for name, tensor in features.items()} for features in calibration]
        graph = quantize_graph(graph, samples)
    return _compile(graph, "bf16" if _has_bf16() else "f32")


class _Ordered(nn.Module):
    """A module with its inputs in a fixed order."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.names = names

    def forward(self, *tensors: Tensor) -> Tensor:
        output: Tensor = self.module(**dict(zip(self.names, tensors, strict=True)))
        return output


def _compile(graph: Any, hint: str) -> Forward:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(graph, "CPU", settings)
    names = [one.get_any_name() for one in compiled.inputs]

    def forward(features: Features) -> NDArray[np.float32]:
        return np.array(compiled([features[name].numpy() for name in names])[0], np.float32)

    return forward


def _check(module: nn.Module, forward: Forward, example: Features) -> None:
    def cut(tensor: Tensor) -> Tensor:
        return tensor[:1, : -(-tensor.shape[1] // 2)]

    for batch in (example, {name: cut(tensor) for name, tensor in example.items()}):
        with torch.no_grad():
            expected = module(**batch).float().numpy()
        error = np.abs(forward(batch) - expected).max() / max(1.0, np.abs(expected).max())
        if not error <= TOLERANCE:  # also when it is NaN
            raise InputError(
                f"OpenVINO's graph of this model differs from torch by {error:.1e} in fp32, relative to the largest "
                f'output, and {TOLERANCE:.0e} is allowed; use engine = "torch".'
            )


def quantize_graph(graph: Any, samples: Sequence[dict[str, NDArray[Any]]], portable: bool = False) -> Any:
    """The OpenVINO graph with 8-bit weights and activations in its matrix products; `samples` are inputs by name.

    Three kinds stay as they are: tables of embeddings; products of one vector a text (pooler, classifier), on which
    little is spent and all of the answer hangs; and those whose input has outliers (OUTLIERS). A `portable` graph has
    weights of 7 bits, with which processors without VNNI instructions do not overflow.
    """
    import nncf
    from nncf.quantization.advanced_parameters import (
        AdvancedQuantizationParameters,
        AdvancedSmoothQuantParameters,
        OverflowFix,
    )

    nodes = graph.get_ordered_ops()
    kept = [node for node in nodes if node.get_type_name() == "Gather"]
    products = [node for node in nodes if node.get_type_name() == "MatMul"]
    kept += [node for node in products if node.get_output_partial_shape(0).rank.get_length() == 2]  # (B, D)
    kept += _with_outliers(graph, products, samples)
    with _quiet():
        return nncf.quantize(
            graph,
            nncf.Dataset(samples),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(samples),
            ignored_scope=nncf.IgnoredScope(names=sorted({node.get_friendly_name() for node in kept})),
            advanced_parameters=AdvancedQuantizationParameters(
                overflow_fix=OverflowFix.ENABLE if portable else None,
                smooth_quant_alphas=AdvancedSmoothQuantParameters(matmul=SMOOTHING),
            ),
        )


def _with_outliers(graph: Any, products: Sequence[Any], samples: Sequence[dict[str, NDArray[Any]]]) -> list[Any]:
    """The matrix products whose input ranges over more than OUTLIERS times its root mean square."""
    import openvino

    def place(node: Any) -> tuple[str, int]:
        tensor = node.input_value(0)
        return tensor.get_node().get_friendly_name(), tensor.get_index()

    inputs = {place(node): node.input_value(0) for node in products}
    watched = graph.clone()
    by_name = {node.get_friendly_name(): node for node in watched.get_ordered_ops()}
    watched.add_outputs([by_name[name].output(index) for name, index in inputs])
    compiled = openvino.Core().compile_model(watched, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    seen: dict[tuple[str, int], list[tuple[float, float, float]]] = {key: [] for key in inputs}
    for sample in samples:
        for key, values in zip(inputs, list(compiled(sample).values())[1:], strict=True):
            seen[key].append((float(values.min()), float(values.max()), float(np.square(values).mean())))
    ranges = {}
    for key, facts in seen.items():
        low, high, square = np.array(facts).T
        ranges[key] = (high.max() - low.min()) / max(1e-12, np.sqrt(square.mean()))
    return [node for node in products if ranges[place(node)] > OUTLIERS]


def _has_bf16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the converters' notes and bars."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
