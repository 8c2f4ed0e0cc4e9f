"""Every layout: as published, written and read again, packed, and with mistakes in it."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from published import MALFORMED, PUBLISHED

from retrieval_kd.layouts import Record, find_writer, read_records
from retrieval_kd.tables import kind_module, kinds
from retrieval_kd.types import InputError

NAMES = [f"{layout}-{name}" for layout, name, _, _ in PUBLISHED]
WRITTEN = [layout for layout in kinds("layouts") if hasattr(kind_module("layouts", layout), "write")]


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_every_layout_has_an_example_here() -> None:
    assert {layout for layout, *_ in PUBLISHED} | {"rankgpt"} == set(kinds("layouts"))
    for layout in kinds("layouts"):
        assert isinstance(kind_module("layouts", layout).FORM, str)


@pytest.mark.parametrize(("layout", "name", "content", "records"), PUBLISHED, ids=NAMES)
def test_as_published(tmp_path: Path, layout: str, name: str, content: str | bytes, records: list[Record]) -> None:
    path = put(tmp_path, name, content)
    found = list(read_records(layout, path))
    assert found == records
    assert all(record.where.startswith(f"{path}:") for record in found)


@pytest.mark.parametrize(("layout", "name", "content", "records"), PUBLISHED, ids=NAMES)
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed(
    tmp_path: Path, layout: str, name: str, content: str | bytes, records: list[Record], suffix: str
) -> None:
    if name.endswith(".parquet"):
        pytest.skip("Parquet packs its columns itself")
    raw = content if isinstance(content, bytes) else content.encode()
    if suffix == ".gz":
        path = put(tmp_path, name + suffix, gzip.compress(raw[:9]) + gzip.compress(raw[9:]))  # two members, as pigz
    else:
        path = tmp_path / (name + suffix)
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(raw)
    assert list(read_records(layout, path)) == records


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_torn_packed_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"run.trec{suffix}"
    lines = "".join(f"q{n} Q0 d{n * 7919 % 1009} 1 {n / 3} x\n" for n in range(5000))
    with pa.output_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}[suffix]) as stream:
        stream.write(lines.encode())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cannot be unpacked: .*fetch or make it again") as error:
        list(read_records("trec", path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("layout", WRITTEN)
def test_written_and_read_again(tmp_path: Path, layout: str, suffix: str) -> None:
    """Each published example goes through the writer and comes back as it was."""
    examples = [records for other, _, _, records in PUBLISHED if other == layout]
    if layout == "pairs" and suffix:
        pytest.skip("Parquet packs its columns itself")
    name = "again.parquet" if layout == "pairs" else f"again{suffix}"
    for number, records in enumerate(examples):
        whole = [record for record in records if needed(layout, record)]
        assert whole
        path = tmp_path / str(number) / name
        find_writer(layout)(path, whole)
        assert list(read_records(layout, path)) == whole
        assert [file.name for file in path.parent.iterdir()] == [name]  # no scratch left


def needed(layout: str, record: Record) -> bool:
    """Whether a record has what the layout's writer needs."""
    without_scores = {"hard_negatives", "tevatron", "flag_embedding", "prod", "lead", "syntriever", "msmarco_run"}
    return record.scores is not None or layout in without_scores


@pytest.mark.parametrize(("layout", "line", "message"), MALFORMED, ids=[f"{m[0]}-{m[2]}" for m in MALFORMED])
def test_a_malformed_line_is_named(tmp_path: Path, layout: str, line: str, message: str) -> None:
    """After a good line, so that the number counts; with what was expected."""
    by_line = [content for other, _, content, _ in PUBLISHED if other == layout and str(content).endswith("\n")]
    good = str(by_line[-1]) if by_line else ""
    path = put(tmp_path, "file.jsonl", f"{good}\n{line}\n")
    with pytest.raises(InputError) as error:
        list(read_records(layout, path))
    form = kind_module("layouts", layout).FORM.replace("\t", "<tab>")
    number = len(good.splitlines()) + 2  # a blank line counts
    assert str(error.value).startswith(f"{path}:{number}: ")
    assert message in str(error.value)
    assert str(error.value).endswith(f"; expected {form}")


