"""Exported graphs: equal to torch, in one file, and refused when they are not."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling
from tiny import CHECK_TEXTS, MAX_LENGTH, WORDS, tiny_sentence_transformer
from torch import Tensor, nn

from retrieval_kd.encoder import Encoder
from retrieval_kd.export_graph import _write_tokenizer, export_graph
from retrieval_kd.students import Batch
from retrieval_kd.towers import load_towers, run_tower, tokenize
from retrieval_kd.types import InputError


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    """The student that the fixture `exported` was made from."""
    return tiny_sentence_transformer(tmp_path_factory.mktemp("student"))


def mixed_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 0 to 60 words, some of them unknown; the longest are cut."""
    chance = random.Random(seed)
    words = [*WORDS, "xylophone", "çedilla", "東京", "[SEP]", "[MASK]", "O'Neill"]
    return [" ".join(chance.choices(words, k=chance.choice([0, 1, 2, 3, 5, 8, 13, 60]))) for _ in range(count)]


def test_fp32_equals_sentence_transformers(exported: Path, student: SentenceTransformer) -> None:
    texts = mixed_texts(100)
    assert max(len(student.tokenizer(text)["input_ids"]) for text in texts) > MAX_LENGTH
    encoder = Encoder.load(exported / "fp32")
    np.testing.assert_allclose(encoder.encode(texts), student.encode(texts, batch_size=7), atol=1e-5)
    singles = np.concatenate([encoder.encode([text]) for text in texts[:20]])
    np.testing.assert_allclose(singles, student.encode(texts[:20], batch_size=1), atol=1e-5)


def test_int8_is_smaller_and_close(exported: Path, student: SentenceTransformer) -> None:
    texts = mixed_texts(100)
    exact, vectors = student.encode(texts), Encoder.load(exported / "int8").encode(texts)
    cosines = (exact * vectors).sum(1) / np.linalg.norm(vectors, axis=1)
    assert 0.99 < cosines.min() < 0.99999, "close, and not the fp32 graph"
    sizes = {form: (exported / form / "model.onnx").stat().st_size for form in ("fp32", "int8")}
    assert sizes["int8"] < 0.75 * sizes["fp32"]
    kinds = {node.op_type for node in onnx.load(exported / "int8" / "model.onnx").graph.node}
    assert "MatMulInteger" in kinds


def test_int8_vectors_do_not_depend_on_their_neighbours(exported: Path) -> None:
    texts, encoder = mixed_texts(20), Encoder.load(exported / "int8")
    singles = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_array_equal(encoder.encode(texts), singles)


def test_manifest(exported: Path, student: SentenceTransformer) -> None:
    for form in ("fp32", "int8"):
        folder = exported / form
        assert {path.name for path in folder.iterdir()} == {"model.onnx", "tokenizer.json", "encoder.json"}
        manifest = json.loads((folder / "encoder.json").read_text())
        assert (manifest["form"], manifest["runtime"], manifest["precision"]) == (form, "onnx", form)
        assert (manifest["vectors"], manifest["widths"]) == ("dense", [])
        assert manifest["dimension"] == 32
        assert manifest["max_length"] == MAX_LENGTH
        assert manifest["identity"] == manifest["document_identity"] == {"student": "tiny"}
        assert manifest["parameters"] == sum(parameter.numel() for parameter in student.parameters())
        assert manifest["bytes"] == sum((folder / name).stat().st_size for name in ("model.onnx", "tokenizer.json"))
        assert manifest["parity"]["texts"] == len(CHECK_TEXTS) + 2
        assert 0 < manifest["parity"]["fp32_max_error"] < 1e-5
    assert manifest["parity"]["max_error"] > 1e-4, "int8 differs, within no tolerance"
    assert 0.99 < manifest["parity"]["min_cosine"] <= manifest["parity"]["mean_cosine"] < 1


