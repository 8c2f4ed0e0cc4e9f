"""Sparse students of causal language models: a text read once, or twice with the second copy pooled (echo)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import SparseEncoder
from tiny import WORDS, collection_of, tiny_masked_lm
from tiny_lm import save_tiny_lm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from retrieval_kd import sparse_towers
from retrieval_kd.encoder import Encoder
from retrieval_kd.export_graph import export_graph
from retrieval_kd.sparse_student import SparseStudent
from retrieval_kd.sparse_towers import encode_sparse, load_sparse_towers
from retrieval_kd.students import Batch, Outputs, inference_free, load_student
from retrieval_kd.tables import Component
from retrieval_kd.teachers import load_teacher
from retrieval_kd.types import InputError

RNG = np.random.default_rng(0)
QUERIES = [" ".join(RNG.choice(WORDS, RNG.integers(1, 4))) for _ in range(5)] + [""]
DOCUMENTS = [" ".join(RNG.choice(WORDS, RNG.integers(1, 9))) for _ in range(8)]  # many beyond the 20 tokens
TEXTS = [*QUERIES, *DOCUMENTS]
LENGTH = 20  # tokens, each a byte of a text
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """A student of one tower: the decoder's kind, whether its tokenizer puts a token before texts, and its options."""

    kind: str
    begin: bool
    echo: bool
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def source(self) -> str:
        return f"{self.kind}-{self.begin}"


CASES = {
    "llama": Case("llama", True, False),
    "llama echo": Case("llama", True, True),
    "llama without BOS": Case("llama", False, False),
    "llama echo without BOS": Case("llama", False, True),
    "mistral echo": Case("mistral", True, True),
    "gpt2": Case("gpt2", False, False),
    "gpt2 echo": Case("gpt2", False, True),
    "qwen3 echo, sum": Case("qwen3", False, True, (("pooling", "sum"), ("double_log", True))),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    cases = {case.source: case for case in CASES.values()}
    return {name: str(save_tiny_lm(folder / name, case.kind, begin=case.begin)) for name, case in cases.items()}


def make(model: str, **options: Any) -> SparseStudent:
    student = load_student(Component(kind="splade", model=model, max_length=LENGTH, **options), seed=0)
    assert isinstance(student, SparseStudent)
    return student.eval()


def of_case(case: Case, sources: dict[str, str]) -> SparseStudent:
    return make(sources[case.source], echo=case.echo, **dict(case.options))


def batch_of(student: SparseStudent, queries: list[str], documents: list[str]) -> Batch:
    sides: list[Any] = []
    for texts, side in ((queries, "query"), (documents, "document")):
        sides.append([np.array(ids, np.int32) for ids in student.tokenize(texts, side)])  # type: ignore[arg-type]
    every = torch.arange(len(documents)).repeat(len(queries), 1)
    return Batch(*sides, every, micro_batch_tokens=50)


def outputs(student: SparseStudent, queries: list[str] = QUERIES, documents: list[str] = DOCUMENTS) -> Outputs:
    found: Outputs = student(batch_of(student, queries, documents))
    return found


def reference(source: str, texts: list[str], echo: bool, pooling: str = "max", double_log: bool = False) -> Array:
    """By transformers alone: each text by itself, its ids doubled by hand."""
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source).eval()
    rows = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"]
        own = ids[1:] if tokenizer.bos_token_id is not None else ids  # less the token that tells where a text begins
        if not own:
            rows.append(np.zeros(model.config.vocab_size, np.float32))
            continue
        with torch.no_grad():
            logits = model(torch.tensor([ids + own if echo else ids])).logits[0, -len(own) :]  # (tokens, V)
        weights = torch.log1p(torch.relu(logits))
        weights = torch.log1p(weights) if double_log else weights
        rows.append((weights.amax(0) if pooling == "max" else weights.sum(0)).numpy())
    return np.stack(rows)


def expected(case: Case, sources: dict[str, str], texts: list[str]) -> Array:
    return reference(sources[case.source], texts, case.echo, **dict(case.options))


@pytest.fixture(scope="module")
def saved(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every case's student as it is saved; one of two towers, and an inference-free one."""
    folder = tmp_path_factory.mktemp("saved")
    found = {}
    for name, case in CASES.items():
        found[name] = folder / name
        found[name].mkdir()
        of_case(case, sources).save(found[name])
    document = {"model": sources["llama-True"], "echo": True, "max_length": LENGTH}
    found["two"] = folder / "two"
    found["two"].mkdir()
    make(sources["llama-True"], document=document).save(found["two"])
    options = inference_free.Options(model=sources["llama-True"], echo=True, max_length=LENGTH)
    inference_free.begin(options, DOCUMENTS, folder / "free")
    return {**found, "free": folder / "free/model"}


ALONE = """
import json, sys
sys.modules["retrieval_kd"] = None
import numpy as np
from sentence_transformers import SparseEncoder
folders, queries, documents = json.loads(sys.argv[1])
vectors = {}
for name, folder in folders.items():
    model = SparseEncoder(folder, device="cpu", trust_remote_code=True)
    again = folder + "-again"
    if name == "llama echo":  # saved by who has not this package
        model.save(again)
        model = SparseEncoder(again, device="cpu", trust_remote_code=True)
    for side, encode, texts in (("query", model.encode_query, queries), ("document", model.encode_document, documents)):
        vectors[f"{name}/{side}"] = encode(texts, convert_to_sparse_tensor=False).numpy()
np.savez(sys.argv[2], **vectors)
"""


@pytest.fixture(scope="module")
def plain(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Array]:
    """What Sentence Transformers makes of the saved folders where this package is not to be had."""
    folder = tmp_path_factory.mktemp("plain")
    told = json.dumps([{name: str(path) for name, path in saved.items()}, QUERIES, DOCUMENTS])
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ALONE, told, str(folder / "vectors.npz")]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "vectors.npz") as vectors:
        return dict(vectors)


