"""Operations on whole stores: a plain dictionary says what must be found before and after."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval_kd.progress import console
from retrieval_kd.store import lookup, operations
from retrieval_kd.store.locks import hold
from retrieval_kd.store.operations import (
    KINDS,
    compact,
    find_store,
    merge,
    open_folder,
    quarantine,
    stores,
    summary,
    unknown_rows,
    verify,
)
from retrieval_kd.store.parts import Kind, schema_of
from retrieval_kd.store.store import Store
from retrieval_kd.types import InputError

TEACHER = {"kind": "cross_encoder", "model": "tiny"}
WIDTH = 6


def keys(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def filled(root: Path, seed: int = 0, kinds: Sequence[Kind] = KINDS, identity: dict[str, str] = TEACHER) -> Store:
    """A store of three parts a kind, in which some judgements stand twice, equal and not."""
    rng = np.random.default_rng(seed)
    store = Store.open(root, "ce", identity)
    some = rng.integers(0, 2**64, 4, dtype=np.uint64)  # few keys, so that they meet again
    for _ in range(3):
        if "scores" in kinds:
            scores = rng.choice(np.array([np.nan, -1.5, 0.25, 3.0], np.float32), 12)
            store.append_scores(rng.choice(some, 12), rng.choice(some, 12), scores)
        if "preferences" in kinds:
            chance = rng.choice(np.array([0.25, 0.5], np.float32), 20)
            store.append_preferences(rng.choice(some, 20), rng.choice(some, 20), rng.choice(some, 20), chance)
        if "rankings" in kinds:
            store.append_rankings(rng.choice(some, 8), [rng.permutation(some)[: rng.integers(1, 3)] for _ in range(8)])
        if "embeddings" in kinds:
            store.append_embeddings(rng.permutation(some)[:3], rng.normal(size=(3, WIDTH)).astype(np.float32))
    store.record(pairs=36, texts=0, tokens=None, seconds=1.5)
    return store


def answers(store: Store) -> dict[str, object]:
    """All that can be asked of a store: scores and vectors of every key, distinct preferences and rankings in order."""
    every = {key for kind in KINDS for path in store.parts(kind) for key in all_keys(path)}
    some = np.array(sorted(every), np.uint64)
    pairs = np.repeat(some, len(some)), np.tile(some, len(some))
    scores, found = store.find_scores(*pairs)
    vectors, known = store.find_embeddings(some)
    preferred: dict[tuple[int, ...], list[float]] = {}
    for row in store.preferences().to_pylist():
        seen = preferred.setdefault((row["query_key"], row["first_key"], row["second_key"]), [])
        seen += [row["probability"]] if row["probability"] not in seen else []
    ranked: dict[int, list[list[int]]] = {}
    for row in store.rankings().to_pylist():
        seen = ranked.setdefault(row["query_key"], [])
        seen += [row["document_keys"]] if row["document_keys"] not in seen else []
    return {
        "scores": (scores.tobytes(), found.tobytes()),
        "vectors": (vectors.tobytes(), known.tobytes()),
        "preferences": preferred,
        "rankings": ranked,
    }


def all_keys(path: Path) -> list[int]:
    table = pq.read_table(path)
    return [int(key) for name in table.column_names if name.endswith("_key") for key in table.column(name).to_pylist()]


@pytest.fixture
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Store:
    """A store of the test's kind, or of all."""
    params = getattr(request.node, "callspec", None)
    kind = params and params.params.get("kind")
    return filled(tmp_path, kinds=[kind] if kind else KINDS)


def test_summary_counts_what_is_there(store: Store) -> None:
    found = summary(store)
    assert {name: found[name] for name in ("pairs", "preferences", "rankings", "vectors", "parts", "torn")} == {
        "pairs": 36,
        "preferences": 60,
        "rankings": 24,
        "vectors": 9,
        "parts": 12,
        "torn": 0,
    }
    assert (found["teacher"], found["kind"], found["folder"]) == ("ce", "cross_encoder", store.folder.name)
    assert found["folder"] == f"ce-{found['fingerprint'][:8]}"
    assert found["bytes"] == sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file())
    newest = max(path.stat().st_mtime for path in store.folder.glob("*/part-*"))
    assert found["written"] == time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(newest))


