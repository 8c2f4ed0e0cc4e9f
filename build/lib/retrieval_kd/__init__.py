"""Distil slow rankers into fast retrievers: score once, train small, evaluate honestly, serve without torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from retrieval_kd.types import Collection, Hits, InputError, Queries

if TYPE_CHECKING:
    from retrieval_kd.data import load_collection
    from retrieval_kd.encoder import Encoder, check_index
    from retrieval_kd.index import open_index
    from retrieval_kd.pipeline import Workspace, run

__version__ = "0.1.0"

# What is heavy is imported when first used, so that a server needs neither torch nor its start-up time.
_LAZY = {
    "Encoder": "encoder",
    "Workspace": "pipeline",
    "check_index": "encoder",
    "load_collection": "data",
    "open_index": "index",
    "run": "pipeline",
}
__all__ = [
    "Collection",
    "Encoder",
    "Hits",
    "InputError",
    "Queries",
    "Workspace",
    "check_index",
    "load_collection",
    "open_index",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from retrieval_kd.extras import missing_extra

    try:
        return getattr(importlib.import_module(f"retrieval_kd.{_LAZY[name]}"), name)
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
