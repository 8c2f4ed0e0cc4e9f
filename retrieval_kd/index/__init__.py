"""Indexes: each kind is one module that can `build` a folder from vectors and `load` it for searching."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.files import read_json
from retrieval_kd.tables import kind_module
from retrieval_kd.types import Hits, InputError

MANIFEST = "index.json"
FORMAT = 1


class Index(Protocol):
    """An opened index; row i is the document `document_ids[i]`."""

    document_ids: Sequence[str]
    manifest: dict[str, Any]

    def search(self, vectors: NDArray[np.float32], k: int) -> Hits:
        """The best `k` documents of each query vector (Q, D)."""
        ...


def open_index(folder: Path, threads: int = 1) -> Index:
    """Open the index in `folder`, whichever its kind."""
    return cast(Index, kind_module("index", read_manifest(folder)["kind"]).load(folder, threads))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index folder; InputError if it has none, or one of an unknown format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} is not an index: it has no {MANIFEST}; make one with `rkd index`.")
    manifest = read_json(path)
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise InputError(f"{path}: format {version!r} is unknown, this version reads {FORMAT}; build it again.")
    return cast(dict[str, Any], manifest)