def test_summary_of_an_empty_store_and_of_a_torn_part(tmp_path: Path) -> None:
    empty = Store.open(tmp_path, "new", {"kind": "bm25"})
    assert (summary(empty)["pairs"], summary(empty)["parts"], summary(empty)["written"]) == (0, 0, None)
    store = filled(tmp_path)
    store.parts("scores")[1].write_bytes(b"PAR1")
    assert (summary(store)["pairs"], summary(store)["torn"]) == (24, 1)


def test_stores_are_found_by_name_and_by_folder(tmp_path: Path) -> None:
    one, other = filled(tmp_path), filled(tmp_path, kinds=[], identity={"kind": "other"})
    bm25 = Store.open(tmp_path, "bm25", {"kind": "bm25"})
    (tmp_path / "notes").mkdir()
    assert stores(tmp_path) == sorted([one, other, bm25], key=lambda store: store.folder.name)
    assert stores(one.folder) == [one]
    assert find_store(tmp_path, "bm25") == bm25
    assert find_store(tmp_path, one.folder.name) == one
    with pytest.raises(InputError, match=r"holds 2 teachers called 'ce'; give one of its folders: ce-\w{8}, ce-\w{8}"):
        find_store(tmp_path, "ce")
    with pytest.raises(InputError, match="holds no teacher called 'none'"):
        find_store(tmp_path, "none")
    with pytest.raises(InputError, match="is no folder of teacher scores"):
        stores(tmp_path / "none")
    teacher = json.loads((one.folder / "teacher.json").read_text())
    (one.folder / "teacher.json").write_text(json.dumps(teacher | {"identity": {"kind": "edited"}}))
    with pytest.raises(InputError, match="does not say who the teacher is"):
        open_folder(one.folder)


def test_a_whole_store_is_verified(store: Store) -> None:
    verdict = verify(store)
    assert (verdict.parts, verdict.torn, verdict.unsorted) == (12, {}, [])
    tables = {kind: [tuple(row.values()) for path in store.parts(kind) for row in rows(path)] for kind in KINDS}
    pairs = {row[:2] for row in tables["scores"]}
    assert verdict.doubled == {
        "scores": 36 - len(pairs),
        "preferences": 60 - len(set(tables["preferences"])),
        "rankings": 24 - len({(row[0], tuple(row[1])) for row in tables["rankings"]}),
        "embeddings": 9 - len({row[0] for row in tables["embeddings"]}),
    }
    assert min(verdict.doubled.values()) > 0


def rows(path: Path) -> list[dict[str, object]]:
    return pq.read_table(path).to_pylist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "other columns"])
def test_torn_parts_are_named(store: Store, kind: Kind, how: str) -> None:
    path = store.parts(kind)[1]
    raw = bytearray(path.read_bytes())
    if how == "flipped":
        raw[len(raw) // 8] ^= 1
    elif how == "cut":
        raw = raw[:-30]
    path.write_bytes(raw if how in ("cut", "flipped") else b"")
    if how == "other columns":
        pq.write_table(pa.table({"a": [1]}), path)
    verdict = verify(store)
    assert list(verdict.torn) == [path]
    assert verdict.torn[path]
    assert kind in verdict.doubled  # the other parts are counted all the same
    with pytest.raises(InputError, match="cannot be read") as error:
        compact(store, kind)
    assert str(path) in str(error.value)
    assert len(store.parts(kind)) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_any_flipped_bit_is_seen_or_does_no_harm(tmp_path: Path, kind: Kind) -> None:
    """Every byte of a part in turn: verify names the part, or it still reads as before."""
    path = filled(tmp_path, kinds=[kind]).parts(kind)[0]
    raw, before = path.read_bytes(), rows(path)
    seen = 0
    for place in range(0, len(raw), 5):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ (1 << place % 8)]) + raw[place + 1 :])
        if operations._inspect(path, kind)[0] is None:
            # as text: NaN is not equal to itself
            assert str(rows(path)) == str(before), f"byte {place} of {len(raw)}"
        else:
            seen += 1
    assert seen > len(raw) / 10


