"""Comparisons against their parts computed apart, and read back from what is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from retrieval_kd.compare import SUFFIXES, compare, html_page, latex, markdown, write_comparison
from retrieval_kd.evaluate.per_query import Measured, bounded, join
from retrieval_kd.evaluate.significance import bootstrap_interval, pairwise
from retrieval_kd.types import InputError

COUNT = 60
GENERATOR = np.random.default_rng(0)
BASE = GENERATOR.random(COUNT)
IDS = [f"q{number}" for number in range(COUNT)]
TEXTS = [f"text of {query}" for query in IDS]


def quality(shift: float, noise: float = 0.05) -> dict[str, np.ndarray]:
    values = np.clip(BASE + GENERATOR.normal(shift, noise, COUNT), 0, 1)
    return {"nDCG@10": values, "MRR@10": np.sqrt(values)}


MEASURED = Measured(IDS, {"low": quality(-0.1), "top_1": quality(0.15), "a|b": quality(0.0), "same": quality(0.0)})
FOUND = compare(MEASURED, "ndcg_cut_10", texts=TEXTS, listing=2, rounds=2000, facts={"collection": "toy"})


def test_systems_come_best_first_with_letters() -> None:
    means = {name: each["nDCG@10"].mean() for name, each in MEASURED.systems.items()}
    assert list(FOUND["systems"]) == sorted(means, key=lambda name: -means[name])
    assert {name: record["letter"] for name, record in FOUND["systems"].items()} == dict(
        zip(MEASURED.systems, "abcd", strict=True)
    )
    for name, record in FOUND["systems"].items():
        assert record["means"] == {metric: values.mean() for metric, values in MEASURED.systems[name].items()}
        assert record["interval"] == list(bootstrap_interval(MEASURED.systems[name]["nDCG@10"], 2000))
    assert (FOUND["collection"], FOUND["metric"], FOUND["queries"]) == ("toy", "nDCG@10", COUNT)
    json.dumps(FOUND)


def test_who_beats_whom_is_what_the_corrected_tests_say() -> None:
    order = {name: MEASURED.systems[name]["nDCG@10"] for name in FOUND["systems"]}
    beaten = {name: set() for name in order}
    for pair in pairwise(order, 2000):
        if pair.adjusted_p < 0.05:
            winner, loser = (pair.first, pair.second) if pair.difference > 0 else (pair.second, pair.first)
            beaten[winner].add(loser)
    assert {name: set(record["beats"]) for name, record in FOUND["systems"].items()} == beaten
    assert beaten["top_1"] == {"low", "a|b", "same"}
    assert beaten["low"] == set()
    assert "same" not in beaten["a|b"]


def test_a_difference_that_the_correction_takes_away_beats_nobody() -> None:
    generator = np.random.default_rng(5)
    base = generator.random(40)
    values = {
        "base": base,
        "up": base + generator.normal(0.03, 0.09, 40),
        "other": base + generator.normal(0, 0.09, 40),
    }
    found = compare(Measured(IDS[:40], {name: {"MAP": each} for name, each in values.items()}), "MAP", rounds=1000)
    assert sum(pair["p"] < 0.05 for pair in found["pairs"]) == 2
    assert min(pair["adjusted_p"] for pair in found["pairs"]) > 0.05
    assert [record["beats"] for record in found["systems"].values()] == [[], [], []]


def test_what_could_not_be_seen_is_said() -> None:
    (note,) = FOUND["power"]
    pair = next(one for one in FOUND["pairs"] if {one["first"], one["second"]} == {"a|b", "same"})
    assert f"show one of {pair['detectable']:.3f} four times in five" in note
    assert abs(pair["difference"]) < pair["detectable"] < 0.06


def test_listing_names_the_queries_of_the_largest_differences() -> None:
    one = next(each for each in FOUND["listing"] if (each["first"], each["second"]) == ("top_1", "low"))
    differences = MEASURED.systems["top_1"]["nDCG@10"] - MEASURED.systems["low"]["nDCG@10"]
    best = np.argsort(-differences)[:2]
    assert [case["query"] for case in one["wins"]] == [IDS[place] for place in best]
    assert [case["text"] for case in one["wins"]] == [TEXTS[place] for place in best]
    assert [case["first"] - case["second"] for case in one["wins"]] == pytest.approx(differences[best])
    assert len(one["losses"]) == min(2, (differences < 0).sum())  # a query that is not lost is not listed as lost


def cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown() -> None:
    lines = markdown(FOUND).splitlines()
    assert cells(lines[0]) == ["letter", "system", "nDCG@10", "95% interval", "beats", "MRR@10"]
    assert [cells(line)[1] for line in lines[2:6]] == list(FOUND["systems"])
    for line, record in zip(lines[2:6], FOUND["systems"].values(), strict=True):
        assert float(cells(line)[2]) == pytest.approx(record["means"]["nDCG@10"], abs=5.1e-4)
        assert cells(line)[4].split() == sorted(FOUND["systems"][name]["letter"] for name in record["beats"])
    text = "\n".join(lines)
    assert "Holm over 6 pairs, at 0.05" in text
    assert "text of q" in text


def test_latex() -> None:
    text = latex(FOUND)
    assert r"b & top\_1 & \textbf{" in text
    assert re.search(
        r"\\textbf\{0\.\d{3}\}\$\^\{acd\}\$ & \\textbf\{0\.\d{3}\} \\\\", text
    )  # letters on the first metric
    assert text.count(r"\\") == 5
    assert text.index(r"\toprule") < text.index(r"\midrule") < text.index(r"\bottomrule")


def test_html_holds_the_cells_of_the_markdown(tmp_path: Path) -> None:
    page = html_page(FOUND, MEASURED, TEXTS)
    shown = [
        [[one["label"] for one in table["columns"]], *([text for _, text in row] for row in table["rows"])]
        for table in page["tables"]
    ]
    lines = [cells(line) for line in markdown(FOUND).splitlines() if line.startswith("|")]
    tables = [[line for line in lines if len(line) == len(one[0])] for one in shown]
    for found, expected in zip(shown, tables, strict=True):
        assert found == [expected[0], *expected[2 : len(found) + 1]]
    names = list(FOUND["systems"])
    assert page["queries"]["systems"] == names
    assert page["queries"]["first"] == [1, 0]
    assert page["queries"]["values"]["MRR@10"][0] == np.round(MEASURED.systems[names[0]]["MRR@10"], 4).tolist()
    assert html_page(FOUND, MEASURED)["queries"]["texts"] == IDS
    for suffix in SUFFIXES:
        write_comparison(tmp_path / f"found{suffix}", FOUND, MEASURED)
    assert json.loads((tmp_path / "found.json").read_text()) == FOUND
    assert (tmp_path / "found.md").read_text() == markdown(FOUND)
    assert (tmp_path / "found.tex").read_text() == latex(FOUND)


def test_a_recall_that_lists_are_too_short_for_is_marked() -> None:
    values = {name: {"nDCG@10": BASE, "R@100": BASE} for name in ("long", "short")}
    measured = join({"x": Measured(IDS, values, {"short": bounded(["nDCG@10", "R@100", "R@50"], 50)})})
    found = compare(measured, "nDCG@10", rounds=100)
    assert {name: record["bounded"] for name, record in found["systems"].items()} == {"long": [], "short": ["R@100"]}
    value = f"{BASE.mean():.3f}"
    text = markdown(found)
    assert [cells(line)[-1] for line in text.splitlines()[2:4]] == [value, f"{value}†"]
    assert "† The lists are shorter than that" in text
    assert rf"\textbf{{{value}}}$^{{\dagger}}$" in latex(found)
    (caption,) = html_page(found, measured)["tables"][0]["captions"]
    assert caption == "† The lists are shorter than that: a higher value was out of reach."
    assert bounded(["R@100"], 50, documents=50) == []


def test_one_system_has_nobody_to_beat() -> None:
    alone = compare(Measured(IDS, {"one": quality(0.0)}), "MRR@10")
    assert (alone["pairs"], alone["power"], alone["systems"]["one"]["beats"]) == ([], [], [])
    assert markdown(alone).count("\n") == 3
    page = html_page(alone, Measured(IDS, {"one": quality(0.0)}))
    assert (len(page["tables"]), page["queries"]["first"]) == (1, [0, 0])


def test_a_metric_that_was_not_measured_is_refused() -> None:
    with pytest.raises(InputError, match="'low' was not measured by MAP; it has nDCG@10, MRR@10"):
        compare(MEASURED, "map")
