"""Scoring: the cross_encoder teacher against Sentence Transformers' CrossEncoder.predict, same weights and same pairs.

    RKD_DATA=... python scripts/bench_score.py --model work/scifact-cross-encoder/student
    python scripts/bench_score.py --model MODEL --device cuda --precision bf16

The pairs are whole lists, as scoring meets them: the 100 best documents of BM25 for each of some SciFact queries. Both
sides use the same threads, run in processes of their own, and take turns, round by round, each of which scores
all pairs after a first one that does not count. Speed is the median round's; Kendall's tau is within lists, against
CrossEncoder.predict in fp32. On a GPU both run in bf16, and the share of the card's peak is that of a large
product of matrices measured in the same run.

The model is any cross-encoder; SciFact's is trained in minutes by `rkd run scripts/recipes/scifact-cross-encoder.toml`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

# precision -> engine, least speed against predict, least tau, largest error
TARGETS: dict[str, tuple[str, float, float | None, float | None]] = {
    "fp32": ("torch", 1.0, None, 1e-4),
    "bf16": ("openvino", 2.3, 0.995, None),
    "int8": ("openvino", 4.0, 0.98, None),
}
THEIRS = "CrossEncoder.predict"


def main() -> None:
    """Run every contender in turns and print the table, then one JSON line."""
    arguments = _arguments()
    if arguments.contender:
        _serve(arguments)
        return
    cuda = arguments.device == "cuda"
    contenders = {THEIRS: [THEIRS, "bf16" if cuda else "fp32"]}
    for name in arguments.precision:
        engine = arguments.engine or ("torch" if cuda else TARGETS[name][0])
        contenders[f"retrieval_kd {engine} {name}"] = [engine, name]
    running = {name: _Contender(arguments, *chosen) for name, chosen in contenders.items()}
    for _ in range(arguments.rounds):
        for contender in running.values():
            contender.round()
    figures: dict[str, Any] = {"model": Path(arguments.model).name, "device": arguments.device}
    figures |= {name: getattr(arguments, name) for name in ("queries", "depth", "max_length", "threads", "rounds")}
    theirs = running[THEIRS]
    figures["tokens_per_pair"] = theirs.facts["tokens"] / len(theirs.scores)
    heads = ["", "documents/s", "ratio", "Kendall's tau", "largest error", "seconds to the first score"]
    heads += ["share of peak"] if cuda else []
    print(_row(heads))
    print("|---" + "|---:" * (len(heads) - 1) + "|")
    for name, one in running.items():
        facts = one.figures(theirs, arguments.depth)
        figures[name] = facts
        cells = [name, *(f"{facts[key]:{form}}" for key, form in FORMS.items())]
        print(_row([*cells, f"{facts['share_of_peak']:.1%}"] if cuda else cells))
    if not cuda:
        for name, (engine, speed, tau, error) in TARGETS.items():
            ours = figures.get(f"retrieval_kd {arguments.engine or engine} {name}")
            if ours:
                met = ours["ratio"] >= speed and (tau is None or ours["kendall_tau"] >= tau)
                met = met and (error is None or ours["max_error"] <= error)
                ours["target_met"] = bool(met)
                print(f"{name}: target {'met' if met else 'MISSED'} ({speed}x" + (f", tau {tau})" if tau else ")"))
    figures |= {"machine": f"{_processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"}
    packages = ("torch", "transformers", "sentence-transformers", "openvino", "nncf")
    figures |= {"versions": {package: version(package) for package in packages}}
    print(json.dumps(figures))


FORMS = {
    "documents_per_second": ".1f",
    "ratio": ".2f",
    "kendall_tau": ".4f",
    "max_error": ".1e",
    "first_seconds": ".1f",
}


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or name of a cross-encoder")
    parser.add_argument("--data", default="scifact", help="a folder of RKD_DATA or an ir_datasets id")
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--depth", type=int, default=100, help="documents a query")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of query and document together")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16", "int8"], choices=tuple(TARGETS))
    parser.add_argument("--engine", choices=("torch", "openvino"), help="instead of each precision's own")
    parser.add_argument("--batch-size", type=int, default=32, help="of CrossEncoder.predict")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contender", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


class _Contender:
    """A process that scores all pairs when it is told to."""

    def __init__(self, arguments: argparse.Namespace, engine: str, precision: str) -> None:
        command = [sys.executable, __file__, "--contender", engine, precision]
        for name in ("model", "data", "queries", "depth", "max_length", "device", "batch_size", "threads"):
            command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        threads = {name: str(arguments.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads}
        )
        self.seconds: list[float] = []
        self.facts = self._answer()
        self.scores = np.array(self.facts.pop("scores"), np.float32)

    def round(self) -> None:
        """Have all pairs scored once more."""
        assert self._process.stdin is not None
        self._process.stdin.write("again\n")
        self._process.stdin.flush()
        self.seconds.append(self._answer()["seconds"])

    def figures(self, theirs: _Contender, depth: int) -> dict[str, Any]:
        """Speed, and how far the scores are from the other's."""
        from retrieval_kd.diagnostics.lists import kendall_tau

        starts = np.arange(0, len(self.scores) + 1, depth)
        seconds = statistics.median(self.seconds)
        facts = {
            "documents_per_second": round(len(self.scores) / seconds, 2),
            "ratio": round(statistics.median(t / o for t, o in zip(theirs.seconds, self.seconds, strict=True)), 2),
            "kendall_tau": round(float(np.nanmean(kendall_tau(starts, theirs.scores, self.scores))), 4),
            "worst_tau": round(float(np.nanmin(kendall_tau(starts, theirs.scores, self.scores))), 4),
            "max_error": float(np.abs(self.scores - theirs.scores).max()),
            "first_seconds": round(self.facts["first_seconds"], 1),
        }
        if "peak" in self.facts:
            facts["share_of_peak"] = self.facts["operations"] / seconds / self.facts["peak"]
            facts["peak_teraflops"] = round(self.facts["peak"] / 1e12, 1)
        return facts

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise SystemExit(f"a contender ended: {self._process.args!r}")


