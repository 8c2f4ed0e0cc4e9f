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

from retrieval_kd.index import in_order, row_span
from retrieval_kd.tables import Positive, Table
from retrieval_kd.types import Hits, InputError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

VECTORS = ("sparse",)
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


def write(vectors: csr_array, folder: Path, options: Options, document_ids: Sequence[str]) -> dict[str, Any]:
    """Index vectors (N, V) into a folder."""
    if vectors.nnz:  # Seismic has no empty index
        wide = vectors.shape[1] > _NARROW
        dataset = (seismic.SeismicDatasetLV if wide else seismic.SeismicDataset)(vectors.shape[1])
        rows = [str(row) for row in range(len(document_ids))]
        terms, starts = vectors.indices.astype(np.int64), vectors.indptr.astype(np.int64)
        dataset.add_documents_by_id(rows, terms, vectors.data, starts)
        index = _class(vectors.shape[1]).build_from_dataset(
            dataset,
            n_postings=options.n_postings,
            centroid_fraction=options.centroid_fraction,
            summary_energy=options.summary_energy,
        )
        index.save(str(folder / _NAME))
    return {"postings": int(vectors.nnz)}


class SeismicIndex:
    """A built index, in memory; a search spreads its queries over `threads`."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> None:
        self._index: Any = None
        if manifest["postings"]:
            try:
                self._index = _class(manifest["dimension"]).load(str(folder / _FILE))
            except OSError as error:
                raise InputError(f"{folder / _FILE} cannot be read ({error}); build it again.") from None
        self._manifest, self._threads = manifest, threads

    def search(self, vectors: csr_array, k: int) -> Hits:
        """About the best `k` documents of each query by inner product, those that share a term with it."""
        hits = Hits.none(vectors.shape[0], k)
        asked = [query for query in range(len(hits)) if vectors.data[row_span(vectors, query)].any()]
        if self._index is None or not asked:
            return hits
        word = seismic.get_seismic_string()
        found = self._index.batch_search(
            np.array(asked, word),
            [vectors.indices[row_span(vectors, query)].astype(word) for query in asked],
            [np.ascontiguousarray(vectors.data[row_span(vectors, query)], np.float32) for query in asked],
            k=k,
            query_cut=self._manifest["query_cut"],
            heap_factor=self._manifest["heap_factor"],
            num_threads=self._threads,
        )
        for results in found:
            positive = [(int(query), float(score), int(row)) for query, score, row in results if score > 0]
            for place, (query, score, row) in enumerate(positive):
                hits.rows[query, place], hits.scores[query, place] = row, score
        return in_order(hits.rows, hits.scores)


load = SeismicIndex


def _class(terms: int) -> Any:
    return seismic.SeismicIndexLV if terms > _NARROW else seismic.SeismicIndex
