"""Files are whole or absent, and what is wrong in one is named with its line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_kd import files
from retrieval_kd.files import (
    atomic,
    fingerprint,
    hash_texts,
    load_hits,
    read_json,
    read_lines,
    read_run,
    save_hits,
    sha256,
    size_bytes,
    write_json,
    write_run,
)
from retrieval_kd.types import Hits, InputError


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_atomic_makes_parents_and_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    for content in ("old", "new"):
        with atomic(path) as scratch:
            assert scratch.parent == path.parent
            assert scratch.name.startswith(".")
            scratch.write_text(content)
            assert not path.exists() or path.read_text() == "old"  # readers see the old one until the end
        assert path.read_text() == content
    assert names(tmp_path) == ["a", "a/b", "a/b/file.txt"]


def test_atomic_leaves_the_old_file_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic(path) as scratch:  # noqa: PT012
        scratch.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_atomic_replaces_a_folder_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with atomic(path) as scratch:
        (scratch / "inner").mkdir(parents=True)
        (scratch / "inner" / "old.txt").write_text("old")
    with atomic(path) as scratch:
        scratch.mkdir()
        (scratch / "new.txt").write_text("new")
        assert names(path) == ["inner", "inner/old.txt"]
    assert names(tmp_path) == ["folder", "folder/new.txt"]


def test_atomic_leaves_the_old_folder_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic(path) as scratch:  # noqa: PT012
        scratch.mkdir()
        (scratch / "new.txt").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["folder", "folder/old.txt"]


def test_atomic_clears_what_a_killed_writer_left(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with atomic(path) as scratch:
        leftover = scratch  # the name depends on the process: what a killed one of this number left
        scratch.mkdir()
    leftover.mkdir()
    (leftover / "stale.txt").write_text("stale")
    with atomic(path) as scratch:
        assert not scratch.exists()
        scratch.mkdir()
    assert names(path) == []


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": "Hofstätter"}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert "Hofstätter" in (tmp_path / "x.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("raw", [b'{"a": 1', b'{"a": "\xe4"}'])
def test_bad_json_names_the_file(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"x\.json is not valid JSON"):
        read_json(path)
    with pytest.raises(InputError, match=r"y\.json does not exist"):
        read_json(tmp_path / "y.json")


def test_read_lines_counts_blank_lines_and_keeps_odd_separators(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("one\r\n\n  \n tw\u2028o\x0c\nthree".encode())
    assert list(read_lines(path)) == [(1, "one"), (4, " tw\u2028o\x0c"), (5, "three")]


def test_read_lines_names_the_line_of_a_wrong_encoding(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("fine\nä fine\n".encode() + "caf\xe9\n".encode("latin-1"))
    lines = read_lines(path)
    assert [next(lines), next(lines)] == [(1, "fine"), (2, "ä fine")]
    with pytest.raises(InputError, match=r"x\.txt:3: not UTF-8 .* at byte 3"):
        next(lines)


def test_read_lines_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.txt does not exist"):
        next(read_lines(tmp_path / "x.txt"))


def test_fingerprint_ignores_key_order_alone() -> None:
    one = {"a": 1, "b": {"c": [1, 2], "d": "x"}}
    other = {"b": {"d": "x", "c": [1, 2]}, "a": 1}
    assert fingerprint(one) == fingerprint(other)
    text = '{"a": 1, "b": {"c": [1, 2], "d": "x"}}'
    assert fingerprint(one) == hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    others = [{"a": 1, "b": {"c": [2, 1], "d": "x"}}, {"a": 2, "b": one["b"]}, {"a": 1}, [1], ["1"], "1", 1, None]
    assert len({fingerprint(value) for value in [one, *others]}) == 1 + len(others)


def test_fingerprint_reads_paths_as_text() -> None:
    assert fingerprint({"model": Path("a/b")}) == fingerprint({"model": "a/b"})


@given(st.lists(st.sampled_from(["", "a", "b", "ab", "ä", "\ud800"]), max_size=4), st.data())
def test_hash_texts_keeps_borders_and_order(texts: list[str], data: st.DataObject) -> None:
    other = data.draw(st.lists(st.sampled_from(["", "a", "b", "ab", "ä", "\ud800"]), max_size=4))
    assert (hash_texts(texts) == hash_texts(other)) == (texts == other)
    assert hash_texts(iter(texts)) == hash_texts(tuple(texts))


def test_hash_texts_by_hand() -> None:
    raw = (2).to_bytes(8, "little") + b"ab" + (0).to_bytes(8, "little")
    assert hash_texts(["ab", ""]) == hashlib.blake2b(raw, digest_size=8).hexdigest()
    assert len({hash_texts(texts) for texts in (["ab"], ["a", "b"], ["", "ab"], ["ab", ""], ["b", "a"], [])}) == 6


def test_sizes_and_sha256(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "one").write_bytes(b"123")
    (tmp_path / "inner" / "two").write_bytes(b"12345")
    assert size_bytes(tmp_path) == 8  # folders themselves do not count
    assert size_bytes(tmp_path / "one") == 3
    assert sha256(tmp_path / "one") == hashlib.sha256(b"123").hexdigest()


def test_hits_round_trip(tmp_path: Path) -> None:
    hits = Hits(np.array([[3, 1], [0, -1]], np.int32), np.array([[2, np.nan], [1, -np.inf]], np.float32))
    save_hits(tmp_path, hits)
    loaded = load_hits(tmp_path)
    np.testing.assert_array_equal(loaded.rows, hits.rows)
    np.testing.assert_array_equal(loaded.scores, hits.scores)


def test_run_round_trip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    count, width, documents = 5, 7, [f"d{n}" for n in range(40)]
    queries = [f"q{n}" for n in range(count)]
    rows = np.stack([rng.permutation(len(documents))[:width] for _ in queries]).astype(np.int32)
    scores = -np.sort(-rng.normal(size=(count, width)).astype(np.float32), axis=1)
    scores[1, 2:5] = scores[1, 2]  # ties keep the order of the file
    rows[3, 4:], scores[3, 4:] = -1, -np.inf
    rows[4], scores[4] = -1, -np.inf
    path = tmp_path / "x.trec"
    write_run(path, Hits(rows, scores), queries, documents, "tag")
    read = read_run(path, queries, documents)
    np.testing.assert_array_equal(read.rows, rows)
    np.testing.assert_array_equal(read.scores, scores)  # nine digits hold a float32
    lines = [line.split() for line in path.read_text().splitlines()]
    assert len(lines) == 3 * width + 4
    assert lines[0] == ["q0", "Q0", documents[rows[0, 0]], "1", f"{scores[0, 0]:.9g}", "tag"]
    assert [line[3] for line in lines if line[0] == "q3"] == ["1", "2", "3", "4"]


def test_read_run_orders_by_score_whatever_the_ranks_say(tmp_path: Path) -> None:
    path = tmp_path / "x.trec"
    path.write_text("q2 Q0 a 1 1.5 t\nq2\tQ0\tb\t2\t2.5\tt\n\nq1 Q0 c 1 -3e-1 t\n")
    hits = read_run(path, ["q1", "q2", "q3"], ["a", "b", "c"])
    assert hits.rows.tolist() == [[2, -1], [1, 0], [-1, -1]]
    np.testing.assert_array_equal(hits.scores, np.float32([[-0.3, -np.inf], [2.5, 1.5], [-np.inf, -np.inf]]))


def test_read_run_of_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "x.trec"
    path.write_text("")
    assert read_run(path, ["q1", "q2"], ["a"]).rows.shape == (2, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1 Q0 b 2 3.1", "has 6 fields .* this one has 5: 'q1 Q0 b 2 3.1'"),
        ("q1 Q0 b 2 3.1 t t", "this one has 7"),
        ("q1 Q0 z 2 3.1 t", "document 'z' is not in the collection"),
        ("q9 Q0 b 2 3.1 t", "query 'q9' is not in the split"),
        ("q1 Q0 a 2 3.1 t", "'a' appears twice for query 'q1'"),
        ("q1 Q0 b 2 high t", "the score 'high' is not a number"),
        ("q1 Q0 b 2 nan t", "the score 'nan' is not a number"),
        ("q1 Q0 b 2 -inf t", "the score '-inf' is not a number"),
    ],
)
def test_read_run_names_bad_lines(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.trec"
    path.write_text(f"q1 Q0 a 1 4 t\n\n{line}\n")
    with pytest.raises(InputError, match=rf"x\.trec:3: .*{message}"):
        read_run(path, ["q1"], ["a", "b"])


def test_write_json_refuses_what_json_cannot_hold_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps("old"))
    with pytest.raises(TypeError):
        write_json(path, {1, 2})
    assert read_json(path) == "old"
    assert names(tmp_path) == ["x.json"]


def test_arrays_are_saved_as_numpy_saves_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", 100)
    rng = np.random.default_rng(0)
    for array in (
        rng.normal(size=(50, 3)).astype(np.float32),
        rng.integers(0, 9, 7),
        rng.random((4, 5)) < 0.5,
        np.empty((0, 3), np.int32),
        rng.normal(size=(2, 6, 4))[:, ::2].T,
    ):
        np.save(tmp_path / "theirs.npy", np.ascontiguousarray(array))
        for source in (array, np.load(tmp_path / "theirs.npy", mmap_mode="r") if array.size else array):
            files.save_array(tmp_path / "ours.npy", source)
            assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()


def test_what_is_put_into_a_mapped_array_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE", 2)
    array = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float32, (9, 4))
    places = np.array([8, 1, 3, 0, 5])
    values = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    files.put(array, places, values)
    np.testing.assert_array_equal(files.pick(array, places), values)
    expected = np.zeros((9, 4), np.float32)
    expected[places] = values
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), expected)
    private = np.load(tmp_path / "a.npy", mmap_mode="c")
    private[:] = 7
    files.forget(private)  # what is in memory alone is not given back
    assert (private == 7).all()


def test_mapped_arrays_are_npy_files_that_have_their_place_on_the_disk(tmp_path: Path) -> None:
    for shape in ((2, 300, 1000), (0, 5), (3, 0)):
        array = files.map_array(tmp_path / "a.npy", shape)
        assert (array.dtype, array.shape, array.any()) == (np.float32, shape, False)
        array[:] = 3
        array.flush()
        loaded = np.load(tmp_path / "a.npy", mmap_mode="r")
        np.testing.assert_array_equal(loaded, np.full(shape, 3, np.float32))
        assert (tmp_path / "a.npy").stat().st_blocks * 512 >= loaded.nbytes


def test_the_size_of_a_folder_whose_files_go_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole").write_bytes(bytes(10))
    (tmp_path / ".scratch").write_bytes(bytes(100))
    is_file = Path.is_file

    def looked_at(path: Path) -> bool:
        found = is_file(path)
        if path.name == ".scratch":
            path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "is_file", looked_at)
    assert size_bytes(tmp_path) == 10
