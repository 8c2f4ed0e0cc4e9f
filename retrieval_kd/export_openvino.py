"""OpenVINO graphs, made of an ONNX graph: in fp32, with half weights for bf16, or in 8-bit integers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retrieval_kd.encoder import OPENVINO_GRAPH
from retrieval_kd.engines import quantize_graph
from retrieval_kd.export_onnx import quiet
from retrieval_kd.forms import FormPrecision


def convert_graph(path: Path, precision: FormPrecision, calibration: Sequence[dict[str, Any]]) -> None:
    """Write `model.xml` and `model.bin` in the place of the ONNX graph at `path`.

    bf16 is what products run in when the graph is opened. int8 has weights and activations of products in 8 bits,
    after SmoothQuant; `calibration` are batches of inputs by name. Other weights of both, the table of embeddings
    above all, are kept in fp16, which is as small as bf16 and has more digits.
    """
    import openvino

    with quiet():
        graph = openvino.convert_model(str(path))
        if precision == "int8":
            graph = quantize_graph(graph, calibration, portable=True)
        openvino.save_model(graph, str(path.with_name(OPENVINO_GRAPH)), compress_to_fp16=precision != "fp32")
    path.unlink()
