"""`rkd methods`: the published methods that a recipe can name."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from retrieval_kd.cli_output import Json, Quiet, print_json, print_table
from retrieval_kd.methods import method_names, method_text, read_method

app = typer.Typer(help="List the published methods that a recipe can use by `method = NAME`.", add_completion=False)


@app.callback(invoke_without_command=True)
def methods(context: typer.Context, quiet: Quiet = False, json_: Json = False) -> None:
    """List the published methods that a recipe can use by `method = NAME`.

    rkd methods show margin_mse
    """
    if context.invoked_subcommand:
        return
    facts = [{"name": name, **_facts(read_method(name))} for name in method_names()]
    if not quiet and not json_:
        rows = [[f["name"], f["title"], *(", ".join(f[key]) or "-" for key in ("needs", "trains"))] for f in facts]
        print_table(["name", "title", "needs", "trains"], rows)
        typer.echo("rkd methods show NAME prints one, with its paper, figures, pitfalls, roles and stages.")
    print_json(json_, {"methods": facts})


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A method, as `rkd methods` lists it.", show_default=False)],
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Print the file of a method: its facts, the teachers that it expects, and what it adds to a recipe."""
    text = method_text(name)
    if not quiet and not json_:
        typer.echo(text, nl=False)
    print_json(json_, {"name": name, **read_method(name)})


def _facts(method: dict[str, Any]) -> dict[str, Any]:
    return {key: method[key] for key in ("title", "paper", "needs", "trains")}
