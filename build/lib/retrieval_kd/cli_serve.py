"""`rkd serve`: exported students over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from retrieval_kd.cli_output import Json, Quiet, print_json
from retrieval_kd.progress import console, say


def serve(
    folders: Annotated[
        list[str],
        typer.Argument(
            help="Folders of runs (work/RECIPE) or of exported encoders, also NAME=FOLDER.", show_default=False
        ),
    ],
    form: Annotated[
        str | None, typer.Option(help="Which exported form of a run.", show_default="int8, or the only one")
    ] = None,
    bm25: Annotated[
        str | None, typer.Option(help="Serve BM25 too, over a run's documents, a BEIR folder or an ir_datasets id.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="RKD_API_KEY", help="Clients must send it: Authorization: Bearer KEY.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads that encode one batch.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Batches encoded at once.")] = 1,
    batch_texts: Annotated[int, typer.Option(min=1, help="Most texts of a batch; 1: no batching.")] = 64,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a batch.")] = 2048,
    batch_wait: Annotated[float, typer.Option(min=0, help="Milliseconds a batch waits for more, under load.")] = 2.0,
    max_texts: Annotated[int, typer.Option(min=1, help="Most texts of one request.")] = 256,
    max_requests: Annotated[int, typer.Option(min=1, help="Most requests at once.")] = 512,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 30.0,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Serve exported students and their indexes over HTTP, without torch; a page at / compares two of them.

    rkd serve work/demo --bm25 work/demo --port 8000
    curl -s localhost:8000/search -H 'content-type: application/json' -d '{"query": "read a csv file"}'
    """
    console.quiet = quiet
    from retrieval_kd import server

    models = [server.load_model(folder, form, threads) for folder in folders]
    if bm25 is not None:
        models.append(server.load_bm25(bm25))
    say(f"http://{host}:{port}/ serves {', '.join(model.name for model in models)}; Ctrl+C ends it.")
    limits = server.Limits(texts=max_texts, requests=max_requests, seconds=timeout)
    batching = server.Batching(batch_texts, batch_tokens, batch_wait, workers)
    server.serve(models, host, port, limits, batching, api_key or None)
    print_json(json_, {"served": [model.name for model in models]})