def test_a_wrong_range_in_the_footer_is_seen(tmp_path: Path) -> None:
    """A part with the ranges of another reads as before, but a search for one of its keys would leave it out."""
    store = filled(tmp_path, kinds=["scores"])
    path = store.parts("scores")[0]
    raw = path.read_bytes()
    low = pq.ParquetFile(path).metadata.row_group(0).column(1).statistics.min
    stored, wrong = low.to_bytes(8, "little"), (low + 2**60).to_bytes(8, "little")
    start = raw.rindex(stored)  # in the footer, after the data
    path.write_bytes(raw[:start] + wrong + raw[start + 8 :])
    assert verify(store).torn == {path: "its footer gives another range of 'document_key' than its rows have"}


def test_parts_out_of_order_are_told(store: Store) -> None:
    path = store.parts("scores")[0]
    table = pq.read_table(path)
    pq.write_table(table.take(list(range(len(table)))[::-1]), path)
    assert verify(store).unsorted == [path]


def test_quarantine_moves_a_part_out(store: Store) -> None:
    part = store.parts("scores")[0]
    raw = part.read_bytes()
    place = quarantine(part)
    assert place == store.folder / "quarantine/scores" / part.name
    assert place.read_bytes() == raw
    assert not part.exists()
    assert len(store.parts("scores")) == 2
    assert Store.open(store.folder.parent, "ce", TEACHER) == store  # still a store
    assert summary(store)["parts"] == 11
    for wrong in (place, store.folder / "teacher.json", store.folder / "scores/part-1.txt"):
        with pytest.raises(InputError, match="is no part of a store"):
            quarantine(wrong)
    with pytest.raises(InputError, match="does not exist"):
        quarantine(part)


@pytest.mark.parametrize("block", [5, 2**21])
@pytest.mark.parametrize("part_bytes", [100, 2**27])
@pytest.mark.parametrize("kind", KINDS)
def test_compacting_changes_no_answer(
    store: Store, kind: Kind, part_bytes: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "BLOCK", block)  # rows of a range of keys
    monkeypatch.setattr(operations, "PART_BYTES", part_bytes)
    before, verdict = answers(store), verify(store)
    done = compact(store, kind)
    assert answers(store) == before
    assert done["parts_before"] == 3
    assert done["rows"] == done["rows_before"] - verdict.doubled[kind]
    assert done["parts"] == len(store.parts(kind))
    assert (done["parts"] == 1) == (part_bytes == 2**27)
    assert kind not in verify(store).doubled
    assert verify(store).unsorted == []
    for path in store.parts(kind):
        file = pq.ParquetFile(path, page_checksum_verification=True)
        assert file.schema_arrow == schema_of(kind, WIDTH)
    names = [path.name for path in store.parts(kind)]
    assert compact(store, kind)["rows"] == done["rows"]
    assert [path.name for path in store.parts(kind)] == names  # nothing more to gain, nothing written


def test_compacted_scores_are_the_lowest_and_in_order(tmp_path: Path) -> None:
    store = Store.open(tmp_path, "ce", TEACHER)
    high = 2**64 - 1
    for score in (np.nan, 2.0, 1.0, np.nan):
        store.append_scores(keys(high, 3, 3), keys(0, high, 1), np.array([score, np.nan, score], np.float32))
    assert compact(store, "scores")["rows"] == 3
    (path,) = store.parts("scores")
    found = [tuple(row.values()) for row in rows(path)]
    assert [row[:2] for row in found] == [(3, 1), (3, high), (high, 0)]
    assert [found[0][2], found[2][2]] == [1.0, 1.0]
    assert np.isnan(found[1][2])


def test_the_oldest_vector_stays(tmp_path: Path) -> None:
    store = Store.open(tmp_path, "ce", TEACHER)
    for number in range(3):
        store.append_embeddings(keys(1, 2 + number), np.full((2, 3), number, np.float32))
    assert compact(store, "embeddings")["rows"] == 4
    assert store.find_embeddings(keys(1, 2, 3, 4))[0][:, 0].tolist() == [0.0, 0.0, 1.0, 2.0]


