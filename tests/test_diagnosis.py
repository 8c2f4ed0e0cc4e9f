"""`rkd scores stats` over stores: joined with a split, against numpy, trec_eval and scipy; what is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytrec_eval
from click.testing import Result
from meanwhile import compact_once_listed
from scipy.stats import kendalltau, mannwhitneyu
from toy import write_beir
from typer.testing import CliRunner

from retrieval_kd import cli
from retrieval_kd.pipeline import diagnosis
from retrieval_kd.pipeline.diagnosis import Judge, diagnose
from retrieval_kd.progress import console
from retrieval_kd.store.keys import text_keys
from retrieval_kd.store.store import Store
from retrieval_kd.types import Collection, InputError, Queries

DOCUMENTS, QUERIES = 60, 12
TEXTS = [f"text {n}" for n in range(DOCUMENTS)]
PROMPTS = {"ce": ("", ""), "bi": ("query: ", "document: ")}


@pytest.fixture(autouse=True)
def _quiet_again() -> Any:
    yield
    console.quiet = False


@pytest.fixture
def collection() -> Collection:
    rng = np.random.default_rng(3)
    qrels = [
        {int(row): int(grade) for row, grade in zip(rng.permutation(DOCUMENTS)[:9], rng.integers(0, 3, 9), strict=True)}
        for _ in range(QUERIES)
    ]
    train = Queries([f"q{n}" for n in range(QUERIES)], [f"query {n}" for n in range(QUERIES)], qrels)
    return Collection("toy", [f"d{n}" for n in range(DOCUMENTS)], TEXTS, {"train": train, "dev": Queries(["x"], ["y"])})


@pytest.fixture
def grids(collection: Collection) -> dict[str, np.ndarray]:
    """Scores (Q, N) of two teachers; NaN where none is stored. The second is noisier and rounded; both miss some."""
    rng = np.random.default_rng(4)
    qrels = collection.splits["train"].qrels
    truth = np.array([[grades.get(row, 0) for row in range(DOCUMENTS)] for grades in qrels], float)
    ce = (truth + rng.normal(size=truth.shape)).astype(np.float32)
    bi = np.round(ce + rng.normal(size=truth.shape), 1).astype(np.float32)
    ce[rng.random(ce.shape) < 0.3] = np.nan
    bi[rng.random(bi.shape) < 0.5] = np.nan
    ce[7], bi[9] = np.nan, np.nan  # each has no score of one query
    return {"ce": ce, "bi": bi}


@pytest.fixture
def judges(tmp_path: Path, collection: Collection, grids: dict[str, np.ndarray]) -> dict[str, Judge]:
    """The stores of the teachers: parts that overlap, answers that are none, and texts of elsewhere."""
    found = {}
    for name, (before_query, before_document) in PROMPTS.items():
        store = Store.open(tmp_path / "store", name, {"kind": name})
        queries = text_keys([before_query + text for text in collection.splits["train"].texts])
        documents = text_keys([before_document + text for text in TEXTS])
        q, d = np.nonzero(np.isfinite(grids[name]))
        values = grids[name][q, d]
        half = len(q) // 2
        for some in (slice(0, half + 20), slice(half - 20, None)):  # 40 pairs stand twice, once higher
            extra = np.float32(some.start == 0) * np.float32(0.5) * (np.arange(len(q))[some] >= half - 20)
            store.append_scores(queries[q[some]], documents[d[some]], values[some] + extra)
        store.append_scores(queries[[7, 7]], documents[[0, 1]], np.full(2, np.nan, np.float32))  # asked in vain
        store.append_scores(text_keys(["elsewhere"]), documents[:1], np.full(1, 99, np.float32))
        if name == "ce":  # which has read prompts at another time
            prompted = text_keys(["query: query 1", "query 1"]), text_keys(["text 1", "document: text 1"])
            store.append_scores(*prompted, np.full(2, -99, np.float32))
        found[name] = Judge(store, before_query, before_document)
    return found


@pytest.mark.parametrize("read", [2**17, 50])  # all at once, and lists cut by the borders of what is read
def test_a_split_against_each_query_by_itself(
    collection: Collection,
    grids: dict[str, np.ndarray],
    judges: dict[str, Judge],
    monkeypatch: pytest.MonkeyPatch,
    read: int,
) -> None:
    monkeypatch.setattr(diagnosis, "READ", read)
    found = diagnose(list(judges.values()), collection, "train")
    qrels = collection.splits["train"].qrels
    relevant = np.array([[grades.get(row, 0) > 0 for row in range(DOCUMENTS)] for grades in qrels])
    judged = np.array([[row in grades for row in range(DOCUMENTS)] for grades in qrels])
    assert list(found.teachers) == ["ce", "bi"]
    for name, grid in grids.items():
        stats, known = found.teachers[name], np.isfinite(grid)
        in_vain = 2  # bi was given a NaN beside nothing; ce likewise
        if name == "bi":
            in_vain = int((~known[7, :2]).sum())  # of pairs with an answer too, the answer counts
        assert (stats.pairs, stats.answered) == (known.sum() + in_vain, known.sum())
        assert (stats.queries, stats.coverage) == (QUERIES - 1, (QUERIES - 1) / QUERIES)
        sizes = [row.sum() for row in known if row.any()]
        assert (stats.documents_min, stats.documents_max) == (min(sizes), max(sizes))
        assert stats.documents_median == np.median(sizes)
        assert (stats.min, stats.max) == (np.nanmin(grid), np.nanmax(grid))
        assert stats.mean == pytest.approx(np.nanmean(grid.astype(float)))
        assert stats.std == pytest.approx(np.nanstd(grid.astype(float)))
        assert (stats.relevant, stats.relevant_scored) == (relevant.sum(), (relevant & known).sum())
        counts = [(relevant & known).sum(), (judged & ~relevant & known).sum(), (~judged & known).sum()]
        assert found.counts[name].sum(1).tolist() == counts
        chances, margins, run = [], [], {}
        for query in range(QUERIES):
            good, bad = (grid[query][known[query] & mark] for mark in (relevant[query], ~relevant[query]))
            if len(good) and len(bad):
                chances.append(mannwhitneyu(good, bad).statistic / (len(good) * len(bad)))
                margins.append(good.astype(float).mean() - bad.astype(float).mean())
            if known[query].any():
                run[f"q{query}"] = {f"d{row}": float(grid[query, row]) for row in np.flatnonzero(known[query])}
        assert stats.auc == pytest.approx(np.mean(chances))
        assert stats.margin == pytest.approx(np.mean(margins))
        graded = {f"q{n}": {f"d{row}": grade for row, grade in grades.items()} for n, grades in enumerate(qrels)}
        values = pytrec_eval.RelevanceEvaluator(graded, {"ndcg_cut_10"}).evaluate(run)
        assert stats.ndcg == pytest.approx(np.mean([value["ndcg_cut_10"] for value in values.values()]))
    (agreement,) = found.agreements
    both = np.isfinite(grids["ce"]) & np.isfinite(grids["bi"])
    taus = [
        kendalltau(grids["ce"][query][shared], grids["bi"][query][shared]).statistic
        for query, shared in enumerate(both)
        if shared.sum() > 1
    ]
    assert (agreement.teachers, agreement.pairs) == (("ce", "bi"), both.sum())
    assert agreement.kendall_tau == pytest.approx(np.mean(taus))
    overlaps = []
    for query, shared in enumerate(both):
        if shared.sum() > 10:
            one, two = (np.argsort(-grids[name][query][shared], kind="stable")[:10] for name in ("ce", "bi"))
            overlaps.append(len({*one.tolist()} & {*two.tolist()}) / 10)
    assert agreement.overlap == pytest.approx(np.mean(overlaps))
    assert any("8.3% of the split's queries have no score" in word for word in found.advice)


def test_without_a_collection_everything_stored_counts(
    judges: dict[str, Judge], grids: dict[str, np.ndarray], tmp_path: Path
) -> None:
    found = diagnose([judges["ce"]])
    stats = found.teachers["ce"]
    assert (stats.answered, stats.pairs) == (np.isfinite(grids["ce"]).sum() + 3, np.isfinite(grids["ce"]).sum() + 5)
    assert (stats.max, stats.coverage, stats.auc, stats.ndcg, stats.relevant) == (99, None, None, None, None)
    other = Store.open(tmp_path / "more", "ce", {"kind": "another"})
    pairs = np.arange(4, dtype=np.uint64)
    other.append_scores(pairs, pairs, np.arange(4, dtype=np.float32))
    two = diagnose([judges["ce"], Judge(other)])
    assert list(two.teachers) == [judges["ce"].store.folder.name, other.folder.name]  # two are called ce
    assert two.agreements[0].pairs == 0
    assert two.advice[-1].endswith("have no scored pair in common.")


def test_nothing_to_sum_up_is_an_error_and_a_silent_teacher_is_told(
    judges: dict[str, Judge], collection: Collection
) -> None:
    unprompted = Judge(judges["bi"].store)
    with pytest.raises(InputError, match=r"no score of split 'train' of 'toy' in \S+bi-\w+; .*--query-prompt"):
        diagnose([unprompted], collection, "train")
    found = diagnose([judges["ce"], unprompted], collection, "train")
    assert (list(found.teachers), found.silent) == (["ce"], ["bi"])
    assert found.advice[0] == "bi: no score here; if it reads prompts before the texts, give them."
    with pytest.raises(InputError, match="a teacher is given twice"):
        diagnose([unprompted, judges["bi"]], collection, "train")
    in_vain = Store.open(judges["ce"].store.folder.parent, "mute", {"kind": "mute"})
    in_vain.append_scores(*(np.zeros(1, np.uint64) for _ in range(2)), np.full(1, np.nan, np.float32))
    with pytest.raises(InputError, match="no score in"):
        diagnose([Judge(in_vain)])


def test_stores_are_compacted_meanwhile(
    judges: dict[str, Judge], collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts of one go between their listing and their reading."""
    expected = diagnose(list(judges.values()), collection)
    left = compact_once_listed(judges["bi"].store, monkeypatch)
    found = diagnose(list(judges.values()), collection)
    assert "scores" not in left
    assert found.facts() == expected.facts()
    np.testing.assert_array_equal(found.counts["bi"], expected.counts["bi"])


