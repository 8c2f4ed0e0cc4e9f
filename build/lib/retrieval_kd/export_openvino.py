"""OpenVINO graphs, made of an ONNX graph: in fp32, with half weights for bf16, or in 8-bit integers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.encoder import OPENVINO_GRAPH
from retrieval_kd.engines import quantize_graph
from retrieval_kd.export_onnx import quiet
from retrieval_kd.forms import FormPrecision


def convert_graph(path: Path, precision: FormPrecision, calibration: Sequence[dict[str, Any]]) -> None:
    """Write `model.xml` and `model.bin` in the place of the ONNX graph at `path`.

    bf16 is what products run in when the graph is opened. int8 has weights and activations of products in 8 bits,
    after SmoothQuant; `calibration` are batches of inputs by name. Weights of bf16 and the tables of embeddings
    of int8 are kept in fp16, which is as small as bf16 and has more digits.
    """
    import openvino

    with quiet():
        graph = openvino.convert_model(str(path))
        if precision == "int8":
            graph = quantize_graph(graph, calibration, portable=True)
            _halve_tables(graph)
        openvino.save_model(graph, str(path.with_name(OPENVINO_GRAPH)), compress_to_fp16=precision == "bf16")
    path.unlink()


def _halve_tables(graph: Any) -> None:
    """Keep tables of embeddings in fp16, in place: OpenVINO compresses nothing of a graph that is quantised."""
    import openvino
    from openvino import opset13

    for node in graph.get_ordered_ops():
        table = node.input_value(0).get_node() if node.get_type_name() == "Gather" else None
        if table is not None and table.get_type_name() == "Constant" and table.get_element_type() == openvino.Type.f32:
            half = opset13.constant(table.get_data().astype(np.float16))
            node.input(0).replace_source_output(opset13.convert(half, "f32").output(0))
