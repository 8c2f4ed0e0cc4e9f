"""The pipeline: one function per command. Each reads, checks what changed, calls a step, writes a manifest."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrieval_kd.pipeline.evaluation import evaluate
    from retrieval_kd.pipeline.negatives import write_negatives
    from retrieval_kd.pipeline.steps import export, index, mine, score, search
    from retrieval_kd.pipeline.training import train
    from retrieval_kd.pipeline.workspace import Workspace

__all__ = [
    "Workspace",
    "evaluate",
    "export",
    "index",
    "mine",
    "run",
    "score",
    "search",
    "train",
    "write_negatives",
]

# Imported when first used: what only reads a store needs neither torch nor the memory that it takes.
_HOME = {
    "Workspace": "workspace",
    "evaluate": "evaluation",
    "train": "training",
    "write_negatives": "negatives",
    **dict.fromkeys(("export", "index", "mine", "score", "search"), "steps"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def run(workspace: Workspace) -> dict[str, object]:
    """Every stage of a recipe in order; those whose inputs did not change are skipped.

    Returns the report: systems by name, each with its measures, and the seconds taken.
    """
    from retrieval_kd import pipeline

    for stage in ("mine", "score", "train", "index", "export", "search"):
        getattr(pipeline, stage)(workspace)
    return pipeline.evaluate(workspace)
