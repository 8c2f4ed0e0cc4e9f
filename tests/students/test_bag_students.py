"""Static and lexical students: where they start, what they compute, and that what is saved and served is the same."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from batches import DOCUMENTS, QUERIES, batch_of
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tiny import tiny_sentence_transformer

from retrieval_kd.bag_student import BagStudent
from retrieval_kd.encoder import Encoder
from retrieval_kd.export_table import export_table
from retrieval_kd.static_start import piece_vectors, principal_axes, sentence_states, special_tokens, table_tokens
from retrieval_kd.students import Batch, begin, begins, begun, load_student
from retrieval_kd.tables import Component
from retrieval_kd.towers import load_towers
from retrieval_kd.types import InputError

SMALL: dict[str, Any] = {"hidden": (8, 12), "dimension": 6, "longest": 3}
STUDENTS: list[tuple[str, dict[str, Any]]] = [
    ("static", {}),
    ("static", {"dimension": 12, "weights": "zipf"}),
    ("static", {"dimension": 12, "drop": 3, "start": "sentences", "weights": "idf"}),
    ("static", {"max_length": 7}),
    ("lexical", SMALL),
    ("lexical", {**SMALL, "start": "teacher", "hidden": (10,)}),
    ("lexical", {**SMALL, "start": "teacher", "hidden": (), "max_length": 7}),
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_sentence_transformer(folder / "t", width=32).save(str(folder / "model"))
    return folder / "model"


def make(kind: str, teacher: Path, folder: Path, **options: Any) -> BagStudent:
    """A student as a run makes it, with new weights added as if trained."""
    component = Component(kind=kind, model=str(teacher), **options)
    assert begins(component)
    folder.mkdir(exist_ok=True)
    begin(component, DOCUMENTS, folder, seed=0, precision="fp32")
    started = begun(component, folder)
    assert not begins(started)
    student = load_student(started, 0)
    assert isinstance(student, BagStudent)
    return student.eval()


def shake(student: BagStudent) -> None:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))


def vectors(student: BagStudent) -> tuple[Any, Any, Any]:
    """Vectors of both sides and all scores, through the forward pass that training uses."""
    with torch.no_grad():
        outputs = student(batch_of(student, QUERIES, DOCUMENTS))
    assert outputs.queries is not None
    assert outputs.documents is not None
    return outputs.queries.numpy(), outputs.documents.numpy(), outputs.scores.numpy()


@pytest.mark.parametrize(("kind", "options"), STUDENTS, ids=str)
def test_saved_loaded_and_served_it_gives_the_same_vectors(
    kind: str, options: dict[str, Any], teacher: Path, tmp_path: Path
) -> None:
    student = make(kind, teacher, tmp_path / "start", **options)
    shake(student)
    queries, documents, scores = vectors(student)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(scores, queries @ documents.T, atol=1e-6)
    (tmp_path / "saved").mkdir()
    student.save(tmp_path / "saved")
    trust = {"trust_remote_code": True} if kind == "lexical" else {}
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu", **trust)
    np.testing.assert_allclose(loaded.encode_query(QUERIES), queries, atol=1e-6)
    np.testing.assert_allclose(loaded.encode_document(DOCUMENTS), documents, atol=1e-6)
    assert loaded.similarity_fn_name == "dot"
    again = load_student(Component(kind=kind, model=str(tmp_path / "saved")), 0)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
    for form in ("fp32", "int8"):
        same = {"identity": {"side": "query"}, "document_identity": {"side": "query"}}
        manifest = export_table(list(student.query), tmp_path / form, form, check_texts=QUERIES, **same)  # type: ignore[arg-type]
        served = Encoder.load(tmp_path / form).encode([*DOCUMENTS, ""])
        np.testing.assert_allclose(served[:-1], documents, atol=1e-6 if form == "fp32" else 0.03)
        assert not served[-1].any()
        assert manifest["dimension"] == documents.shape[1]
        assert manifest["parity"]["min_cosine"] > 0.999
    exact, small = ((tmp_path / form / "table.npz").stat().st_size for form in ("fp32", "int8"))
    assert small < exact
    assert Encoder.load(tmp_path / "int8").count_tokens(DOCUMENTS)[0] == min(
        len(again.towers.query[0].tokenizer.encode(DOCUMENTS[0]).ids), options.get("max_length", 24)
    )


def test_plain_sentence_transformers_asks_for_trust_in_a_lexical_student(teacher: Path, tmp_path: Path) -> None:
    make("lexical", teacher, tmp_path, **SMALL)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(tmp_path / "model"), device="cpu")


def model2vec_inference() -> ModuleType:
    """Model2Vec's functions from tokens to rows, without what its package needs for tokenizers."""
    pytest.importorskip("model2vec")
    spec = importlib.util.find_spec("model2vec")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "distill" / "inference.py"
    found = importlib.util.spec_from_file_location("model2vec_inference", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_table_is_that_of_model2vec(teacher: Path, tmp_path: Path) -> None:
    """Equal rows, up to the sign of a principal component, for the same tokens and without training."""
    oracle = model2vec_inference()
    student = make("static", teacher, tmp_path, dimension=12, weights="zipf")
    table: Any = student.query[0]
    model = SentenceTransformer(str(teacher), device="cpu")
    first: Any = model[0]
    ids, heard = table_tokens(first.tokenizer)
    before, after = special_tokens(first.tokenizer)
    found = oracle.create_embeddings(first.auto_model, [[*before, token, *after] for token in ids.tolist()], "cpu", 0)
    found = oracle.apply_pca(found, 12) * oracle.compute_weights(len(ids), 1e-4)[:, None]
    rows = table.embedding.weight.detach().numpy()
    signs = np.sign((rows[ids] * found)[heard].sum(0))
    assert (signs != 0).all()
    np.testing.assert_allclose((rows[ids] * signs)[heard], found[heard], atol=1e-5)
    assert set(ids[~heard].tolist()) == {first.tokenizer.pad_token_id, first.tokenizer.unk_token_id}
    assert not rows[first.tokenizer.all_special_ids].any()


def test_tokens_start_as_the_teacher_s_vectors_of_them(teacher: Path, tmp_path: Path) -> None:
    """Less the mean of all, which the oracle of the table is too."""
    student = make("static", teacher, tmp_path)
    rows = student.query[0].embedding.weight.detach().numpy()  # type: ignore[union-attr]
    model = SentenceTransformer(str(teacher), device="cpu")
    vocabulary = model.tokenizer.get_vocab()
    first, second = (
        np.mean([state.numpy() for state in model.encode(word, output_value="token_embeddings")], 0)
        for word in ("list", "thread")
    )
    np.testing.assert_allclose(rows[vocabulary["list"]] - rows[vocabulary["thread"]], first - second, atol=1e-5)
    ids, heard = table_tokens(model.tokenizer)
    np.testing.assert_allclose(rows[ids[heard]].mean(0), 0, atol=0.1)


@pytest.mark.parametrize("options", [{}, {"start": "sentences"}, {**SMALL, "start": "teacher"}], ids=str)
def test_the_teacher_is_read_in_the_recipe_s_precision(options: dict[str, Any], teacher: Path, tmp_path: Path) -> None:
    """In bf16 the rows are near those of fp32, and not the same."""
    component = Component(kind="lexical" if "hidden" in options else "static", model=str(teacher), **options)
    started = {}
    for precision in ("fp32", "bf16"):
        begin(component, DOCUMENTS, tmp_path / precision, 0, precision)
        started[precision] = load_student(begun(component, tmp_path / precision), 0).state_dict()
    for name, rows in started["fp32"].items():
        np.testing.assert_allclose(started["bf16"][name], rows, atol=0.03 * rows.abs().max())
    assert any(not torch.equal(started["bf16"][name], rows) for name, rows in started["fp32"].items())


def test_sentences_start_from_mean_states(teacher: Path, tmp_path: Path) -> None:
    """A token's states in all its places and its own vector once, moved as states are from vectors of single tokens."""
    towers = load_towers(str(teacher))
    model = SentenceTransformer(str(teacher), device="cpu")
    read = [model.tokenizer(text, truncation=True, max_length=24)["input_ids"] for text in DOCUMENTS]
    alone = np.random.default_rng(0).normal(size=(len(model.tokenizer), 32)).astype(np.float32)
    rows, sentences = sentence_states(towers, DOCUMENTS, alone, "fp32")
    by_token: dict[int, list[Any]] = {}
    for ids, found in zip(read, model.encode(DOCUMENTS, output_value="token_embeddings"), strict=True):
        for token, state in zip(ids, found.numpy(), strict=True):
            by_token.setdefault(token, []).append(state)
    seen = sorted(by_token)
    shift = np.mean([np.mean(by_token[token], 0) for token in seen], 0) - alone[seen].mean(0)
    for token in range(len(alone)):
        states = by_token.get(token, [])
        expected = (np.sum(states, 0) + alone[token] + shift) / (len(states) + 1)
        np.testing.assert_allclose(rows[token], expected, atol=1e-4)
    means = [rows[[token for token in ids if token not in model.tokenizer.all_special_ids]].mean(0) for ids in read]
    np.testing.assert_allclose(sentences, means, atol=1e-5)


def test_principal_axes_are_those_of_svd() -> None:
    points = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32) * [5, 4, 3, 2, 1, 0.5]
    axes = principal_axes(points, 3, drop=1)
    _, _, rows = np.linalg.svd(points - points.mean(0))
    np.testing.assert_allclose(np.abs(axes.T @ rows[1:4].T), np.eye(3), atol=1e-5)
    with pytest.raises(InputError, match="ask for 7 principal axes; the teacher's vectors have 6"):
        principal_axes(points, 4, drop=3)


