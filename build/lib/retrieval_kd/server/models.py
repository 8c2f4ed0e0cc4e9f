"""What is served under one name: an encoder of queries, perhaps the index of its documents, perhaps their texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from retrieval_kd.data import load_collection
from retrieval_kd.data.beir import read_texts
from retrieval_kd.encoder import MANIFEST, TOKENIZER, Encoder, check_index, matrix_of
from retrieval_kd.index import Index, open_index, read_manifest
from retrieval_kd.types import Hits, InputError


@dataclass(eq=False)
class Model:
    """An encoder and what is searched with it; `tokenizer` cuts nothing off.

    `document_ids` and `texts` are those of the collection, one a row; an index knows its ids itself. Raises InputError
    when the index was not made by the document tower of this encoder.
    """

    name: str
    encoder: Any  # Encoder or BM25
    tokenizer: Tokenizer | None = None
    index: Index | None = None
    document_ids: Sequence[str] = ()
    texts: Sequence[str] | None = None
    manifest: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.manifest = getattr(self.encoder, "manifest", {})
        if self.index is not None:
            _check_index(self.name, self.manifest, self.index)
            self.document_ids = self.index.document_ids
        assert self.texts is None or len(self.texts) == len(self.document_ids), "one text a row"

    @property
    def vectors(self) -> str:
        """The form of its vectors: "dense", "sparse", perhaps "binary"; BM25 gives "none"."""
        return str(self.manifest.get("vectors", "dense" if self.manifest else "none"))

    @property
    def looks_up(self) -> bool:
        """Whether a text takes microseconds, so that nothing is gained by waiting for others."""
        return self.manifest.get("runtime") == "table"

    @property
    def one_by_one(self) -> bool:
        """Whether the encoder takes texts one by one, as int8 graphs do, so that a batch only delays the first."""
        return int(self.manifest.get("batch_size", 1 if self.manifest.get("form") == "int8" else 32)) == 1

    @property
    def dimension(self) -> int:
        """The width of its vectors, 0 if it gives none."""
        return int(getattr(self.encoder, "dimension", 0))

    @property
    def widths(self) -> list[int]:
        """Widths that vectors may be cut to: those that the student was trained for, and the whole."""
        return sorted({*self.manifest.get("widths", []), self.dimension})

    @property
    def sides(self) -> list[str]:
        """Whose texts are encoded: an asymmetric student's documents have another tower."""
        if self.manifest.get("document_identity") == self.manifest.get("identity", ""):
            return ["query", "document"]
        return ["query"]

    @property
    def searchable(self) -> bool:
        """Whether there are documents to search."""
        return self.index is not None or self.vectors == "none"

    @property
    def max_length(self) -> int | None:
        """The most tokens that are read of a text."""
        return self.manifest.get("max_length")

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids that the encoder would read of each text if it cut none; prompt included."""
        if self.tokenizer is None:
            return [[] for _ in texts]
        prompted = [self.manifest.get("prompt", "") + text for text in texts]
        return [found.ids for found in self.tokenizer.encode_batch_fast(prompted)]

    def encode(self, texts: Sequence[str]) -> Sequence[Any]:
        """A row of each text: its vector (D,), or of sparse vectors its terms and weights."""
        rows: Sequence[Any] = self.encoder.terms(texts) if self.vectors == "sparse" else self.encoder.encode(texts)
        return rows

    def search(self, rows: Sequence[Any], k: int) -> Hits:
        """The best documents of queries, given as its encoder makes them (vectors, or terms); of BM25, as texts."""
        if self.index is None:
            hits: Hits = self.encoder.retrieve(rows, k)
            return hits
        sparse = self.vectors == "sparse"
        return self.index.search(matrix_of(rows, self.dimension) if sparse else np.stack(rows), k)

    def search_together(self, asked: Sequence[tuple[Any, int]]) -> list[tuple[NDArray[np.int32], NDArray[np.float32]]]:
        """(rows, scores) of the best documents of each (query, k); those of one k are one search."""
        found: dict[int, tuple[NDArray[np.int32], NDArray[np.float32]]] = {}
        for k in {k for _, k in asked}:
            places = [place for place, (_, own) in enumerate(asked) if own == k]
            hits = self.search([asked[place][0] for place in places], k)
            found |= zip(places, zip(hits.rows, hits.scores, strict=True), strict=True)
        return [found[place] for place in range(len(asked))]

    def describe(self) -> dict[str, Any]:
        """What is served under this name."""
        return {
            "name": self.name,
            "vectors": self.vectors,
            "dimension": self.dimension or None,
            "widths": self.widths if self.vectors == "dense" else [],
            "sides": self.sides,
            "documents": len(self.document_ids) if self.searchable else None,
            "texts": self.texts is not None,
            "encoder": self.manifest,
            "index": None if self.index is None else self.index.manifest,
        }


def load_model(folder: str, form: str | None = None, threads: int = 1) -> Model:
    """Open the folder of a run (work/RECIPE) with its index and texts, or the folder of one exported encoder alone.

    `folder` may be `NAME=FOLDER`; otherwise the name is the folder's. `form` is the exported form of a run, such as
    int8; without it, int8, or else the only one. Raises InputError for a folder that is neither.
    """
    name, _, place = folder.rpartition("=") if not Path(folder).is_dir() else ("", "", folder)
    path = Path(place)
    exported = _is_exported(path)
    encoder_folder = path if exported else _exported(path, form)
    tokenizer = Tokenizer.from_file(str(encoder_folder / TOKENIZER))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encoder = Encoder.load(encoder_folder, threads)
    index = None if exported else open_index(_index_of(path, encoder.manifest), threads)
    texts = None if index is None else _texts_in_order(path / "index" / "documents.jsonl", index.document_ids)
    model = Model(name or path.resolve().name, encoder, tokenizer, index, texts=texts)
    if index is not None:
        model.search(model.encode(["first"]), 1)  # numba compiles, files are mapped: not at a client's cost
    return model


def load_bm25(collection: str, name: str = "bm25") -> Model:
    """BM25 over a collection, indexed now: a run's folder (the documents as its student reads them), a BEIR folder, an
    ir_datasets id, or "pydocs".
    """
    from retrieval_kd.teachers.bm25 import BM25, Options

    documents = Path(collection) / "index" / "documents.jsonl"
    if documents.is_file():
        texts = read_texts(documents, with_title=True)
        ids, written = list(texts), list(texts.values())
    else:
        found = load_collection(collection, [])
        ids, written = list(found.document_ids), list(found.documents)
    bm25 = BM25(Options(), written)
    bm25.retrieve(["index"], 1)  # builds it
    return Model(name, bm25, document_ids=ids, texts=written)


def _is_exported(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _exported(folder: Path, form: str | None) -> Path:
    """The folder of the exported form of a run."""
    served = folder / "served"
    found = sorted(place.name for place in served.iterdir() if _is_exported(place)) if served.is_dir() else []
    if not found:
        raise InputError(f"{folder} is neither an exported encoder nor a finished run: {served} has none.")
    chosen = form or ("int8" if "int8" in found else found[0])
    if chosen not in found or (form is None and len(found) > 1 and "int8" not in found):
        raise InputError(f"{served} has no form {chosen!r}; it has {', '.join(found)}.")
    return served / chosen


def _index_of(run: Path, manifest: dict[str, Any]) -> Path:
    """The index of the run that belongs to the encoder: there may be others, of vectors cut shorter."""
    found = sorted(path.parent for path in (run / "index").glob("*/index.json"))
    own = [path for path in found if read_manifest(path)["identity"] == manifest.get("document_identity")]
    path = (own or [run / "index" / "index"])[0]
    if not path.is_dir():
        raise InputError(f"{path} does not exist; run `rkd index`, or give the folder of the encoder alone.")
    return path


def _texts_in_order(path: Path, document_ids: Sequence[str]) -> list[str]:
    """The texts of `document_ids`, in their order, title first; InputError if one is missing."""
    texts = read_texts(path, with_title=True)
    for document_id in document_ids:
        if document_id not in texts:
            raise InputError(f"{path} lacks document {document_id!r} of the index; give the file that was indexed.")
    return [texts[document_id] for document_id in document_ids]


def _check_index(name: str, manifest: dict[str, Any], index: Index) -> None:
    """Refuse an index whose vectors another document tower made."""
    try:
        check_index(manifest, index.manifest)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
