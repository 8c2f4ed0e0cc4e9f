"""The pipeline: one function per command. Each reads, checks what changed, calls a step, writes a manifest."""

from __future__ import annotations

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


def run(workspace: Workspace) -> dict[str, object]:
    """Every stage of a recipe in order; those whose inputs did not change are skipped.

    Returns the report: systems by name, each with its measures, and the seconds taken.
    """
    for stage in (mine, score, train, index, export, search):
        stage(workspace)
    return evaluate(workspace)
