"""The command line from outside: help, exit codes, one line for a mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from retrieval_kd import cli, cli_workspace, engines
from retrieval_kd.extras import EXTRA_OF
from retrieval_kd.recipe import Recipe as RecipeTable
from retrieval_kd.tables import parse
from retrieval_kd.types import InputError

COMMANDS = [
    "run",
    "mine",
    "score",
    "train",
    "index",
    "export",
    "search",
    "eval",
    "compare",
    "demo",
    "serve",
    "doctor",
    "scores",
]


def rkd(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "retrieval_kd", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    )


def test_version(tmp_path: Path) -> None:
    done = rkd("--version", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"retrieval-kd {version('retrieval-kd')}\n", "")


def test_every_command_has_help() -> None:
    commands = dict(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    assert set(COMMANDS) <= set(commands)
    group = commands.pop("scores")
    assert group.help
    commands |= {f"scores {name}": command for name, command in group.commands.items()}
    for name, command in commands.items():
        assert command.help, name
        assert command.get_short_help_str(200).strip(), name
        for parameter in command.params:
            assert parameter.name == "help" or getattr(parameter, "help", None), (name, parameter.name)
        shown = CliRunner().invoke(cli.app, [*name.split(), "--help"], terminal_width=200, color=False)
        assert shown.exit_code == 0, name
        helps = [command.help, *(getattr(parameter, "help", None) or "" for parameter in command.params)]
        assert not [text for text in helps if "[" in text], f"{name}: what stands in brackets is not shown"
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        assert {"--quiet", "--json"} <= options, name


def test_help_says_what_is_taken_if_nothing_is_given() -> None:
    shown = CliRunner().invoke(cli.app, ["run", "--help"], terminal_width=200, color=False).output
    assert "work/RECIPE" in shown
    assert "OUT/../store" in shown


def test_help_lists_every_command(tmp_path: Path) -> None:
    done = rkd("--help", folder=tmp_path)
    assert done.returncode == 0
    for name in COMMANDS:
        assert re.search(rf"^\W*{name}\s+\w", done.stdout, re.MULTILINE), name


def test_doctor_ends_with_json(tmp_path: Path) -> None:
    done = rkd("doctor", "--json", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["cores"] == len(os.sched_getaffinity(0))
    assert {name: fact["extra"] for name, fact in facts["packages"].items()} == EXTRA_OF
    assert facts["packages"]["pytest"]["version"] == version("pytest")
    assert facts["packages"]["Stemmer"]["version"] == version("PyStemmer")
    assert set(facts["matrix_products"]) == {"fp32", "bf16"}


def test_doctor_names_the_extra_of_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "EXTRA_OF", {"absent_package": "ray", "pytest": "dev"})
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(cli.app, ["doctor"])
    assert shown.exit_code == 0
    assert "retrieval-kd[ray]" in "".join(shown.stdout.split())  # not read as markup
    assert "retrieval-kd[dev]" not in shown.stdout
    assert version("pytest") in shown.stdout


@pytest.mark.parametrize(("asked", "rate", "told"), [("bf16", 70.0, 1), ("bf16", 90.0, 0), ("fp32", 70.0, 0)])
def test_slow_bf16_is_told_where_a_recipe_asks_for_it(
    asked: str, rate: float, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    news: list[str] = []
    monkeypatch.setattr(cli_workspace, "say", news.append)
    monkeypatch.setattr(engines, "matrix_rates", lambda **_: {"fp32": 100.0, "bf16": rate})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    source = {"kind": "bi_encoder", "model": "m", "precision": asked}
    table = {"data": {"collection": "c"}, "candidates": {"sources": [source]}, "student": {"kind": "dense"}}
    cli_workspace.tell_of_slow_bf16(parse(RecipeTable, table, "recipe"))
    assert ["0.7 of fp32's speed" in line for line in news] == [True] * told


def one_line(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("Error: ")
    for part in expected:
        assert part in done.stderr


@pytest.mark.parametrize("command", ["run", "mine"])
def test_a_missing_recipe_is_one_line(tmp_path: Path, command: str) -> None:
    one_line(rkd(command, "none.toml", folder=tmp_path), "recipe none.toml does not exist.")
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_recipe_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('[data]\ncollection = "x"\ntets = "y"\n[student]\nkind = "dense"\n')
    one_line(rkd("run", "r.toml", folder=tmp_path), "r.toml: unknown key 'data.tets'; did you mean 'test'?")
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]


def test_serving_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    said = "work/none is neither an exported encoder nor a finished run: work/none/served has none."
    one_line(rkd("serve", "work/none", folder=tmp_path), said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["run"], ["run", "r.toml", "--colour"], ["rnu"]])
def test_wrong_usage(tmp_path: Path, arguments: list[str]) -> None:
    done = rkd(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("x.trec:2: too short."), "Error: x.trec:2: too short.\n"),
        (ModuleNotFoundError("No module named 'ranx'", name="ranx"), "retrieval-kd[eval]"),
    ],
)
def test_mistakes_end_with_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, message: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), ModuleNotFoundError("?", name="numpyy")])
def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(type(error)) as caught:
        cli.main()
    assert caught.value is error
