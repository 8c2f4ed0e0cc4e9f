"""Engines: OpenVINO gives torch's numbers, says what it is, and refuses what it cannot do."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from tiny import WORDS, collection_of, tiny_classifier, tiny_sentence_transformer
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    MobileBertConfig,
    MobileBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from retrieval_kd import engines
from retrieval_kd.first_token import _FirstToken, trim_last_layer
from retrieval_kd.tables import Component, options
from retrieval_kd.teachers import load_teacher
from retrieval_kd.types import InputError

RNG = np.random.default_rng(0)
DOCUMENTS = [" ".join(RNG.choice(WORDS, RNG.integers(3, 30))) for _ in range(40)]
QUERIES = [" ".join(RNG.choice(WORDS[7:], 3)) for _ in range(3)]
LEFT = [query for query in QUERIES for _ in DOCUMENTS]
RIGHT = DOCUMENTS * len(QUERIES)
COLLECTION = collection_of(DOCUMENTS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bi-encoder, and a cross-encoder over the same tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    tiny_sentence_transformer(folder / "transformer").save(str(folder / "bi_encoder"))
    return {"bi_encoder": folder / "bi_encoder", "cross_encoder": tiny_classifier(folder / "cross_encoder")}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "SAMPLE", 12)


def load(kind: str, models: dict[str, Path], **chosen: Any) -> Any:
    return load_teacher(Component(kind=kind, model=str(models[kind]), max_length=24, **chosen), COLLECTION)


def test_rates_of_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best round counts: 1 ms of 2 x 1024 x 768 x 3072 operations in fp32, 2 ms in bf16."""
    taken = iter([*[5e-3, 1e-3, 4e-3], *[2e-3, 6e-3, 3e-3]])
    clock = iter([time for seconds in taken for time in (0.0, seconds)])
    monkeypatch.setattr(engines.time, "perf_counter", lambda: next(clock))
    assert engines.matrix_rates(rounds=3) == {"fp32": 4831.8, "bf16": 2415.9}


@pytest.mark.parametrize("kind", ["bi_encoder", "cross_encoder"])
def test_openvino_in_fp32_is_torch(kind: str, models: dict[str, Path]) -> None:
    """In batches of every length; the default engine is torch."""
    torch_scores = load(kind, models).score(LEFT, RIGHT)
    teacher = load(kind, models, engine="openvino")
    np.testing.assert_allclose(teacher.score(LEFT, RIGHT), torch_scores, atol=1e-5)
    np.testing.assert_allclose(teacher.score(LEFT[:1], RIGHT[:1]), torch_scores[:1], atol=1e-5)
    assert teacher.score([], []).shape == (0,)


@pytest.mark.parametrize("kind", ["bi_encoder", "cross_encoder"])
def test_each_engine_and_precision_is_a_teacher_of_its_own(kind: str, models: dict[str, Path]) -> None:
    """Far from each other on a tiny model of random weights, yet in nearly the same order."""
    exact = load(kind, models)
    expected = exact.score(LEFT, RIGHT)
    scores, identities = {}, {}
    chosen = [("torch", "bf16"), ("openvino", "fp32"), ("openvino", "int8")]
    chosen += [("openvino", "bf16")] if engines._has_bf16() else []
    for engine, precision in chosen:
        teacher = load(kind, models, engine=engine, precision=precision)
        scores[precision], identities[engine, precision] = teacher.score(LEFT, RIGHT), teacher.identity
        taus = [
            kendalltau(*(one[start : start + 40] for one in (expected, scores[precision]))).statistic
            for start in range(0, len(LEFT), 40)
        ]
        assert np.mean(taus) > {"fp32": 0.999, "bf16": 0.95, "int8": 0.75}[precision]
    different = [exact.identity, *identities.values()]
    assert len({str(identity) for identity in different}) == len(different)
    assert np.abs(scores["int8"] - expected).max() > 1e-4
    found = identities["openvino", "int8"]
    found = found["document"] if kind == "bi_encoder" else found
    assert (found["engine"], found["precision"]) == ("openvino", "int8")
    assert found["quantizer"].startswith("nncf ")
    assert found["rest"] in ("bf16", "fp32")


