"""`rkd scores` from outside: what is printed, exit codes, files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from toy import write_beir
from typer.testing import CliRunner

from retrieval_kd import cli
from retrieval_kd.layouts import read_records
from retrieval_kd.progress import console
from retrieval_kd.store.store import Store
from retrieval_kd.tables import kinds
from retrieval_kd.types import InputError

RUN = "q0 Q0 d0 1 9.5 x\nq0 Q0 d1 2 0.25 x\nq1 Q0 d1 1 3 x\n"


@pytest.fixture(autouse=True)
def _quiet_again() -> Any:
    yield
    console.quiet = False


def rkd(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["scores", *map(str, arguments)], env={"COLUMNS": "200"})


def facts(*arguments: object, code: int = 0) -> dict[str, Any]:
    """The JSON object at the end of a command's output."""
    done = rkd(*arguments, "--json", "-q")
    assert done.exit_code == code, done.output
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A BEIR folder `toy`, a run, and a store with the scores of the run in three parts."""
    texts = [f"text {number}" for number in range(3)]
    write_beir(tmp_path / "toy", texts, ["query 0", "query 1"], {"train": {0: {0: 1}, 1: {2: 1}}})
    (tmp_path / "run.trec").write_text(RUN)
    facts("import", "trec", tmp_path / "run.trec", *target(tmp_path))
    store = Store.open(tmp_path / "store", "other", {"kind": "bm25"})
    keys = np.arange(3, dtype=np.uint64)
    for score in (1.0, 2.0):
        store.append_scores(keys, keys, np.full(3, score, np.float32))
    return tmp_path


def target(place: Path) -> list[object]:
    return ["--collection", place / "toy", "--teacher", "reader", "--store", place / "store"]


def test_layouts_are_listed() -> None:
    found = facts("layouts")
    assert sorted(found) == kinds("layouts")
    assert found["trec"] == {"about": found["trec"]["about"], "form": "qid Q0 docid rank score tag", "written": True}
    assert not found["d2llm"]["written"]
    shown = rkd("layouts").stdout
    assert all(name in shown for name in kinds("layouts"))


def test_import_says_what_it_did_and_once(place: Path) -> None:
    again = facts("import", "trec", place / "run.trec", *target(place))
    assert {name: value for name, value in again.items() if name != "store"} == dict.fromkeys(
        ["scores", "preferences", "rankings", "conflicts", "unknown_queries", "unknown_documents"], 0
    )
    assert Path(again["store"]).parent == place / "store"
    (place / "more.trec").write_text(RUN + "q0 Q0 d9 1 1 x\n")
    with pytest.raises(InputError, match=r"more.trec:4: document 'd9' is not in"):
        raise rkd("import", "trec", place / "more.trec", *target(place)).exception or AssertionError
    more = facts("import", "trec", place / "more.trec", *target(place), "--allow-unknown")
    assert (more["scores"], more["unknown_documents"]) == (3, 1)  # another file is another teacher


def test_export_writes_a_layout(place: Path) -> None:
    found = facts("export", "trec", place / "out.trec.zst", *target(place))
    assert found == {"file": str(place / "out.trec.zst"), "queries": 2, "documents": 3, "left_out": 0}
    assert list(read_records("trec", place / "out.trec.zst")) == list(read_records("trec", place / "run.trec"))
    with pytest.raises(InputError, match="query 'q1' has no relevant document"):
        raise rkd("export", "colbert", place / "out", *target(place)).exception or AssertionError
    found = facts("export", "colbert", place / "out", *target(place), "--allow-missing")
    assert (found["queries"], found["left_out"]) == (1, 1)
    assert json.loads((place / "out").read_text()) == ["q0", ["d0", 9.5], ["d1", 0.25]]
    for wrong, message in ((["--teacher", "none"], "holds no teacher called 'none'"), (["--split", "dev"], "no split")):
        with pytest.raises(InputError, match=message):
            raise rkd("export", "trec", place / "out", *target(place), *wrong).exception or AssertionError


def test_ls_shows_every_teacher(place: Path) -> None:
    found = {fact["teacher"]: fact for fact in facts("ls", place / "store")["teachers"]}
    assert (found["reader"]["pairs"], found["reader"]["kind"], found["reader"]["parts"]) == (3, "imported", 1)
    assert (found["other"]["pairs"], found["other"]["kind"], found["other"]["parts"]) == (6, "bm25", 2)
    shown = rkd("ls", place / "store").stdout
    for fact in found.values():
        assert all(str(fact[name]) in shown for name in ("teacher", "kind", "fingerprint", "written"))
    assert "cannot be read" not in shown


def test_verify_quarantine_and_verify(place: Path) -> None:
    whole = facts("verify", place / "store")
    assert whole["whole"]
    assert {name[:5]: fact["doubled"] for name, fact in whole["teachers"].items()} == {
        "reade": {},
        "other": {"scores": 3},
    }
    assert "3 scores stand twice, all whole" in rkd("verify", place / "store").stdout
    part = sorted((place / "store").glob("other-*/scores/part-*"))[0]
    raw = part.read_bytes()[:-9]
    part.write_bytes(raw)
    torn = facts("verify", place / "store", code=1)
    assert not torn["whole"]
    assert [list(fact["torn"]) for fact in torn["teachers"].values()] == [[str(part)], []]
    done = rkd("verify", place / "store", "--quiet")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"{part}: ")
    assert part.exists()  # nothing moves but by command
    with pytest.raises(InputError, match="cannot be read"):
        raise rkd("compact", place / "store").exception or AssertionError
    moved = facts("quarantine", "--all-torn", place / "store")["moved"]
    assert list(moved) == [str(part)]
    assert Path(moved[str(part)]).read_bytes() == raw
    assert facts("verify", place / "store")["whole"]
    (other,) = (place / "store").glob("other-*/scores/part-*")
    assert f"{other} -> " in rkd("quarantine", other).stdout
    for wrong in ([], [other, "--all-torn", place / "store"]):
        with pytest.raises(InputError, match="give a part to quarantine, or --all-torn STORE"):
            raise rkd("quarantine", *wrong).exception or AssertionError


def test_compact_one_teacher_and_all(place: Path) -> None:
    assert facts("compact", place / "store", "--teacher", "reader")["teachers"].keys() == {
        path.name for path in (place / "store").glob("reader-*")
    }
    shown = rkd("compact", place / "store").stdout
    assert "scores: 2 parts -> 1, 6 rows -> 3" in shown
    assert len(list((place / "store").glob("other-*/scores/part-*"))) == 1


def test_merge_two_folders(place: Path) -> None:
    (other,) = (place / "store").glob("other-*")
    facts("import", "trec", place / "run.trec", *target(place)[:-1], place / "elsewhere")
    (reader,) = (place / "elsewhere").glob("reader-*")
    store = Store.open(place / "elsewhere", "other", {"kind": "bm25"})
    store.append_scores(np.array([9], np.uint64), np.array([9], np.uint64), np.ones(1, np.float32))
    assert facts("merge", other, store.folder) == {"copied": 1}
    assert Store.open(place / "store", "other", {"kind": "bm25"}).count("scores") == 7
    with pytest.raises(InputError, match="belong to two teachers"):
        raise rkd("merge", other, reader).exception or AssertionError


def test_push_writes_a_folder_and_stays_here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    options = [*target(place), "--licence", "mit"]
    found = facts("push", place / "published", *options)
    assert found == {"folder": str(place / "published"), "scores": 3, "address": None}
    assert "license: mit" in (place / "published/README.md").read_text()
    with pytest.raises(InputError, match="nobody is logged in"):
        raise rkd("push", place / "again", *options, "--repo", "me/x").exception or AssertionError
    assert (place / "again/README.md").exists()


def test_a_mistake_is_one_line_and_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "retrieval_kd", "scores", "ls", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: none is no folder of teacher scores.\n"
