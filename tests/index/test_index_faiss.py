"""FAISS indexes: Flat against brute force, the approximate ones against Flat, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import csr_array

from retrieval_kd.index import Index, build_index, open_index
from retrieval_kd.tables import Component
from retrieval_kd.types import InputError

FLAT = Component(kind="faiss")


def random_vectors(count: int, width: int = 16, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def make(folder: Path, vectors: NDArray[np.float32], **options: object) -> Index:
    ids = [f"d{row}" for row in range(len(vectors))]
    build_index(Component(kind="faiss", **options), vectors, folder, document_ids=ids, identity={"tower": "tiny"})
    return Index(folder)


@pytest.mark.parametrize("queries", [1, 7, 50])  # FAISS goes another way from 20 queries on
def test_flat_is_brute_force(tmp_path: Path, queries: int) -> None:
    documents, asked = random_vectors(200), random_vectors(queries, seed=1)
    hits = make(tmp_path / "index", documents).search(asked, 10)
    full = asked @ documents.T
    np.testing.assert_array_equal(hits.rows, np.argsort(-full, axis=1)[:, :10])
    np.testing.assert_allclose(hits.scores, -np.sort(-full, axis=1)[:, :10], rtol=1e-4, atol=1e-5)


def test_many_queries_are_searched_in_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, asked = make(tmp_path / "index", random_vectors(200)), random_vectors(53, seed=1)
    whole, sizes = index.search(asked, 10), []
    search = index._opened.search
    monkeypatch.setattr(index._opened, "search", lambda vectors, k: sizes.append(len(vectors)) or search(vectors, k))
    monkeypatch.setattr("retrieval_kd.index.RESULTS", 250)
    hits = index.search(asked, 10)
    assert sizes == [25, 25, 3]
    np.testing.assert_array_equal(hits.rows, whole.rows)
    np.testing.assert_allclose(hits.scores, whole.scores, rtol=1e-6)


def test_candidates_are_scored_again(tmp_path: Path) -> None:
    documents, asked = random_vectors(500), random_vectors(30, seed=1)
    best = np.argsort(-(asked @ documents.T), axis=1)[:, :10]
    shares = []
    for k_factor in (1, 50):
        index = make(tmp_path / str(k_factor), documents, factory="RaBitQ,Refine(Flat)", k_factor=k_factor)
        rows = index.search(asked, 10).rows
        shares.append(np.mean([len({*one} & {*other}) / 10 for one, other in zip(rows, best, strict=True)]))
    assert shares[0] < 0.8
    assert shares[1] == 1.0  # every document
    with pytest.raises(InputError, match=r"index\.k_factor: the factory 'Flat' has no such parameter; drop it"):
        make(tmp_path / "flat", documents, k_factor=2)


def test_inner_product_and_not_cosine(tmp_path: Path) -> None:
    documents = np.array([[1, 0], [3, 3], [0, 0.5]], np.float32)
    hits = make(tmp_path / "index", documents).search(np.array([[1, 0.1]], np.float32), 3)
    assert hits.rows.tolist() == [[1, 0, 2]]
    np.testing.assert_allclose(hits.scores, [[3.3, 1.0, 0.05]], rtol=1e-6)


def test_equal_scores_come_by_row(tmp_path: Path) -> None:
    documents = np.array([[1, 0], [2, 0], [1, 0], [2, 0], [1, 0]], np.float32)
    hits = make(tmp_path / "index", documents).search(np.array([[1, 0], [-1, 0]], np.float32), 5)
    assert hits.rows.tolist() == [[1, 3, 0, 2, 4], [0, 2, 4, 1, 3]]
    assert hits.scores.tolist() == [[2, 2, 1, 1, 1], [-1, -1, -1, -2, -2]]


def test_more_results_than_documents_and_none(tmp_path: Path) -> None:
    index = make(tmp_path / "index", random_vectors(3))
    assert index.search(random_vectors(2), 10).rows.shape == (2, 3)
    assert index.search(random_vectors(0), 10).rows.shape == (0, 3)
    empty = make(tmp_path / "empty", random_vectors(0))
    assert empty.search(random_vectors(2), 10).rows.shape == (2, 0)


@pytest.mark.parametrize(
    ("options", "overlap"),
    [
        ({"factory": "HNSW16", "ef_search": 200}, 0.95),
        ({"factory": "IVF8,Flat", "nprobe": 8}, 1.0),  # every list: exact
        ({"factory": "IVF8,Flat", "nprobe": 1}, 0.2),
        ({"factory": "SQ8"}, 0.9),
        ({"factory": "IVF4,PQ8x4", "nprobe": 4}, 0.2),
    ],
)
def test_other_factories_find_most_of_it(tmp_path: Path, options: dict[str, object], overlap: float) -> None:
    documents, asked = random_vectors(400), random_vectors(20, seed=1)
    exact = make(tmp_path / "flat", documents).search(asked, 10)
    found = make(tmp_path / "index", documents, **options).search(asked, 10)
    shared = [len({*one} & {*other}) / 10 for one, other in zip(exact.rows, found.rows, strict=True)]
    assert np.mean(shared) >= overlap


def test_search_parameters_count(tmp_path: Path) -> None:
    """One list of eight holds fewer than 100 documents: the places left are empty, and are so marked."""
    documents, asked = random_vectors(400), random_vectors(20, seed=1)
    hits = make(tmp_path / "narrow", documents, factory="IVF8,Flat", nprobe=1).search(asked, 390)
    missing = hits.rows == -1
    assert missing.any(axis=1).all()
    np.testing.assert_array_equal(missing, np.isneginf(hits.scores))
    assert (np.diff(missing.astype(int), axis=1) >= 0).all(), "missing places stand last"
    wide = make(tmp_path / "wide", documents, factory="IVF8,Flat", nprobe=8).search(asked, 390)
    assert wide.valid.all()


def test_manifest_and_open(tmp_path: Path) -> None:
    vectors = random_vectors(5)
    identity = {"weights": "w1", "pair": (1, 2)}
    manifest = build_index(FLAT, vectors, tmp_path / "index", document_ids=list("abcde"), identity=identity)
    assert {key: manifest[key] for key in ("kind", "factory", "documents", "vectors", "dimension", "nprobe")} == {
        "kind": "faiss",
        "factory": "Flat",
        "documents": 5,
        "vectors": "dense",
        "dimension": 16,
        "nprobe": None,
    }
    assert manifest["identity"] == {"weights": "w1", "pair": [1, 2]}, "as it will be read"
    assert manifest["bytes"] >= vectors.nbytes
    assert manifest["seconds"] >= 0
    index = open_index(tmp_path / "index")
    assert index.manifest == manifest
    assert index.document_ids == list("abcde")
    assert index.search(vectors[2:3], 1).rows.tolist() == [[2]]


def test_the_settings_of_the_process_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a search, FAISS has the index's threads, and takes eight queries together; after it, what it had."""
    documents = random_vectors(5)
    make(tmp_path / "index", documents)

    def settings() -> tuple[int, int]:
        return faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold

    before, inside = settings(), []
    index = Index(tmp_path / "index", threads=before[0] + 1)
    opened = index._opened._index
    fake = SimpleNamespace(search=lambda vectors, k: inside.append(settings()) or opened.search(vectors, k))
    monkeypatch.setattr(index._opened, "_index", fake)
    index.search(random_vectors(2), 3)
    assert inside == [(before[0] + 1, 8 * documents.shape[1])]
    assert settings() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factory": "IVF64,Flat"}, "'IVF64,Flat' cannot be trained on 20 vectors: at least 64 are needed"),
        ({"factory": "PQ4"}, "cannot be trained on 20 vectors: at least 256 are needed"),
        ({"factory": "Flatt"}, "FAISS cannot build 'Flatt'"),
        ({"factory": "PQ5"}, "FAISS cannot build 'PQ5' .*multiple"),
        ({"factory": "IDMap,Flat"}, "FAISS cannot fill 'IDMap,Flat'"),
        ({"nprobe": 3}, "index.nprobe: the factory 'Flat' has no such parameter"),
        ({"factory": "IVF4,Flat", "ef_search": 3}, "index.ef_search: the factory 'IVF4,Flat' has no such"),
    ],
)
def test_what_cannot_be_built(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(tmp_path / "index", random_vectors(20), **options)
    assert list(tmp_path.iterdir()) == []


def test_vectors_and_ids_that_are_refused(tmp_path: Path) -> None:
    vectors = random_vectors(3)
    with pytest.raises(InputError, match="ids occur twice"):
        build_index(FLAT, vectors, tmp_path / "index", document_ids=["a", "b", "a"], identity={})
    vectors[1, 3] = np.nan
    with pytest.raises(InputError, match="vector of document 'b' has values"):
        build_index(FLAT, vectors, tmp_path / "index", document_ids=["a", "b", "c"], identity={})
    assert list(tmp_path.iterdir()) == []


def test_folders_and_queries_that_are_refused(tmp_path: Path) -> None:
    index = make(tmp_path / "index", random_vectors(5))
    for wrong in (random_vectors(2, width=8), random_vectors(1)[0]):
        with pytest.raises(InputError, match="cannot be searched in an index of width 16"):
            index.search(wrong, 3)
    with pytest.raises(InputError, match="is not an index"):
        open_index(tmp_path)
    path = tmp_path / "index" / "index.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"kind": "fais"}))
    with pytest.raises(InputError, match="did you mean 'faiss'"):
        open_index(tmp_path / "index")
    path.write_text(json.dumps(manifest | {"format": 0}))
    with pytest.raises(InputError, match="format 0 is unknown"):
        open_index(tmp_path / "index")
    path.write_text(json.dumps(manifest))
    (tmp_path / "index" / "document_ids.json").write_text('["a", "b"]')
    with pytest.raises(InputError, match="2 document ids and a manifest of 5"):
        open_index(tmp_path / "index")
    (tmp_path / "index" / "document_ids.json").write_text(json.dumps([f"d{row}" for row in range(5)]))
    make(tmp_path / "less", random_vectors(4))
    (tmp_path / "less" / "index.faiss").rename(tmp_path / "index" / "index.faiss")
    with pytest.raises(InputError, match="4 vectors and a manifest of 5 documents"):
        open_index(tmp_path / "index")
    with pytest.raises(InputError, match="does not take sparse vectors"):
        build_index(FLAT, csr_array(np.eye(2, dtype=np.float32)), tmp_path / "x", document_ids=["a", "b"], identity={})


@pytest.mark.parametrize("factory", ["Flat", "IVF4", "HNSW16"])
def test_binary_vectors_are_compared_by_their_signs(tmp_path: Path, factory: str) -> None:
    documents, asked = random_vectors(200, width=24), random_vectors(9, width=24, seed=1)
    search = {"IVF4": {"nprobe": 4}, "HNSW16": {"ef_search": 200}}.get(factory, {})
    index = make(tmp_path / "index", np.packbits(documents > 0, axis=1), factory=factory, **search)
    assert (index.manifest["vectors"], index.manifest["dimension"]) == ("binary", 24)
    hits = index.search(np.packbits(asked > 0, axis=1), 10)
    full = np.where(asked > 0, 1, -1) @ np.where(documents > 0, 1, -1).T
    np.testing.assert_array_equal(hits.scores, -np.sort(-full, axis=1)[:, :10])
    np.testing.assert_array_equal(np.take_along_axis(full, hits.rows, 1), hits.scores)
    if factory == "Flat":  # equal scores, of which there are many, by row
        np.testing.assert_array_equal(hits.rows, np.argsort(-full, axis=1, kind="stable")[:, :10])


def test_binary_and_dense_do_not_meet(tmp_path: Path) -> None:
    packed = np.packbits(random_vectors(20, width=64) > 0, axis=1)
    index = make(tmp_path / "binary", packed)
    with pytest.raises(InputError, match=r"dense query vectors of shape \(2, 64\) .* width 64 that takes binary ones"):
        index.search(random_vectors(2, width=64), 3)
    with pytest.raises(InputError, match="binary query vectors"):
        make(tmp_path / "dense", random_vectors(20, width=64)).search(packed[:2], 3)
    with pytest.raises(InputError, match="'Flat' has no such parameter"):
        make(tmp_path / "flat", packed, nprobe=2)
    with pytest.raises(InputError, match="FAISS cannot build 'PQ8'"):
        make(tmp_path / "pq", packed, factory="PQ8")