def test_prompt_projection_and_no_normalisation(tmp_path: Path) -> None:
    """Another prompt, a Dense head, CLS pooling, a model in training mode with dropout and half precision."""
    base = tiny_sentence_transformer(tmp_path / "student", layers=1, normalize=False)
    torch.manual_seed(1)
    dense = Dense(32, 12, activation_function=nn.Tanh())
    modules = [base[0], Pooling(32, "cls"), dense]
    student = SentenceTransformer(modules=modules, device="cpu")
    for dropout in [module for module in student.modules() if isinstance(module, nn.Dropout)]:
        dropout.p = 0.5
    student.train()
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    manifest = export_graph(
        modules,
        tmp_path / "out",
        "fp32",
        prompt="key: ",
        identity={"tower": "query"},
        document_identity={"tower": "document"},
        check_texts=CHECK_TEXTS,
    )
    assert manifest["dimension"] == 12
    assert manifest["document_identity"] == {"tower": "document"}
    assert student.training, "the caller's model is left as it was"
    assert base[0].auto_model.config._attn_implementation != "eager"
    assert all(torch.equal(weight, before[name]) for name, weight in student.state_dict().items())
    expected = student.eval().encode(CHECK_TEXTS, prompt="key: ")
    vectors = Encoder.load(tmp_path / "out").encode(CHECK_TEXTS)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert np.abs(vectors - student.encode(CHECK_TEXTS)).max() > 1e-3, "the prompt counts"


class ForgetfulPooling(Pooling):
    """Pooling that averages the padding too, once it is traced."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        if torch.compiler.is_exporting():
            features = {**features, "attention_mask": torch.ones_like(features["attention_mask"])}
        return super().forward(features)


@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_gate_refuses_a_graph_that_ignores_the_mask(tmp_path: Path, form: str) -> None:
    student = tiny_sentence_transformer(tmp_path / "student", layers=1)
    modules = [student[0], ForgetfulPooling(32, "mean"), student[2]]
    with pytest.raises(InputError, match=r"differs from torch by .* in a coordinate and 1.00e-04 is allowed"):
        export_graph(modules, tmp_path / "out", form, identity={}, check_texts=CHECK_TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_gate_sees_truncation_and_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that cuts one token earlier: only a text beyond the longest shows it, and the gate adds one."""
    student = tiny_sentence_transformer(tmp_path / "student", layers=1)
    monkeypatch.setattr(
        "retrieval_kd.export_graph._write_tokenizer",
        lambda fast, length, path: _write_tokenizer(fast, length - 1, path),
    )
    with pytest.raises(InputError, match="differs from torch"):
        export_graph(student, tmp_path / "out", "fp32", identity={}, check_texts=["sort a list"])


@pytest.mark.parametrize("side", ["right", "left"])
def test_token_ids_are_those_of_training(exported: Path, tmp_path: Path, side: str) -> None:
    """Prompt, special tokens and truncation, from whichever side."""
    tiny_sentence_transformer(tmp_path / "student").save(str(tmp_path / "model"))
    towers = load_towers(str(tmp_path / "model"), max_length=9, query_prompt="key: ")
    towers.query[0].tokenizer.truncation_side = side
    shutil.copy(exported / "fp32/model.onnx", tmp_path / "whole.onnx")  # whose weights are the same
    options = {"prompt": "key: ", "identity": {}, "check_texts": CHECK_TEXTS, "traced": tmp_path}
    export_graph(towers.query, tmp_path / "out", "fp32", **options)
    texts = [text for text in mixed_texts(100) if text]
    expected = tokenize(towers.query, towers.render(texts, "query"))
    assert max(map(len, expected)) == 9 > min(map(len, expected))
    encoder = Encoder.load(tmp_path / "out")
    assert encoder.tokenize(texts) == expected
    batch = Batch([np.array(ids, np.int32) for ids in expected], [], torch.zeros(len(texts), 0, dtype=torch.int64))
    with torch.no_grad():
        trained = run_tower(towers.query, batch.queries, batch)[:, 0].numpy()  # padded as in training
    np.testing.assert_allclose(encoder.encode(texts), trained, atol=1e-5)


def test_student_of_nan_is_refused(tmp_path: Path) -> None:
    student = tiny_sentence_transformer(tmp_path / "student", layers=1)
    with torch.no_grad():
        student[0].auto_model.embeddings.LayerNorm.weight[0] = torch.nan
    with pytest.raises(InputError, match="training diverged"):
        export_graph(student, tmp_path / "out", "fp32", identity={}, check_texts=CHECK_TEXTS)


def test_modules_that_cannot_be_exported(tmp_path: Path) -> None:
    student = tiny_sentence_transformer(tmp_path / "student", layers=1)
    with pytest.raises(InputError, match="needs a Transformer as first module, this one is Pooling"):
        export_graph([student[1]], tmp_path / "out", "fp32", identity={}, check_texts=CHECK_TEXTS)
    modules = [student[0], Pooling(32, "mean", include_prompt=False)]
    with pytest.raises(InputError, match="include_prompt"):
        export_graph(modules, tmp_path / "out", "fp32", prompt="q: ", identity={}, check_texts=CHECK_TEXTS)
