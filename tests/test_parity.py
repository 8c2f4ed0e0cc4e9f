"""Parity of two engines: by hand, over two stores, and from a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from meanwhile import compact_once_listed
from scipy.stats import kendalltau
from tiny import WORDS, tiny_sentence_transformer
from toy import own_document, write_beir
from typer.testing import CliRunner

from retrieval_kd import cli
from retrieval_kd.diagnostics.parity import compare
from retrieval_kd.pipeline.parity import check_stores
from retrieval_kd.progress import console
from retrieval_kd.store.keys import text_keys
from retrieval_kd.store.store import Store
from retrieval_kd.types import Collection, InputError, Queries

NAN = np.nan


@pytest.fixture(autouse=True)
def _quiet_again() -> Any:
    yield
    console.quiet = False


def rkd(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, list(map(str, arguments)), env={"COLUMNS": "200"})


def test_by_hand() -> None:
    """Two lists; the second of four documents, of which two are answered by both."""
    rows = np.array([[0, 1, 2, -1], [3, 1, 0, 2]], np.int32)
    first = np.array([[3, 2, 1, NAN], [1, 2, NAN, 5]], np.float32)
    second = np.array([[3, 1, 1.5, NAN], [1, 2.25, 7, NAN]], np.float32)
    queries = Queries(["q0", "q1"], ["", ""], [{1: 1}, {}])
    found = compare(rows, first, second, queries, ["d0", "d1", "d2", "d3"])
    assert (found.pairs, found.lists, found.unanswered) == (5, 2, 2)
    assert (found.max_error, found.mean_error) == (1.0, (1.0 + 0.5 + 0.25) / 5)
    assert found.spread == pytest.approx(np.std([3, 2, 1, 1, 2]))
    assert found.kendall_tau == pytest.approx((kendalltau([3, 2, 1], [3, 1, 1.5]).statistic + 1) / 2)
    assert found.worst_tau == pytest.approx(1 / 3)
    # the relevant document stands second, and third with the other scores; a query without qrels does not count
    assert found.ndcg == pytest.approx((1 / np.log2(3), 1 / np.log2(4)))
    assert found.facts["ndcg_change"] == pytest.approx(1 / 2 - 1 / np.log2(3))
    assert compare(rows, first, second).ndcg is None
    with pytest.raises(InputError, match="no pair that both have scored"):
        compare(rows, first, np.full_like(second, NAN))


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A BEIR folder, a bi-encoder, and a recipe over both."""
    rng = np.random.default_rng(0)
    documents = [" ".join(rng.choice(WORDS, rng.integers(3, 15))) for _ in range(30)]
    queries = [" ".join(text.split()[:4]) for text in documents[:6]]
    write_beir(tmp_path / "toy", documents, queries, {"train": own_document(6), "test": own_document(6)})
    tiny_sentence_transformer(tmp_path / "transformer").save(str(tmp_path / "model"))
    (tmp_path / "recipe.toml").write_text(
        f"""
        data = {{ collection = "{tmp_path / "toy"}" }}
        candidates = {{ depth = 8 }}
        student = {{ kind = "dense", model = "{tmp_path / "model"}" }}
        [[teachers]]
        name = "tower"
        kind = "bi_encoder"
        model = "{tmp_path / "model"}"
        query_prompt = "find: "
        [[stages]]
        steps = 1
        terms = [{{ loss = "kl", teachers = ["tower"] }}]
        """
    )
    return tmp_path


def stores(place: Path) -> list[Path]:
    return sorted(
        path.parent for path in (place / "work/store").glob("tower*/teacher.json") if "." not in path.parts[-2]
    )