def test_vectors_of_two_widths_are_refused(tmp_path: Path) -> None:
    store = Store.open(tmp_path, "ce", TEACHER)
    store.append_embeddings(keys(1), np.ones((1, 3), np.float32))
    other = Store.open(tmp_path / "other", "ce", TEACHER)
    other.append_embeddings(keys(2), np.ones((1, 4), np.float32))
    shutil.copy(other.parts("embeddings")[0], store.folder / "embeddings")
    with pytest.raises(InputError, match=r"vectors of widths \[3, 4\]"):
        compact(store, "embeddings")


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [0, 1, 3, 4, 6])
def test_compacting_killed_at_any_step(store: Store, kind: Kind, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before and after every rename and every removal: the same answers, and the next one heals it."""
    before = answers(store)
    distinct = {path.name for path in store.parts(kind)}
    monkeypatch.setattr(operations, "PART_BYTES", 150)
    left = [step]

    def mortal(function: object) -> object:
        def call(*arguments: object, **options: object) -> object:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return function(*arguments, **options)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patch:
        patch.setattr(operations, "write_part", mortal(operations.write_part))
        patch.setattr(Path, "unlink", mortal(Path.unlink))
        try:
            compact(store, kind)
        except Killed:
            assert answers(store) == before
        else:
            assert step > 3
    assert answers(store) == before
    for path in store.folder.rglob(".part-*"):
        path.unlink()
    monkeypatch.undo()
    compact(store, kind)
    assert answers(store) == before
    assert len(store.parts(kind)) == 1
    assert kind not in verify(store).doubled
    assert not distinct & {path.name for path in store.parts(kind)}


def compact_for_ever(folder: Path) -> None:
    operations.PART_BYTES = 100
    while True:
        compact(open_folder(folder), "scores")
        store = open_folder(folder)
        store.append_scores(keys(1), keys(2), np.array([np.nan], np.float32))  # so that there is something to do


def test_compacting_killed_for_real(tmp_path: Path) -> None:
    store = filled(tmp_path, kinds=["scores"])
    store.append_scores(keys(1), keys(2), np.ones(1, np.float32))
    before = answers(store)["scores"]
    chance = random.Random(0)
    context = multiprocessing.get_context("fork")
    for _ in range(4):
        process = context.Process(target=compact_for_ever, args=(store.folder,))
        process.start()
        time.sleep(0.15 + chance.random() * 0.2)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert answers(store)["scores"] == before
    compact(store, "scores")
    assert answers(store)["scores"] == before
    assert len(store.parts("scores")) == 1


def test_a_part_that_came_while_compacting_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write = operations.write_part

    def slow(folder: Path, table: pa.Table) -> Path:
        store.append_scores(keys(11), keys(12), np.array([5.0], np.float32))
        return write(folder, table)

    monkeypatch.setattr(operations, "write_part", slow)
    compact(store, "scores")
    assert store.find_scores(keys(11), keys(12))[0].tolist() == [5.0]


READS: dict[str, Callable[[Store], Any]] = {
    "scores": lambda store: store.find_scores(keys(1, 11), keys(2, 12))[0].tolist(),
    "embeddings": lambda store: store.find_embeddings(keys(1, 11))[0],
    "preferences": lambda store: store.preferences(keys(1)).to_pylist(),
    "rankings": lambda store: store.rankings().to_pylist(),
    "count": lambda store: store.count("scores") in (2, 4),
    "summary": lambda store: summary(store)["torn"],
    "verify": lambda store: verify(store).torn,
    "unknown_rows": lambda store: len(unknown_rows(store, "rankings", schema_of("rankings").empty_table())),
}


@pytest.mark.parametrize("how", READS)
def test_readers_do_not_mind_compacting(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts go between their listing and their reading."""
    store = Store.open(tmp_path, "ce", TEACHER)
    for _ in range(2):
        store.append_scores(keys(1, 11), keys(2, 12), np.ones(2, np.float32))
        store.append_preferences(keys(1), keys(2), keys(3), np.ones(1, np.float32))
        store.append_rankings(keys(1), [keys(2, 3)])
        store.append_embeddings(keys(1), np.ones((1, 3), np.float32))
    before, listed = READS[how](store), Store.parts
    assert READS["count"](store) is True
    left = set(KINDS)

    def parts(self: Store, kind: Kind) -> list[Path]:
        found = listed(self, kind)
        if kind in left:
            left.remove(kind)
            with monkeypatch.context() as patch:
                patch.setattr(Store, "parts", listed)
                assert compact(self, kind)["parts"] == 1
            assert not any(path.exists() for path in found)
        return found

    monkeypatch.setattr(Store, "parts", parts)
    after = READS[how](store)
    assert left < set(KINDS)
    if how in ("preferences", "rankings"):
        assert before == after * 2  # what stood twice stands once
    else:
        np.testing.assert_array_equal(after, before)


def test_two_that_compact_take_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "quiet", False)
    store = filled(tmp_path, kinds=["scores"])
    before = answers(store)["scores"]
    done: list[dict[str, int]] = []
    threads = [threading.Thread(target=lambda: done.append(compact(store, "scores"))) for _ in range(3)]
    with hold(store.folder / ".compact", "never said"):
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while "another process compacts it; waiting" not in capsys.readouterr().err:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert len(store.parts("scores")) == 3
    for thread in threads:
        thread.join()
    assert sorted(counts["parts_before"] for counts in done) == [1, 1, 3]
    assert answers(store)["scores"] == before