def near(found: Any, wanted: Array) -> None:
    assert wanted.any()
    np.testing.assert_allclose(np.asarray(found), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_vectors_are_those_of_transformers(
    name: str, sources: dict[str, str], saved: dict[str, Path], plain: dict[str, Array]
) -> None:
    """As trained, as this package encodes a collection, as a teacher, and in Sentence Transformers without it."""
    case = CASES[name]
    queries, documents = expected(case, sources, QUERIES), expected(case, sources, DOCUMENTS)
    with torch.no_grad():
        found = outputs(of_case(case, sources))
    near(found.queries, queries)
    near(found.documents, documents)
    near(plain[f"{name}/query"], queries)
    near(plain[f"{name}/document"], documents)
    near(encode_sparse(load_sparse_towers(str(saved[name])), DOCUMENTS, "document", "fp32").toarray(), documents)
    teacher: Any = load_teacher(Component(kind="sparse_encoder", model=str(saved[name])), collection_of(DOCUMENTS))
    near(teacher.score(QUERIES[:5], DOCUMENTS[:5]), (queries[:5] * documents[:5]).sum(1))
    other = reference(sources[case.source], DOCUMENTS, not case.echo, **dict(case.options))
    assert np.abs(other - documents).max() > 0.1, "echo matters"


def test_towers_apart_load_alone_too(sources: dict[str, str], plain: dict[str, Array]) -> None:
    near(plain["two/query"], reference(sources["llama-True"], QUERIES, echo=False))
    near(plain["two/document"], reference(sources["llama-True"], DOCUMENTS, echo=True))
    near(plain["free/document"], reference(sources["llama-True"], DOCUMENTS, echo=True))
    assert (plain["free/query"] > 0).any()


def test_plain_sentence_transformers_asks_for_trust(saved: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SparseEncoder(str(saved["llama echo"]), device="cpu")


@pytest.mark.parametrize("name", CASES)
def test_neighbours_change_nothing(name: str, sources: dict[str, str]) -> None:
    """Nor does the side of their padding."""
    student = of_case(CASES[name], sources)
    with torch.no_grad():
        alone = torch.cat([outputs(student, [text], []).queries for text in TEXTS])  # type: ignore[misc]
        first: Any = student.towers.query[0]
        for side in ("left", "right"):
            first.tokenizer.padding_side = side
            together = student.towers.model(first.preprocess(TEXTS))["sentence_embedding"]
            near(together, alone.numpy())


def test_what_was_saved_is_read_as_it_was_trained(saved: dict[str, Path], sources: dict[str, str]) -> None:
    for name in ("llama", "llama echo"):
        case = CASES[name]
        with torch.no_grad():
            again = outputs(make(str(saved[name])))
            near(again.documents, expected(case, sources, DOCUMENTS))
    told = {"model": str(saved["llama echo"]), "echo": True}
    with torch.no_grad():
        near(outputs(make(**told)).documents, expected(CASES["llama echo"], sources, DOCUMENTS))


def test_a_teacher_that_reads_twice_is_another_one(sources: dict[str, str], saved: dict[str, Path]) -> None:
    names = ("llama", "llama echo")
    identities = [
        load_teacher(Component(kind="sparse_encoder", model=str(saved[name])), collection_of(DOCUMENTS)).identity
        for name in names
    ]
    assert identities[0] != identities[1]
    bare: Any = load_teacher(Component(kind="sparse_encoder", model=sources["llama-True"]), collection_of(DOCUMENTS))
    short = QUERIES[:3]
    near(bare.score(short, short), (reference(sources["llama-True"], short, False) ** 2).sum(1))


def test_max_length_counts_one_copy(sources: dict[str, str]) -> None:
    student = make(sources["llama-True"], echo=True)
    tokens = student.tokenize(["x" * 50], "query")[0]
    assert len(tokens) == LENGTH
    first: Any = student.towers.query[0]
    gpt2: Any = load_student(Component(kind="splade", model=sources["gpt2-False"], echo=True), 0)
    assert gpt2.towers.query[0].max_seq_length == 32, "two copies have 64 positions"
    assert first.max_seq_length == LENGTH


def test_the_head_reads_the_second_copy_alone(sources: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In training token states, of which the vocabulary is pooled in parts; in Sentence Transformers logits."""
    student = make(sources["llama-True"], echo=True)
    seen: list[tuple[int, ...]] = []
    pool = sparse_towers.pool_vocabulary

    def pooling(states: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(tuple(states.shape))
        return pool(states, *rest)

    monkeypatch.setattr(sparse_towers, "pool_vocabulary", pooling)
    outputs(student, ["x" * 9], [])
    first: Any = student.towers.query[0]
    first.auto_model.lm_head.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    first(first.preprocess(["x" * 9]))
    assert seen == [(1, 11, 16)] * 2  # ten tokens and one place of padding


@pytest.mark.parametrize("echo", [False, True])
def test_gradients_are_those_of_the_modules_that_are_saved(echo: bool, sources: dict[str, str]) -> None:
    found = []
    for ours in (True, False):
        student = make(sources["mistral-True"], echo=echo).train()
        if ours:
            documents = outputs(student).documents
        else:
            documents = student.towers.model(student.towers.model.preprocess(DOCUMENTS))["sentence_embedding"]
        assert documents is not None
        (documents @ documents.T).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 15
    scale = max(float(gradient.abs().max()) for gradient in found[1].values())
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, atol=1e-5 * scale, rtol=1e-3, msg=name)


def train(student: SparseStudent, steps: int = 15) -> list[float]:
    """In-batch negatives: each document is its own query's."""
    learned = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=3e-2)
    batch, losses = batch_of(student.train(), DOCUMENTS, DOCUMENTS[::-1]), []
    for _ in range(steps):
        grid = student(batch).grid / 100
        loss = torch.nn.functional.cross_entropy(grid, torch.arange(len(DOCUMENTS)).flip(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    student.eval()
    return losses


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}], ids=["all", "LoRA"])
def test_it_learns(lora: dict[str, Any] | None, sources: dict[str, str], tmp_path: Path) -> None:
    student = make(sources["llama-True"], echo=True, lora=lora)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained) == (lora is not None)
    losses = train(student)
    assert losses[-1] < 0.9 * losses[0]
    student.save(tmp_path)
    with torch.no_grad():
        found, again = outputs(student), outputs(make(str(tmp_path)))
    near(again.documents, found.documents.numpy())  # type: ignore[union-attr]
    names = load_sparse_towers(str(tmp_path)).model.state_dict()
    assert not any("lora" in name for name in names)


