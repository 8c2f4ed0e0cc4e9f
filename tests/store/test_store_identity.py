"""Whose judgements a store holds: shared by one teacher's names, never given to another teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrieval_kd.files import fingerprint
from retrieval_kd.store.store import Store
from retrieval_kd.types import InputError

TEACHER = {"model": "tiny", "revision": "abc", "prompt": "Document: ", "lengths": [32, 512]}
KEY = np.array([5], np.uint64)


def scored(root: Path) -> Store:
    store = Store.open(root, "ce", TEACHER)
    store.append_scores(KEY, KEY, np.ones(1, np.float32))
    return store


def knows(store: Store) -> bool:
    return bool(store.find_scores(KEY, KEY)[1][0])


@pytest.mark.parametrize(
    "change", [{"model": "large"}, {"prompt": ""}, {"lengths": [512, 32]}, {"revision": None}, {"dtype": "bf16"}]
)
def test_another_teacher_of_the_same_name_finds_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    store = scored(tmp_path)
    other = Store.open(tmp_path, "ce", TEACHER | change)
    assert other.folder != store.folder
    assert not knows(other)
    assert knows(Store.open(tmp_path, "ce", TEACHER))


def test_the_same_teacher_under_another_name_shares(tmp_path: Path) -> None:
    store = scored(tmp_path)
    again = Store.open(tmp_path, "teacher-2", dict(reversed(TEACHER.items())) | {"lengths": (32, 512)})
    assert again.folder == store.folder
    assert knows(again)
    assert again == store
    assert len(list(tmp_path.iterdir())) == 1


def test_teacher_json_says_who(tmp_path: Path) -> None:
    store = scored(tmp_path)
    mark = fingerprint(TEACHER)
    assert store.folder.name == f"ce-{mark[:8]}"
    assert store.identity == TEACHER
    teacher = json.loads((store.folder / "teacher.json").read_text())
    assert teacher == {"name": "ce", "fingerprint": mark, "identity": TEACHER}


def test_a_clash_of_eight_digits_is_refused(tmp_path: Path) -> None:
    other = Store.open(tmp_path, "ce", {"model": "large"})
    other.append_scores(KEY, KEY, np.ones(1, np.float32))
    other.folder.rename(tmp_path / f"ce-{fingerprint(TEACHER)[:8]}")
    with pytest.raises(InputError, match="another teacher, though its name ends in the same 8 digits"):
        Store.open(tmp_path, "ce", TEACHER)
    with pytest.raises(InputError, match="another teacher"):
        Store.open(tmp_path, "other-name", TEACHER)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda teacher: teacher | {"identity": TEACHER | {"model": "large"}}, "another teacher"),
        (lambda teacher: teacher | {"fingerprint": teacher["fingerprint"][:8] + "00000000"}, "another teacher"),
        (lambda teacher: {"name": "ce"}, "does not say who"),
        (lambda teacher: [], "does not say who"),
    ],
)
def test_an_edited_teacher_json_is_refused(tmp_path: Path, edit: Any, message: str) -> None:
    path = scored(tmp_path).folder / "teacher.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=message) as error:
        Store.open(tmp_path, "ce", TEACHER)
    assert str(path.parent) in str(error.value)


def test_a_torn_teacher_json_is_refused(tmp_path: Path) -> None:
    path = scored(tmp_path).folder / "teacher.json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(InputError, match=r"teacher\.json is not valid JSON"):
        Store.open(tmp_path, "ce", TEACHER)


def test_parts_of_nobody_are_refused_and_an_empty_folder_is_taken(tmp_path: Path) -> None:
    store = scored(tmp_path)
    (store.folder / "teacher.json").unlink()
    with pytest.raises(InputError, match=r"teacher\.json is gone"):
        Store.open(tmp_path, "ce", TEACHER)
    shutil.rmtree(store.folder / "scores")
    assert not knows(Store.open(tmp_path, "ce", TEACHER))


def test_two_folders_of_one_teacher_are_refused_until_merged(tmp_path: Path) -> None:
    store = scored(tmp_path / "here")
    copy = scored(tmp_path / "elsewhere").folder.rename(store.folder.with_name("copy" + store.folder.name[2:]))
    with pytest.raises(InputError, match="hold the same teacher; move the parts"):
        Store.open(tmp_path / "here", "ce", TEACHER)
    for part in (copy / "scores").iterdir():
        part.rename(store.folder / "scores" / part.name)
    shutil.rmtree(copy)
    assert Store.open(tmp_path / "here", "ce", TEACHER).count("scores") == 2


@pytest.mark.parametrize("name", ["", "a/b", "../up", "a b", "*"])
def test_a_name_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="names a folder"):
        Store.open(tmp_path, name, TEACHER)