def test_a_recipe_and_then_the_stores_that_it_filled(toy: Path) -> None:
    options = [toy / "recipe.toml", "--out", toy / "work/toy", "--teacher", "tower"]
    early = rkd("scores", "parity", *options, "--precision", "bf16")
    assert isinstance(early.exception, InputError)
    assert "run `rkd mine" in str(early.exception)
    assert rkd("mine", *options[:3], "-q").exit_code == 0
    (toy / "work/toy/recipe.json").unlink()
    done = rkd("scores", "parity", *options, "--precision", "bf16", "--pairs", 12, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert 12 <= found["pairs"] < 6 * 8
    assert (found["unanswered"], found["lists"]) == (0, 2)
    assert 0 < found["max_error"] < 0.1
    assert found["kendall_tau"] > 0.5
    assert not (toy / "work/toy/recipe.json").exists()
    assert len(stores(toy)) == 2
    by_stores = ["scores", "parity", *stores(toy), "--collection", toy / "toy", "--query-prompt", "find: "]
    again = json.loads(rkd(*by_stores, "--json").stdout.splitlines()[-1])
    assert again.pop("ndcg") == pytest.approx(found["ndcg"])
    assert again == pytest.approx({name: value for name, value in found.items() if name != "ndcg"}, rel=1e-5)
    assert found["ndcg"][0] > 0
    without = json.loads(rkd("scores", "parity", *stores(toy), "--json").stdout.splitlines()[-1])
    assert without["ndcg"] is None
    assert without["kendall_tau"] == pytest.approx(found["kendall_tau"])
    shown = rkd(*by_stores).stdout
    assert f"{found['kendall_tau']:.4f}" in shown
    assert f"{found['pairs']}, 2" in shown
    assert rkd(*by_stores, "--min-tau", 0.1).exit_code == 0
    failed = rkd(*by_stores, "--min-tau", 1.1)
    assert (failed.exit_code, "is below 1.1" in failed.stderr) == (1, True)


def test_what_is_asked_wrongly(toy: Path) -> None:
    recipe, work = toy / "recipe.toml", ["--out", toy / "work/toy"]
    rkd("mine", recipe, *work, "-q")
    wrong: list[tuple[list[object], str]] = [
        ([recipe, *work, "--teacher", "towr", "--precision", "bf16"], "no teacher 'towr'; did you mean 'tower'"),
        ([recipe, *work, "--teacher", "tower", "--precision", "int8"], '"int8" needs engine = "openvino"'),
        ([recipe, *work, "--teacher", "tower", "--engine", "torch"], "give --teacher|has .* already"),
        ([recipe, *work, "--precision", "bf16"], "give --teacher"),
        ([recipe, *work, "--teacher", "tower"], "give --teacher"),
        ([recipe, *work, "--teacher", "tower", "--precision", "bf16", "--split", "dev"], "not 'dev'"),
        ([toy], "give a recipe, or the folders"),
    ]
    for arguments, message in wrong:
        with pytest.raises(InputError, match=message):
            raise rkd("scores", "parity", *arguments).exception or AssertionError(arguments)


def test_stores_are_compacted_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of the second go between their listing and their reading."""
    keys = text_keys(["a", "a"]), text_keys(["x", "y"])
    one, two = (Store.open(tmp_path, name, {"kind": name}) for name in ("one", "two"))
    for store, values in ((one, [1, 2]), (two, [1, 2.5])):
        for _ in range(2):
            store.append_scores(*keys, np.array(values, np.float32))
    expected = check_stores(one, two)
    left = compact_once_listed(two, monkeypatch)
    assert check_stores(one, two) == expected
    assert "scores" not in left
    assert expected.pairs == 2


def test_a_split_without_queries_shares_nothing(tmp_path: Path) -> None:
    stores = [Store.open(tmp_path, name, {"kind": name}) for name in ("one", "two")]
    for store in stores:
        store.append_scores(text_keys(["a"]), text_keys(["x"]), np.ones(1, np.float32))
    empty = Collection("toy", ["d"], ["x"], {"test": Queries([], [])})
    with pytest.raises(InputError, match="the stores share no pair of split 'test' of 'toy'"):
        check_stores(*stores, empty)


def test_stores_share_what_both_have_answered(tmp_path: Path) -> None:
    queries, documents = text_keys(["a", "a", "a", "b"]), text_keys(["x", "y", "z", "x"])
    one, two = (Store.open(tmp_path, name, {"kind": name}) for name in ("one", "two"))
    one.append_scores(queries, documents, np.array([1, 2, NAN, 4], np.float32))
    one.append_scores(queries[2:3], documents[2:3], np.array([3], np.float32))  # another run did get an answer
    two.append_scores(queries[:3], documents[:3], np.array([1, 2.5, 3], np.float32))
    done = rkd("scores", "parity", one.folder, two.folder, "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["pairs"], found["lists"], found["max_error"], found["kendall_tau"]) == (3, 1, 0.5, 1.0)
    empty = Store.open(tmp_path, "three", {"kind": "three"})
    for other, message in ((empty, "share no pair"), (one, "given twice")):
        with pytest.raises(InputError, match=message):
            raise rkd("scores", "parity", one.folder, other.folder).exception or AssertionError