def test_an_int8_teacher_is_who_it_was_calibrated_on(models: dict[str, Path]) -> None:
    """Other documents, or another prompt before them, make another teacher; the same ones the same."""
    chosen = {"engine": "openvino", "precision": "int8"}
    first = load("cross_encoder", models, **chosen)
    assert first.identity == load("cross_encoder", models, **chosen).identity
    assert first.identity != load("cross_encoder", models, **chosen, query_prompt="q: ").identity
    other = Component(kind="cross_encoder", model=str(models["cross_encoder"]), max_length=24, **chosen)
    assert first.identity != load_teacher(other, collection_of(DOCUMENTS[::-1])).identity
    with pytest.raises(InputError, match="which has none"):
        load_teacher(other, collection_of([]))


def test_calibration_pairs_by_hand() -> None:
    found = engines.calibration_pairs(collection_of(["a b", "c d", "e f"]))
    assert found == [("a b", "a b"), ("c d", "a b"), ("e f", "e f")]
    many = engines.calibration_pairs(collection_of([f"{number} " + "word " * 20 for number in range(1000)]))
    assert len(many) == engines.SAMPLE
    assert many[0][1].startswith("0 ")
    assert [len(head.split()) for head, _ in many] == [engines.HEAD_WORDS] * len(many)
    assert many[-1][0].startswith("999 ")


