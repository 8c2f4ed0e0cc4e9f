"""A whole tiny run, what it skips the second time, and what one stage asks of another."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import torch
from whole_run import BASELINES, BEFORE_TRAINING, SINCE_TRAINING, workspace

from retrieval_kd import pipeline
from retrieval_kd.encoder import Encoder
from retrieval_kd.files import read_json
from retrieval_kd.pipeline import Workspace
from retrieval_kd.teachers import load_teacher
from retrieval_kd.teachers.bi_encoder import BiEncoder
from retrieval_kd.types import InputError


def test_the_report_has_every_system(place: Path, report: dict[str, object]) -> None:
    assert read_json(place / "work/tiny/report/report.json") == json.loads(json.dumps(report))
    systems = report["systems"]
    assert list(systems) == ["bm25", "teacher", "fused", "student", "student-int8"]
    for system in systems.values():
        for metric in ("nDCG@10", "MRR@10"):
            assert math.isfinite(system[metric])
            assert 0 <= system[metric] <= 1
    assert systems["bm25"]["nDCG@10"] > 0.5  # queries are words of their documents
    for name in ("teacher", "student", "student-int8"):
        assert systems[name]["query_p50_ms"] > 0
        assert systems[name]["bytes"] > 0
    assert systems["student"]["bytes"] > systems["student-int8"]["bytes"]
    assert systems["student"]["index_bytes"] > 20 * 32 * 4
    assert report["facts"]["training_queries"] == 5
    assert set(report["facts"]["seconds"]) == {*BEFORE_TRAINING, *SINCE_TRAINING}


def test_trec_eval_agrees_with_the_report(place: Path, report: dict[str, object]) -> None:
    qrels: dict[str, dict[str, int]] = {}
    for line in (place / "toy/qrels/test.tsv").read_text().splitlines()[1:]:
        query, document, grade = line.split("\t")
        qrels.setdefault(query, {})[document] = int(grade)
    for name in ("student", "student-int8"):
        run: dict[str, dict[str, float]] = {}
        for line in (place / f"work/tiny/runs/{name}.trec").read_text().splitlines():
            query, _, document, _, score, tag = line.split()
            assert tag == name
            run.setdefault(query, {})[document] = float(score)
        assert {len(found) for found in run.values()} == {10}
        values = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10"}).evaluate(run)
        expected = np.mean([values[query]["ndcg_cut_10"] for query in qrels])
        assert report["systems"][name]["nDCG@10"] == pytest.approx(expected, abs=1e-9)


def test_what_is_served_is_the_student(place: Path, report: dict[str, object]) -> None:
    """Dot products of the saved student give the run's scores, and the served encoder its vectors."""
    made = workspace(place)
    student = made.trained
    assert isinstance(student, BiEncoder)
    queries = made.test_queries.texts
    vectors = student.embed(queries, "query")
    full = vectors @ student.embed(made.collection.documents, "document").T
    run = pipeline.steps.load_runs(made)["student"]
    np.testing.assert_allclose(np.take_along_axis(full, run.rows, 1), run.scores, atol=1e-4)
    np.testing.assert_allclose(-np.sort(-full, axis=1)[:, :10], run.scores, atol=1e-4)
    np.testing.assert_allclose(Encoder.load(place / "work/tiny/served/fp32").encode(queries), vectors, atol=1e-4)


def test_training_candidates_hold_the_positives_and_test_candidates_only_what_is_found(
    place: Path, report: dict[str, object]
) -> None:
    made = workspace(place)
    train = np.load(place / "work/tiny/candidates/train/rows.npy")
    assert [set(row[:2]) for row in train.tolist()] == [set(grades) for grades in made.train_queries.qrels]
    ranks = np.load(place / "work/tiny/candidates/test/ranks.npy")
    valid = np.load(place / "work/tiny/candidates/test/rows.npy") >= 0
    assert (ranks.max(0)[valid] > 0).all()


