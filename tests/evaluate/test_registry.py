"""The registry of collections against the metadata of ir_datasets, and copies that hold something else."""

from __future__ import annotations

import os
from pathlib import Path

import ir_datasets
import pytest
from toy import write_beir

from retrieval_kd.data import irds
from retrieval_kd.evaluate import registry as module
from retrieval_kd.evaluate.registry import Entry, count_mismatches, load_known, open_judged, registry
from retrieval_kd.types import InputError

BEIR = "trec-covid bioasq nfcorpus nq hotpotqa fiqa signal1m trec-news robust04 arguana webis-touche2020 cqadupstack"
BEIR += " quora dbpedia-entity scidocs fever climate-fever scifact"
REAL = os.environ.get("RKD_DATA")


def test_every_collection_is_there() -> None:
    known = registry()
    assert {f"beir/{name}" for name in BEIR.split()} <= set(known)
    assert len(known["beir/cqadupstack"].parts) == 12
    assert sum(name.startswith("nano-beir/") for name in known) == 13
    years = [f"msmarco-passage{'-v2' if year > 2020 else ''}/trec-dl-{year}" for year in range(2019, 2024)]
    assert [known[name].relevance for name in years] == [2] * 5
    assert known["msmarco-passage/dev/small"].metric == "MRR@10"
    assert {name for name, entry in known.items() if entry.self_ids} == {
        f"{group}/{name}" for group in ("beir", "nano-beir") for name in ("arguana", "quora")
    }
    assert not any(entry.bm25 for name, entry in known.items() if name.startswith("nano-beir/"))


@pytest.mark.parametrize("name", [name for name, entry in registry().items() if entry.irds])
def test_counts_are_those_of_ir_datasets(name: str) -> None:
    entry = registry()[name]
    try:
        dataset = ir_datasets.load(f"{entry.irds}/{entry.split}")
    except KeyError:  # an id that has its test queries itself
        dataset = ir_datasets.load(entry.irds)
    facts = dataset.metadata()
    assert entry.documents == facts["docs"]["count"]
    assert entry.judgements == facts["qrels"]["count"]
    assert entry.queries == facts["queries"]["count"]


def test_counts_that_differ_are_told() -> None:
    entry = Entry(folder="x", documents=3, queries=2, judgements=4)
    assert count_mismatches(entry, 3, [{0: 1, 1: 0}, {2: 1, 0: 0}]) == []
    assert count_mismatches(entry, 4, [{0: 1}]) == [
        "4 documents, 3 expected",
        "1 queries with judgements, 2 expected",
        "1 judgements, 4 expected",
    ]
    assert count_mismatches(entry, 3, [{0: 1, 1: 0, 2: 0}], dropped=1) == []  # the other query had that one alone
    assert count_mismatches(Entry(folder="x"), 9, []) == []


def beir_folder(folder: Path, documents: int, queries: int = 1) -> Path:
    return write_beir(
        folder, ["x"] * documents, ["y"] * queries, {"test": {number: {0: 1} for number in range(queries)}}
    )


def test_another_copy_is_refused_or_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKD_DATA", str(tmp_path))
    beir_folder(tmp_path / "scifact", 7)
    with pytest.raises(InputError, match=r"not the published one: 7 documents, 5,183 expected; 1 queries.*300 exp"):
        open_judged("beir/scifact")
    judged = open_judged("beir/scifact", allow_mismatch=True)
    assert "not the published beir/scifact: 7 documents, 5,183 expected" in judged.notes
    assert (judged.metric, judged.relevance, judged.self_ids) == ("nDCG@10", 1, False)
    assert open_judged("scifact", metric="recip_rank -M 10", relevance=2).metric == "MRR@10"  # nothing is known of it


def test_a_small_version_is_not_read_from_the_folder_of_the_large_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setenv("RKD_DATA", str(tmp_path))
    monkeypatch.setattr(irds, "load_irds", lambda *arguments: asked.append(arguments))
    beir_folder(tmp_path / "scifact", 7)
    load_known("nano-beir/scifact", registry()["nano-beir/scifact"])
    assert asked == [("nano-beir/scifact", ["test"], False)]


def test_where_a_collection_is_not_distributed_the_remedy_names_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RKD_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"put it at .*robust04"):
        open_judged("beir/robust04")
    with pytest.raises(InputError, match="mean of 12 collections"):
        open_judged("beir/cqadupstack")


def test_another_split_is_measured_in_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKD_DATA", str(tmp_path))
    folder = beir_folder(tmp_path / "arguana", 4)
    (folder / "qrels" / "test.tsv").rename(folder / "qrels" / "mine.tsv")
    judged = open_judged("beir/arguana", "mine")
    assert (judged.split, judged.self_ids, judged.entry) == ("mine", True, None)  # its counts are not known


def test_a_mistake_in_the_file_is_named(tmp_path: Path) -> None:
    for text, message in (
        ('["a"]\nirds = "x"\nmetrik = "MAP"', "unknown key 'metrik'; did you mean 'metric'"),
        ('["a"]\nparts = ["b"]', "there is no part 'b'"),
        ('["a"]\nirds = "x"\nbm25 = { "nDCG@10" = 0.1 }', "their source go together"),
        ('["a"]\nsplit = "test"', "say where the collection is"),
    ):
        file = tmp_path / "c.toml"
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            module.registry.__wrapped__(file)


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="needs the collections in RKD_DATA")
@pytest.mark.parametrize("name", ["beir/scifact", "beir/nfcorpus"])
def test_real_collections_hold_what_they_must(name: str) -> None:
    judged = open_judged(name)
    assert judged.entry is not None
    assert not any(note.startswith("not the published") for note in judged.notes)