@pytest.mark.parametrize("kind", ["bi_encoder", "cross_encoder"])
def test_what_cannot_work_is_refused_when_it_is_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match='"int8" needs engine = "openvino"'):
        options("teachers", Component(kind=kind, model="m", precision="int8"))
    with pytest.raises(InputError, match="engine"):
        options("teachers", Component(kind=kind, model="m", engine="onnx"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nncf" else find(name))
    options("teachers", Component(kind=kind, model="m", engine="openvino", precision="bf16"))
    with pytest.raises(InputError, match=r"'nncf', which is not installed; .*retrieval-kd\[openvino\]"):
        options("teachers", Component(kind=kind, model="m", engine="openvino", precision="int8"))


def test_a_processor_without_bf16_is_told(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_has_bf16", lambda: False)
    with pytest.raises(InputError, match="this processor has no bf16"):
        load("cross_encoder", models, engine="openvino", precision="bf16").score(LEFT[:1], RIGHT[:1])
    assert load("cross_encoder", models, engine="openvino", precision="int8").identity["rest"] == "fp32"


class Counting(nn.Module):
    """Multiplies by the length of its input, which a trace takes for a constant."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.float().sum(1, keepdim=True) * len(ids[0].tolist())


class Failing(nn.Module):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("not for tracing")


def test_a_graph_that_is_not_the_module_is_refused() -> None:
    example = {"ids": torch.tensor([[1, 2], [3, 0]])}
    with pytest.raises(InputError, match=r"differs from torch by .* use engine = \"torch\""):
        engines.compile_module(Counting(), example, "fp32")
    with pytest.raises(InputError, match="cannot convert this model"):
        engines.compile_module(Failing(), example, "fp32")


class Products(nn.Module):
    """Two products of one shape; the input of the second has one value that is far above all others."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 64)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        peak = 1 + 1000.0 * (ids == 7)[..., None] * torch.eye(64)[3]
        return self.second(self.first(self.table(ids)) * peak)


def test_products_whose_input_has_outliers_are_found() -> None:
    """Of 19,200 values one is 1000 times the others, so that they range over some 100 times their mean square."""
    import openvino

    torch.manual_seed(0)
    ids = torch.arange(300)[None]
    graph = openvino.convert_model(Products().eval(), example_input=(ids,))
    products = [node for node in graph.get_ordered_ops() if node.get_type_name() == "MatMul"]
    assert len(products) == 2
    for inputs, expected in ((ids, products[1:]), (ids[:, 8:], [])):
        kept = engines._with_outliers(graph, products, [{graph.inputs[0].get_any_name(): inputs.numpy()}])
        assert [node.get_friendly_name() for node in kept] == [node.get_friendly_name() for node in expected]


def test_int8_quantises_all_products_but_those_of_one_vector_a_text(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each product of token states reads activations in 8 bits; pooler and classifier (B, D) do not."""
    graphs: list[Any] = []
    compile_graph = engines._compile

    def watch(graph: Any, hint: str) -> Any:
        graphs.append(graph)
        return compile_graph(graph, hint)

    monkeypatch.setattr(engines, "_compile", watch)
    load("cross_encoder", models, engine="openvino", precision="fp32").score(LEFT[:1], RIGHT[:1])
    (exact,) = graphs
    assert not any(node.get_type_name() == "FakeQuantize" for node in exact.get_ordered_ops())
    load("cross_encoder", models, engine="openvino", precision="int8").score(LEFT[:1], RIGHT[:1])
    graph = graphs[-1]  # the one that scores
    products = [node for node in graph.get_ordered_ops() if node.get_type_name() == "MatMul"]
    reduced = {
        rank: [
            any(node.input_value(place).get_node().get_type_name() == "FakeQuantize" for place in (0, 1))
            for node in products
            if (node.get_output_partial_shape(0).rank.get_length() == 2) == (rank == 2)
        ]
        for rank in (2, 3)
    }
    assert reduced[2] == [False, False]
    assert len(reduced[3]) > 8
    assert sum(reduced[3]) >= 8  # of each layer at least query, key, value and the feed-forward's first


@pytest.mark.parametrize("attends", [True, False], ids=["padded", "whole"])
@pytest.mark.parametrize(
    ("config", "model"),
    [(BertConfig, BertForSequenceClassification), (RobertaConfig, RobertaForSequenceClassification)],
)
def test_a_trimmed_classifier_gives_the_same_logits(config: Any, model: Any, attends: bool) -> None:
    torch.manual_seed(0)
    settings = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    classifier = model(config(**settings, intermediate_size=64, num_labels=2, pad_token_id=0)).eval()
    ids = torch.randint(3, 60, (4, 12))
    mask = torch.ones_like(ids)
    if attends:
        mask[1, 5:], mask[3, 9:] = 0, 0
    before = classifier(input_ids=ids, attention_mask=mask).logits
    trim_last_layer(classifier)
    seen: list[tuple[int, ...]] = []
    classifier.base_model.encoder.layer[-1].register_forward_hook(lambda *a: seen.append(tuple(a[2].shape)))
    torch.testing.assert_close(classifier(input_ids=ids, attention_mask=mask).logits, before, atol=1e-6, rtol=1e-5)
    assert seen == [(4, 1, 32)]


def test_other_classifiers_stay_whole(models: dict[str, Path]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(models["cross_encoder"], attn_implementation="eager")
    layer = model.base_model.encoder.layer[-1]
    trim_last_layer(model)
    assert model.base_model.encoder.layer[-1] is layer


def test_a_family_without_decoders_stays_whole() -> None:
    """MobileBERT keeps its layers where BERT does, and its configuration does not know `is_decoder`."""
    settings = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32, "intermediate_size": 64}
    model = MobileBertForSequenceClassification(MobileBertConfig(**settings, **sizes))
    assert not hasattr(model.config, "is_decoder")
    layer = model.base_model.encoder.layer[-1]
    trim_last_layer(model)
    assert model.base_model.encoder.layer[-1] is layer


def test_the_teacher_is_trimmed(models: dict[str, Path]) -> None:
    model, _ = load("cross_encoder", models)._loaded
    assert isinstance(model.base_model.encoder.layer[-1], _FirstToken)
