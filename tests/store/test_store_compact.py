"""Compacting: the same answers before, after, when killed, and to those who read meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filled_store import TEACHER, WIDTH, Killed, answers, filled, keys, rows
from meanwhile import compact_once_listed

from retrieval_kd.progress import console
from retrieval_kd.store import lookup, operations
from retrieval_kd.store.locks import hold
from retrieval_kd.store.operations import KINDS, compact, open_folder, summary, unknown_rows, verify
from retrieval_kd.store.parts import Kind, schema_of
from retrieval_kd.store.store import Store
from retrieval_kd.types import InputError


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
    before = READS[how](store)
    assert READS["count"](store) is True
    left = compact_once_listed(store, monkeypatch)
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
