"""Milvus, for dense and for sparse vectors: a file of Milvus Lite in the index's folder, or a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from pymilvus import DataType, MilvusClient, MilvusException

from retrieval_kd.index import Vectors, in_order, is_sparse, row_span
from retrieval_kd.tables import Name, Table
from retrieval_kd.types import Hits, InputError

VECTORS = ("dense", "sparse")
_FILE, _BATCH = "milvus.db", 1000
_MOST = 16_384  # results that Milvus gives


class Options(Table):
    """Where the vectors are, and how Milvus indexes them."""

    uri: str | None = None  # a server's address, such as "http://localhost:19530"; none: a file, with Milvus Lite
    collection: Name = "documents"  # replaced if the server has one of this name
    index_type: str | None = None  # "SPARSE_INVERTED_INDEX" for sparse vectors and "FLAT" for dense ones, both exact


def write(vectors: Vectors, folder: Path, options: Options, document_ids: Sequence[str]) -> dict[str, Any]:
    """Index vectors (N, D) or (N, V) into a folder, or into a server's collection.

    InputError for a server that does not answer and for an index that Milvus does not know.
    """
    dense = not is_sparse(vectors)
    field = f"vector_{uuid4().hex}"  # by which `load` sees that the collection is still this one
    client = _connect(folder, options.uri)
    try:
        schema = client.create_schema(auto_id=False)
        schema.add_field("row", DataType.INT64, is_primary=True)
        if dense:
            schema.add_field(field, DataType.FLOAT_VECTOR, dim=vectors.shape[1])
        else:
            schema.add_field(field, DataType.SPARSE_FLOAT_VECTOR)
        index = client.prepare_index_params()
        index_type = options.index_type or ("FLAT" if dense else "SPARSE_INVERTED_INDEX")
        index.add_index(field, index_type=index_type, metric_type="IP")
        client.drop_collection(options.collection)
        client.create_collection(options.collection, schema=schema, index_params=index)
        for begin in range(0, len(document_ids), _BATCH):
            batch = [(row, _value(vectors, row)) for row in range(begin, min(begin + _BATCH, len(document_ids)))]
            entries = [{"row": row, field: value} for row, value in batch if dense or value]
            if entries:
                client.insert(options.collection, entries)
        client.flush(options.collection)
        client.release_collection(options.collection)  # loaded when it was made, empty
        client.load_collection(options.collection)  # Milvus Lite builds the index here, or refuses it
    except MilvusException as error:
        raise InputError(f"index: Milvus cannot build this ({error.message}).") from None
    finally:
        client.close()
        _release(folder, options.uri)
    return {"field": field}


class MilvusIndex:
    """An opened index; Milvus decides by itself how many threads it uses."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> None:
        self._client = _connect(folder, manifest["uri"])
        self._collection, self._field = manifest["collection"], manifest["field"]
        self._dense = manifest["vectors"] == "dense"
        try:
            self._client.load_collection(self._collection)
            fields = self._client.describe_collection(self._collection)["fields"]
        except MilvusException as error:
            raise InputError(f"{folder} cannot be opened ({error.message}); build it again.") from None
        if self._field not in [field["name"] for field in fields]:
            raise InputError(
                f"{folder}: the collection {self._collection!r} at {manifest['uri'] or folder / _FILE} was built anew "
                "for another index; build it again, and give each recipe an index.collection of its own."
            )

    def search(self, vectors: Vectors, k: int) -> Hits:
        """The best `k` documents of each query by inner product; of sparse ones, those that share a term with it."""
        if k > _MOST:
            raise InputError(f"Milvus gives at most {_MOST} results a query, and {k} are asked for.")
        hits = Hits.none(vectors.shape[0], k)
        values = {query: _value(vectors, query) for query in range(len(hits))}
        asked = [query for query, value in values.items() if self._dense or value]
        for begin in range(0, len(asked), _BATCH):
            batch = asked[begin : begin + _BATCH]
            found = self._client.search(
                self._collection,
                data=[values[query] for query in batch],
                anns_field=self._field,
                limit=k,
                search_params={"metric_type": "IP"},
                consistency_level="Strong",
            )
            for query, results in zip(batch, found, strict=True):
                positive = [result for result in results if self._dense or result["distance"] > 0]
                hits.rows[query, : len(positive)] = [result["row"] for result in positive]
                hits.scores[query, : len(positive)] = [result["distance"] for result in positive]
        return in_order(hits.rows, hits.scores)


load = MilvusIndex


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
    if not is_sparse(vectors):
        return vectors[row]
    span = row_span(vectors, row)
    pairs = zip(vectors.indices[span].tolist(), vectors.data[span].tolist(), strict=True)
    return {term: weight for term, weight in pairs if weight > 0}