def _serve(arguments: argparse.Namespace) -> None:
    """Score all pairs once and tell the scores, then once for every line of the input."""
    import torch

    torch.set_num_threads(arguments.threads)
    queries, documents, collection = _pairs(arguments)
    began = time.perf_counter()
    engine, precision = arguments.contender
    score = (_theirs if engine == THEIRS else _ours)(arguments, engine, precision, collection)
    score(queries[:2], documents[:2])
    facts: dict[str, Any] = {"first_seconds": time.perf_counter() - began}
    facts["scores"] = [float(value) for value in score(queries, documents)]
    facts |= _work(arguments, queries, documents)
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        score(queries, documents)
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


def _pairs(arguments: argparse.Namespace) -> tuple[list[str], list[str], Any]:
    """Queries and documents (n,) of whole lists, and their collection."""
    from retrieval_kd.data import load_collection
    from retrieval_kd.tables import Component
    from retrieval_kd.teachers import load_teacher

    collection = load_collection(arguments.data, ["test"])
    texts = collection.split("test").texts
    chosen = [texts[place] for place in np.linspace(0, len(texts) - 1, arguments.queries).astype(int)]
    bm25: Any = load_teacher(Component(kind="bm25"), collection)
    rows = bm25.retrieve(chosen, arguments.depth).rows
    if (rows < 0).any():
        raise SystemExit(f"some query finds fewer than {arguments.depth} documents; give a smaller --depth.")
    queries = [query for query in chosen for _ in range(arguments.depth)]
    return queries, [collection.documents[row] for row in rows.ravel()], collection


def _ours(arguments: argparse.Namespace, engine: str, precision: str, collection: Any) -> Any:
    from retrieval_kd.tables import Component
    from retrieval_kd.teachers import load_teacher

    options = {"model": arguments.model, "max_length": arguments.max_length, "engine": engine, "precision": precision}
    return load_teacher(Component(kind="cross_encoder", **options), collection).score


def _theirs(arguments: argparse.Namespace, engine: str, precision: str, collection: Any) -> Any:
    import torch
    from sentence_transformers import CrossEncoder

    from retrieval_kd.weights import locate_model

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = CrossEncoder(
        str(locate_model(arguments.model)),
        device=arguments.device,
        max_length=arguments.max_length,
        model_kwargs={"torch_dtype": dtype},
    )
    raw, size = torch.nn.Identity(), arguments.batch_size
    return lambda queries, documents: model.predict(
        list(zip(queries, documents, strict=True)), activation_fn=raw, batch_size=size, show_progress_bar=False
    )


def _work(arguments: argparse.Namespace, queries: list[str], documents: list[str]) -> dict[str, Any]:
    """The tokens that are read without padding; on a GPU, the operations that they need, and the card's peak."""
    from transformers import AutoConfig, AutoTokenizer

    from retrieval_kd.weights import locate_model

    folder = locate_model(arguments.model)
    tokens = AutoTokenizer.from_pretrained(folder)(queries, documents, truncation=True, max_length=arguments.max_length)
    lengths = np.array([len(ids) for ids in tokens["input_ids"]], np.float64)
    facts: dict[str, Any] = {"tokens": float(lengths.sum())}
    if arguments.device == "cuda":
        config = AutoConfig.from_pretrained(folder)
        width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        # Of a token: four projections, two of the feed-forward, and its attention to every token of its pair.
        products = lengths * (4 * width**2 + 2 * width * inner) + 2 * lengths**2 * width
        facts |= {"operations": float(2 * layers * products.sum()), "peak": _peak()}
    return facts


def _peak() -> float:
    """Operations a second of a large product of bf16 matrices, the best of several."""
    import torch

    size, best = 8192, 0.0
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(20):
        torch.cuda.synchronize()
        began = time.perf_counter()
        left @ right
        torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
