"""A finished run evaluated beside a second searcher."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from whole_run import workspace

from retrieval_kd import pipeline
from retrieval_kd.files import load_hits, read_json
from retrieval_kd.pipeline import Workspace
from retrieval_kd.types import InputError


def evaluate_hybrid(place: Path, name: str, hybrid: str) -> tuple[Workspace, dict[str, object]]:
    """The finished tiny recipe, evaluated once more beside BM25 as `hybrid` says."""
    shutil.copytree(place / "work/tiny", place / "work" / name)
    made = Workspace(place / "tiny.toml", place / "work" / name, overrides=[f"evaluation.hybrid={hybrid}"])
    return made, pipeline.evaluate(made)


def test_a_hybrid_is_tuned_on_the_train_split(place: Path, report: dict[str, object]) -> None:
    made, found = evaluate_hybrid(place, "hybrid", '{ searcher = "bm25" }')
    assert list(found["systems"]) == [*report["systems"], "student + bm25"]
    manifest = read_json(made.folder / "hybrid/manifest.json")
    facts = {key: manifest[key] for key in ("searcher", "weight", "tuned")}
    assert found["facts"]["hybrid"] == facts == {**facts, "searcher": "bm25", "tuned": "nDCG@10 of 5 train queries"}
    assert manifest["tried"][f"{manifest['weight']:.6g}"] == max(manifest["tried"].values())
    student = pipeline.steps.load_runs(made)["student"]
    bm25 = made.teachers["bm25"].retrieve(made.test_queries.texts, 10)
    run: dict[str, dict[int, float]] = {query: {} for query in made.test_queries.ids}
    for line in (made.folder / "hybrid/hybrid.trec").read_text().splitlines():
        query, _, document, _, score, _ = line.split()
        run[query][int(document[1:])] = float(score)
    for number, query in enumerate(made.test_queries.ids):
        lists = []
        for hits in (student, bm25):
            pairs = zip(hits.rows[number].tolist(), hits.scores[number].tolist(), strict=True)
            lists.append({row: score for row, score in pairs if row >= 0})
        dense, sparse = (lambda row, one=one: one.get(row, min(one.values())) for one in lists)
        both = {row: dense(row) + manifest["weight"] * sparse(row) for row in {*lists[0], *lists[1]}}
        assert sorted(run[query].values(), reverse=True) == pytest.approx(sorted(both.values())[::-1][:10], rel=1e-5)
        assert run[query] == pytest.approx({row: both[row] for row in run[query]}, rel=1e-5)


def test_a_hybrid_of_a_given_weight(place: Path, report: dict[str, object]) -> None:
    """Weight 0 is the student's own order, as far as its list goes; nothing is tuned."""
    made, found = evaluate_hybrid(place, "given", '{ searcher = "bm25", weight = 0.0 }')
    assert found["facts"]["hybrid"] == {"searcher": "bm25", "weight": 0.0}
    fused, student = load_hits(made.folder / "hybrid"), load_hits(made.folder / "runs/student")
    np.testing.assert_array_equal(fused.rows[:, :9], student.rows[:, :9])  # the tenth is level with what it lacks


def test_hybrids_that_cannot_be(place: Path, report: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"there are: bm25, teacher, .*; did you mean 'bm25'"):
        workspace(place, "tiny", 'evaluation.hybrid={ searcher = "bm26" }')
    (place / "toy/qrels/unjudged.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t0\n")
    shutil.copytree(place / "work/tiny", place / "work/nothing-judged")
    overrides = ['evaluation.hybrid={ searcher = "bm25" }', 'data.train="unjudged"']
    made = Workspace(place / "tiny.toml", place / "work/nothing-judged", overrides=overrides)
    with pytest.raises(InputError, match=r"judgements of the train split, which has none; give .*hybrid\.weight"):
        pipeline.evaluate(made)
