"""What commands about a recipe have in common: its options, and the workspace that they open."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrieval_kd.progress import say
from retrieval_kd.recipe import load_recipe

if TYPE_CHECKING:
    from retrieval_kd.pipeline import Workspace
    from retrieval_kd.recipe import Recipe as RecipeTable

Recipe = Annotated[Path, typer.Argument(help="A recipe (TOML).", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the results.", show_default="work/RECIPE")]
StoreFolder = Annotated[
    Path | None, typer.Option("--store", help="Folder of teacher scores.", show_default="OUT/../store")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: --set training.seed=1, --set '*.precision=fp32'.")
]
AllowUnknown = Annotated[
    bool, typer.Option("--allow-unknown-qrels", help="Drop and count judgements of absent documents.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would take, from samples; write nothing.")]


def open_workspace(
    recipe: Path, out: Path | None, store: Path | None, set_: list[str] | None, allow: bool, dry: bool = False
) -> Workspace:
    """The workspace of a recipe with its overrides; libraries of models are told to be quiet."""
    overrides = [*(set_ or []), *(["data.allow_unknown_qrels=true"] if allow else [])]
    load_recipe(recipe, overrides)  # a mistake in it is told before torch is imported
    from retrieval_kd.pipeline import Workspace

    hush()
    workspace = Workspace(recipe, out, store, overrides, dry)
    tell_of_slow_bf16(workspace.recipe)
    return workspace


def tell_of_slow_bf16(recipe: RecipeTable) -> None:
    """Say so if the recipe computes in bf16, and the processor that will do it is faster in fp32."""
    import torch

    from retrieval_kd.engines import matrix_rates

    if '"bf16"' not in recipe.model_dump_json() or torch.cuda.is_available():
        return
    rates = matrix_rates(rows=256, rounds=3)
    if rates["bf16"] < 0.8 * rates["fp32"]:
        share = rates["bf16"] / rates["fp32"]
        say(f"bf16 runs at {share:.1f} of fp32's speed on this processor; --set '*.precision=fp32' is the faster way")


def hush() -> None:
    """Keep other packages' bars and notes off the screen; ours say what goes on."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG when it is imported
