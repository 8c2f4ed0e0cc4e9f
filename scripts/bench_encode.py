"""Latency of served query encoders: every form against SentenceTransformer.encode, one query at a time on one thread.

    python scripts/bench_encode.py --out work/bench-encode --prepare   # export, which takes minutes
    python scripts/bench_encode.py --out work/bench-encode             # measure

The models are all-MiniLM-L6-v2 and students that keep 4 and 2 of its layers, untrained, since time does not depend on
it. Queries are those of `--data`; contenders take turns, a round each, and all rounds of one count. Cosines are with
the vectors of the same model in torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
MODELS = {"MiniLM, 6 layers": (), "4 layers": (0, 1, 3, 5), "2 layers": (0, 5)}
FORMS = ("fp32", "int8", "int8-static", "openvino-fp32", "openvino-bf16", "openvino-int8")


def main() -> None:
    """Export what is missing; then measure, and print the table and one JSON line."""
    arguments = _arguments()
    import torch

    torch.set_num_threads(1)
    from retrieval_kd.data import load_collection

    collection = load_collection(arguments.data)
    queries = list(collection.split("test").texts[: arguments.queries])
    contenders: dict[tuple[str, str], Any] = {}
    for name, layers in MODELS.items():
        student = _student(layers)
        contenders[name, "torch"] = lambda texts, student=student: student.encode(texts, show_progress_bar=False)
        folder = arguments.out / name.replace(", ", "-").replace(" ", "-")
        for form in arguments.forms:
            if arguments.prepare:
                _export(student, folder, form, list(collection.split("train").texts), queries)
            else:
                from retrieval_kd.encoder import Encoder

                contenders[name, form] = Encoder.load(folder / form, threads=1).encode
    if not arguments.prepare:
        _report(contenders, queries, arguments.rounds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the exported encoders")
    parser.add_argument("--prepare", action="store_true", help="export, and measure nothing")
    parser.add_argument("--data", default="pydocs")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--forms", nargs="+", default=FORMS)
    return parser.parse_args()


def _student(layers: tuple[int, ...]) -> Any:
    from retrieval_kd.students.dense import Options, load

    return load(Options(model=MODEL, layers=layers)).towers.model.eval()


def _export(student: Any, folder: Path, form: str, training: list[str], queries: list[str]) -> None:
    from retrieval_kd.export_graph import export_graph
    from retrieval_kd.sample import spread

    if not (folder / form).exists():
        calibration = [training[place] for place in spread(len(training), 128)]
        traced = folder / "traced"
        traced.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"identity": {}, "check_texts": queries[:32], "calibration": calibration}
        export_graph(student, folder / form, form, traced=traced, **options)


def _report(contenders: dict[tuple[str, str], Any], queries: list[str], rounds: int) -> None:
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in contenders}
    for encode in contenders.values():
        for query in queries:  # OpenVINO compiles for every length that it has not met
            encode([query])
    for _ in range(rounds):
        for key, encode in contenders.items():
            for query in queries:
                start = perf_counter()
                encode([query])
                seconds[key].append(perf_counter() - start)
    exact = {name: encode(queries) for (name, form), encode in contenders.items() if form == "torch"}
    base = np.median(seconds[next(iter(MODELS)), "torch"]) * 1e3
    figures: dict[str, Any] = {}
    print(f"| model | form | p50 ms | p95 ms | times {next(iter(MODELS))} in torch | mean cosine | least cosine |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for (name, form), encode in contenders.items():
        p50, p95 = np.percentile(seconds[name, form], [50, 95]) * 1e3
        vectors = encode(queries)
        norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(exact[name], axis=1)
        cosines = (vectors * exact[name]).sum(1) / norms
        figures[f"{name}, {form}"] = facts = {
            "p50_ms": round(p50, 3),
            "p95_ms": round(p95, 3),
            "faster": round(base / p50, 2),
            "mean_cosine": round(float(cosines.mean()), 5),
            "min_cosine": round(float(cosines.min()), 5),
        }
        print(f"| {name} | {form} | " + " | ".join(f"{value:g}" for value in facts.values()) + " |")
    figures["machine"] = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    packages = ("torch", "sentence-transformers", "onnxruntime", "openvino", "nncf")
    figures["versions"] = {package: version(package) for package in packages}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
