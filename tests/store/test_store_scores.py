"""The score store against a plain dictionary, and as other readers see it."""

from __future__ import annotations

import math
import tempfile
from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.format import open_memmap

from retrieval_kd.store.keys import first_of_each, text_keys
from retrieval_kd.store.lookup import key_ranges
from retrieval_kd.store.store import Store
from retrieval_kd.types import InputError

TEACHER = {"kind": "cross_encoder", "model": "tiny", "max_length": 512}


def keys(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def random_keys(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(0, 2**64, n, dtype=np.uint64)


def test_text_keys_never_change() -> None:
    # from coreutils: printf a | b2sum -l 64, which gives 40f89e395b66422f, read as little-endian
    assert text_keys(["a", ""]).tolist() == [0x2F42665B399EF840, 0xB4B2797457A0A6E4]
    assert text_keys([]).dtype == np.uint64
    assert text_keys([]).shape == (0,)
    lone = text_keys(["x\ud800", "x\ud801", "grün", "grun"])  # half a surrogate pair, as broken JSON has it
    assert len(set(lone.tolist())) == 4


@pytest.mark.parametrize("block", [999, 2**21])
def test_scores_are_found_as_in_a_dictionary(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval_kd.store.store.BLOCK", block)
    rng = np.random.default_rng(0)
    store = Store.open(tmp_path, "ce", TEACHER)
    known: dict[tuple[int, int], float] = {}
    for _ in range(3):
        query_keys, document_keys = np.repeat(random_keys(rng, 40), 25), random_keys(rng, 1000)
        scores = rng.normal(size=1000).astype(np.float32)
        scores[rng.random(1000) < 0.1] = np.nan
        store.append_scores(query_keys, document_keys, scores)
        known |= dict(zip(zip(query_keys.tolist(), document_keys.tolist(), strict=True), scores.tolist(), strict=True))
    pairs = np.array(list(known), np.uint64)
    query_keys = np.concatenate([pairs[:, 0], pairs[:500, 0], pairs[:500, 1]])
    document_keys = np.concatenate([pairs[:, 1], pairs[500:1000, 1], pairs[:500, 0]])  # known, re-paired, swapped
    order = rng.permutation(np.tile(np.arange(len(query_keys)), 2))

    scores, found = store.find_scores(query_keys[order], document_keys[order])

    wanted = list(zip(query_keys[order].tolist(), document_keys[order].tolist(), strict=True))
    np.testing.assert_array_equal(found, [pair in known for pair in wanted])
    np.testing.assert_array_equal(scores, np.array([known.get(pair, math.nan) for pair in wanted], np.float32))
    assert scores.dtype == np.float32
    assert found.dtype == np.bool_
    assert np.isnan(scores[found]).any(), "the data must hold pairs that were asked and not answered"
    assert store.count("scores") == len(known) == 3000


# keys that differ only beyond what int64 and float64 hold
KEY = st.sampled_from([0, 1, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1])
SCORE = st.sampled_from([math.nan, math.nan, -1.5, 0.0, 2.5])
PART = st.lists(st.tuples(KEY, KEY, SCORE), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(PART, max_size=3), wanted=st.lists(st.tuples(KEY, KEY), max_size=30))
def test_any_parts_and_any_wanted_pairs(
    parts: list[list[tuple[int, int, float]]], wanted: list[tuple[int, int]]
) -> None:
    answers: dict[tuple[int, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as root:
        store = Store.open(Path(root), "ce", TEACHER)
        for part in parts:
            store.append_scores(
                keys(*(q for q, _, _ in part)),
                keys(*(d for _, d, _ in part)),
                np.array([s for _, _, s in part], np.float32),
            )
            for q, d, s in part:
                answers.setdefault((q, d), []).append(s)
        scores, found = store.find_scores(keys(*(q for q, _ in wanted)), keys(*(d for _, d in wanted)))
    assert found.tolist() == [pair in answers for pair in wanted]
    numbers = [[s for s in answers.get(pair, []) if not math.isnan(s)] for pair in wanted]
    expected = [min(some) if some else math.nan for some in numbers]
    np.testing.assert_array_equal(scores, np.array(expected, np.float32))


@pytest.mark.parametrize("block", [7, 2**21])
def test_a_grid_is_what_its_pairs_are(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval_kd.store.store.BLOCK", block)
    monkeypatch.setattr("retrieval_kd.files.PIECE", 3)
    rng = np.random.default_rng(4)
    query_keys, document_keys = random_keys(rng, 20)[rng.integers(0, 20, 31)], random_keys(rng, 9)  # some twice
    rows = rng.integers(-1, 9, (31, 5)).astype(np.int32)
    store = Store.open(tmp_path, "ce", TEACHER)
    known = rng.random(rows.shape) < 0.6
    known &= rows >= 0
    pairs = query_keys[np.nonzero(known)[0]], document_keys[rows[known]]
    values = np.where(rng.random(known.sum()) < 0.2, np.nan, rng.normal(size=known.sum())).astype(np.float32)
    store.append_scores(*pairs, values)
    lowest: dict[tuple[int, int], float] = {}
    for left, right, value in zip(*pairs, values, strict=True):
        lowest[left, right] = np.fmin(lowest.get((left, right), np.nan), value)
    expected = np.full(rows.shape, -np.inf, np.float32)
    lacking = []
    for query, rank in zip(*np.nonzero(rows >= 0), strict=True):
        pair = query_keys[query], document_keys[rows[query, rank]]
        expected[query, rank] = lowest.get(pair, np.nan)
        lacking += [[query, rank]] if pair not in lowest else []
    np.save(tmp_path / "rows.npy", rows)
    for lists, grid in (
        (rows, np.empty(rows.shape, np.float32)),
        (np.load(tmp_path / "rows.npy", mmap_mode="r"), open_memmap(tmp_path / "g.npy", "w+", np.float32, rows.shape)),
    ):
        missing = store.find_grid(query_keys, document_keys, lists, grid)
        np.testing.assert_array_equal(grid, expected)
        assert missing.tolist() == lacking
    assert 0 < len(lacking) < (rows >= 0).sum()
    np.testing.assert_array_equal(np.load(tmp_path / "g.npy"), expected)
    none = np.empty((31, 0), np.int32)
    assert store.find_grid(query_keys, document_keys, none, none.astype(np.float32)).shape == (0, 2)


@given(rows=st.integers(0, 10**9), block=st.integers(1, 10**8))
def test_ranges_of_keys_hold_each_key_once(rows: int, block: int) -> None:
    if rows // block > 1000:
        rows = 1000 * block
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retrieval_kd.store.lookup.BLOCK", block)
        ranges = key_ranges(rows)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == 2**64 - 1
    assert all(last + 1 == first for (_, last), (first, _) in pairwise(ranges))
    assert len(ranges) * block >= rows


@given(st.lists(st.tuples(*[st.integers(0, 3).map(lambda n: n * (2**62 + 1))] * 2)))
def test_the_first_of_each_pair(pairs: list[tuple[int, int]]) -> None:
    first: dict[tuple[int, int], int] = {}
    for place, pair in enumerate(pairs):
        first.setdefault(pair, place)
    left, right = (np.array([pair[side] for pair in pairs], np.uint64) for side in (0, 1))
    assert first_of_each(left, right).tolist() == list(first.values())


def test_an_empty_store_and_an_empty_question(tmp_path: Path) -> None:
    store = Store.open(tmp_path, "ce", TEACHER)
    scores, found = store.find_scores(keys(1, 2), keys(3, 4))
    assert np.isnan(scores).all()
    assert not found.any()
    store.append_scores(keys(), keys(), np.empty(0, np.float32))
    assert store.parts("scores") == []
    store.append_scores(keys(1), keys(3), np.ones(1, np.float32))
    assert [len(a) for a in store.find_scores(keys(), keys())] == [0, 0]


def test_two_processes_that_scored_one_pair_give_one_answer(tmp_path: Path) -> None:
    store = Store.open(tmp_path, "ce", TEACHER)
    for score in (np.nan, 0.25, 0.5, np.nan):
        store.append_scores(keys(7), keys(9), np.array([score], np.float32))
    scores, found = store.find_scores(keys(7, 7, 9), keys(9, 9, 7))
    assert scores[:2].tolist() == [0.25, 0.25]
    assert found.tolist() == [True, True, False]
    assert store.count("scores") == 4


def test_a_folder_with_wildcards_in_its_name(tmp_path: Path) -> None:
    names = ["run[ab]", "runa", "a*?'b", "lr=1"]
    for number, name in enumerate(names):
        Store.open(tmp_path / name, "ce", TEACHER).append_scores(keys(1), keys(number), np.ones(1, np.float32))
    for number, name in enumerate(names):
        found = Store.open(tmp_path / name, "ce", TEACHER).find_scores(keys(1, 1, 1, 1), keys(0, 1, 2, 3))[1]
        assert found.tolist() == [other == number for other in range(4)]


def test_other_readers_read_the_parts_as_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    store = Store.open(tmp_path, "ce", TEACHER)
    query_keys, document_keys = random_keys(rng, 500), random_keys(rng, 500)
    scores = rng.normal(size=500).astype(np.float32)
    store.append_scores(query_keys[:300], document_keys[:300], scores[:300])
    store.append_scores(query_keys[300:], document_keys[300:], scores[300:])

    pattern = f"{store.folder}/scores/part-*.parquet"
    assert duckdb.execute("select count(*) from read_parquet($1)", [pattern]).fetchall() == [(500,)]
    table = pq.read_table(store.folder / "scores")
    assert table.schema.names == ["query_key", "document_key", "score"]
    assert table.schema.types == [pa.uint64(), pa.uint64(), pa.float32()]
    rows = {(row["query_key"], row["document_key"]): row["score"] for row in table.to_pylist()}
    expected = zip(query_keys.tolist(), document_keys.tolist(), scores.tolist(), strict=True)
    assert rows == {(q, d): s for q, d, s in expected}
    for path in store.parts("scores"):
        pairs = [tuple(row.values()) for row in pq.read_table(path).drop(["score"]).to_pylist()]
        assert pairs == sorted(pairs)


def test_parts_that_another_tool_merged_are_read(tmp_path: Path) -> None:
    store = Store.open(tmp_path, "ce", TEACHER)
    store.append_scores(keys(1, 2), keys(3, 2**64 - 1), np.array([0.5, np.nan], np.float32))
    store.append_scores(keys(5), keys(6), np.array([1.5], np.float32))
    old = store.parts("scores")
    merged = store.folder / "scores" / "part-merged.parquet"
    duckdb.execute(f"copy (from read_parquet($1)) to '{merged}'", [[str(path) for path in old]])
    for path in old:
        path.unlink()
    scores, found = store.find_scores(keys(5, 2, 1), keys(6, 2**64 - 1, 3))
    assert found.all()
    np.testing.assert_array_equal(scores, np.array([1.5, np.nan, 0.5], np.float32))
    assert store.count("scores") == 3


@pytest.mark.parametrize(("documents", "limit"), [(None, 12.0), (100_000, 7.5)], ids=["all new", "each ten times"])
def test_bytes_a_pair(tmp_path: Path, documents: int | None, limit: float) -> None:
    rng = np.random.default_rng(2)
    pool = random_keys(rng, documents or 1_000_000)
    document_keys = pool[rng.integers(0, len(pool), 1_000_000)] if documents else pool
    store = Store.open(tmp_path, "ce", TEACHER)
    scores = rng.normal(0, 4, 1_000_000).astype(np.float32)
    store.append_scores(np.repeat(random_keys(rng, 10_000), 100), document_keys, scores)
    (part,) = store.parts("scores")
    assert part.stat().st_size / 1_000_000 <= limit


def spoil(part: Path, how: str) -> None:
    raw = part.read_bytes()
    if how == "other columns":
        pq.write_table(pa.table({"query_key": keys(1), "score": np.ones(1, np.float32)}), part)
    elif how == "other types":
        pq.write_table(pa.table({"query_key": ["a"], "document_key": ["b"], "score": ["c"]}), part)
    else:
        part.write_bytes({"empty": b"", "half": raw[: len(raw) // 2], "last byte": raw[:-1], "text": b"x" * 99}[how])


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("how", ["empty", "half", "last byte", "text", "other columns", "other types"])
def test_a_part_that_cannot_be_read_is_named(tmp_path: Path, how: str, which: int) -> None:
    store = Store.open(tmp_path, "ce", TEACHER)
    for number in range(3):
        store.append_scores(keys(1, 2), keys(number, number), np.ones(2, np.float32))
    part = store.parts("scores")[which]
    spoil(part, how)
    for read in (lambda: store.find_scores(keys(1), keys(0)), lambda: store.count("scores")):
        with pytest.raises(InputError, match=r"cannot be read.*Move this file out of the store") as error:
            read()
        assert str(error.value).startswith(str(part))
    part.rename(tmp_path / part.name)  # the remedy
    found = store.find_scores(keys(1, 1, 1), keys(0, 1, 2))[1]
    assert found.tolist() == [number != which for number in range(3)]


def test_a_failure_without_a_part_at_fault_is_no_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path, "ce", TEACHER)
    store.append_scores(keys(1), keys(2), np.ones(1, np.float32))
    monkeypatch.setattr("retrieval_kd.store.lookup.FIND", "select error('disk full'), $1, $2 from parts")
    with pytest.raises(duckdb.Error, match="disk full"):
        store.find_scores(keys(1), keys(2))


def test_scratch_files_are_ignored(tmp_path: Path) -> None:
    store = Store.open(tmp_path, "ce", TEACHER)
    store.append_scores(keys(1), keys(2), np.ones(1, np.float32))
    (part,) = store.parts("scores")
    part.with_name(f".{part.name}.123").write_bytes(b"PAR1 half")
    assert store.parts("scores") == [part]
    assert store.count("scores") == 1
    assert store.find_scores(keys(1), keys(2))[1].all()
