"""A disk that is full: it is said where and what to do, what is there is whole, and the work goes on afterwards."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from checksum_teacher import Checksum

from retrieval_kd import answers, workers
from retrieval_kd.files import map_array
from retrieval_kd.scoring import fill_scores
from retrieval_kd.store.operations import verify
from retrieval_kd.store.store import Store
from retrieval_kd.types import Hits, InputError

QUERIES = [f"query {number}" for number in range(30)]
DOCUMENTS = [f"document {number}" for number in range(1000)]
HITS = Hits(np.tile(np.arange(1000, dtype=np.int32), (30, 1)), np.zeros((30, 1000), np.float32))


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of its own, of `size`; skips where nobody may mount one."""
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30,000 pairs are 360 KB; the disk has 256."""
    monkeypatch.setattr(answers, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(workers, "CHUNK", 2000)
    whole = fill_scores(tmp_path / "whole", "t", Checksum(), QUERIES, DOCUMENTS, HITS)
    with small_disk(tmp_path / "disk", "256k") as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(60_000))
        with pytest.raises(InputError, match=r"is on a full disk, and .* Free some space, or move the folder") as error:
            fill_scores(disk, "t", Checksum(), QUERIES, DOCUMENTS, HITS)
        store = Store.open(disk, "t", {"kind": "fake"})
        assert str(store.folder) in str(error.value)
        kept = store.count("scores")
        assert 0 < kept < HITS.rows.size
        assert not list(store.folder.rglob(".part-*")), "no half-written part is left"
        assert (verify(store).torn, verify(store).doubled) == ({}, {})
        for entry in store.ledger():
            assert entry["pairs"] >= kept
        with pytest.raises(InputError, match="is on a full disk"):
            fill_scores(disk, "t", Checksum(), QUERIES, DOCUMENTS, HITS)
        ballast.unlink()
        subprocess.run(["mount", "-o", "remount,size=2m", disk], check=True)
        asked: list[str] = []

        class Counting(Checksum):
            def score(self, queries: list[str], documents: list[str]) -> np.ndarray:
                asked.extend(queries)
                return super().score(queries, documents)

        scores = fill_scores(disk, "t", Counting(), QUERIES, DOCUMENTS, HITS)
        np.testing.assert_array_equal(scores, whole)
        assert len(asked) <= HITS.rows.size - kept
        assert store.count("scores") == HITS.rows.size


def test_a_mapped_array_needs_its_place_at_once(tmp_path: Path) -> None:
    """Written page by page into a sparse file, it would end the process."""
    with small_disk(tmp_path / "disk", "256k") as disk:
        with pytest.raises(InputError, match=r"is on a full disk, and grid\.npy could not be written"):
            map_array(disk / "grid.npy", (1, 100, 1000))
        (disk / "grid.npy").unlink(missing_ok=True)
        grid = map_array(disk / "grid.npy", (1, 50, 1000))
        with pytest.raises(OSError, match="No space left"):
            (disk / "ballast").write_bytes(bytes(100_000))
        grid[:] = 1
        grid.flush()
        assert np.load(disk / "grid.npy").sum() == 50_000


@pytest.mark.parametrize("where", ["parquet.write_table", "fsync", "mkdir", "ledger"])
def test_no_space_at_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    store = Store.open(tmp_path, "t", {"kind": "fake"})
    keys = np.arange(1000, dtype=np.uint64)
    store.record(1, 0, None, 1.0)
    if where != "mkdir":
        store.append_scores(keys, keys, np.ones(1000, np.float32))

    def full(*arguments: object, **options: object) -> None:
        if where == "parquet.write_table":
            assert isinstance(arguments[1], Path)
            arguments[1].write_bytes(b"PAR1 half a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "ledger":
            write = os.write
            patch.setattr(os, "write", lambda handle, line: write(handle, line[:20]))
        else:
            patch.setattr({"fsync": "os.fsync", "mkdir": "pathlib.Path.mkdir"}.get(where, f"pyarrow.{where}"), full)
        more = partial(store.append_scores, keys + 1000, keys, np.ones(1000, np.float32))
        with pytest.raises(InputError, match="is on a full disk"):
            store.record(2, 0, None, 1.0) if where == "ledger" else more()
    assert (verify(store).torn, store.count("scores")) == ({}, 0 if where == "mkdir" else 1000)
    store.record(3, 0, None, 1.0)
    assert [entry["pairs"] for entry in store.ledger()] == [1, 3]
    assert not list(store.folder.rglob(".part-*"))


def test_other_failures_are_not_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path, "t", {"kind": "fake"})

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("pyarrow.parquet.write_table", broken)
    with pytest.raises(OSError, match="Input/output error"):
        store.append_scores(np.zeros(1, np.uint64), np.zeros(1, np.uint64), np.ones(1, np.float32))