def test_towers_apart_have_updates_of_their_own(sources: dict[str, str], saved: dict[str, Path]) -> None:
    lora = {"targets": ["q_proj"]}
    document = {"model": sources["llama-True"], "lora": lora}
    student = make(sources["llama-True"], document=document)
    trained = {name.split(".")[0] for name, one in student.named_parameters() if "lora_" in name and one.requires_grad}
    assert trained == {"document"}
    with pytest.raises(InputError, match=r"student\.document\.lora would train nothing"):
        make(sources["llama-True"], document={**document, "frozen": True})
    free = load_student(Component(kind="inference_free", model=str(saved["free"]), lora=lora), 0)
    assert {name.split(".")[0] for name, one in free.named_parameters() if one.requires_grad} == {"document"}


@pytest.mark.parametrize("name", ["llama echo", "gpt2 echo"])
def test_exported_it_gives_the_same_vectors(
    name: str, saved: dict[str, Path], sources: dict[str, str], tmp_path: Path
) -> None:
    towers = load_sparse_towers(str(saved[name]))
    export_graph(towers.query, tmp_path / "fp32", "fp32", identity={}, check_texts=DOCUMENTS)
    near(Encoder.load(tmp_path / "fp32").encode(TEXTS).toarray(), expected(CASES[name], sources, TEXTS))


def test_what_cannot_work(sources: dict[str, str], saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mlm' is none, or was trained to read it once; leave echo out"):
        make(str(tiny_masked_lm(tmp_path / "mlm")), echo=True)
    with pytest.raises(InputError, match="read it once; leave echo out"):
        make(str(saved["llama"]), echo=True)
    AutoModel.from_pretrained(sources["llama-True"]).save_pretrained(tmp_path / "headless")
    AutoTokenizer.from_pretrained(sources["llama-True"]).save_pretrained(tmp_path / "headless")
    for echo in (False, True):
        with pytest.raises(InputError, match="no language model's head"):
            make(str(tmp_path / "headless"), echo=echo)


@pytest.mark.parametrize("name", ["llama", "llama echo"])
def test_both_copies_count_in_a_micro_batch(
    sources: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    student, sizes = of_case(CASES[name], sources), []
    encode = sparse_towers.encode_batch

    def watched(modules: Any, token_ids: Any) -> Any:
        sizes.append(len(token_ids) * max(map(len, token_ids)) * (2 if CASES[name].echo else 1))
        return encode(modules, token_ids)

    monkeypatch.setattr(sparse_towers, "encode_batch", watched)
    outputs(student)
    assert 25 < max(sizes) <= 50  # micro_batch_tokens of `batch_of`