def test_a_torn_part_names_the_remedy(judges: dict[str, Judge]) -> None:
    part = judges["ce"].store.parts("scores")[0]
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(InputError, match="run `rkd scores verify`"):
        diagnose([judges["ce"]])


@pytest.fixture
def folder(tmp_path: Path, collection: Collection, judges: dict[str, Judge]) -> Path:
    """The collection as a BEIR folder beside the stores."""
    train = collection.splits["train"]
    write_beir(tmp_path / "toy", TEXTS, train.texts, {"train": dict(enumerate(train.qrels))})
    return tmp_path


def rkd(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["scores", "stats", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_command(folder: Path, judges: dict[str, Judge]) -> None:
    target = ["--collection", folder / "toy", "--split", "train"]
    ce, bi = (judges[name].store.folder for name in ("ce", "bi"))
    given = [ce, bi, *target, "--query-prompt", "", "--query-prompt", "query: "]
    given += ["--document-prompt", "", "--document-prompt", "document: "]
    done = rkd(*given, "--json", "--plot", folder / "stats.png")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == ["teachers", "agreements", "silent", "advice", "plot"]
    assert found["teachers"]["ce"]["queries"] == QUERIES - 1
    assert found["agreements"][0]["teachers"] == ["ce", "bi"]
    assert (folder / "stats.png").read_bytes().startswith(b"\x89PNG")
    shown = rkd(*given).stdout
    for word in ("suggested teacher_temperature", "AUC", "nDCG@10", "Kendall's tau", "ce / bi", "have no score"):
        assert word in shown
    assert "AUC" not in rkd(ce).stdout  # nothing is known of relevance
    alone = rkd(ce, "--json", "--plot", folder / "one.png")
    assert json.loads(alone.stdout)["agreements"] == []
    assert (folder / "one.png").stat().st_size > 10_000
    root = json.loads(rkd(folder / "store", *target, "--json").stdout)
    assert (list(root["teachers"]), root["silent"]) == (["ce"], ["bi"])
    for wrong, message in (
        ([ce, "--split", "dev"], "give --collection too"),
        ([ce, *target, "--query-prompt", "a", "--query-prompt", "b"], "2 prompts for 1 teachers"),
        ([folder / "none"], "is no folder of teacher scores"),
        ([folder / "toy"], "no teacher"),
    ):
        with pytest.raises(InputError, match=message):
            raise rkd(*wrong).exception or AssertionError
