"""Bi-encoders with a learned head: the formulas of DSE and D2LLM, and what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import batch_of
from sentence_transformers import SentenceTransformer
from tiny import WORDS, tiny_sentence_transformer
from torch.nn.functional import relu

from retrieval_kd import pair_head as heads
from retrieval_kd.pair_head import PairHead, load_head, load_pair_encoder
from retrieval_kd.pooling import PMA
from retrieval_kd.students import Batch, load_student
from retrieval_kd.students.pair_head import PairHeadStudent
from retrieval_kd.tables import Component
from retrieval_kd.types import InputError

RNG = np.random.default_rng(0)
QUERIES = [" ".join(RNG.choice(WORDS, RNG.integers(1, 6))) for _ in range(5)]
DOCUMENTS = [" ".join(RNG.choice(WORDS, RNG.integers(1, 40))) for _ in range(7)]
DSE = {"features": "products", "top_layers": 2, "hidden": [16], "normalize": False}
D2LLM = {"features": "concat", "pooling": "pma", "hidden": [12, 12], "normalize": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    tiny_sentence_transformer(folder / "t", layers=3).save(str(folder / "model"))
    return str(folder / "model")


def load(model: str, seed: int = 0, **options: Any) -> PairHeadStudent:
    student = load_student(Component(kind="pair_head", model=model, **options), seed)
    assert isinstance(student, PairHeadStudent)
    return student.eval()


def batch(student: Any, columns: torch.Tensor | None = None, **settings: Any) -> Batch:
    return batch_of(student, QUERIES, DOCUMENTS, columns, **{"micro_batch_tokens": 3, **settings})


@pytest.mark.parametrize("features", ["concat", "products"])
@pytest.mark.parametrize("hidden", [(5,), (5, 4), ()])
def test_head_by_hand(features: Any, hidden: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    head = PairHead(3, features, hidden)
    queries, documents = torch.randn(4, 3), torch.randn(6, 3)
    matrices = [p.detach().numpy().astype(float) for p in head.parameters()]
    with torch.no_grad():
        grid = head.grid(queries, documents).numpy()
    for i, u in enumerate(queries.numpy().astype(float)):
        for j, v in enumerate(documents.numpy().astype(float)):
            x = np.concatenate([u, v] if features == "concat" else [u, v, u * v, abs(u - v)])
            for weight, bias in zip(matrices[:-2:2], matrices[1:-2:2], strict=True):
                x = np.maximum(weight @ x + bias, 0)
            assert grid[i, j] == pytest.approx((matrices[-2] @ x + matrices[-1])[0], abs=1e-5)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = PairHead(3, hidden=(5,))

    def run() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        sides = [torch.randn(n, 3, generator=generator).requires_grad_() for n in (4, 7)]
        head.zero_grad()
        grid = head.grid(*sides)
        grid.square().sum().backward()
        return [grid.detach(), *(side.grad for side in sides), *(p.grad.clone() for p in head.parameters())]

    whole = run()
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", 2 * 12 * 4)  # two documents
    for got, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(got, expected)


def test_pma_by_formula() -> None:
    """Softmax over the text's own tokens alone, scaled by the whole width, seed and feed-forward as residuals."""
    torch.manual_seed(0)
    module = PMA(8, 2)
    states = torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        for norm in module.norms:
            norm.weight += torch.randn(8)
            norm.bias += torch.randn(8)
        vectors = module({"token_embeddings": states, "attention_mask": mask})["sentence_embedding"]
        for text, length in enumerate((3, 5)):
            x = states[text, :length]
            q, k, v = module.query(module.seed), module.key(x), module.value(x)
            read = []
            for head in (slice(0, 4), slice(4, 8)):
                weights = torch.exp(q[:, head] @ k[:, head].T / 8**0.5)
                read.append(weights / weights.sum() @ v[:, head])
            pooled = module.norms[0](module.seed + torch.cat(read, 1))
            expected = module.norms[1](pooled + relu(module.feed(pooled)))[0]
            torch.testing.assert_close(vectors[text], expected, atol=1e-6, rtol=1e-5)


