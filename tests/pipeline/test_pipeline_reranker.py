"""A cross-encoder as the student of a run, and as the teacher of another."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from whole_run import workspace

from retrieval_kd import pipeline
from retrieval_kd.files import read_json
from retrieval_kd.pipeline import Workspace
from retrieval_kd.types import InputError


def test_a_teacher_that_another_recipe_trains(place: Path) -> None:
    """A cross-encoder is trained first, then re-ranks as the teacher of a dense student."""
    text = (place / "tiny.toml").read_text().replace('["bm25", "teacher"]', '["own", "teacher"]')
    old, new = 'name = "bm25"\nkind = "bm25"', 'name = "own"\nkind = "cross_encoder"\ntrained_by = "reranker.toml"'
    assert text.count(old) == 1
    (place / "second.toml").write_text(text.replace(old, f"{new}\nmax_length = 32"))
    report = pipeline.run(workspace(place, "second"))
    assert list(report["systems"]) == ["bm25", "own", "teacher", "fused", "student", "student-int8"]
    first = read_json(place / "work/reranker/report/report.json")["systems"]
    assert set(first) == {"bm25", "student"}
    assert (first["student"]["engine"], report["systems"]["own"]["engine"]) == ("re-rank", "re-rank")
    own = workspace(place, "second").teachers["own"]
    assert own.identity["weights"] == workspace(place, "reranker").trained.identity["weights"]
    scores = np.load(place / "work/second/scores/test/scores.npy")
    assert np.isfinite(scores[0]).sum() == (np.load(place / "work/second/candidates/test/rows.npy") >= 0).sum()


def test_a_recipe_of_labels_alone_needs_no_teacher(place: Path) -> None:
    text = (place / "reranker.toml").read_text()
    (place / "labels.toml").write_text(text[: text.index("[[teachers]]")])
    report = pipeline.run(workspace(place, "labels"))
    assert set(report["systems"]) == {"bm25", "student"}


def test_labels_are_missed_before_training(place: Path) -> None:
    shutil.copytree(place / "toy", place / "unjudged")
    text = (place / "unjudged/qrels/train.tsv").read_text().splitlines()
    zeroed = [text[0], *(line.rsplit("\t", 1)[0] + "\t0" for line in text[1:])]
    (place / "unjudged/qrels/train.tsv").write_text("\n".join(zeroed))
    overrides = [f"data.collection={place / 'unjudged'}"]
    made = Workspace(place / "reranker.toml", place / "work/nothing-to-tune-on", overrides=overrides)
    pipeline.mine(made)
    pipeline.score(made)
    with pytest.raises(InputError, match="no training query has a relevant document"):
        pipeline.train(made)


def test_a_cross_encoder_has_no_vectors_to_compare(place: Path) -> None:
    with pytest.raises(InputError, match="makes no vectors, which info_nce needs"):
        workspace(place, "reranker", 'stages.0.terms=[{loss = "info_nce", relation = "batch"}]')
