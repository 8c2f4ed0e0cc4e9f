"""Served encoders: what they load, what they refuse, and that they do without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retrieval_kd.encoder import Encoder, check_index
from retrieval_kd.index import build_index, open_index
from retrieval_kd.tables import Component
from retrieval_kd.types import InputError


def test_order_is_kept_over_many_batches(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval_kd.encoder._CHUNK", 50)
    encoder = Encoder.load(exported / "fp32")
    texts = [
        " ".join(["list", "file", "sort"][number % 3] for _ in range(1 + number * 7 % 20)) for number in range(120)
    ]
    vectors = encoder.encode(texts)
    assert vectors.shape == (120, encoder.dimension)
    assert vectors.dtype == np.float32
    for number in (0, 1, 49, 50, 99, 119):
        np.testing.assert_allclose(vectors[number], encoder.encode([texts[number]])[0], atol=1e-5)


def test_no_texts_and_no_list(exported: Path) -> None:
    encoder = Encoder.load(exported / "fp32")
    assert encoder.encode([]).shape == (0, 32)
    with pytest.raises(InputError, match="takes a list of texts"):
        encoder.encode("sort a list")


def test_count_tokens(exported: Path) -> None:
    encoder = Encoder.load(exported / "fp32")
    assert encoder.count_tokens(["sort the list", "", "list " * 100]) == [5, 2, 24]  # with [CLS] and [SEP]
    encoder.manifest["prompt"] = "read "
    assert encoder.count_tokens(["sort the list"]) == [6]


def test_left_padding(exported: Path) -> None:
    """The side of the padding is the tokenizer's; this model, with absolute positions, shows which it was."""
    encoder = Encoder.load(exported / "fp32")
    texts = ["sort", "read a file and close it"]
    right = encoder.encode(texts)
    encoder.manifest["padding_side"] = "left"
    left = encoder.encode(texts)
    assert np.abs(left[0] - right[0]).max() > 1e-3
    np.testing.assert_allclose(left[1], right[1], atol=1e-5)


def test_several_threads_give_the_same(exported: Path) -> None:
    texts = ["sort a list", "read a file and close it"]
    one, two = (Encoder.load(exported / "fp32", threads).encode(texts) for threads in (1, 2))
    np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("fault", ["no manifest", "no graph", "format", "runtime", "not json", "other tokenizer"])
def test_folders_that_are_refused(exported: Path, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(exported / "fp32", folder)
    manifest = folder / "encoder.json"
    match fault:
        case "no manifest":
            manifest.unlink()
            message = "is not an exported encoder"
        case "no graph":
            (folder / "model.onnx").unlink()
            message = r"has no model\.onnx"
        case "format":
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
            message = "format 99 is unknown"
        case "runtime":
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"runtime": "tensorrt"}))
            message = "runtime 'tensorrt' is unknown"
        case "not json":
            manifest.write_text("{")
            message = "not valid JSON"
        case _:
            path = folder / "tokenizer.json"
            path.write_text(path.read_text().replace('"list"', '"lisp"'))
            message = "is not the file that was exported"
    with pytest.raises(InputError, match=message):
        Encoder.load(folder)


def test_works_without_torch(exported: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from retrieval_kd.encoder import Encoder, check_index
print(Encoder.load(Path({str(exported / "fp32")!r})).encode(["sort a list"]).shape)
print([name for name in ("torch", "transformers", "sentence_transformers", "onnx", "faiss") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["(1, 32)", "[]"]


def test_an_index_of_another_document_tower_is_refused(exported: Path, tmp_path: Path) -> None:
    encoder = Encoder.load(exported / "fp32")
    vectors = encoder.encode(["sort a list", "read a file"])
    flat, ids = Component(kind="faiss"), ["a", "b"]
    build_index(flat, vectors, tmp_path / "own", document_ids=ids, identity={"student": "tiny"})
    check_index(encoder.manifest, open_index(tmp_path / "own").manifest)
    build_index(flat, vectors, tmp_path / "other", document_ids=ids, identity={"student": "tiny", "max_length": 9})
    with pytest.raises(InputError, match=r"made by another document tower .* they differ in max_length"):
        check_index(encoder.manifest, open_index(tmp_path / "other").manifest)
    build_index(flat, vectors[:, :8], tmp_path / "short", document_ids=ids, identity={"student": "tiny"})
    with pytest.raises(InputError, match="the index has vectors of width 8 and the encoder gives 32"):
        check_index(encoder.manifest, open_index(tmp_path / "short").manifest)