@pytest.mark.parametrize("start", ["random", "teacher"])
def test_a_lexical_student_is_a_product_with_tf_idf(start: str, teacher: Path, tmp_path: Path) -> None:
    """By the matrix of texts by n-grams that the module does without, its columns counted with a dictionary."""
    options = {**SMALL, "start": start, "at_least": 2}
    student = make("lexical", teacher, tmp_path, **options)
    module: Any = student.query[0]
    tokens = [one.ids for one in module.tokenizer.encode_batch(DOCUMENTS, add_special_tokens=False)]
    grams = [Counter(tuple(ids[at : at + n]) for n in (1, 2, 3) for at in range(len(ids) - n + 1)) for ids in tokens]
    total: Counter[tuple[int, ...]] = sum(grams, Counter())
    known = sorted(gram for gram, count in total.items() if count >= 2)
    if start == "teacher":
        ids, heard = table_tokens(SentenceTransformer(str(teacher)).tokenizer)
        known += [(token,) for token in ids[heard].tolist() if (token,) not in known]
    assert len(known) == len(module.keys)
    counts = np.array([[one[gram] for gram in known] for one in grams], float)
    place = {gram: module.keys.tolist().index(key(gram)) for gram in known}
    table = module.table.weight.detach().numpy()[[place[gram] for gram in known]]
    x = unit(counts @ table)
    layers = [layer.detach().numpy() for layer in module.layers]
    if start == "random":
        for layer in layers:
            x = unit(np.maximum(x, 0)) @ layer.T
    else:
        assert not layers[-1].any(), "the network starts as the sum of its rows"
    np.testing.assert_allclose(vectors(student)[1], unit(x), atol=1e-5)
    if start == "teacher":  # a token's row has its vector's direction, and pseudo-IDF by length; others are 0
        single = np.array([len(gram) == 1 for gram in known])
        assert not table[~single].any()
        vectors_alone = piece_vectors(
            load_towers(str(teacher)), [list(gram) for gram in known if len(gram) == 1], "fp32"
        )
        seen = np.array([total[gram] if total[gram] >= 2 else 1 for gram in known])
        weights = np.log(seen.sum() / seen)[single, None]
        expected = weights * (vectors_alone - vectors_alone.mean(0))
        np.testing.assert_allclose(table[single], expected / np.linalg.norm(expected, axis=1).mean(), atol=1e-5)


