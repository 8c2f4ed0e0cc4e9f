"""What a store holds, and how stores are found."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from filled_store import filled

from retrieval_kd.store.operations import find_store, open_folder, stores, summary
from retrieval_kd.store.store import Store
from retrieval_kd.types import InputError


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
