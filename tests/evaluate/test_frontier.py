"""The Pareto front and the waterfall, against numbers by hand and against the definitions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrieval_kd.evaluate.frontier import DEEP, MeasuredPoint, pareto, waterfall, write_frontier
from retrieval_kd.evaluate.significance import paired_test
from retrieval_kd.metrics import PRIMARY
from retrieval_kd.report import System
from retrieval_kd.types import Collection, Hits, Queries

COUNT = 25
QUERIES = Queries([f"q{n}" for n in range(COUNT)], ["text"] * COUNT, [{0: 1}] * COUNT)
COLLECTION = Collection("tiny", ["a", "b"], ["one", "two"], {"test": QUERIES})


def test_the_front_by_hand() -> None:
    costs, values = [1, 2, 2, 3, 4, 1], [0.5, 0.6, 0.4, 0.6, 0.7, 0.5]
    assert pareto(costs, values) == [True, True, False, False, True, True]  # equal points do not beat each other
    assert pareto([], []) == []


def test_the_front_is_what_no_point_beats() -> None:
    rng = np.random.default_rng(0)
    costs, values = rng.integers(0, 6, (2, 40)).astype(float)
    front = pareto(costs.tolist(), values.tolist())
    best = {cost: values[costs <= cost].max() for cost in costs}
    first = {value: costs[values >= value].min() for value in values}
    assert front == [values[n] == best[costs[n]] and costs[n] == first[values[n]] for n in range(40)]


def test_a_waterfall_is_of_paired_differences() -> None:
    rng = np.random.default_rng(0)
    first = rng.random(200)
    second, third = first - 0.05 + rng.normal(0, 0.01, 200), first
    found = waterfall([("teacher", first), ("student", second), ("again", third)])
    assert [step["name"] for step in found] == ["teacher", "student", "again"]
    assert "difference" not in found[0]
    assert found[1]["difference"] == pytest.approx((second - first).mean())
    low, high = found[1]["difference_interval"]
    assert low < found[1]["difference"] < high
    assert high - low < 0.005  # paired: the queries' own spread, 0.29, does not count
    error = 1.96 * (second - first).std() / np.sqrt(200)
    assert (high - low) / 2 == pytest.approx(error, rel=0.1)
    assert found[1]["p"] == paired_test(second, first)
    assert sum(step.get("difference", 0) for step in found) == pytest.approx(found[2]["value"] - found[0]["value"])


def point(seed: int, name: str, encode: float, search: float, megabytes: float, **facts: Any) -> MeasuredPoint:
    rng = np.random.default_rng(seed)
    hits = Hits(np.zeros((COUNT, 1), np.int32), np.ones((COUNT, 1), np.float32))
    system = System(name, "onnx int8", {PRIMARY: rng.random(COUNT), DEEP: rng.random(COUNT)}, hits)
    times = {f"{what}_{key}_ms": value for what, value in (("encode", encode), ("search", search)) for key in KEYS}
    index = {"index_bytes": int(megabytes * 1e6), "build_seconds": 1.25}
    peaks = {"build_peak_bytes": 120e6, "search_peak_bytes": 90e6, "machine": {"processor": "x"}}
    return MeasuredPoint(system, "Flat", {**times, **index, **peaks, **facts}, 2_000_000)


KEYS = ("p50", "p95", "p99")
POINTS = [point(0, "flat", 1.0, 0.5, 8), point(1, "hnsw", 1.0, 0.05, 10), point(2, "pq", 1.0, 0.04, 0.5)]


def test_the_report_is_written_and_read_back(tmp_path: Path) -> None:
    values = {one.system.name: one.system.quality[PRIMARY] for one in POINTS}
    falls = [("teacher", values["flat"] + 0.1), *values.items()]
    written = write_frontier(tmp_path, POINTS, falls, COLLECTION, "test", {"recipe": "x.toml"}, ["A note."])
    assert {path.name for path in tmp_path.iterdir()} == {f"frontier.{end}" for end in ("md", "json", "html", "png")}
    assert json.loads((tmp_path / "frontier.json").read_text()) == written
    means = [one.system.quality[PRIMARY].mean() for one in POINTS]
    for key, costs in (("latency", [1.5, 1.05, 1.04]), ("size", [10, 12, 2.5])):
        on = [key in one["on_front_of"] for one in written["points"].values()]
        assert on == pareto(costs, means)
    text = (tmp_path / "frontier.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[0][:4] == ["point", "index", "query encoder", "nDCG@10"]
    assert [row[0] for row in rows[2:5]] == ["flat", "hnsw", "pq"]
    assert [row[3] for row in rows[2:5]] == [f"{mean:.3f}" for mean in means]
    assert rows[3][6:11] == ["1.00", "1.00", "0.050", "0.050", "0.050"]
    assert rows[3][11:16] == ["10.0", "2.00", "1.25", "120", "90.0"]
    assert "A note." in text
    assert rows[-1][0] == "pq"
    assert float(rows[-1][3]) == pytest.approx(means[2] - means[1], abs=5e-5)
    assert rows[-3][-1] == "<0.001"  # 0.1 lost by every query
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "frontier.html").read_text()
    assert page.count('"front":') == 2 * len(POINTS)
