"""A whole tiny suite: its figures against trec_eval, what it skips, what it checks, and its mistakes."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from tiny import tiny_classifier, tiny_sentence_transformer
from toy import draw_texts, write_beir
from typer.testing import CliRunner

from retrieval_kd import cli
from retrieval_kd.compare import compare
from retrieval_kd.evaluate.per_query import Measured, read_per_query
from retrieval_kd.evaluate.registry import registry
from retrieval_kd.files import load_hits
from retrieval_kd.pipeline import suite as pipeline_suite
from retrieval_kd.pipeline.suite import run_suite
from retrieval_kd.suite import Suite, is_suite, load_suite
from retrieval_kd.suite_report import suite_report
from retrieval_kd.types import InputError

SUITE = """
depth = 12
metrics = ["nDCG@10", "R@100"]

[[collections]]
name = "toy"
metric = "MRR@10"
relevance = 2

[[collections]]
name = "toy"
label = "toy itself"
self_ids = true

[[systems]]
name = "bm25"
kind = "bm25"

[[systems]]
name = "encoder"
kind = "bi_encoder"
model = "{place}/model"

[[systems]]
name = "both"
kind = "fusion"
of = ["bm25", "encoder"]

[[systems]]
name = "reranker"
kind = "cross_encoder"
model = "{place}/classifier"
max_length = 32
rerank = "bm25"
rerank_depth = 5

[[systems]]
name = "theirs"
kind = "run"
file = "theirs.trec"

[[systems]]
name = "student"
kind = "student"
work = "work"

