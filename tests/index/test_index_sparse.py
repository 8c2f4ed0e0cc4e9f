"""Every sparse index against the plain matrix product, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.sparse import csr_array, hstack, random_array, vstack

from retrieval_kd.index import Index, build_index, open_index
from retrieval_kd.tables import Component, kind_module
from retrieval_kd.types import Hits, InputError

CASES = [
    ("impact", {}),
    ("impact", {"window": 100}),
    ("impact", {"weights": "float32"}),
    ("lucene", {}),
    ("seismic", {}),
    ("milvus", {}),
]


def kind_of(name: str) -> str:
    """The name of a kind whose packages are there."""
    try:
        kind_module("index", name)
    except InputError as error:
        pytest.skip(str(error))
    return name


def sparse(rows: int, terms: int, density: float, seed: int) -> csr_array:
    vectors = csr_array(random_array((rows, terms), density=density, format="csr", dtype=np.float32, rng=seed))
    vectors.sort_indices()
    return vectors


def make(folder: Path, kind: str, vectors: csr_array, threads: int = 1, **options: object) -> Index:
    ids = [f"d{row}" for row in range(vectors.shape[0])]
    build_index(Component(kind=kind, **options), vectors, folder, document_ids=ids, identity={"tower": "tiny"})
    return open_index(folder, threads)


def kept(vectors: csr_array, weights: str = "uint8") -> NDArray[np.float64]:
    """The documents' weights as an exact index keeps them, written anew."""
    full = vectors.toarray().astype(np.float64)
    step = full.max(initial=0) / 255
    return (
        full if weights == "float32" or step == 0 else np.where(full > 0, np.maximum(np.rint(full / step), 1), 0) * step
    )


def assert_product(hits: Hits, queries: csr_array, documents: NDArray[np.float64], k: int) -> None:
    """The hits are the best of the product: equal scores, and each row has the score it is listed with."""
    full = queries.toarray().astype(np.float64) @ documents.T
    k = min(k, len(documents))
    wanted = -np.sort(-full, axis=1)[:, :k]
    assert hits.rows.shape == wanted.shape
    np.testing.assert_array_equal(hits.rows >= 0, wanted > 0)
    for rows, scores, best, every in zip(hits.rows, hits.scores, wanted, full, strict=True):
        found = rows >= 0
        assert len(set(rows[found])) == found.sum()
        np.testing.assert_allclose(scores[found], best[found], rtol=2e-5)
        np.testing.assert_allclose(scores[found], every[rows[found]], rtol=2e-5)
        assert np.isneginf(scores[~found]).all()


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda case: str(case))
def test_agrees_with_the_product(tmp_path: Path, name: str, options: dict[str, object]) -> None:
    documents, queries = sparse(3000, 400, 0.04, 1), sparse(40, 400, 0.05, 2)
    hits = make(tmp_path / "index", kind_of(name), documents, **options).search(queries, 10)
    if name in ("impact", "lucene"):
        assert_product(hits, queries, kept(documents, str(options.get("weights", "uint8"))), 10)
        return
    best = np.argsort(-(queries @ documents.T).toarray(), axis=1, kind="stable")[:, :10]
    shared = [len({*one} & {*other}) / 10 for one, other in zip(best, hits.rows, strict=True)]
    assert np.mean(shared) >= 0.98


@pytest.mark.parametrize("name", ["impact", "lucene", "seismic", "milvus"])
def test_empty_ones_and_more_results_than_documents(tmp_path: Path, name: str) -> None:
    documents = csr_array(np.array([[1, 0, 2], [0, 0, 0], [0, 3, 0], [2, 0, 1]], np.float32))
    queries = csr_array(np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], np.float32))
    hits = make(tmp_path / "index", kind_of(name), documents).search(queries, 10)
    assert hits.rows.tolist() == [[0, 3, -1, -1], [-1] * 4, [2, -1, -1, -1]]
    np.testing.assert_allclose(hits.scores[0, :2], [3, 3], rtol=5e-3)
    assert np.isneginf(hits.scores[hits.rows < 0]).all()
    nothing = make(tmp_path / "nothing", kind_of(name), csr_array((2, 3), dtype=np.float32))
    assert nothing.search(queries, 5).rows.tolist() == [[-1, -1]] * 3


