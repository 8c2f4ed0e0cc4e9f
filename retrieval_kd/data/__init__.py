"""Collections: BEIR folders, ir_datasets ids, and the embedded `pydocs`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from retrieval_kd.types import Collection


def load_collection(
    name: str, splits: Sequence[str] = ("train", "dev", "test"), allow_unknown_qrels: bool = False
) -> Collection:
    """Load a collection by name.

    `name` is `pydocs`, a BEIR folder, or an ir_datasets id; an id whose last part is a folder
    below the directory in the environment variable RKD_DATA is read from there.
    """
    if name == "pydocs":
        from retrieval_kd.data.pydocs import load_pydocs

        return load_pydocs()
    from retrieval_kd.data.beir import load_beir

    local = Path(os.environ.get("RKD_DATA", ""), Path(name).name)
    for folder in [Path(name), *([local] if "RKD_DATA" in os.environ else [])]:
        if (folder / "corpus.jsonl").is_file():
            return load_beir(folder, allow_unknown_qrels)
    from retrieval_kd.data.irds import load_irds

    return load_irds(name, splits, allow_unknown_qrels)