[[systems]]
name = "served"
kind = "student"
work = "work"
form = "fp32"
"""
SYSTEMS = ["bm25", "encoder", "both", "reranker", "theirs", "student", "served"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, exported: Path) -> Path:
    """A collection whose queries are documents too, models, a run of somebody else, and a trained student."""
    folder = tmp_path_factory.mktemp("suite")
    tiny_sentence_transformer(folder / "transformer").save(str(folder / "model"))
    tiny_classifier(folder / "classifier", width=16)
    tiny_sentence_transformer(folder / "weights").save(str(folder / "work" / "student"))
    shutil.copytree(exported / "fp32", folder / "work" / "served" / "fp32")
    recipe = {"precision": "fp32", "student": {"kind": "dense", "model": "x", "render": {}}}
    (folder / "work" / "recipe.json").write_text(json.dumps(recipe))
    judged = {number: {number: 2, number + 8: 1, number + 3: 0} for number in range(8)}
    data = write_beir(folder / "data" / "toy", *draw_texts(), {"test": judged})
    with (data / "corpus.jsonl").open("a") as corpus:
        corpus.write((data / "queries.jsonl").read_text())
    run = [f"q{n} Q0 d{row} 1 {-row} x" for n in range(1, 9) for row in range(9)]  # q0 is not there, q8 not judged
    (folder / "theirs.trec").write_text("\n".join(run) + "\n")
    (folder / "mine.toml").write_text(SUITE.format(place=folder))
    return folder


@pytest.fixture(autouse=True)
def _data(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKD_DATA", str(place / "data"))


@pytest.fixture(scope="module")
def out(place: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RKD_DATA", str(place / "data"))
        run_suite(place / "mine.toml", place / "out")
    return place / "out"


def trec_eval(run: Path, place: Path, key: str, relevance: int) -> list[float]:
    found: dict[str, dict[str, float]] = {}
    for line in run.read_text().splitlines():
        query, _, document, _, score, _ = line.split()
        found.setdefault(query, {})[document] = float(score)
    judged: dict[str, dict[str, int]] = {}
    for line in (place / "data/toy/qrels/test.tsv").read_text().splitlines()[1:]:
        query, document, grade = line.split("\t")
        judged.setdefault(query, {})[document] = int(grade)
    values = pytrec_eval.RelevanceEvaluator(judged, {key}, relevance_level=relevance).evaluate(found)
    return [values.get(f"q{n}", {}).get(key, 0.0) for n in range(8)]


def test_figures_are_those_of_trec_eval(place: Path, out: Path) -> None:
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "report.md", "toy", "toy-itself"]
    for folder, relevance in (("toy", 2), ("toy-itself", 1)):
        measured = read_per_query(out / folder / "report")
        assert list(measured.systems) == SYSTEMS
        for name, quality in measured.systems.items():
            run = out / folder / "runs" / name / "run.trec"
            for metric, key in (("nDCG@10", "ndcg_cut_10"), ("R@100", "recall_100")):
                expected = trec_eval(run, place, key, relevance)
                assert quality[metric].tolist() == pytest.approx(expected, abs=1e-9), (folder, name, metric)
    report = json.loads((out / "report.json").read_text())
    first, second, *rest = report["scores"]
    assert (first["metric"], second["metric"], rest) == ("MRR@10", "nDCG@10", [])  # no mean over different metrics
    assert first["scores"]["bm25"] == read_per_query(out / "toy" / "report").systems["bm25"]["MRR@10"].mean()


def test_lists_that_are_too_short_for_a_recall_are_marked(out: Path) -> None:
    found = json.loads((out / "report.json").read_text())["collections"][0]["systems"]
    # of 20 documents suites ask for 12, and the re-ranked lists have 5; the run has 9
    assert {name for name, record in found.items() if record["bounded"] == ["R@100"]} == set(SYSTEMS)
    line = next(line for line in (out / "report.md").read_text().splitlines() if "| reranker |" in line)
    assert line.endswith(f"{found['reranker']['means']['R@100']:.3f}† |")


def test_a_query_does_not_find_itself_where_the_rule_says_so(out: Path) -> None:
    for name in ("bm25", "encoder", "both", "student"):
        found = {}
        for folder in ("toy", "toy-itself"):
            lines = [line.split() for line in (out / folder / "runs" / name / "run.trec").read_text().splitlines()]
            found[folder] = [line[0] == line[2] for line in lines]
        assert sum(found["toy"]) == 8  # each query is a document, and finds itself
        assert sum(found["toy-itself"]) == 0
        if name == "encoder":
            assert len(found["toy-itself"]) == 8 * 12  # another result is in its place
    values = {folder: read_per_query(out / folder / "report") for folder in ("toy", "toy-itself")}
    assert values["toy-itself"].systems["bm25"]["nDCG@10"].mean() > values["toy"].systems["bm25"]["nDCG@10"].mean()


def test_a_student_is_the_model_in_its_folder(out: Path) -> None:
    # the exported encoder was made of the same weights: its vectors, and so its run, are torch's
    torch_run, served = (np.load(out / "toy" / "runs" / name / "rows.npy") for name in ("student", "served"))
    np.testing.assert_array_equal(torch_run, served)


def test_a_reranker_orders_what_it_is_given(out: Path) -> None:
    base, ranked = (np.load(out / "toy" / "runs" / name / "rows.npy") for name in ("bm25", "reranker"))
    for one, other in zip(base, ranked, strict=True):
        assert set(one[:5]) - {-1} == set(other) - {-1}
    assert (base[:, :5] != ranked[:, :5]).any()


def test_a_run_of_others_says_what_it_lacks(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    notes = report["collections"][0]["notes"]
    assert "theirs: 1 queries of the run are not judged, and left out" in notes
    assert "theirs: 1 judged queries are not in the run, and count 0" in notes
    assert all(note in (out / "report.md").read_text() for note in notes)


def made(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}


def test_what_is_finished_is_skipped(place: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = shutil.copytree(out, tmp_path / "again", copy_function=shutil.copy2)
    before = made(again)
    assert len(before) == 16
    for name in ("retrieve", "fill_scores", "fuse_hits", "compare"):
        monkeypatch.setattr(pipeline_suite, name, None)  # nothing is asked a second time
    run_suite(place / "mine.toml", again, place / "store")
    assert made(again) == before
    monkeypatch.undo()
    monkeypatch.setenv("RKD_DATA", str(place / "data"))
    changed = (
        (place / "mine.toml")
        .read_text()
        .replace('of = ["bm25", "encoder"]', 'of = ["bm25", "encoder"]\nshares = [1.0, 0.5]')
    )
    (place / "changed.toml").write_text(changed)
    run_suite(place / "changed.toml", again, place / "store")
    after = made(again)
    assert {name for name in before if after[name] != before[name]} == {
        f"{folder}/{what}/manifest.json" for folder in ("toy", "toy-itself") for what in ("runs/both", "report")
    }


def test_only_some_collections(place: Path, tmp_path: Path) -> None:
    report = run_suite(place / "mine.toml", tmp_path / "o", place / "store", only=["toy itself"])
    assert [one["collection"] for one in report["collections"]] == ["toy itself"]
    assert "Not measured, though in the suite: toy." in (tmp_path / "o" / "report.md").read_text()
    with pytest.raises(InputError, match="no such collection; did you mean 'toy'"):
        run_suite(place / "mine.toml", tmp_path / "o", place / "store", only=["toi"])


def test_check_compares_with_what_is_expected(place: Path, out: Path) -> None:
    found = json.loads((out / "report.json").read_text())["scores"][0]["scores"]["bm25"]
    expected = (
        '\n[[expected]]\ncollection = "toy"\nsystem = "bm25"\nscores = {{ "mrr_at_10" = {} }}\ntolerance = 0.01\n'
    )
    for off, code in ((0.009, 0), (-0.011, 1)):
        suite = place / "checked.toml"
        suite.write_text((place / "mine.toml").read_text() + expected.format(found + off))
        shown = CliRunner().invoke(
            cli.app, ["eval", str(suite), "--out", str(out), "--store", str(place / "store"), "--check"]
        )
        assert shown.exit_code == code, shown.output
        assert ("toy: bm25: MRR@10 is" in shown.output) == bool(code)
        report = (out / "report.md").read_text()
        assert ("**beyond**" in report) == bool(code)
    shown = CliRunner().invoke(cli.app, ["eval", str(place / "mine.toml"), "--check"])
    assert "has no [[expected]] to check" in str(shown.exception)


def test_compare_reads_reports_and_runs(place: Path, out: Path, tmp_path: Path) -> None:
    report, run = out / "toy" / "report", out / "toy" / "runs" / "encoder" / "run.trec"
    theirs = shutil.copy(run, tmp_path / "again.trec")
    files = [tmp_path / f"table.{suffix}" for suffix in ("md", "tex", "html", "json")]
    options = ["--collection", "toy", "--relevance", "2", "--metric", "recip_rank -M 10", "--listing", "1"]
    options += [word for file in files for word in ("--out", str(file))]
    shown = CliRunner().invoke(cli.app, ["compare", str(report), str(theirs), *options])
    assert shown.exit_code == 0, shown.output
    found = json.loads(files[3].read_text())
    assert list(found["systems"]["again"]["means"]) == ["nDCG@10", "MRR@10", "R@100", "R@1000", "MAP"]
    assert found["systems"]["again"]["means"]["MRR@10"] == found["systems"]["encoder"]["means"]["MRR@10"]
    pair = next(one for one in found["pairs"] if {one["first"], one["second"]} == {"again", "encoder"})
    assert (pair["p"], pair["ties"], pair["detectable"]) == (1.0, 8, None)
    for file in files[:3]:
        assert "reranker" in file.read_text()
    shown = CliRunner().invoke(cli.app, ["compare", str(theirs)])
    assert "say whose judgements measure it" in str(shown.exception)
    for files, options, message in (
        ([report], ["--split", "dev"], "give --collection too"),
        ([report], ["--collection", "toy", "--relevance", "2"], "these values are measured already"),
    ):
        shown = CliRunner().invoke(cli.app, ["compare", *map(str, files), *options])
        assert message in str(shown.exception)
    shown = CliRunner().invoke(cli.app, ["compare", str(report), "--collection", "toy", "--json", "--quiet"])
    assert "relevance" not in json.loads(shown.stdout.splitlines()[-1])  # of values from elsewhere it is not known
    shown = CliRunner().invoke(cli.app, ["compare", str(theirs), "--out", "x.pdf"])
    assert ".md, .tex, .html or .json" in str(shown.exception)


def test_parts_count_as_their_mean_and_bm25_stands_beside_what_is_published() -> None:
    known = registry()
    names = [*known["beir/cqadupstack"].parts, "beir/scifact"]
    text = 'collections = [{ name = "beir/cqadupstack" }, { name = "beir/scifact" }]\n'
    suite = Suite.model_validate(tomllib.loads(text + '[[systems]]\nname = "lexical"\nkind = "bm25"\n'))
    measured = []
    for number, name in enumerate(names):
        quality = {metric: np.full(4, value + number / 1000) for metric, value in known[name].bm25.items()}
        facts = {"collection": name, "name": name, "split": "test", "relevance": 1, "self_ids": False}
        measured.append({**compare(Measured(list("1234"), {"lexical": quality}), "nDCG@10", facts=facts), "notes": []})
    report = suite_report("name", suite, measured)
    parts, scifact, mean = report["scores"]
    published = [known[name].bm25["nDCG@10"] for name in names[:12]]
    assert parts["scores"]["lexical"] == pytest.approx(np.mean(published) + 5.5 / 1000)
    assert (parts["queries"], scifact["queries"], mean["queries"]) == (48, 4, None)
    assert mean["scores"]["lexical"] == pytest.approx((parts["scores"]["lexical"] + scifact["scores"]["lexical"]) / 2)
    beside = {one["collection"]: [line["within"] for line in one["published"]] for one in report["collections"]}
    assert beside["beir/cqadupstack/android"] == [True] * 3
    assert beside["beir/scifact"] == [False] * 3  # 0.012 more


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('of = ["bm25", "encoder"]', 'of = ["bm25", "encodr"]'), "uses 'encodr', which is no system before it; did"),
        (('rerank = "bm25"', 'rerank = "theirs"'), "'reranker' uses 'theirs', which is no system before it"),
        (('rerank = "bm25"\nrerank_depth = 5', ""), "cannot search a collection; say whose results it re-ranks"),
        (('label = "toy itself"', ""), "collections 'toy' and 'toy' have one file name; give one another label"),
        (('label = "toy itself"', 'label = "-toy"'), "collections 'toy' and '-toy' have one file name"),
        (
            ('of = ["bm25", "encoder"]', 'of = ["bm25", "encoder"]\nrerank = "bm25"'),
            "'both' of kind 'fusion' re-ranks nothing",
        ),
        (
            ('form = "fp32"', 'form = "fp32"\nrerank = "bm25"'),
            "the form fp32 encodes queries alone, and cannot re-rank",
        ),
        (('file = "theirs.trec"', 'file = "{collection}.trec"'), "no run of toy: .*toy.trec does not exist"),
        (('work = "work"', 'work = "works"'), "works holds no trained student; run its recipe first"),
        (('file = "theirs.trec"', 'fiel = "theirs.trec"'), "unknown key 'fiel'; did you mean 'file'"),
        (("max_length = 32", "max_lenght = 32"), "unknown key 'max_lenght'; did you mean 'max_length'"),
        (('name = "theirs"', 'name = "a b"'), "String should match"),
    ],
)
def test_mistakes(place: Path, out: Path, change: tuple[str, str], message: str) -> None:
    text = (place / "mine.toml").read_text()
    assert change[0] in text
    suite = place / "mistaken.toml"
    suite.write_text(text.replace(*change))
    with pytest.raises(InputError, match=message):
        run_suite(suite, out, place / "store")


def test_who_can_search_re_ranks_where_it_is_asked_to(place: Path, out: Path, tmp_path: Path) -> None:
    model = f'model = "{place}/model"'
    text = (place / "mine.toml").read_text().replace(model, f'{model}\nrerank = "bm25"\nrerank_depth = 4')
    (place / "reranking.toml").write_text(text)
    run_suite(place / "reranking.toml", tmp_path / "o", place / "store", only=["toy"])
    candidates, found, full = (
        load_hits(folder / "toy" / "runs" / name)
        for folder, name in ((out, "bm25"), (tmp_path / "o", "encoder"), (out, "encoder"))
    )
    assert found.rows.shape == (8, 4)
    for query in range(8):
        assert set(found.rows[query].tolist()) == set(candidates.rows[query, :4].tolist())
        searched = dict(zip(full.rows[query].tolist(), full.scores[query].tolist(), strict=True))
        scores = dict(zip(found.rows[query].tolist(), found.scores[query].tolist(), strict=True))
        assert {row: searched[row] for row in scores if row in searched} == pytest.approx(
            {row: score for row, score in scores.items() if row in searched}, abs=1e-5
        )
        assert (np.diff(found.scores[query]) <= 0).all()


@pytest.mark.parametrize(
    ("collection", "message"),
    [
        ("toi", "no collection 'toi' in the suite; did you mean 'toy'"),
        ("toy", "MAP is not measured on toy; add it to `metrics`"),
    ],
)
def test_what_cannot_be_expected_is_told_before_anything_is_measured(
    place: Path, tmp_path: Path, collection: str, message: str
) -> None:
    expected = f'\n[[expected]]\ncollection = "{collection}"\nsystem = "bm25"\nscores = {{ MAP = 0.5 }}\n'
    (place / "expecting.toml").write_text((place / "mine.toml").read_text() + expected)
    with pytest.raises(InputError, match=message):
        run_suite(place / "expecting.toml", tmp_path / "o", place / "store")
    assert not (tmp_path / "o").exists()


def test_a_collection_and_the_mean_that_it_is_part_of_are_not_both_measured(tmp_path: Path) -> None:
    names = ["beir/cqadupstack", "beir/cqadupstack/android"]
    (tmp_path / "both.toml").write_text(
        "".join(f'[[collections]]\nname = "{name}"\n' for name in names) + '[[systems]]\nname = "a"\nkind = "bm25"\n'
    )
    with pytest.raises(InputError, match="beir/cqadupstack/android is measured twice"):
        run_suite(tmp_path / "both.toml", tmp_path / "o")


def test_a_suite_is_told_from_a_recipe(place: Path) -> None:
    assert is_suite(place / "mine.toml")
    recipes = Path(cli.__file__).parent / "demo.toml"
    assert not is_suite(recipes)
    assert not is_suite(place / "absent.toml")
    for options in (["--only", "toy"], ["--check"]):
        shown = CliRunner().invoke(cli.app, ["eval", str(recipes), *options])
        assert "are for suites" in str(shown.exception)
    shown = CliRunner().invoke(cli.app, ["eval", str(place / "mine.toml"), "--set", "depth=1"])
    assert "are for recipes" in str(shown.exception)


SUITES = sorted((Path(__file__).parents[1] / "eval").glob("*.toml"))


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_the_suites_here_are_whole(path: Path) -> None:
    suite = load_suite(path)
    assert suite.systems[0].kind == "bm25"
    known = {one.title for one in suite.collections}
    assert {one.collection for one in suite.expected} <= known
