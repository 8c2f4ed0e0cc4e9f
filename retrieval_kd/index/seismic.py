"""Seismic: an approximate inverted index whose lists are cut, clustered and summarised.

It keeps weights in 16 bits, so that scores are near those of the full product and not equal to them.
Source: Bruch, Nardini, Rulli and Venturini 2024, arXiv:2404.18812.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import seismic
from pydantic import Field

from retrieval_kd.index import check_documents, check_queries, in_order, no_hits, read_ids, read_manifest, writing
from retrieval_kd.tables import Positive, Table
from retrieval_kd.types import Hits, InputError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

TAKES = "sparse"
_NAME, _FILE = "index", "index.index.seismic"  # Seismic adds the rest
_NARROW = 2**16  # terms that fit its smaller index
Share = Annotated[float, Field(gt=0, le=1)]


class Options(Table):
    """What Seismic keeps of each list, and how much of a query it looks at."""

    n_postings: Positive = 3500  # postings a list, on average
    centroid_fraction: Share = 0.1  # clusters a posting
    summary_energy: Share = 0.4  # of a cluster's weights that its summary keeps
    query_cut: Positive = 50  # the query's largest weights that choose lists
    heap_factor: Share = 0.9  # a cluster is left out if its summary is below the k-th score over this


def build(
    vectors: csr_array,
    folder: Path,
    options: Options,
    *,
    document_ids: Sequence[str],
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Index the documents' vectors into `folder` and return its manifest.

    `identity` describes the tower that made the vectors.

    Shapes: vectors (N, V), row i belongs to `document_ids[i]`.
    """
    check_documents(vectors, document_ids)
    kept = vectors.copy()
    kept.eliminate_zeros()
    with writing(folder, "seismic", options, vectors, document_ids, identity) as (scratch, manifest):
        manifest |= {"postings": int(kept.nnz)}
        if kept.nnz:  # Seismic has no empty index
            wide = vectors.shape[1] > _NARROW
            dataset = (seismic.SeismicDatasetLV if wide else seismic.SeismicDataset)(vectors.shape[1])
            rows = [str(row) for row in range(len(document_ids))]
            dataset.add_documents_by_id(rows, kept.indices.astype(np.int64), kept.data, kept.indptr.astype(np.int64))
            index = _class(vectors.shape[1]).build_from_dataset(
                dataset,
                n_postings=options.n_postings,
                centroid_fraction=options.centroid_fraction,
                summary_energy=options.summary_energy,
            )
            index.save(str(scratch / _NAME))
    return read_manifest(folder)


class SeismicIndex:
    """A built index, in memory; row i is the document `document_ids[i]`."""

    def __init__(self, index: Any, document_ids: Sequence[str], manifest: dict[str, Any], threads: int) -> None:
        self.document_ids = document_ids
        self.manifest = manifest
        self._index = index
        self._threads = threads

    @classmethod
    def load(cls, folder: Path, threads: int = 1) -> SeismicIndex:
        """Open a folder that `build` made; a search spreads its queries over `threads`."""
        manifest = read_manifest(folder)
        index = None
        if manifest["postings"]:
            try:
                index = _class(manifest["dimension"]).load(str(folder / _FILE))
            except OSError as error:
                raise InputError(f"{folder / _FILE} cannot be read ({error}); build it again.") from None
        return cls(index, read_ids(folder, manifest["documents"]), manifest, threads)

    def search(self, vectors: csr_array, k: int) -> Hits:
        """About the best `k` documents of each query by inner product; equal scores in the order of rows.

        Shapes: vectors (Q, V); Hits (Q, min(k, N)), row -1 where fewer documents are found.
        """
        check_queries(vectors, self, TAKES)
        hits = no_hits(vectors.shape[0], max(0, min(k, self.manifest["documents"])))
        asked = [query for query in range(len(hits)) if vectors.data[_span(vectors, query)].any()]
        if self._index is None or not asked or hits.rows.size == 0:
            return hits
        word = seismic.get_seismic_string()
        found = self._index.batch_search(
            np.array(asked, word),
            [vectors.indices[_span(vectors, query)].astype(word) for query in asked],
            [np.ascontiguousarray(vectors.data[_span(vectors, query)], np.float32) for query in asked],
            k=hits.rows.shape[1],
            query_cut=self.manifest["query_cut"],
            heap_factor=self.manifest["heap_factor"],
            num_threads=self._threads,
        )
        for results in found:
            positive = [(int(query), float(score), int(row)) for query, score, row in results if score > 0]
            for place, (query, score, row) in enumerate(positive):
                hits.rows[query, place], hits.scores[query, place] = row, score
        return in_order(hits.rows, hits.scores)


load = SeismicIndex.load


def _class(terms: int) -> Any:
    return seismic.SeismicIndexLV if terms > _NARROW else seismic.SeismicIndex


def _span(vectors: csr_array, row: int) -> slice:
    return slice(vectors.indptr[row], vectors.indptr[row + 1])