def test_blank_lines_count_and_are_left_out(tmp_path: Path) -> None:
    path = put(tmp_path, "run", "q Q0 d 1 1 x\r\n\n  \nq Q0 e 2\n")
    with pytest.raises(InputError, match=r"run:4: 4 fields"):
        list(read_records("trec", path))


def test_ranks_decide_whatever_the_order_of_lines(tmp_path: Path) -> None:
    path = put(tmp_path, "run", "1\t7\t2\n1\t8\t1\n1\t9\t11\n")
    assert next(read_records("msmarco_run", path)).ranking == [1, 0, 2]


def test_what_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = put(tmp_path, "queries.tsv", "1\tgrün\n".encode() + "2\tgrün\n".encode("latin1"))
    with pytest.raises(InputError, match=r"queries.tsv:2: not UTF-8"):
        list(read_records("msmarco_queries", path))


@pytest.mark.parametrize(
    ("layout", "content", "message"),
    [
        ("splade_json", "[1]", r"\[1\] is not an object"),
        ("splade_json", '{"1": [2]}', r"query '1': \[2\] is not an object"),
        ("splade_json", '{"1": {"2": "x"}}', r"query '1': 'x' is not a finite number"),
        ("splade_json", '{"1": {"2": 1}', "not JSON"),
        ("opensearch_scores", '{"1": {"doc_id": ["2"]}}', r"query '1': scores None for 1 documents"),
        ("opensearch_scores", '{"1": {"score": [2]}}', r"query '1': there is no 'doc_id'"),
        ("prod", '[{"query_id": "1"}]', "item 1: there is no 'pos_id'"),
        ("fid", "3", "3 is not a list"),
        ("lead", "[3]", "item 1: 3 is not an object"),
        ("rankllm", "", "not JSON"),
    ],
)
def test_a_malformed_whole_file(tmp_path: Path, layout: str, content: str, message: str) -> None:
    path = put(tmp_path, "file.json", content)
    with pytest.raises(InputError, match=message) as error:
        list(read_records(layout, path))
    assert str(path) in str(error.value)


def test_parquet_without_a_column_and_no_parquet(tmp_path: Path) -> None:
    content = next(content for layout, name, content, _ in PUBLISHED if layout == "rank_distillm")
    with pytest.raises(InputError, match=r"row 1: .* lacks a column; expected rows with query_id"):
        list(read_records("pairs", put(tmp_path, "a.parquet", content)))
    with pytest.raises(InputError, match=r"b.parquet cannot be read"):
        list(read_records("pairs", put(tmp_path, "b.parquet", content[:-20])))


class Command:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("layout", ["score_pickle", "d2llm"])
@pytest.mark.parametrize("where", ["value", "key", "whole"])
def test_a_pickle_that_runs_something_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = Command()
    content = {"value": {1: {2: bad}}, "key": {bad: {2: 1.0}}, "whole": bad}[where]
    path = put(tmp_path, "scores.pkl.gz", gzip.compress(pickle.dumps(content)))
    with pytest.raises(InputError, match=r"asks for (posix|os|nt)\.system, which could run anything"):
        list(read_records(layout, path))
    assert not Path("harmed").exists()
    pickle.loads(pickle.dumps(bad))  # the pickle does what the layout refuses
    assert Path("harmed").exists()


@pytest.mark.parametrize("callable_", [eval, exec, getattr, bytearray, __import__])
def test_other_builtins_are_refused_too(tmp_path: Path, callable_: object) -> None:
    path = put(tmp_path, "scores.pkl", pickle.dumps({1: callable_}))
    with pytest.raises(InputError, match=r"asks for (builtins|io)\."):
        list(read_records("score_pickle", path))


