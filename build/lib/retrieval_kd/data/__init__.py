"""Collections: BEIR folders, ir_datasets ids, and the embedded `pydocs`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

from retrieval_kd.types import Collection, InputError, ReadTexts, Texts


def load_collection(
    name: str, splits: Sequence[str] = ("train", "dev", "test"), allow_unknown_qrels: bool = False
) -> Collection:
    """Load a collection by name.

    `name` is `pydocs`, a BEIR folder, or an ir_datasets id; an id whose last part is a folder
    below the directory in the environment variable RKD_DATA is read from there.

    Renderings are read when asked for: `irds:ID` gives the texts of another ir_datasets id with the
    same ids (`irds:neumarco/zh/train`), any other name a file of the BEIR folder (see `data.beir`).
    """
    folder = None
    if name == "pydocs":
        from retrieval_kd.data.pydocs import load_pydocs

        collection = load_pydocs()
    elif folder := _beir_folder(name):
        from retrieval_kd.data.beir import load_beir

        collection = load_beir(folder, splits, allow_unknown_qrels)
    else:
        from retrieval_kd.data.irds import load_irds

        collection = load_irds(name, splits, allow_unknown_qrels)
    # Queries are kept: several sides ask for the same ones. Documents may be millions; who asks keeps them.
    queries, documents = _reader("queries", name, folder), _reader("corpus", name, folder)
    return replace(collection, read_queries=cache(queries), read_documents=documents)


def _beir_folder(name: str) -> Path | None:
    local = Path(os.environ.get("RKD_DATA", ""), Path(name).name)
    for folder in [Path(name), *([local] if "RKD_DATA" in os.environ else [])]:
        if (folder / "corpus.jsonl").is_file():
            return folder
    return None


def _reader(stem: Literal["queries", "corpus"], collection: str, folder: Path | None) -> ReadTexts:
    """What reads a rendering of the collection's queries or documents by its name."""

    def read(name: str) -> Texts:
        if name.startswith("irds:"):
            from retrieval_kd.data import irds

            return irds.read_rendering(name.removeprefix("irds:"), stem)
        if folder is None:
            raise InputError(
                f"there is no rendering {name!r} of {collection!r}, which is no BEIR folder; another ir_datasets id "
                "with the same ids can be one: 'irds:ID'."
            )
        from retrieval_kd.data import beir

        return beir.read_rendering(folder, stem, name)

    return read