def test_top_layers_are_dses_vectors(model: str) -> None:
    """Means over tokens of the last two layers, side by side."""
    student = load(model, **DSE)
    transformer = SentenceTransformer(model, device="cpu")[0]
    with torch.no_grad():
        outputs = student(batch(student))
        for text, vector in zip(DOCUMENTS, outputs.documents, strict=True):
            tokens = transformer.tokenizer(text, truncation=True, max_length=24, return_tensors="pt")
            states = transformer.model(**tokens, output_hidden_states=True).hidden_states
            expected = torch.cat([states[-2][0].mean(0), states[-1][0].mean(0)])
            torch.testing.assert_close(vector, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "trust"),
    [
        ({}, False),
        ({"hidden": [], "features": "concat", "query_prompt": "find: "}, False),
        (DSE, True),
        (D2LLM, True),
        ({**D2LLM, "lora": {"rank": 2}, "normalize": True, "max_length": 9}, True),
    ],
    ids=str,
)
def test_saved_and_loaded_it_is_the_same(options: dict[str, Any], trust: bool, model: str, tmp_path: Path) -> None:
    student = load(model, **options)
    with torch.no_grad():
        for parameter in student.parameters():  # as if trained
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        outputs = student(batch(student))
    assert outputs.grid.std() > 1e-3
    student.save(tmp_path)
    loaded = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=trust)
    np.testing.assert_allclose(loaded.encode_query(QUERIES), outputs.queries, atol=5e-6)
    np.testing.assert_allclose(loaded.encode_document(DOCUMENTS), outputs.documents, atol=5e-6)
    towers, head = load_pair_encoder(tmp_path), load_head(tmp_path)
    vectors = [towers.model.encode(towers.render(t, s)) for t, s in ((QUERIES, "query"), (DOCUMENTS, "document"))]
    with torch.no_grad():
        grid = head.grid(*map(torch.from_numpy, vectors))
    torch.testing.assert_close(grid, outputs.grid, atol=1e-5, rtol=1e-5)


def test_other_packages_modules_are_refused(model: str, tmp_path: Path) -> None:
    load(model, **D2LLM).save(tmp_path)
    listed = (tmp_path / "modules.json").read_text(encoding="utf-8")
    (tmp_path / "modules.json").write_text(listed.replace("retrieval_kd.pooling", "os.path"), encoding="utf-8")
    with pytest.raises(InputError, match=r"names os.path.PMA"):
        load_pair_encoder(tmp_path)
    with pytest.raises(InputError, match=r"has no pair_head\.json"):
        load_head(Path(model))


@pytest.mark.parametrize(("options", "layers"), [(DSE, False), (D2LLM, False), (D2LLM, True)], ids=str)
def test_gradient_caching_and_micro_batches_change_nothing(options: dict[str, Any], layers: bool, model: str) -> None:
    student = load(model, **options).train()
    columns = torch.tensor([[0, 6], [3, -1], [5, 2], [1, 4], [2, 2]])

    def run(**settings: Any) -> dict[str, torch.Tensor]:
        student.zero_grad()
        outputs = student(batch(student, columns, layers=layers, **settings))
        losses = [
            o.scores.square().mean() + o.grid.softmax(1)[:, 0].sum() + o.queries.square().mean()
            for o in (outputs, *outputs.layers)
        ]
        loss = torch.stack(losses).sum()
        loss.backward()
        found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
        return {**found, "loss": loss.detach()}

    expected = run(micro_batch_tokens=100)
    assert {name.partition(".")[0] for name in expected} >= {"head", "loss"}
    for caching in (False, True):
        found = run(micro_batch_tokens=2, gradient_caching=caching)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=1e-3, msg=name)


def test_columns_and_missing_candidates(model: str) -> None:
    student = load(model)
    columns = torch.tensor([[0, 6], [3, -1], [5, 2], [1, -1], [2, 2]])
    with torch.no_grad():
        outputs = student(batch(student, columns))
        alone = student(Batch(batch(student).queries, [], columns[:, :0]))
    expected = outputs.grid.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, 0)
    torch.testing.assert_close(outputs.scores, expected)
    assert (alone.scores.shape, alone.grid.shape, alone.queries.shape) == ((5, 0), (5, 0), (5, 32))


def test_new_weights_depend_on_the_seed(model: str) -> None:
    draws = [load(model, seed, **D2LLM).state_dict() for seed in (0, 0, 1)]
    new = [name for name in draws[0] if name.startswith("head.") or name.endswith(".seed")]
    assert len(new) > 3
    for name in new:
        assert torch.equal(draws[0][name], draws[1][name])
        assert not torch.equal(draws[0][name], draws[2][name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "pma", "pma_heads": 5}, "student.pma_heads is 5, which does not divide the 32 dimensions"),
        ({"top_layers": 4}, "student.top_layers is 4; model .* has 3 layers"),
    ],
)
def test_what_cannot_work(options: dict[str, Any], message: str, model: str) -> None:
    with pytest.raises(InputError, match=message):
        load(model, **options)


def test_layers_of_top_layers_are_refused(model: str) -> None:
    student = load(model, **DSE)
    with pytest.raises(InputError, match=r"student\.top_layers"):
        student(batch(student, layers=True))


def test_settings_are_readable(model: str, tmp_path: Path) -> None:
    load(model, **DSE).save(tmp_path)
    settings = json.loads((tmp_path / "pair_head.json").read_text(encoding="utf-8"))
    assert settings == {"dim": 64, "features": "products", "hidden": [16]}