def test_plain_types_by_name_are_read(tmp_path: Path) -> None:
    path = put(tmp_path, "scores.pkl", b"cbuiltins\ndict\n)R.")  # dict()
    assert list(read_records("score_pickle", path)) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([1]), r"\[1\] is not an object"),
        (pickle.dumps({1: 2.0}), "query 1: 2.0 is not a dictionary"),
        (pickle.dumps({1: {2: "x"}}), "query 1: 'x' is not a finite number"),
        (pickle.dumps({1: {2.5: 1.0}}), "query 1: 2.5 is not an id"),
        (pickle.dumps({1: {2: 1.0}})[:-4], "not a pickle of plain values"),
        (b"no pickle", "not a pickle of plain values"),
    ],
)
def test_a_malformed_pickle(tmp_path: Path, content: bytes, message: str) -> None:
    path = put(tmp_path, "scores.pkl", content)
    with pytest.raises(InputError, match=message):
        list(read_records("score_pickle", path))


def test_a_malformed_pickle_of_logits(tmp_path: Path) -> None:
    for value in ({"q": [("d", [1.0])]}, {"q": [("d", 1.0)]}, {"q": "d"}, {"q": [(1, [1.0, 2.0])]}):
        with pytest.raises(InputError, match="query 'q': "):
            list(read_records("d2llm", put(tmp_path, "a.pkl", pickle.dumps(value))))


RANKGPT = '{"query": "why", "positive_passages": [], "retrieved_passages": [%s]}\n'
RETRIEVED = ", ".join(f'{{"docid": "{n}", "text": "t{n}"}}' for n in range(3))


def test_rankgpt_is_two_files(tmp_path: Path) -> None:
    beside = put(tmp_path, "train.jsonl", RANKGPT % RETRIEVED * 4)
    answers = ["[3] > [1] > [2]", "[2]>[2]>[9]", "I cannot rank these.", "[1] > [2] > [3]"]
    path = put(tmp_path, "gpt3.5.json", json.dumps(answers))
    found = list(read_records("rankgpt", path, beside))
    # the third refuses: no order, rather than the incoming one
    assert [record.ranking for record in found] == [[2, 0, 1], [1, 0, 2], None, [0, 1, 2]]
    assert found[0] == Record(None, "why", ["0", "1", "2"], ["t0", "t1", "t2"], ranking=[2, 0, 1])
    with pytest.raises(InputError, match="layout 'rankgpt' is two files"):
        list(read_records("rankgpt", path))
    with pytest.raises(InputError, match="layout 'trec' is one file"):
        list(read_records("trec", path, beside))
    for count, message in ((3, "has 3 answers and .* more lines"), (5, "has 5 answers and .* 4 lines")):
        put(tmp_path, "gpt3.5.json", json.dumps((answers * 2)[:count]))
        with pytest.raises(InputError, match=message):
            list(read_records("rankgpt", path, beside))
    put(tmp_path, "gpt3.5.json", json.dumps([1, *answers[1:]]))
    with pytest.raises(InputError, match="answer 1: 1 is not a text"):
        list(read_records("rankgpt", path, beside))


SCORED = Record("q", "a query", ["b", "a", "c"], ["B", "A", "C"], [0.5, 2.0, 1.0], [False, True, False])