def key(gram: tuple[int, ...]) -> int:
    value = gram[0] + 1
    for token in gram[1:]:
        value = (value * 0x9E3779B97F4A7C15 + token + 1) % 2**64
    return value


def unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ["static", "lexical"])
def test_a_frozen_document_tower_keeps_its_vectors(kind: str, teacher: Path, tmp_path: Path) -> None:
    options = {"start": "teacher", "hidden": ()} if kind == "lexical" else {}
    student = make(kind, teacher, tmp_path / "start", document={"model": str(teacher)}, **options)
    assert student.frozen_documents
    assert not any("document" in name for name in student.state_dict())
    model = SentenceTransformer(str(teacher), device="cpu")
    assert (
        student.tokenize(DOCUMENTS[:1], "document")
        == model.tokenizer(DOCUMENTS[:1], truncation=True, max_length=24)["input_ids"]
    )
    (tmp_path / "saved").mkdir()
    student.save(tmp_path / "saved")
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=kind == "lexical")
    np.testing.assert_allclose(loaded.encode_document(DOCUMENTS), model.encode(DOCUMENTS), atol=1e-5)
    np.testing.assert_allclose(loaded.encode_query(QUERIES), vectors_of_queries(student), atol=1e-6)


def vectors_of_queries(student: BagStudent) -> Any:
    tokens = [np.array(ids, np.int32) for ids in student.tokenize(QUERIES, "query")]
    documents = torch.zeros(0, 32)
    with torch.no_grad():
        outputs = student(Batch(tokens, [], torch.zeros(len(QUERIES), 0, dtype=torch.long), documents))
    assert outputs.queries is not None
    return outputs.queries.numpy()


