"""Forms of an exported encoder: each near the student, and the graph that its name says."""

from __future__ import annotations

import builtins
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sentence_transformers import SentenceTransformer, SparseEncoder
from test_export import mixed_texts
from tiny import CHECK_TEXTS, MAX_LENGTH, tiny_masked_lm, tiny_sentence_transformer

from retrieval_kd import export_onnx
from retrieval_kd.encoder import Encoder
from retrieval_kd.export import Quality
from retrieval_kd.export_graph import export_graph
from retrieval_kd.export_openvino import convert_graph
from retrieval_kd.forms import CutVectors, cut_width, parse_form
from retrieval_kd.sparse_towers import load_sparse_towers
from retrieval_kd.types import InputError

FORMS = ("int8-static", "openvino-fp32", "openvino-bf16", "openvino-int8", "fp32-16-binary")
HAS_BF16 = "avx512_bf16" in Path("/proc/cpuinfo").read_text()


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    return tiny_sentence_transformer(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs of `student`, traced once."""
    return tmp_path_factory.mktemp("traced")


@pytest.fixture(scope="module")
def served(student: SentenceTransformer, traced: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the student in every form of FORMS."""
    folder = tmp_path_factory.mktemp("served")
    for form in FORMS:
        if form != "openvino-bf16" or HAS_BF16:
            texts = {"check_texts": CHECK_TEXTS, "calibration": mixed_texts(64, seed=5)}
            export_graph(
                student, folder / form, form, identity={"student": "tiny"}, widths=[16], traced=traced, **texts
            )
    return folder


@pytest.mark.parametrize(("form", "least"), [("int8-static", 0.99), ("openvino-bf16", 0.9995), ("openvino-int8", 0.99)])
def test_other_precisions_are_close_and_not_fp32(
    served: Path, student: SentenceTransformer, form: str, least: float
) -> None:
    if form == "openvino-bf16" and not HAS_BF16:
        pytest.skip("the processor has no bf16")
    texts = mixed_texts(60)
    vectors, exact = Encoder.load(served / form).encode(texts), student.encode(texts)
    cosines = (vectors * exact).sum(1) / np.linalg.norm(vectors, axis=1)
    assert least < cosines.min()
    assert np.abs(vectors - exact).max() > 1e-4
    parity = json.loads((served / form / "encoder.json").read_text())["parity"]
    assert parity["fp32_max_error"] < 1e-5 < parity["max_error"]
    assert least < parity["min_cosine"]


def test_openvino_equals_sentence_transformers(served: Path, student: SentenceTransformer) -> None:
    texts = mixed_texts(60)
    assert max(len(student.tokenizer(text)["input_ids"]) for text in texts) > MAX_LENGTH, "some are cut"
    encoder = Encoder.load(served / "openvino-fp32", threads=2)
    np.testing.assert_allclose(encoder.encode(texts), student.encode(texts, batch_size=7), atol=1e-5)
    singles = np.concatenate([encoder.encode([text]) for text in texts[:20]])
    np.testing.assert_allclose(singles, student.encode(texts[:20], batch_size=1), atol=1e-5)


def test_static_scales_do_not_depend_on_neighbours(served: Path) -> None:
    """In batches of 32: the ranges of activations are in the graph."""
    graph = onnx.load(served / "int8-static" / "model.onnx").graph
    kinds = {node.op_type for node in graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert "DynamicQuantizeLinear" not in kinds
    encoder, texts = Encoder.load(served / "int8-static"), mixed_texts(40)
    assert encoder.manifest["batch_size"] > 1
    assert encoder.manifest["calibration"]["texts"] == 64
    together, singles = encoder.encode(texts), np.concatenate([encoder.encode([text]) for text in texts])
    cosines = (together * singles).sum(1) / np.linalg.norm(together, axis=1) / np.linalg.norm(singles, axis=1)
    assert cosines.min() > 0.999  # what rounds to another step in a longer matrix


def test_files_and_sizes(served: Path) -> None:
    names = {path.name for path in (served / "openvino-int8").iterdir()}
    assert names == {"model.xml", "model.bin", "tokenizer.json", "encoder.json"}
    sizes = {form: (served / form / "model.bin").stat().st_size for form in ("openvino-int8", "openvino-fp32")}
    assert sizes["openvino-int8"] < 0.5 * sizes["openvino-fp32"]
    manifest = json.loads((served / "openvino-int8" / "encoder.json").read_text())
    assert set(manifest["fingerprints"]) == names - {"encoder.json"}


def test_a_changed_file_is_refused(served: Path, tmp_path: Path) -> None:
    shutil.copytree(served / "openvino-fp32", tmp_path / "changed")
    with (tmp_path / "changed/model.bin").open("ab") as file:
        file.write(b"0")
    with pytest.raises(InputError, match=r"model\.bin is not the file that was exported"):
        Encoder.load(tmp_path / "changed")


def test_a_width_is_cut_and_normalised_inside_the_graph(
    traced: Path, served: Path, student: SentenceTransformer
) -> None:
    texts = mixed_texts(30)
    session = onnxruntime.InferenceSession(str(traced / "16.onnx"), providers=["CPUExecutionProvider"])
    features = {name: student.preprocess(texts)[name].numpy() for name in ("input_ids", "attention_mask")}
    short = student.encode(texts, truncate_dim=16)
    expected = short / np.linalg.norm(short, axis=1, keepdims=True)
    np.testing.assert_allclose(session.run(None, features)[0], expected, atol=1e-5)
    manifest = Encoder.load(served / "fp32-16-binary").manifest
    assert (manifest["dimension"], manifest["widths"]) == (16, [16])
    assert manifest["identity"] == {"student": "tiny", "width": 16, "binary": True} == manifest["document_identity"]


def test_a_binary_form_gives_the_signs(served: Path, student: SentenceTransformer) -> None:
    texts = mixed_texts(30)
    encoder = Encoder.load(served / "fp32-16-binary")
    vectors = encoder.encode(texts)
    assert (vectors.dtype, vectors.shape, encoder.dimension) == (np.uint8, (30, 2), 16)
    signs = student.encode(texts, truncate_dim=16) > 0
    assert (np.unpackbits(vectors, axis=1).astype(bool) == signs).mean() > 0.999  # a coordinate may be all but 0
    assert encoder.manifest["parity"]["equal_bits"] > 0.999


def test_no_normalisation_stays_none(tmp_path: Path) -> None:
    student = tiny_sentence_transformer(tmp_path / "student", layers=1, normalize=False)
    features = student.preprocess(CHECK_TEXTS)
    with torch.inference_mode():
        vectors = export_onnx._Dense(list(student), True, 8)(features["input_ids"], features["attention_mask"])
    np.testing.assert_allclose(vectors, student.encode(CHECK_TEXTS)[:, :8], atol=1e-5)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_masked_lm(tmp_path_factory.mktemp("masked"))


@pytest.fixture(scope="module")
def sparse(masked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The masked language model as a SPLADE tower of 30 terms a text, in three forms."""
    folder = tmp_path_factory.mktemp("sparse")
    traced = tmp_path_factory.mktemp("traced")
    texts = {"check_texts": CHECK_TEXTS, "calibration": mixed_texts(30, 5)}
    for form in ("fp32", "int8-static", "openvino-int8"):
        tower = load_sparse_towers(str(masked)).query
        export_graph(tower, folder / form, form, identity={}, top_k=30, traced=traced, **texts)
    return folder


@pytest.mark.parametrize("form", ["fp32", "int8-static", "openvino-int8"])
def test_a_splade_tower_gives_sparse_vectors(masked: Path, sparse: Path, form: str) -> None:
    texts = mixed_texts(30)
    encoder = Encoder.load(sparse / form)
    vectors = encoder.encode(texts)
    model = SparseEncoder(str(masked), device="cpu", max_active_dims=30)
    expected = model.encode_query(texts, convert_to_sparse_tensor=False).numpy()
    assert (vectors.format, vectors.shape, vectors.dtype) == ("csr", expected.shape, np.float32)
    assert vectors.nnz == (vectors.toarray() > 0).sum()
    assert np.diff(vectors.indptr).max() == 30, "and more without the limit"
    if form == "fp32":
        np.testing.assert_allclose(vectors.toarray(), expected, atol=1e-5)
    else:
        product = (vectors.toarray() * expected).sum(1)
        cosines = product / np.linalg.norm(vectors.toarray(), axis=1) / np.linalg.norm(expected, axis=1)
        assert 0.97 < cosines.min() < 0.999999
    assert encoder.encode([]).shape == (0, expected.shape[1])


@pytest.mark.parametrize(("pooling", "activation"), [("sum", "relu"), ("max", "log1p_relu"), ("sum", "log1p_relu")])
def test_other_poolings_of_splade(masked: Path, pooling: str, activation: str) -> None:
    towers = load_sparse_towers(str(masked))
    towers.query[1].pooling_strategy, towers.query[1].activation_function = pooling, activation
    features = towers.model.preprocess(mixed_texts(20))
    with torch.inference_mode():
        vectors = export_onnx._Splade(list(towers.query), True, None)(features["input_ids"], features["attention_mask"])
    expected = towers.model.encode(mixed_texts(20), convert_to_sparse_tensor=False)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_smoothing_changes_no_product(served: Path, traced: Path, tmp_path: Path) -> None:
    """The graph gives what it gave, from other weights; of a channel that stands out, little is left to stand out."""
    tokens = [np.array([ids], np.int64) for ids in Encoder.load(served / "openvino-fp32").tokenize(mixed_texts(20))]
    batches = [{"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in tokens]
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    model = onnx.load(traced / "whole.onnx")
    norm = next(tensor for tensor in model.graph.initializer if "LayerNorm.weight" in tensor.name)
    loud = onnx.numpy_helper.to_array(norm).copy()
    loud[3] *= 50
    norm.CopyFrom(onnx.numpy_helper.from_array(loud, norm.name))
    for path in (before, after):
        onnx.save(model, path)
    export_onnx._smooth(after, batches)

    def run(path: Path) -> Any:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return np.concatenate([session.run(None, batch)[0] for batch in batches])

    np.testing.assert_allclose(run(after), run(before), atol=1e-5)
    spread = []
    for path in (before, after):
        graph = onnx.load(path)
        weights = {tensor.name for tensor in graph.graph.initializer}
        products = [node for node in graph.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
        (largest,) = export_onnx._largest(graph, [products[0].input[0]], batches).values()
        spread.append(largest.max() / np.median(largest))
    assert spread[1] < 0.5 * spread[0]


def quality_of(value: float, **facts: str) -> Quality:
    return Quality(["sort a list"], lambda vectors: value * float(vectors.shape == (1, 32)), 0.5, 0.02, facts)


def test_quality_is_in_the_manifest_and_gates(student: SentenceTransformer, traced: Path, tmp_path: Path) -> None:
    def export_with(value: float) -> dict[str, Any]:
        options = {"traced": traced, "quality": quality_of(value, collection="toy", split="test")}
        return export_graph(student, tmp_path / "out", "int8", identity={}, check_texts=CHECK_TEXTS, **options)

    with pytest.raises(InputError, match=r"nDCG@10 0\.4899 against 0\.5000 in torch, more than 2\.0% lost"):
        export_with(0.4899)
    assert not list(tmp_path.iterdir())
    facts = {"collection": "toy", "split": "test", "queries": 1, "torch_ndcg_10": 0.5, "ndcg_10": 0.4901}
    assert export_with(0.4901)["quality"] == facts | {"change": -0.0198, "tolerance": 0.02}
    assert Encoder.load(tmp_path / "out").manifest["quality"]["ndcg_10"] == 0.4901


def test_the_gate_holds_for_an_openvino_graph(
    student: SentenceTransformer, traced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion that loses something: the ONNX graph was right, and its successor is not written."""

    def spoiled(path: Path, *rest: Any) -> None:
        model = onnx.load(path)
        weight = next(tensor for tensor in model.graph.initializer if "LayerNorm.weight" in tensor.name)
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.01, weight.name))
        onnx.save(model, path)
        convert_graph(path, *rest)

    monkeypatch.setattr("retrieval_kd.export_graph.convert_graph", spoiled)
    with pytest.raises(InputError, match="the exported encoder differs from torch by"):
        export_graph(student, tmp_path / "out", "openvino-fp32", identity={}, check_texts=CHECK_TEXTS, traced=traced)
    assert not list(tmp_path.iterdir())


def test_without_openvino(served: Path, student: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    importing, find = builtins.__import__, importlib.util.find_spec

    def refuse(name: str, *rest: Any) -> Any:
        if name == "openvino":
            raise ModuleNotFoundError("No module named 'openvino'", name="openvino")
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"needs the package 'openvino'.*retrieval-kd\[openvino\]"):
        Encoder.load(served / "openvino-fp32")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else find(name))
    with pytest.raises(InputError, match=r"retrieval-kd\[openvino\]"):
        export_graph(student, served / "none", "openvino-bf16", identity={}, check_texts=CHECK_TEXTS)
    assert not (served / "none").exists()


