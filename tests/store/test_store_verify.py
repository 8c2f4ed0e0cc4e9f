"""Torn parts are found, wherever the damage is, and moved out."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filled_store import TEACHER, filled, rows

from retrieval_kd.store import operations
from retrieval_kd.store.operations import KINDS, compact, quarantine, summary, verify
from retrieval_kd.store.parts import Kind
from retrieval_kd.store.store import Store
from retrieval_kd.types import InputError


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
