"""Merging stores: everything once, whatever happens on the way."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filled_store import TEACHER, Killed, answers, filled

from retrieval_kd.store.operations import KINDS, merge, unknown_rows, verify
from retrieval_kd.store.store import Store
from retrieval_kd.types import InputError


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