def notes(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    """The stages that were up to date, and those whose inputs had changed."""
    lines = capsys.readouterr().err.splitlines()
    return tuple(
        [line.removesuffix(end) for line in lines if line.endswith(end)]
        for end in (": up to date", ": inputs changed, made again")
    )


def test_a_second_run_skips_everything(
    place: Path, report: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    again = pipeline.run(workspace(place))
    done, changed = notes(capsys)
    assert set(done) == {*BEFORE_TRAINING, *SINCE_TRAINING, *BASELINES}
    assert changed == []
    for name, system in report["systems"].items():
        assert again["systems"][name]["nDCG@10"] == system["nDCG@10"]


def test_another_seed_retrains_and_no_more(
    place: Path, report: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "work/tiny", place / "work/seeded")
    capsys.readouterr()
    pipeline.run(Workspace(place / "tiny.toml", place / "work/seeded", overrides=["training.seed=7"]))
    done, changed = notes(capsys)
    assert changed == SINCE_TRAINING
    assert set(done) == {*BEFORE_TRAINING, *BASELINES}


def test_processes_share_the_training_of_a_recipe(place: Path, report: dict[str, object]) -> None:
    """`torchrun -m retrieval_kd train` ends where `rkd train` does; only the first process writes."""
    out = place / "work/shared"
    made = Workspace(place / "tiny.toml", out, place / "work/store")
    pipeline.mine(made)
    pipeline.score(made)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "retrieval_kd", "train", str(place / "tiny.toml"), "--out", str(out)]
    done = subprocess.run([*command, "--store", str(place / "work/store")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    alone = workspace(place)
    assert read_json(out / "stages/0/manifest.json")["key"] == read_json(alone.folder / "stages/0/manifest.json")["key"]
    ours, theirs = ((folder / "training/0/log.jsonl").read_text() for folder in (out, alone.folder))
    pairs = zip(json.loads(ours).items(), json.loads(theirs).items(), strict=True)
    assert all(name == same and value == pytest.approx(other, abs=1e-5) for (name, value), (same, other) in pairs)
    texts = made.test_queries.texts
    vectors = [found.trained.embed(texts, "query") for found in (made, alone)]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-3)  # Adam turns rounding into steps: 3 of at most 1e-3
    assert sorted(path.name for path in (out / "training/0").iterdir()) == ["checkpoint-00000003.pt", "log.jsonl"]


def test_a_stage_that_mines_with_the_student_reads_what_it_found(place: Path, report: dict[str, object]) -> None:
    """Two stages, the second on the first student's candidates, filtered and averaged; and what each made of it."""
    stage = """{ steps = 2, batch_size = 4, candidates = 4, terms = [{ loss = "info_nce" }] }"""
    second = (
        "{ steps = 2, batch_size = 2, candidates = 4, mine = { depth = 6, skip = 1 }, average = { stages = [0] }, "
        'filter = { student_rank = [1, 20], teacher = "teacher", teacher_rank = [1, 20] }, '
        'terms = [{ loss = "kl", teachers = ["snapshot"] }, { loss = "info_nce" }] }'
    )
    made = Workspace(place / "tiny.toml", place / "work/stages", place / "work/store", [f"stages=[{stage}, {second}]"])
    for step in (pipeline.mine, pipeline.score, pipeline.train):
        step(made)
    folder = place / "work/stages"
    before = load_teacher(made.student_as_teacher(folder / "stages/0/student"), made.collection)
    queries = made.train_queries
    full = before.embed(queries.texts, "query") @ before.embed(made.collection.documents, "document").T
    order = np.argsort(-full, axis=1)
    rows, ranks = np.load(folder / "mined/1/rows.npy"), np.load(folder / "mined/1/student_ranks.npy")
    for number, grades in enumerate(queries.qrels):
        rank = 1 + min(order[number].tolist().index(row) for row in grades if grades[row] > 0)
        assert ranks[number] == (rank if rank <= 6 + 1 else 0)  # 0: beyond depth and skip
        found = [row for row in rows[number].tolist() if row not in grades]
        assert found == [row for row in order[number, 1:7].tolist() if row not in grades][: len(found)]
    assert np.load(folder / "mined/1/scores.npy").shape == (2, 5, 6)
    weights = [torch.load(folder / f"stages/{number}/weights.pt")["student"] for number in (0, 1)]
    last = torch.load(folder / "training/1/checkpoint-00000002.pt", weights_only=False)["state"]["models"]["student"]
    for name, tensor in weights[1].items():
        torch.testing.assert_close(tensor, (weights[0][name] + last[name]) / 2, atol=1e-6, rtol=1e-5)


def test_a_stage_names_the_command_that_comes_before_it(place: Path) -> None:
    made = Workspace(place / "tiny.toml", place / "work/bare", place / "store")
    for stage, command in ((pipeline.score, "mine"), (pipeline.index, "train"), (pipeline.search, "export")):
        with pytest.raises(InputError, match=rf"run `rkd {command} \S+tiny.toml` first"):
            stage(made)


def test_a_student_of_cosines_is_not_asked_for_bm25_s_margins(place: Path) -> None:
    """The model's own modules make unit vectors, which the recipe does not show."""
    term = 'stages.0.terms=[{loss = "margin_mse", teachers = ["bm25"]}]'
    with pytest.raises(
        InputError, match="the student's scores are cosines, between -1 and 1, and those of teacher 'bm25'"
    ):
        pipeline.mine(workspace(place, "tiny", term))
