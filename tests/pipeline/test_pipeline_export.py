"""Served forms of a finished run: each is measured as it searches, and refused if it loses too much."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from whole_run import workspace

from retrieval_kd import pipeline
from retrieval_kd.files import read_json
from retrieval_kd.pipeline import Workspace
from retrieval_kd.teachers.bi_encoder import BiEncoder
from retrieval_kd.types import InputError


@pytest.mark.parametrize(("forms", "values"), [('["fp32", "int8"]', [0.5, 0.5, 0.4]), ('["int8"]', [0.5, 0.4])])
def test_int8_that_loses_too_much_is_refused(
    place: Path, report: dict[str, object], monkeypatch: pytest.MonkeyPatch, forms: str, values: list[float]
) -> None:
    given = iter(values)  # of torch, then of each form
    monkeypatch.setattr("retrieval_kd.pipeline.exporting.per_query", lambda *_: {"nDCG@10": np.array([next(given)])})
    served = (place / "work/tiny/served/manifest.json").read_text()
    with pytest.raises(InputError, match=r"0\.4000 against 0\.5000 in torch, more than 10\.0% lost"):
        pipeline.export(workspace(place, "tiny", "export.quality_tolerance=0.1", f"export.forms={forms}"))
    assert (place / "work/tiny/served/manifest.json").read_text() == served


def test_forms_cut_queries_and_documents_alike(place: Path, report: dict[str, object]) -> None:
    """OpenVINO, half the width, and signs alone: each searches its own index, and the gate measures that search."""
    forms = '["fp32", "openvino-fp32", "fp32-16", "int8-16-binary"]'
    made = Workspace(place / "tiny.toml", place / "work/forms", place / "work/store", [f"export.forms={forms}"])
    found = pipeline.run(made)
    names = ["student", "student-openvino-fp32", "student-fp32-16", "student-int8-16-binary"]
    assert list(found["systems"])[-4:] == names
    engines = [found["systems"][name]["engine"] for name in names]
    assert engines == ["onnx fp32", "openvino fp32", "onnx fp32", "onnx int8"]
    student = made.trained
    assert isinstance(student, BiEncoder)
    sides = {"query": made.test_queries.texts, "document": made.collection.documents}
    queries, documents = (student.embed(texts, side)[:, :16] for side, texts in sides.items())
    unit = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (queries, documents)]
    runs = pipeline.steps.load_runs(made)
    full = unit[0] @ unit[1].T
    np.testing.assert_allclose(-np.sort(-full, axis=1)[:, :10], runs["student-fp32-16"].scores, atol=1e-4)
    signs = np.where(queries > 0, 1, -1) @ np.where(documents > 0, 1, -1).T
    np.testing.assert_allclose(-np.sort(-signs, axis=1)[:, :10], runs["student-int8-16-binary"].scores, atol=4.1)
    for form, name in zip(["fp32", "openvino-fp32", "fp32-16", "int8-16-binary"], names, strict=True):
        quality = read_json(place / f"work/forms/served/{form}/encoder.json")["quality"]
        assert quality["ndcg_10"] == pytest.approx(found["systems"][name]["nDCG@10"], abs=1e-6)
        assert (quality["split"], quality["queries"]) == ("test", 4)
        assert quality["torch_ndcg_10"] == pytest.approx(found["systems"]["student"]["nDCG@10"], abs=1e-6)
    manifest = read_json(place / "work/forms/index/index-16/index.json")
    path = place / "work/forms/index/index-16/index.json"
    path.write_text(json.dumps(manifest | {"identity": manifest["identity"] | {"weights": "another"}}))
    with pytest.raises(InputError, match=r"made by another document tower .* differ in weights"):
        pipeline.search(Workspace(made.path, made.folder, made.store, [f"export.forms={forms}", "evaluation.depth=5"]))


def test_quality_on_another_collection(place: Path, report: dict[str, object]) -> None:
    shutil.copytree(place / "toy", place / "other")
    (place / "other/qrels/train.tsv").rename(place / "other/qrels/dev.tsv")
    options = [f"export.collection={place / 'other'}", "export.split=dev", 'export.forms=["fp32"]']
    made = Workspace(place / "tiny.toml", place / "work/elsewhere", place / "work/store", options)
    pipeline.run(made)
    quality = read_json(place / "work/elsewhere/served/fp32/encoder.json")["quality"]
    assert (quality["split"], quality["queries"]) == ("dev", 5)
    assert quality["ndcg_10"] == pytest.approx(quality["torch_ndcg_10"], abs=1e-6)
    assert quality["ndcg_10"] != pytest.approx(report["systems"]["student"]["nDCG@10"], abs=1e-3)
