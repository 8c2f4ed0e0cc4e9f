"""Synthetic texts: a BEIR folder that loads, says where each text is from, and goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import Reply, chat_answer, ok, serve
from tiny_lm import save_tiny_lm
from typer.testing import CliRunner

from retrieval_kd import cli
from retrieval_kd import endpoint as endpoint_module
from retrieval_kd.data import load_collection
from retrieval_kd.progress import console
from retrieval_kd.synthesis import Synthesis, synthesize
from retrieval_kd.tables import parse
from retrieval_kd.types import InputError

TEXTS: list[dict[str, Any]] = [
    {"name": "positive", "of": "query", "prompt": "Write a passage that answers: {query}"},
    {"name": "negative", "of": "query", "prompt": "Write one that does not: {query}", "grade": 0},
    {"name": "question", "of": "document", "prompt": "Ask about: {document}", "grade": 2, "sample": 2},
]


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    folder = tmp_path / "toy"
    (folder / "qrels").mkdir(parents=True)
    documents = {"d1": "sorting", "d2": "reading", "d3": "locks"}
    queries = {"q1": "how to sort", "q2": "how to read", "q3": "how to lock"}
    for name, texts in (("corpus", documents), ("queries", queries)):
        lines = [json.dumps({"_id": id_, "text": text}) + "\n" for id_, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t1\n")
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq3\td3\t1\n")
    return folder


def write(path: str, body: Any) -> Reply:
    text = body["messages"][-1]["content"]
    if "does not" in text and "read" in text:
        return ok({"choices": [{"message": {"content": None, "refusal": "no"}}], "usage": {"prompt_tokens": 5}})
    return ok(chat_answer(f" Text for <{text}>\n"))


def options(toy: Path, url: str, texts: Any = TEXTS, seed: int = 0, **endpoint: Any) -> Synthesis:
    model = {"model": "m", "endpoint": {"url": url, "concurrency": 1, **endpoint}}
    return parse(Synthesis, {"collection": str(toy), "seed": seed, "model": model, "texts": texts}, "here")


def test_a_folder_with_what_was_made(toy: Path, tmp_path: Path) -> None:
    with serve(write) as server:
        counts = synthesize(options(toy, server.url), tmp_path / "out")
        assert counts == {"made": 6, "texts": 5, "refused": 1, "tokens": 5 * 11 + 5}
        again = synthesize(options(toy, server.url), tmp_path / "out")
        assert again == {**counts, "made": 0, "tokens": 0}
        assert len(server.asked) == 6
    made = load_collection(str(tmp_path / "out"))
    texts = dict(zip(made.document_ids, made.documents, strict=True))
    assert texts == {
        **{"d1": "sorting", "d2": "reading", "d3": "locks"},
        "q1-positive": "Text for <Write a passage that answers: how to sort>",
        "q2-positive": "Text for <Write a passage that answers: how to read>",
        "q1-negative": "Text for <Write one that does not: how to sort>",
    }
    train = made.split("train")
    judged = {
        (query, made.document_ids[row]): grade
        for query, grades in zip(train.ids, train.qrels, strict=True)
        for row, grade in grades.items()
    }
    asked = [pair for pair in judged if pair[0].startswith("d")]
    assert len(asked) == 2
    assert all(query == f"{document}-question" and judged[query, document] == 2 for query, document in asked)
    assert {pair: grade for pair, grade in judged.items() if pair not in asked} == {
        ("q1", "d1"): 1,
        ("q2", "d2"): 1,
        ("q1", "q1-positive"): 1,
        ("q2", "q2-positive"): 1,
        ("q1", "q1-negative"): 0,
    }
    assert made.split("test").ids == ["q3"]
    lines = [json.loads(line) for line in (tmp_path / "out/synthetic.jsonl").read_text().splitlines()]
    assert {(line["id"], line["text"] is None) for line in lines if line["parent"] == "q2"} == {
        ("q2-positive", False),
        ("q2-negative", True),
    }
    about = {key: lines[0][key] for key in ("parent", "of", "grade", "model", "seed", "system", "prompt")}
    assert about == {"parent": "q1", "of": "query", "grade": 1, "model": "m", "seed": 0, "system": ""} | {
        "prompt": TEXTS[0]["prompt"]
    }


def test_stopped_and_gone_on(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.001)
    with serve(write) as server:
        with pytest.raises(InputError, match="budget_tokens = 30 is spent"):
            synthesize(options(toy, server.url, budget_tokens=30), tmp_path / "out")
        assert len(server.asked) == 3
        assert not (tmp_path / "out/corpus.jsonl").exists()
        counts = synthesize(options(toy, server.url), tmp_path / "out")
        assert counts["made"] == 6 - 3
        synthesize(options(toy, server.url), tmp_path / "whole")
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "synthetic.jsonl"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_texts_of_another_kind_are_not_mixed(toy: Path, tmp_path: Path) -> None:
    with serve(write) as server:
        synthesize(options(toy, server.url, TEXTS[:1]), tmp_path / "out")
        changed = [{**TEXTS[0], "prompt": "Say more on {query}"}]
        with pytest.raises(InputError, match=r"synthetic\.jsonl holds texts 'positive' that another model, prompt"):
            synthesize(options(toy, server.url, changed), tmp_path / "out")
        (tmp_path / "out/synthetic.jsonl").open("a").write('{"name": "pos')
        with pytest.raises(InputError, match=r"synthetic\.jsonl:3: no synthetic text .*delete this line"):
            synthesize(options(toy, server.url, TEXTS[:1]), tmp_path / "out")
        with (toy / "corpus.jsonl").open("a") as file:
            file.write(json.dumps({"_id": "q1-positive", "text": "taken"}) + "\n")
        with pytest.raises(InputError, match="has an id 'q1-positive' already"):
            synthesize(options(toy, server.url, TEXTS[:1]), tmp_path / "new")


def test_by_a_local_model_from_the_command_line(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "quiet", False)  # as it was, when the command has set it
    save_tiny_lm(tmp_path / "decoder")
    table = tmp_path / "make.toml"
    table.write_text(
        f'collection = "{toy}"\nmodel = {{ model = "{tmp_path / "decoder"}" }}\n'
        '[[texts]]\nname = "x"\nof = "query"\nprompt = "{query}"\nmax_tokens = 5\n'
    )
    arguments = ["synthesize", str(table), "--out", str(tmp_path / "out"), "--json", "--quiet"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["texts"] + counts["refused"] == counts["made"] == 2
    assert len(load_collection(str(tmp_path / "out"))) == 3 + counts["texts"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([TEXTS[0], TEXTS[0]], "two kinds of text are called 'positive'"),
        ([{**TEXTS[0], "prompt": "{document}"}], "no place {query}"),
        ([{**TEXTS[0], "grades": 1}], "unknown key 'texts.0.grades'; did you mean 'grade'"),
        ([], "at least 1 item"),
    ],
)
def test_options_are_checked(texts: Any, message: str, toy: Path) -> None:
    with pytest.raises(InputError, match=message):
        options(toy, "http://h/v1", texts)