def test_a_processor_without_bf16(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    class Old(openvino.Core):
        def get_property(self, *names: str) -> Any:
            return ["FP32", "INT8"]

    monkeypatch.setattr(openvino, "Core", Old)
    shutil.copytree(served / "openvino-fp32", tmp_path / "bf16")
    path = tmp_path / "bf16/encoder.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"precision": "bf16"}))
    with pytest.raises(InputError, match="this processor has no bf16; serve the form openvino-fp32"):
        Encoder.load(tmp_path / "bf16")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("fp16", "'fp16' is no form; there are fp32, int8, int8-static, openvino-fp32"),
        ("bf16", "'bf16' is no form"),
        ("openvino-int8-static", "is no form"),
        ("int8-0", "is no form"),
        ("int8-static", "'int8-static' is calibrated on texts, and none are given"),
        ("fp32-32", "keeps 32 coordinates, and the vectors have 32"),
        ("fp32-12-binary", "packs 8 signs a byte, and 12 is no multiple"),
    ],
)
def test_forms_that_are_refused(student: SentenceTransformer, tmp_path: Path, form: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_graph(student, tmp_path / "out", form, identity={}, check_texts=CHECK_TEXTS)


def test_a_sparse_tower_is_not_cut(masked: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'fp32-16' cuts dense vectors"):
        export_graph(
            load_sparse_towers(str(masked)).query, tmp_path / "out", "fp32-16", identity={}, check_texts=CHECK_TEXTS
        )


def test_names_of_forms() -> None:
    form = parse_form("openvino-int8-128-binary")
    assert (form.runtime, form.precision, form.width, form.binary) == ("openvino", "int8", 128, True)
    assert form.index == "index-128-binary"
    assert parse_form("int8-static").index == "index"
    assert form.identity({"weights": "x"}) == {"weights": "x", "width": 128, "binary": True}
    assert parse_form("int8").identity({"weights": "x"}) == {"weights": "x"}
    vectors = np.array([[3.0, 4.0, -2.0]], np.float32)
    np.testing.assert_allclose(parse_form("fp32-2").cut(vectors, unit=True), [[0.6, 0.8]], rtol=1e-6)
    np.testing.assert_array_equal(parse_form("fp32-2").cut(vectors, unit=False), [[3, 4]])
    np.testing.assert_array_equal(cut_width(np.zeros((1, 3), np.float32), 2, unit=True), [[0, 0]])
    bits = parse_form("fp32-binary").cut(np.array([[1, -1, 0, 2, -3, 1, 1, -1]], np.float32), unit=True)
    assert bits.tolist() == [[0b10010110]]


def test_vectors_cut_as_they_are_read() -> None:
    vectors = np.random.default_rng(0).normal(size=(7, 24)).astype(np.float32)
    for name, bits in (("int8-16", False), ("openvino-fp32-16-binary", True), ("fp32-binary", True)):
        form = parse_form(name)
        whole, cut = form.cut(vectors, unit=True), CutVectors(vectors, form, unit=True)
        assert (cut.shape, cut.ndim, cut.dtype) == (whole.shape, 2, whole.dtype)
        for key in (slice(2, 5), np.array([6, 0]), 3):
            np.testing.assert_array_equal(cut[key], whole[key])
        assert (whole.dtype == np.uint8) == bits
    assert parse_form("openvino-fp32-16-binary").narrow(8).name == "openvino-fp32-8-binary"
    with pytest.raises(InputError, match="'fp32-24' keeps 24 coordinates"):
        CutVectors(vectors, parse_form("fp32").narrow(24), unit=True)