@pytest.mark.parametrize("layout", WRITTEN)
def test_positives_are_kept_apart_whatever_their_score(tmp_path: Path, layout: str) -> None:
    """A record as the store gives it, with ids, texts, scores, labels: what comes back has the same marks."""
    path = tmp_path / ("out.parquet" if layout == "pairs" else "out")
    preferring = replace(SCORED, preferences=[(1, 0, 0.75), (0, 2, 0.25)])
    find_writer(layout)(path, [preferring])
    scores, marks, preferred = {}, {}, set()
    records = list(read_records(layout, path))
    assert records
    for record in records:
        names = record.document_ids or [text.lower() for text in record.documents or []]
        assert (record.query_id or record.query) in ("q", "a query")
        scores |= dict(zip(names, record.scores or [], strict=False))
        for name, mark in zip(names, record.positive or [], strict=False):
            marks[name] = mark
        preferred |= {(names[i], names[j]) if p > 0.5 else (names[j], names[i]) for i, j, p in record.preferences or []}
    if layout not in ("prod", "lead", "syntriever", "msmarco_run"):
        assert scores == {"a": 2.0, "b": 0.5, "c": 1.0}
    if getattr(kind_module("layouts", layout), "NEEDS_POSITIVE", False):
        assert marks == {"a": True, "b": False, "c": False}
        with pytest.raises(InputError, match="needs a positive, which query 'q' lacks"):
            find_writer(layout)(path, [replace(preferring, positive=None)])
    if layout in ("pairdistill", "syntriever"):
        assert preferred == {("a", "b"), ("c", "b")}


def test_runs_go_by_score_and_pairdistill_keeps_its_places(tmp_path: Path) -> None:
    find_writer("trec")(tmp_path / "run", [SCORED])
    expected = ["q Q0 a 1 2.0 rkd", "q Q0 c 2 1.0 rkd", "q Q0 b 3 0.5 rkd"]
    assert (tmp_path / "run").read_text().splitlines() == expected
    find_writer("msmarco_run")(tmp_path / "run", [SCORED, replace(SCORED, ranking=[0, 1, 2])])
    expected = ["q\ta\t1", "q\tc\t2", "q\tb\t3", "q\tb\t1", "q\ta\t2", "q\tc\t3"]
    assert (tmp_path / "run").read_text().splitlines() == expected
    find_writer("pairdistill")(tmp_path / "run", [replace(SCORED, preferences=[(0, 1, 0.0)])])
    (line,) = (tmp_path / "run").read_text().splitlines()
    assert json.loads(line)[3] == ["b", 0.5, [[0, pytest.approx(-87.3365)]]]


def test_numeric_ids_stay_numbers_and_no_zero_is_lost(tmp_path: Path) -> None:
    ids = ["7", "007", "٣", "x", "-1", "0"]
    record = Record("12", None, ids, None, [float(n) for n in range(6)], [True] + [False] * 5)
    find_writer("colbert")(tmp_path / "out", [record])
    assert [item[0] for item in json.loads((tmp_path / "out").read_text())[1:]] == [7, "007", "٣", "x", "-1", 0]
    assert list(read_records("colbert", tmp_path / "out")) == [record]


@pytest.mark.parametrize(
    ("layout", "record", "message"),
    [
        ("margin_mse_texts", replace(SCORED, documents=["B\tb", "A", "C"]), "a tab or a line break"),
        ("margin_mse_texts", replace(SCORED, query=None), "needs texts"),
        ("trec", replace(SCORED, document_ids=["b b", "a", "c"]), "cannot hold the id 'b b'"),
        ("trec", replace(SCORED, scores=None), "needs a score of every document, which query 'q' lacks"),
        ("colbert", replace(SCORED, document_ids=None), "needs ids"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(tmp_path: Path, layout: str, record: Record, message: str) -> None:
    (tmp_path / "out").write_text("old")
    with pytest.raises(InputError, match=message):
        find_writer(layout)(tmp_path / "out", [SCORED, record])
    assert (tmp_path / "out").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_unknown_layouts_and_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'trec'"):
        list(read_records("trek", tmp_path))
    with pytest.raises(InputError, match=r"none\.trec does not exist"):
        list(read_records("trec", tmp_path / "none.trec"))
    with pytest.raises(InputError, match="layout 'd2llm' is only read, never written; written are colbert, "):
        find_writer("d2llm")


def test_lines_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    """The first record comes before the rest of the file is looked at."""
    path = put(tmp_path, "run.tsv", "8.5\t1\tq\ta\tb\n" + "broken\n")
    records = read_records("margin_mse", path)
    assert next(records).query_id == "q"
    with pytest.raises(InputError, match=r"run.tsv:2"):
        next(records)