def test_merging_brings_everything_in_once(tmp_path: Path) -> None:
    one, other = filled(tmp_path / "a"), filled(tmp_path / "b", seed=1)
    both = filled(tmp_path / "c")
    for kind in KINDS:
        for path in other.parts(kind):
            shutil.copy(path, both.folder / kind)
    untouched = sorted((path, path.stat().st_mtime_ns) for path in other.folder.rglob("*"))
    assert merge(one, other) == {"copied": 12}
    assert merge(one, other) == {"copied": 0}
    assert answers(one) == answers(both)
    assert [entry["pairs"] for entry in one.ledger()] == [36, 36]
    assert sorted((path, path.stat().st_mtime_ns) for path in other.folder.rglob("*")) == untouched


def test_merging_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = filled(tmp_path / "a"), filled(tmp_path / "b", seed=1)
    copy, left = shutil.copyfile, [4]

    def mortal(source: Path, target: Path) -> None:
        left[0] -= 1
        if not left[0]:
            Path(target).write_bytes(source.read_bytes()[:50])
            raise Killed
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", mortal)
    with pytest.raises(Killed):
        merge(one, other)
    assert verify(one).torn == {}
    assert merge(one, other) == {"copied": 9}
    assert len(one.ledger()) == 2


def test_merging_refuses_another_teacher_itself_and_torn_parts(tmp_path: Path) -> None:
    one, other = filled(tmp_path / "a"), filled(tmp_path / "b", kinds=[], identity={**TEACHER, "model": "big"})
    with pytest.raises(InputError, match=r"belong to two teachers: .*tiny.*big"):
        merge(one, other)
    with pytest.raises(InputError, match="is given twice"):
        merge(one, one)
    same = filled(tmp_path / "c", seed=2)
    same.parts("scores")[1].write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be read"):
        merge(one, same)
    name = same.parts("preferences")[0].name
    (one.folder / "preferences" / name).write_bytes(b"other")
    same.parts("scores")[1].unlink()
    with pytest.raises(InputError, match="differ; verify both stores"):
        merge(one, same)


def test_unknown_rows_are_those_that_no_part_has(store: Store) -> None:
    for kind in ("preferences", "rankings"):
        known = pa.concat_tables([pq.read_table(path) for path in store.parts(kind)])
        assert len(unknown_rows(store, kind, known)) == 0
        empty = Store.open(store.folder.parent / "empty", "ce", TEACHER)
        assert len(unknown_rows(empty, kind, known)) == len({str(row) for row in known.to_pylist()})
        new = known.slice(0, 2).set_column(0, known.schema.field(0), pa.array([5, 5], pa.uint64()))
        found = unknown_rows(store, kind, pa.concat_tables([known, new, new]))
        assert sorted(map(str, found.to_pylist())) == sorted(map(str, new.to_pylist()))
        assert found.schema == known.schema
