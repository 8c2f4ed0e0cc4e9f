"""A report is read back and compared with independent numbers."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from retrieval_kd import report
from retrieval_kd.evaluate.cost import Latency
from retrieval_kd.evaluate.significance import bootstrap_interval, holm, paired_test
from retrieval_kd.metrics import STANDARD
from retrieval_kd.report import System, summarise, systems_markdown, terminal_table, write_report
from retrieval_kd.types import Collection, Hits, InputError, Queries

COUNT = 30
QUERIES = Queries([f"q{n}" for n in range(COUNT)], ["text"] * COUNT, [{0: 1}] * COUNT)
COLLECTION = Collection("beir/tiny", [str(n) for n in range(2000)], [""] * 2000, {"test": QUERIES}, ["2 without text"])


def system(seed: int, name: str, engine: str, depth: int | None = None, **cost: object) -> System:
    generator = np.random.default_rng(seed)
    hits = Hits(np.zeros((COUNT, depth), np.int32), np.zeros((COUNT, depth), np.float32)) if depth else None
    return System(name, engine, {name: generator.random(COUNT) for name in STANDARD}, hits, **cost)


SYSTEMS = [
    system(0, "bm25", "bm25s", 1000, latency=Latency(0.314, 0.5, 99)),
    system(1, "teacher", "re-rank", 100),
    system(
        2,
        "student | int8",
        "onnx int8",
        1000,
        latency=Latency(12.34, 123.4, 99),
        parameters=22_713_216,
        bytes=22_900_000,
        index_bytes=1_536_000_000,
    ),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("report") / "new"
    facts = {"commit": "1a2b3c4", "recipe": Path("x.toml"), "stages": {"steps": 20}}
    return folder, write_report(folder, SYSTEMS, COLLECTION, "test", "bm25", facts)


def table(markdown: str) -> list[dict[str, str]]:
    rows = [line.replace("\\|", "\0") for line in markdown.splitlines() if line.startswith("|")]
    cells = [[cell.strip().replace("\0", "|") for cell in row.strip("|").split("|")] for row in rows]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def test_five_files_and_nothing_else(written: tuple[Path, dict]) -> None:
    assert sorted(file.name for file in written[0].iterdir()) == [
        "per_query.tsv",
        "quality_latency.png",
        "report.html",
        "report.json",
        "report.md",
    ]


def test_markdown_table_holds_the_means(written: tuple[Path, dict]) -> None:
    rows = table((written[0] / "report.md").read_text(encoding="utf-8"))
    assert [row["system"] for row in rows] == ["bm25", "teacher", "student | int8"]
    for row, one in zip(rows, SYSTEMS, strict=True):
        for metric in STANDARD:
            assert float(row[metric].rstrip("†")) == pytest.approx(sum(one.quality[metric]) / COUNT, abs=5.1e-4)
        low, high = (float(end) for end in row["95% interval"].split("\N{EN DASH}"))
        assert (low, high) == pytest.approx(bootstrap_interval(one.quality["nDCG@10"]), abs=5.1e-4)


def test_markdown_table_holds_tests_and_cost(written: tuple[Path, dict]) -> None:
    bm25, teacher, student = table((written[0] / "report.md").read_text(encoding="utf-8"))
    base = SYSTEMS[0].quality["nDCG@10"]
    adjusted = holm([paired_test(one.quality["nDCG@10"], base) for one in SYSTEMS[1:]])
    assert [bm25["Δ to bm25"], bm25["p (Holm)"]] == ["baseline", "\N{EN DASH}"]
    for row, one, p in zip((teacher, student), SYSTEMS[1:], adjusted, strict=True):
        assert float(row["Δ to bm25"]) == pytest.approx((one.quality["nDCG@10"] - base).mean(), abs=5.1e-4)
        assert float(row["p (Holm)"]) == pytest.approx(p, abs=5.1e-4)
    cost = ["query p50 ms", "p95 ms", "parameters", "MB", "index MB"]
    assert [student[name] for name in cost] == ["12.3", "123", "22.7 M", "22.9", "1,536"]
    assert [bm25[name] for name in cost] == ["0.314", "0.500"] + ["\N{EN DASH}"] * 3
    assert [teacher[name] for name in cost] == ["\N{EN DASH}"] * 5


def test_markdown_text(written: tuple[Path, dict]) -> None:
    text = (written[0] / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# beir/tiny, test: 30 queries, 2,000 documents\n")
    assert "paired randomisation test, two-sided, 10,000 rounds; correction: Holm; comparisons: 2; queries: 30." in text
    for line in ("- 2 without text", "- commit: 1a2b3c4", "- recipe: x.toml", "- stages: steps 20", "- processor: "):
        assert f"\n{line}" in text


def test_short_lists_have_a_footnote(written: tuple[Path, dict]) -> None:
    text = (written[0] / "report.md").read_text(encoding="utf-8")
    assert "† R@1000 of teacher is bounded by the depth of the lists, 100." in text
    rows = table(text)
    assert [row["R@1000"].endswith("†") for row in rows] == [False, True, False]
    assert not any(row["R@100"].endswith("†") for row in rows)


def test_a_list_of_every_document_is_not_bounded() -> None:
    short = [system(0, "all", "bm25s", 100), system(1, "half", "bm25s", 50)]
    records = summarise(short, "all", documents=100)
    assert [one["bounded"] for one in records.values()] == [[], ["R@100", "R@1000"]]
    assert summarise(short, "all")["all"]["bounded"] == ["R@1000"]  # the collection may be larger


def test_json_is_what_is_returned(written: tuple[Path, dict]) -> None:
    folder, returned = written
    stored = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert stored == returned
    assert (stored["collection"], stored["split"], stored["queries"]) == ("beir/tiny", "test", COUNT)
    assert stored["baseline"] == "bm25"
    assert stored["facts"] == {"commit": "1a2b3c4", "recipe": "x.toml", "stages": {"steps": 20}}
    assert stored["machine"]["versions"]["numpy"] == np.__version__
    bm25, teacher, student = stored["systems"].values()
    for record, one in zip((bm25, teacher, student), SYSTEMS, strict=True):
        for metric in STANDARD:
            assert record[metric] == pytest.approx(sum(one.quality[metric].tolist()) / COUNT, abs=1e-12)
    base = SYSTEMS[0].quality["nDCG@10"]
    assert teacher["p"] == paired_test(SYSTEMS[1].quality["nDCG@10"], base)
    assert [teacher["adjusted_p"], student["adjusted_p"]] == holm([teacher["p"], student["p"]])
    assert teacher["wins"] == int((SYSTEMS[1].quality["nDCG@10"] > base).sum())
    assert [bm25[key] for key in ("p", "adjusted_p", "difference", "parameters")] == [None] * 4
    assert [student[key] for key in ("query_p50_ms", "query_p95_ms")] == [12.34, 123.4]
    assert [student[key] for key in ("parameters", "bytes", "index_bytes")] == [22_713_216, 22_900_000, 1_536_000_000]


def test_the_table_can_be_made_again_from_the_json(written: tuple[Path, dict]) -> None:
    folder, _ = written
    stored = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert systems_markdown(stored["systems"], "bm25") in (folder / "report.md").read_text(encoding="utf-8")


def test_per_query_values_are_exact(written: tuple[Path, dict]) -> None:
    with (written[0] / "per_query.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == 3 * COUNT
    assert list(rows[0]) == ["query", "system", *STANDARD]
    for one in SYSTEMS:
        mine = [row for row in rows if row["system"] == one.name]
        assert [row["query"] for row in mine] == QUERIES.ids
        for metric in STANDARD:
            assert [float(row[metric]) for row in mine] == one.quality[metric].tolist()


def test_the_plot_is_a_picture(written: tuple[Path, dict]) -> None:
    from PIL import Image

    path = written[0] / "quality_latency.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(path) as image:
        image.load()
        assert min(image.size) > 500
        assert len(image.convert("RGB").getcolors(2**24)) > 50  # not blank


def test_the_plot_places_points_lines_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    place = report.place_labels
    monkeypatch.setattr(report, "place_labels", lambda axes, *rest: (place(axes, *rest), kept.append(axes)))
    crowd = [system(n, f"student number {n}", "torch fp32", 100, latency=Latency(2 + n / 10, 3, 9)) for n in range(6)]
    report._plot(tmp_path / "plot.png", summarise([*crowd, SYSTEMS[1]], "teacher"), "title")
    (axes,) = kept
    assert [note.get_text() for note in axes.texts] == [one.name for one in [*crowd, SYSTEMS[1]]]
    boxes = [note.get_window_extent() for note in axes.texts]
    assert not any(box.count_overlaps(boxes[:number]) for number, box in enumerate(boxes))
    assert axes.get_xscale() == "log"
    for one, bar in zip(crowd, axes.containers, strict=True):
        (x,), (y,) = bar.lines[0].get_data()
        (segment,) = bar.lines[2][0].get_segments()
        assert (x, y) == (one.latency.p50_ms, one.quality["nDCG@10"].mean())
        assert segment[:, 1].tolist() == pytest.approx(bootstrap_interval(one.quality["nDCG@10"]))
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [SYSTEMS[1].quality["nDCG@10"].mean()]


def test_a_report_without_latency(tmp_path: Path) -> None:
    written = write_report(tmp_path, [SYSTEMS[1]], COLLECTION, "test", "teacher", {})
    assert written["test"]["comparisons"] == 0
    assert "## Facts" not in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "quality_latency.png").stat().st_size > 0


def test_a_failed_file_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(tmp_path, SYSTEMS, COLLECTION, "test", "bm25", {})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(path: Path, *rest: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(report, "_plot", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, SYSTEMS[:2], COLLECTION, "test", "bm25", {})
    assert (tmp_path / "quality_latency.png").read_bytes() == before["quality_latency.png"]
    assert {file.name for file in tmp_path.iterdir()} == set(before)


def test_terminal_table_fits_120_columns() -> None:
    odd = system(5, "a [b]very[/b] long name of a system that has to be folded", "onnx int8", 10)
    text = io.StringIO()
    Console(file=text, width=120).print(terminal_table([*SYSTEMS, odd], "bm25", 2000))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 120
    assert not any("…" in line for line in lines)
    assert any(line.startswith("│ a [b]very[/b] long") for line in lines)  # names are not markup
    student = next(line for line in lines if "student" in line)
    for metric in STANDARD:
        assert f"{SYSTEMS[2].quality[metric].mean():.3f}" in student
    assert student.split()[-4:-1] == ["12.3", "│", "22.9"]
    assert "† R@1000 of teacher is bounded by the depth of the lists, 100." in text.getvalue()


@pytest.mark.parametrize(
    ("systems", "baseline", "message"),
    [
        (SYSTEMS, "bm52", "'bm52' is not among the systems: bm25, teacher"),
        ([], "bm25", "not among the systems: none"),
        ([SYSTEMS[0], SYSTEMS[0]], "bm25", "one name"),
        ([System("a", "b", {"MAP": np.zeros(COUNT)})], "a", "not measured by nDCG@10"),
        ([System("a", "b", {"nDCG@10": np.zeros(3)})], "a", "another number of queries than the 30"),
    ],
)
def test_refuses(systems: list[System], baseline: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_report(tmp_path, systems, COLLECTION, "test", baseline, {})
    assert not list(tmp_path.iterdir())
