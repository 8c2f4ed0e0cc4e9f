"""A whole tiny run, what it skips the second time, and the mistakes that a recipe can hold."""

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
from tiny import WORDS, tiny_sentence_transformer
from transformers import BertConfig, BertForSequenceClassification

from retrieval_kd import pipeline
from retrieval_kd.encoder import Encoder
from retrieval_kd.files import load_hits, read_json
from retrieval_kd.pipeline import Workspace
from retrieval_kd.teachers import load_teacher
from retrieval_kd.teachers.bi_encoder import BiEncoder
from retrieval_kd.types import InputError

RECIPE = """
[data]
collection = "{data}"

[candidates]
sources = [{{ kind = "bm25" }}, {{ kind = "bi_encoder", model = "{model}" }}]
depth = 8

[[teachers]]
name = "bm25"
kind = "bm25"

[[teachers]]
name = "teacher"
kind = "bi_encoder"
model = "{model}"

[student]
kind = "dense"
model = "{model}"
layers = [1]
dropout = 0.0

[training]
seed = 3

[[stages]]
steps = 3
batch_size = 4
candidates = 4
learning_rate = 1e-3
terms = [
  {{ loss = "margin_mse", teachers = ["teacher"], scale = 3.0 }},
  {{ loss = "kl", teachers = ["bm25", "teacher"], normalize = "minmax", shares = [0.3, 0.7] }},
  {{ loss = "info_nce", relation = "batch", temperature = 0.1 }},
]

[evaluation]
depth = 10
latency_queries = 2

[export]
quality_tolerance = 1.0
"""

RERANKER = """
[data]
collection = "{data}"

[student]
kind = "cross_encoder"
model = "{classifier}"
max_length = 32

[[stages]]
steps = 2
batch_size = 4
candidates = 3
learning_rate = 1e-3
terms = [{{ loss = "info_nce" }}]

[candidates]
depth = 6

[[teachers]]
name = "bm25"
kind = "bm25"
"""

BEFORE_TRAINING = ["candidates/train", "candidates/test", "scores/test", "scores/train", "trainset"]
SINCE_TRAINING = ["stages/0", "student", "index", "served", "runs"]
BASELINES = ["baselines/bm25", "baselines/teacher"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BEIR collection (20 documents, 8 queries), two models, and recipes."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_sentence_transformer(folder / "transformer").save(str(folder / "model"))
    tower = tiny_sentence_transformer(folder / "classifier", width=16)
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig.from_pretrained(folder / "classifier", num_labels=1)).save_pretrained(
        folder / "classifier"
    )
    tower.tokenizer.save_pretrained(folder / "classifier")
    rng = np.random.default_rng(1)
    data = folder / "toy"
    (data / "qrels").mkdir(parents=True)
    documents = [" ".join(rng.choice(WORDS[7:], 9, replace=False)) for _ in range(20)]
    queries = [" ".join(rng.choice(documents[number].split(), 3, replace=False)) for number in range(8)]
    lines = [json.dumps({"_id": f"d{n}", "title": "", "text": text}) for n, text in enumerate(documents)]
    (data / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    lines = [json.dumps({"_id": f"q{n}", "text": text}) for n, text in enumerate(queries)]
    (data / "queries.jsonl").write_text("\n".join(lines) + "\n")
    for split, numbers in (("train", range(5)), ("test", range(4, 8))):
        judged = [f"q{n}\td{n}\t2\nq{n}\td{n + 9}\t1" for n in numbers]
        (data / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(judged) + "\n")
    names = {"data": data, "model": folder / "model", "classifier": folder / "classifier"}
    (folder / "tiny.toml").write_text(RECIPE.format(**names))
    (folder / "reranker.toml").write_text(RERANKER.format(**names))
    return folder


def workspace(place: Path, name: str = "tiny", *overrides: str) -> Workspace:
    return Workspace(place / f"{name}.toml", place / "work" / name, overrides=overrides)


@pytest.fixture(scope="module")
def report(place: Path) -> dict[str, object]:
    return pipeline.run(workspace(place))


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
    capsys.readouterr()
    pipeline.run(workspace(place, "tiny", "training.seed=7"))
    done, changed = notes(capsys)
    assert changed == SINCE_TRAINING
    assert set(done) == {*BEFORE_TRAINING, *BASELINES}
    pipeline.run(workspace(place))  # back, for the tests after this one


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


def test_a_student_of_cosines_is_not_asked_for_bm25_s_margins(place: Path) -> None:
    """The model's own modules make unit vectors, which the recipe does not show."""
    term = 'stages.0.terms=[{loss = "margin_mse", teachers = ["bm25"]}]'
    with pytest.raises(
        InputError, match="the student's scores are cosines, between -1 and 1, and those of teacher 'bm25'"
    ):
        pipeline.mine(workspace(place, "tiny", term))


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