weights = st.sampled_from([0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 255.0])  # few values: ties


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 70).flatmap(lambda count: arrays(np.float32, (count, 4), elements=weights)),
    arrays(np.float32, (3, 4), elements=weights),
    st.integers(1, 80),
    st.sampled_from([1, 3, 16, 2**16]),
)
def test_impact_is_the_product_ties_by_row(
    tmp_path: Path, documents: NDArray[np.float32], queries: NDArray[np.float32], k: int, window: int
) -> None:
    index = make(tmp_path / "index", "impact", csr_array(documents), window=window, weights="float32")
    hits = index.search(csr_array(queries), k)
    full = queries @ documents.T
    best = np.argsort(-full, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(full, best, axis=1)
    np.testing.assert_array_equal(hits.rows, np.where(scores > 0, best, -1))
    np.testing.assert_array_equal(hits.scores, np.where(scores > 0, scores, -np.inf))


@pytest.mark.parametrize("k", [1, 10, 500])
def test_impact_over_many_windows(tmp_path: Path, k: int) -> None:
    """More documents than places of 16 bits hold, and queries of few and of many terms."""
    documents = sparse(70_000, 200, 0.03, 3)
    index = make(tmp_path / "index", "impact", documents, threads=3)
    one = make(tmp_path / "one", "impact", documents)
    for density in (0.01, 0.3):
        queries = sparse(8, 200, density, 4)
        hits = index.search(queries, k)
        assert_product(hits, queries, kept(documents), k)
        np.testing.assert_array_equal(hits.rows, one.search(queries, k).rows)


@pytest.mark.parametrize("weights", ["uint8", "float32"])
@pytest.mark.parametrize("window", [100, 1024])
def test_impact_leaves_out_what_cannot_win(tmp_path: Path, weights: str, window: int) -> None:
    """Weights so uneven that windows are left out and terms are not added."""
    documents, queries = sparse(6000, 400, 0.06, 0), sparse(40, 400, 0.03, 1)
    documents.data **= 3
    documents = csr_array(documents.multiply(np.repeat(np.linspace(3, 0.2, 60), 100)[:, None]).astype(np.float32))
    index = make(tmp_path / "index", "impact", documents, weights=weights, window=window)
    for k in (1, 10, 500):
        assert_product(index.search(queries, k), queries, kept(documents, weights), k)


@pytest.mark.parametrize("weights", ["uint8", "float32"])
def test_impact_looks_documents_up(tmp_path: Path, weights: str) -> None:
    """Rare strong terms that leave few documents able to win, whose weights of frequent weak terms are looked up."""
    rare, frequent = sparse(60_000, 30, 0.001, 0), sparse(60_000, 6, 0.6, 1)
    documents = csr_array(hstack([rare * 40, frequent], format="csr"), dtype=np.float32)
    index = make(tmp_path / "index", "impact", documents, weights=weights, window=20_000)
    queries = csr_array(hstack([sparse(30, 30, 0.08, 2), csr_array(np.ones((30, 6)))], format="csr"), dtype=np.float32)
    for k in (1, 10, 40):
        assert_product(index.search(queries, k), queries, kept(documents, weights), k)


def test_equal_documents_come_by_row_whatever_their_window(tmp_path: Path) -> None:
    """A sum does not depend on the window: the same twenty documents, in ninety places each."""
    documents = csr_array(vstack([sparse(20, 60, 0.25, 3)] * 90, format="csr"))
    index = make(tmp_path / "index", "impact", documents, window=64, weights="float32")
    hits = index.search(sparse(40, 60, 0.15, 4), 30)
    found = hits.valid.all(axis=1)
    assert found.sum() > 30
    assert (np.diff(hits.rows[found], axis=1) == 20).all(), "the best document's first thirty places"
    assert (hits.scores[found] == hits.scores[found, :1]).all()


def test_what_is_refused(tmp_path: Path) -> None:
    documents = sparse(5, 20, 0.3, 1)
    index = make(tmp_path / "index", "impact", documents)
    with pytest.raises(InputError, match=r"shape \(2, 7\) cannot be searched in an index of width 20"):
        index.search(sparse(2, 7, 0.3, 1), 3)
    with pytest.raises(InputError, match="dense query vectors"):
        index.search(documents.toarray(), 3)
    with pytest.raises(InputError, match="weights below 0"):
        index.search(-documents, 3)
    with pytest.raises(InputError, match="so large"):
        index.search(csr_array(documents * np.float32(1e38)), 3)
    bad = documents.copy()
    bad.data[bad.indptr[3]] = -1
    with pytest.raises(InputError, match="document 'd3' has weights below 0"):
        make(tmp_path / "other", "impact", bad)
    bad.data[bad.indptr[3]] = np.nan
    with pytest.raises(InputError, match="document 'd3' has values that are not finite"):
        make(tmp_path / "other", "impact", bad)
    np.save(tmp_path / "index" / "places.npy", np.zeros(2, np.uint16))
    with pytest.raises(InputError, match="do not belong together"):
        open_index(tmp_path / "index")
    assert not (tmp_path / "other").exists()


def test_a_collection_of_milvus_that_was_built_anew_is_not_searched(tmp_path: Path) -> None:
    """Two indexes on one server, under one name: the first one's documents are gone."""
    options = {"uri": str(tmp_path / "server.db")}
    first = sparse(6, 20, 0.4, 1)
    found = make(tmp_path / "first", kind_of("milvus"), first, **options).search(first, 1)
    assert found.rows.shape == (6, 1)
    make(tmp_path / "second", "milvus", sparse(6, 20, 0.4, 2), **options)
    with pytest.raises(
        InputError, match=r"'documents' at .*server\.db was built anew .* an index\.collection of its own"
    ):
        open_index(tmp_path / "first")
    make(tmp_path / "third", "milvus", first, **options, collection="other")
    open_index(tmp_path / "second")


@pytest.mark.parametrize("name", ["impact", "lucene", "seismic", "milvus"])
def test_weights_of_0_are_no_terms(tmp_path: Path, name: str) -> None:
    """Stored zeros count for nothing, and the caller's vectors are left as they are."""
    documents = csr_array(np.array([[1, 3, 2], [2, 4, 1]], np.float32))
    documents.data[1] = documents.data[4] = 0
    index = make(tmp_path / "index", kind_of(name), documents)
    asked = csr_array(np.array([[0, 1, 0], [1, 0, 0]], np.float32))
    assert index.search(asked, 2).rows.tolist() == [[-1, -1], [1, 0]]
    assert documents.nnz == 6
    assert index.manifest["dimension"] == 3
