"""Judges in a recipe: their preferences and rankings are asked for in `score`, and train a student."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_endpoint import Reply, chat_answer, ok, serve
from tiny import tiny_sentence_transformer
from tiny_lm import save_tiny_lm
from toy import draw_texts, own_document, write_beir

from retrieval_kd import pipeline
from retrieval_kd.files import read_json
from retrieval_kd.pipeline import Workspace

RECIPE = """
[data]
collection = "{folder}/toy"

[candidates]
depth = 5

[[teachers]]
name = "pairs"
kind = "llm_pairwise"
model = "{folder}/decoder"
depth = 4
window = 2

[[teachers]]
name = "lists"
kind = "llm_listwise"
model = "somebody"
endpoint = {{ url = "{url}", input_price = 2.0 }}

[student]
kind = "dense"
model = "{folder}/model"

[[stages]]
steps = 2
batch_size = 2
candidates = 3
terms = [
  {{ loss = "preference_kl", teachers = ["pairs"] }},
  {{ loss = "ranknet", teachers = ["lists"] }},
]
"""


def rank(path: str, body: Any) -> Reply:
    """Passages by their length."""
    passages = re.findall(r"^\[\d+\] (.*)$", body["messages"][-1]["content"], re.MULTILINE)
    order = sorted(range(len(passages)), key=lambda place: -len(passages[place]))
    return ok(chat_answer(" > ".join(f"[{place + 1}]" for place in order)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_sentence_transformer(tmp_path / "transformer").save(str(tmp_path / "model"))
    save_tiny_lm(tmp_path / "decoder")
    test = {3: {3: 1}, 4: {4: 1}}
    write_beir(tmp_path / "toy", *draw_texts(12, 5), {"train": own_document(3), "test": test})
    return tmp_path


def test_judges_teach(folder: Path) -> None:
    with serve(rank) as server:
        recipe = folder / "judges.toml"
        recipe.write_text(RECIPE.format(folder=folder, url=server.url))

        def run(*overrides: str) -> np.ndarray:
            workspace = Workspace(recipe, folder / "work", overrides=overrides)
            pipeline.mine(workspace)
            pipeline.score(workspace)
            return np.load(folder / "work/scores/train/scores.npy")

        scores = run()
        assert len(server.asked) == 5  # lists, of three training and two test queries
        pipeline.train(Workspace(recipe, folder / "work"))
        assert read_json(folder / "work/stages/0/manifest.json")
        chances = np.load(folder / "work/trainset/preferences.npy")
        assert (np.isfinite(chances).sum(1) == 3 + 2).all()  # of four documents, pairs at most two places apart
        parts = set((folder / "store").rglob("part-*"))
        again = run("teachers.0.scores=wins", "teachers.1.scores=negative")
        assert set((folder / "store").rglob("part-*")) == parts
        assert len(server.asked) == 5
    ranked = scores[1][np.isfinite(scores[1])]
    assert set(ranked.tolist()) <= {np.float32(1 / place).item() for place in range(1, 6)}
    np.testing.assert_allclose(again[1], 1 - 1 / scores[1], atol=1e-5)
    known = np.isfinite(scores[0])
    assert known.sum(1).tolist() == [4, 4, 4]
    assert not np.allclose(again[0][known], scores[0][known])
    ledgers = {path.parent.name[:5]: path.read_text() for path in (folder / "store").rglob("ledger.jsonl")}
    assert all("tokens" in line for text in ledgers.values() for line in text.splitlines())
    assert "money" in ledgers["lists"]
    assert "money" not in ledgers["pairs"]
