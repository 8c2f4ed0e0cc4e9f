"""Milvus, for dense and for sparse vectors: a file of Milvus Lite in the index's folder, or a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pymilvus import DataType, MilvusClient, MilvusException

from retrieval_kd.index import (
    Vectors,
    check_documents,
    check_queries,
    in_order,
    no_hits,
    read_ids,
    read_manifest,
    writing,
)
from retrieval_kd.tables import Name, Table
from retrieval_kd.types import Hits, InputError

TAKES = ("dense", "sparse")
_FILE, _BATCH = "milvus.db", 1000
_MOST = 16_384  # results that Milvus gives


class Options(Table):
    """Where the vectors are, and how Milvus indexes them."""

    uri: str | None = None  # a server's address, such as "http://localhost:19530"; none: a file, with Milvus Lite
    collection: Name = "documents"  # replaced if the server has one of this name
    index_type: str | None = None  # "SPARSE_INVERTED_INDEX" for sparse vectors and "FLAT" for dense ones, both exact


def build(
    vectors: Vectors,
    folder: Path,
    options: Options,
    *,
    document_ids: Sequence[str],
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Index the documents' vectors into `folder`, or into a server's collection, and return the manifest.

    `identity` describes the tower that made the vectors. InputError for a server that does not answer and for an
    index that Milvus does not know.

    Shapes: vectors (N, D) or (N, V), row i belongs to `document_ids[i]`.
    """
    check_documents(vectors, document_ids)
    dense = isinstance(vectors, np.ndarray)
    with writing(folder, "milvus", options, vectors, document_ids, identity) as (scratch, manifest):
        manifest |= {"takes": "dense" if dense else "sparse"}
        client = _connect(scratch, options.uri)
        try:
            schema = client.create_schema(auto_id=False)
            schema.add_field("row", DataType.INT64, is_primary=True)
            if dense:
                schema.add_field("vector", DataType.FLOAT_VECTOR, dim=vectors.shape[1])
            else:
                schema.add_field("vector", DataType.SPARSE_FLOAT_VECTOR)
            index = client.prepare_index_params()
            index_type = options.index_type or ("FLAT" if dense else "SPARSE_INVERTED_INDEX")
            index.add_index("vector", index_type=index_type, metric_type="IP")
            client.drop_collection(options.collection)
            client.create_collection(options.collection, schema=schema, index_params=index)
            for begin in range(0, len(document_ids), _BATCH):
                batch = [(row, _value(vectors, row)) for row in range(begin, min(begin + _BATCH, len(document_ids)))]
                entries = [{"row": row, "vector": value} for row, value in batch if dense or value]
                if entries:
                    client.insert(options.collection, entries)
            client.flush(options.collection)
        except MilvusException as error:
            raise InputError(f"index: Milvus cannot build this ({error.message}).") from None
        finally:
            client.close()
            _release(scratch, options.uri)
    return read_manifest(folder)


class MilvusIndex:
    """An opened index; row i is the document `document_ids[i]`."""

    def __init__(self, client: MilvusClient, document_ids: Sequence[str], manifest: dict[str, Any]) -> None:
        self.document_ids = document_ids
        self.manifest = manifest
        self._client = client

    @classmethod
    def load(cls, folder: Path, threads: int = 1) -> MilvusIndex:
        """Open what `build` made; Milvus decides by itself how many threads it uses."""
        manifest = read_manifest(folder)
        client = _connect(folder, manifest["uri"])
        try:
            client.load_collection(manifest["collection"])
        except MilvusException as error:
            raise InputError(f"{folder} cannot be opened ({error.message}); build it again.") from None
        return cls(client, read_ids(folder, manifest["documents"]), manifest)

    def search(self, vectors: Vectors, k: int) -> Hits:
        """The best `k` documents of each query by inner product; equal scores in the order of rows.

        Shapes: vectors (Q, D) or (Q, V); Hits (Q, min(k, N)), row -1 where fewer documents are found.
        """
        takes = self.manifest["takes"]
        check_queries(vectors, self, takes)
        k = max(0, min(k, self.manifest["documents"]))
        if k > _MOST:
            raise InputError(f"Milvus gives at most {_MOST} results a query, and {k} are asked for.")
        hits = no_hits(vectors.shape[0], k)
        values = {query: _value(vectors, query) for query in range(len(hits))}
        asked = [query for query, value in values.items() if takes == "dense" or value]
        for begin in range(0, len(asked) if k else 0, _BATCH):
            batch = asked[begin : begin + _BATCH]
            found = self._client.search(
                self.manifest["collection"],
                data=[values[query] for query in batch],
                anns_field="vector",
                limit=k,
                search_params={"metric_type": "IP"},
                consistency_level="Strong",
            )
            for query, results in zip(batch, found, strict=True):
                positive = [result for result in results if takes == "dense" or result["distance"] > 0]
                hits.rows[query, : len(positive)] = [result["row"] for result in positive]
                hits.scores[query, : len(positive)] = [result["distance"] for result in positive]
        return in_order(hits.rows, hits.scores)


load = MilvusIndex.load


def _connect(folder: Path, uri: str | None) -> MilvusClient:
    try:
        return MilvusClient(uri or str(folder / _FILE))
    except MilvusException as error:
        raise InputError(f"index.uri: Milvus does not answer at {uri or folder / _FILE} ({error.message}).") from None


def _release(folder: Path, uri: str | None) -> None:
    """End the server of a Milvus Lite file, which would hold its lock when the folder has moved."""
    if uri is None:
        from milvus_lite.server_manager import server_manager_instance

        server_manager_instance.release_server(str(folder / _FILE))


def _value(vectors: Vectors, row: int) -> Any:
    """A vector as Milvus takes it: the array, or weights by term, those above 0."""
    if isinstance(vectors, np.ndarray):
        return vectors[row]
    span = slice(vectors.indptr[row], vectors.indptr[row + 1])
    pairs = zip(vectors.indices[span].tolist(), vectors.data[span].tolist(), strict=True)
    return {term: weight for term, weight in pairs if weight > 0}