def test_what_cannot_work(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no StaticEmbedding; one that starts from a teacher is made by"):
        load_student(Component(kind="static", model=str(teacher)), 0)
    make("static", teacher, tmp_path / "static")
    with pytest.raises(InputError, match="is of StaticEmbedding, Normalize, where LexicalEmbedding and Normalize"):
        load_student(Component(kind="lexical", model=str(tmp_path / "static/model")), 0)
    with pytest.raises(InputError, match=r"queries have 12 numbers and student\.document\.model 32"):
        make("static", teacher, tmp_path / "narrow", dimension=12, document={"model": str(teacher)})
    with pytest.raises(InputError, match=r"no n-gram comes 999 times in the documents; lower student\.at_least"):
        make("lexical", teacher, tmp_path / "none", at_least=999)
    same: dict[str, Any] = {"identity": {}, "document_identity": {}}
    with pytest.raises(InputError, match="not of Normalize"):
        export_table([Normalize()], tmp_path / "x", "fp32", check_texts=QUERIES, **same)


def test_a_table_that_is_not_the_student_is_refused(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make("static", teacher, tmp_path / "start")
    same: dict[str, Any] = {"identity": {}, "document_identity": {}}
    monkeypatch.setattr("retrieval_kd.served_table._unit", lambda vector: vector)
    with pytest.raises(InputError, match="not written, because the exported encoder differs from torch by"):
        export_table(list(student.query), tmp_path / "fp32", "fp32", check_texts=QUERIES, **same)
    assert not (tmp_path / "fp32").exists()


def test_a_published_static_model_starts_a_student(teacher: Path, tmp_path: Path) -> None:
    tokenizer = SentenceTransformer(str(teacher)).tokenizer
    module = StaticEmbedding(tokenizer, embedding_dim=5)
    SentenceTransformer(modules=[module]).save(str(tmp_path / "model"))
    student = load_student(Component(kind="static", model=str(tmp_path / "model"), max_length=3), 0)
    assert student.towers.normalized  # type: ignore[union-attr]
    assert student.tokenize(["a list of files"], "query") == [
        tokenizer("a list of", add_special_tokens=False)["input_ids"]
    ]  # type: ignore[operator]
