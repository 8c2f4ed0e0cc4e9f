"""Milvus Lite with dense vectors and at an address of its own; what is refused."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import csr_array

from retrieval_kd.index import Index, build_index, open_index
from retrieval_kd.tables import Component
from retrieval_kd.types import InputError

pytest.importorskip("milvus_lite")


def random_vectors(count: int, width: int = 16, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def make(folder: Path, vectors: NDArray[np.float32] | csr_array, **options: object) -> Index:
    ids = [f"d{row}" for row in range(vectors.shape[0])]
    build_index(Component(kind="milvus", **options), vectors, folder, document_ids=ids, identity={"tower": "tiny"})
    return open_index(folder)


@pytest.mark.parametrize("options", [{}, {"index_type": "HNSW"}], ids=str)
def test_dense_vectors_are_searched_by_inner_product(tmp_path: Path, options: dict[str, object]) -> None:
    """More documents than one insertion takes; results below 0 are results."""
    documents, queries = random_vectors(1500), random_vectors(7, seed=1)
    index = make(tmp_path / "index", documents, **options)
    hits, full = index.search(queries, 10), queries @ documents.T
    np.testing.assert_array_equal(hits.rows, np.argsort(-full, axis=1)[:, :10])
    np.testing.assert_allclose(hits.scores, -np.sort(-full, axis=1)[:, :10], rtol=1e-4)
    assert index.manifest["vectors"] == "dense"
    every = make(tmp_path / "few", documents[:5], **options).search(queries, 9)
    assert every.rows.shape == (7, 5)
    np.testing.assert_allclose(every.scores, -np.sort(-full[:, :5], axis=1), rtol=1e-4)
    assert (every.scores < 0).any()


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_the_vectors_are_at_the_address(tmp_path: Path, form: str) -> None:
    """The folder names the address, and holds no vectors itself; another collection there is left alone."""
    dense = np.abs(random_vectors(20))
    vectors = dense if form == "dense" else csr_array(dense)
    options = {"uri": str(tmp_path / "server.db"), "collection": "ours"}
    make(tmp_path / "others", vectors[:3], **{**options, "collection": "theirs"})
    make(tmp_path / "index", vectors, **options)
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == ["document_ids.json", "index.json"]
    hits = open_index(tmp_path / "index").search(vectors[4:6], 20)
    full = dense[4:6] @ dense.T
    np.testing.assert_allclose(hits.scores, -np.sort(-full, axis=1), rtol=1e-4)
    assert open_index(tmp_path / "others").search(vectors[4:6], 20).rows.shape == (2, 3)


def test_what_milvus_cannot_build(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Milvus cannot build this"):
        make(tmp_path / "index", random_vectors(5), index_type="FLATT")
    with socket.socket() as taken:  # a port where nobody answers
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=rf"index\.uri: Milvus does not answer at {uri}"):
            make(tmp_path / "index", random_vectors(5), uri=uri)
    assert list(tmp_path.iterdir()) == []
