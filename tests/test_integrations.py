"""What others run against the server, as the README shows it: OpenAI's client, Milvus Lite, Pyserini."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from openai import OpenAI
from served import DOCUMENTS, TEXTS, dense_run, running, sparse_run

from retrieval_kd.encoder import Encoder
from retrieval_kd.server import create_app, load_model


@pytest.fixture(scope="module")
def runs(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    dense_run(folder / "dense", exported)
    sparse_run(folder / "sparse", exported)
    return folder


@pytest.fixture(scope="module")
def url(runs: Path) -> Iterator[str]:
    """`rkd serve dense sparse`, in a thread."""
    with running(create_app([load_model(str(runs / "dense")), load_model(str(runs / "sparse"))])) as address:
        yield address


def best(url: str, model: str, query: str, k: int) -> list[str]:
    """What the server itself finds."""
    answer = httpx.post(f"{url}/search", json={"model": model, "query": query, "k": k}).json()
    return [result["id"] for result in answer["results"][0]]


def test_openai_client(url: str, runs: Path) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="not needed")
    answer = client.embeddings.create(model="dense", input=["sort a list", "open a file"])
    vectors = np.array([item.embedding for item in answer.data])

    expected = Encoder.load(runs / "dense/served/int8").encode(["sort a list", "open a file"])
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


def test_milvus_lite(url: str, runs: Path, tmp_path: Path) -> None:
    """One collection with both vectors of each document, searched by the vectors that the server gives for a query."""
    milvus = pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    documents = Encoder.load(runs / "sparse/served/fp32").encode(TEXTS)  # here the document tower, for brevity
    openai = OpenAI(base_url=f"{url}/v1", api_key="not needed")

    client = milvus.MilvusClient(str(tmp_path / "documents.db"))
    schema = client.create_schema(auto_id=False)
    schema.add_field("id", milvus.DataType.VARCHAR, is_primary=True, max_length=64)
    schema.add_field("dense", milvus.DataType.FLOAT_VECTOR, dim=32)
    schema.add_field("sparse", milvus.DataType.SPARSE_FLOAT_VECTOR)
    index = client.prepare_index_params()
    index.add_index("dense", index_type="FLAT", metric_type="IP")
    index.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
    client.create_collection("documents", schema=schema, index_params=index)
    dense = [item.embedding for item in openai.embeddings.create(model="dense", input=TEXTS).data]
    rows = [
        {"id": name, "dense": dense[row], "sparse": dict(zip(*terms_of(documents, row), strict=True))}
        for row, name in enumerate(DOCUMENTS)
    ]
    client.insert("documents", rows)

    query = "open the file"
    vector = openai.embeddings.create(model="dense", input=query).data[0].embedding
    found = client.search("documents", data=[vector], anns_field="dense", limit=3)[0]
    assert [hit["id"] for hit in found] == best(url, "dense", query, 3)
    (weights,) = httpx.post(f"{url}/embed_sparse", json={"inputs": query}).json()
    terms = {entry["index"]: entry["value"] for entry in weights}
    found = client.search("documents", data=[terms], anns_field="sparse", limit=1)[0]
    assert [hit["id"] for hit in found] == best(url, "sparse", query, 1) == ["open"]
    client.close()


def terms_of(vectors: object, row: int) -> tuple[list[int], list[float]]:
    """The terms of one document, and their weights."""
    begin, end = vectors.indptr[row : row + 2]  # type: ignore[attr-defined]
    return vectors.indices[begin:end].tolist(), vectors.data[begin:end].tolist()  # type: ignore[attr-defined]


def test_pyserini_impact_search(url: str, runs: Path, tmp_path: Path) -> None:
    """Anserini's impact index of the documents, searched by the weights that the server gives for a query."""
    searching = pytest.importorskip("pyserini.search.lucene", exc_type=ImportError)
    from pyserini.encode import QueryEncoder
    from pyserini.index.lucene import LuceneIndexer

    documents = Encoder.load(runs / "sparse/served/fp32").encode(TEXTS)
    indexer = LuceneIndexer(
        str(tmp_path / "index"), args=["-index", str(tmp_path / "index"), "-impact", "-pretokenized"]
    )
    for row, name in enumerate(DOCUMENTS):
        terms, weights = terms_of(documents, row)
        vector = {f"t{term}": round(100 * weight) for term, weight in zip(terms, weights, strict=True)}
        indexer.add_doc_dict({"id": name, "contents": "", "vector": vector})
    indexer.close()

    class Served(QueryEncoder):
        """Pyserini's query encoder, which asks the server."""

        def encode(self, text: str, **options: object) -> dict[str, int]:
            (weights,) = httpx.post(f"{url}/embed_sparse", json={"inputs": text}).json()
            return {f"t{entry['index']}": round(100 * entry["value"]) for entry in weights}

    searcher = searching.LuceneImpactSearcher(str(tmp_path / "index"), Served())
    assert [hit.docid for hit in searcher.search("open the file", k=1)] == best(url, "sparse", "open the file", 1)


def test_the_plain_route(url: str) -> None:
    """What the README shows with curl."""
    answer = httpx.post(
        f"{url}/search", content=json.dumps({"query": "date", "k": 1}), headers={"content-type": "application/json"}
    )
    assert answer.json()["results"][0][0]["id"] == "date"
