"""`rkd synthesize`: a language model's queries and passages beside a collection's own."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import typer

from retrieval_kd.cli_output import Json, Quiet, print_json
from retrieval_kd.progress import console, say
from retrieval_kd.tables import parse
from retrieval_kd.types import InputError


def synthesize(
    table: Annotated[Path, typer.Argument(help="What to make (TOML).", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The BEIR folder to write.", show_default=False)],
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Let a language model write queries and passages for a collection, as a BEIR folder. Stopped? Give it again.

    The file names `collection`, `split`, `seed`, `model` as an llm_* teacher has it, and tables `texts`:
    `name`, `of` ("query" or "document"), `prompt`, and, if wanted, `system`, `grade`, `sample`, `max_tokens`.

    rkd synthesize synthetic.toml --out work/scifact-synthetic
    """
    console.quiet = quiet
    from retrieval_kd.synthesis import Synthesis
    from retrieval_kd.synthesis import synthesize as make

    try:
        options = parse(Synthesis, tomllib.loads(table.read_text(encoding="utf-8")), str(table))
    except FileNotFoundError:
        raise InputError(f"{table} does not exist.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{table}: not valid TOML: {error}.") from None
    counts = make(options, out)
    say(f"{out}: " + ", ".join(f"{what} {count:,}" for what, count in counts.items()))
    print_json(json_, {"folder": str(out), **counts})
