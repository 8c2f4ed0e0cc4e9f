"""Embeddings, preferences, rankings and the ledger."""

from __future__ import annotations

import math
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_kd.store.store import Store
from retrieval_kd.types import InputError

TEACHER = {"kind": "bi_encoder", "model": "tiny"}


def keys(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


KEY = st.sampled_from([0, 1, 2, 2**63, 2**64 - 2, 2**64 - 1])


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.lists(KEY, min_size=1, max_size=5), max_size=3), wanted=st.lists(KEY, max_size=12))
def test_embeddings_are_found_as_in_a_dictionary(parts: list[list[int]], wanted: list[int]) -> None:
    rng = np.random.default_rng(0)
    known: dict[int, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as root:
        store = Store.open(Path(root), "bi", TEACHER)
        for part in parts:
            vectors = rng.normal(size=(len(part), 3)).astype(np.float32)
            store.append_embeddings(keys(*part), vectors)
            for key, vector in zip(part, vectors.tolist(), strict=True):
                known.setdefault(key, []).append(vector)
        vectors, found = store.find_embeddings(keys(*wanted))
    assert vectors.shape == (len(wanted), 3 if parts else 0)
    assert vectors.dtype == np.float32
    assert found.tolist() == [key in known for key in wanted]
    for key, vector in zip(wanted, vectors.tolist(), strict=True):
        assert vector == known[key][0] if key in known else all(map(math.isnan, vector))


def test_embeddings_over_many_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval_kd.store.parts.GROUP_VALUES", 700)  # 100 vectors a group
    rng = np.random.default_rng(1)
    store = Store.open(tmp_path, "bi", TEACHER)
    stored = rng.permutation(2000).astype(np.uint64)
    vectors = rng.normal(size=(2000, 7)).astype(np.float32)
    store.append_embeddings(stored[:1234], vectors[:1234])
    store.append_embeddings(stored[1234:], np.asfortranarray(vectors[1234:]))
    assert pq.ParquetFile(store.parts("embeddings")[0]).num_row_groups == 13
    wanted = rng.integers(0, 2500, 3000).astype(np.uint64)
    got, found = store.find_embeddings(wanted)
    np.testing.assert_array_equal(found, wanted < 2000)
    np.testing.assert_array_equal(got[found], vectors[np.argsort(stored)][wanted[found]])
    assert np.isnan(got[~found]).all()
    assert store.count("embeddings") == 2000
    lengths = "select distinct len(vector) from read_parquet($1)"
    assert duckdb.execute(lengths, [f"{store.folder}/embeddings/*.parquet"]).fetchall() == [(7,)]


def test_another_width_is_refused(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "a", "bi", TEACHER)
    store.append_embeddings(keys(1), np.ones((1, 4), np.float32))
    with pytest.raises(InputError, match="holds vectors of width 4, these have 5"):
        store.append_embeddings(keys(2), np.ones((1, 5), np.float32))
    other = Store.open(tmp_path / "b", "bi", TEACHER)
    other.append_embeddings(keys(2), np.ones((1, 5), np.float32))
    (stray,) = other.parts("embeddings")
    stray = stray.rename(store.folder / "embeddings" / stray.name)
    with pytest.raises(InputError, match=f"{stray.name} holds vectors of width 5"):
        store.find_embeddings(keys(1, 2))


def test_preferences_and_rankings_come_back(tmp_path: Path) -> None:
    store = Store.open(tmp_path, "duo", TEACHER)
    assert store.preferences().num_rows == store.rankings().num_rows == 0
    assert store.rankings().column_names == ["query_key", "document_keys"]
    big = 2**64 - 1
    store.append_preferences(keys(1, big), keys(2, 3), keys(4, 5), np.array([0.25, 1.0], np.float32))
    store.append_preferences(keys(6), keys(7), keys(8), np.array([0.5], np.float32))
    columns = ["query_key", "first_key", "second_key", "probability"]
    rows = [(1, 2, 4, 0.25), (big, 3, 5, 1.0), (6, 7, 8, 0.5)]
    assert store.preferences().to_pylist() == [dict(zip(columns, row, strict=True)) for row in rows]

    store.append_rankings(keys(1, 2, 3), [keys(9, big, 8), keys(), keys(4)])
    store.append_rankings(keys(1), [keys(8, 9)])
    assert store.rankings().column("query_key").to_pylist() == [1, 2, 3, 1]
    assert store.rankings().column("document_keys").to_pylist() == [[9, big, 8], [], [4], [8, 9]]
    assert (store.count("preferences"), store.count("rankings"), store.count("scores")) == (3, 4, 0)


@pytest.mark.parametrize("kind", ["embeddings", "preferences", "rankings"])
@pytest.mark.parametrize("how", ["truncated", "one bit"])
def test_a_spoilt_part_of_any_kind_is_named(tmp_path: Path, kind: str, how: str) -> None:
    rng = np.random.default_rng(3)
    store = Store.open(tmp_path, "bi", TEACHER)
    some = rng.integers(0, 2**64, 100, dtype=np.uint64)
    store.append_embeddings(some, rng.normal(size=(100, 64)).astype(np.float32))
    store.append_preferences(some, some, some, rng.random(100).astype(np.float32))
    store.append_rankings(some, [some] * 100)
    (part,) = store.parts(kind)  # type: ignore[arg-type]
    raw = bytearray(part.read_bytes())
    raw[len(raw) // 3] ^= 1  # among the values: only a checksum can tell
    part.write_bytes(raw if how == "one bit" else raw[: len(raw) // 2])
    reads = {"embeddings": lambda: store.find_embeddings(some), "preferences": store.preferences}
    with pytest.raises(InputError, match=r"cannot be read.*Move this file") as error:
        reads.get(kind, store.rankings)()
    assert str(error.value).startswith(str(part))


def test_ledger(tmp_path: Path) -> None:
    store = Store.open(tmp_path, "ce", TEACHER)
    assert store.ledger() == []
    before = datetime.now(UTC).replace(microsecond=0)
    store.record(100, 40, 12_345, 1.23456)
    store.record(7, 8, None, 0.5)
    entries = store.ledger()
    times = [datetime.fromisoformat(entry.pop("time")) for entry in entries]
    assert before <= times[0] <= times[1] <= datetime.now(UTC)
    assert entries == [
        {"pairs": 100, "texts": 40, "tokens": 12_345, "seconds": 1.235},
        {"pairs": 7, "texts": 8, "tokens": None, "seconds": 0.5},
    ]
    path = store.folder / "ledger.jsonl"
    path.write_text(path.read_text()[:-5])
    with pytest.raises(InputError, match=r"ledger\.jsonl:2: not valid JSON"):
        store.ledger()
