"""Values of systems query by query: read back as they were written, joined by query, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retrieval_kd.evaluate import per_query
from retrieval_kd.evaluate.per_query import Measured, join, read_per_query, write_per_query
from retrieval_kd.types import InputError


def test_values_are_exact_and_metrics_may_differ(tmp_path: Path) -> None:
    ids, rng = ["q\t1", "q2", 'q"3'], np.random.default_rng(0)
    systems = {"a": {"nDCG@10": rng.random(3), "MAP": rng.random(3)}, "b|": {"nDCG@10": rng.random(3)}}
    write_per_query(tmp_path / "values.tsv", Measured(ids, systems))
    found = read_per_query(tmp_path / "values.tsv")
    assert list(found.query_ids) == ids
    assert {name: list(quality) for name, quality in found.systems.items()} == {
        "a": ["nDCG@10", "MAP"],
        "b|": ["nDCG@10"],
    }
    for name, quality in systems.items():
        for metric, values in quality.items():
            assert found.systems[name][metric].tolist() == values.tolist()


def test_a_failed_file_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, measured = tmp_path / "values.tsv", Measured(["q"], {"a": {"MAP": np.array([0.5])}})
    write_per_query(path, measured)
    before = path.read_bytes()

    def fail(value: float) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(per_query, "repr", fail, raising=False)
    with pytest.raises(OSError, match="disk full"):
        write_per_query(path, measured)
    assert (path.read_bytes(), len(list(tmp_path.iterdir()))) == (before, 1)


def write(path: Path, systems: dict[str, dict[str, list[float]]]) -> Path:
    lines = ["query\tsystem\tnDCG@10"]
    lines += [f"{q}\t{name}\t{value!r}" for name, of in systems.items() for q, value in of.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_per_query_values_are_read_and_joined(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    write(tmp_path / "r" / "per_query.tsv", {"bm25": {"q1": 0.25, "q2": 1.0}})
    other = write(tmp_path / "b.tsv", {"bm25": {"q2": 0.5, "q1": 0.0}, "x": {"q2": 1.0, "q1": 0.75}})
    parts = {"r": read_per_query(tmp_path / "r"), "b.tsv": read_per_query(other)}
    both = join(parts)
    assert list(both.query_ids) == ["q1", "q2"]
    assert {name: each["nDCG@10"].tolist() for name, each in both.systems.items()} == {
        "r: bm25": [0.25, 1.0],
        "b.tsv: bm25": [0.0, 0.5],
        "x": [0.75, 1.0],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tb\n", "expected the columns query, system"),
        ("query\tsystem\tMAP\nq\tx\n", ":2: 2 columns, the first line has 3"),
        ("query\tsystem\tMAP\nq\tx\t1\nq\tx\t1\n", "occurs a second time"),
        ("query\tsystem\tMAP\nq\tx\t1\nr\ty\t1\n", "'y' has values of other queries"),
        ("query\tsystem\tMAP\nq\tx\tone\n", "could not convert"),
        ("query\tsystem\tMAP\n", "holds no values"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.tsv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_per_query(tmp_path / "p.tsv")


def test_other_queries_are_refused(tmp_path: Path) -> None:
    one, two = (read_per_query(write(tmp_path / f"{q}.tsv", {"x": {q: 1.0}})) for q in ("q1", "q2"))
    with pytest.raises(InputError, match="two and one are of other queries"):
        join({"one": one, "two": two})
