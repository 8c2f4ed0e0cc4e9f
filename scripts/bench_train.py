"""Training: this loop against the Sentence Transformers trainer, same weights, triples, batches and precision.

    RKD_DATA=... python scripts/bench_train.py                     # MS MARCO passages, fp32 and bf16
    RKD_DATA=... python scripts/bench_train.py --data scifact      # long documents
    python scripts/bench_train.py --device cuda --precision bf16

Margin-MSE on triples (query, document, document) of all-MiniLM-L6-v2; both see the same batches in the same
order, so that their losses are equal. Each contender runs in processes of its own, taking turns; time is the
median step's, memory the peak over what the process held before the first step. Needs the package `datasets`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

LENGTH, SEED, WARM = 256, 0, 2
Contender = tuple[Callable[[], Any], list[float], list[float]]  # what trains; losses and seconds, which it fills


def main() -> None:
    """Run every contender in turns and print the table, then one JSON line."""
    arguments = _arguments()
    if arguments.contender:
        print(json.dumps(_measure(arguments)))
        return
    runs: dict[str, list[dict[str, Any]]] = {}
    for precision in arguments.precision:
        for _ in range(arguments.rounds):
            for contender in ("sentence_transformers", "retrieval_kd"):
                runs.setdefault(f"{contender} {precision}", []).append(_spawn(arguments, contender, precision))
    figures: dict[str, Any] = {"data": arguments.data, "device": arguments.device, "batch_size": arguments.batch_size}
    print("| trainer | examples/s | peak MB over start | losses (first, last) |\n|---|---:|---:|---|")
    for name, found in runs.items():
        seconds = statistics.median(second for run in found for second in run["seconds"])
        rate, peak = arguments.batch_size / seconds, max(run["peak_mb"] for run in found)
        losses = found[0]["losses"]
        figures[name] = {"examples_per_second": round(rate, 2), "peak_mb": round(peak), "losses": losses}
        print(f"| {name} | {rate:.1f} | {peak:.0f} | {losses[0]:.5f}, {losses[-1]:.5f} |")
    for precision in arguments.precision:
        theirs, ours = (figures[f"{name} {precision}"] for name in ("sentence_transformers", "retrieval_kd"))
        difference = np.abs(np.array(theirs["losses"]) / np.array(ours["losses"]) - 1).max()
        figures[precision] = {
            "speed_ratio": round(ours["examples_per_second"] / theirs["examples_per_second"], 2),
            "memory_ratio": round(ours["peak_mb"] / theirs["peak_mb"], 2),
            "largest_relative_loss_difference": float(f"{difference:.2g}"),
        }
        print(f"{precision}: {figures[precision]}")
    figures |= {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    figures |= {"versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")}}
    print(json.dumps(figures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="msmarco-dl-pool", help="a folder of RKD_DATA or an ir_datasets id")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--contender", choices=("sentence_transformers", "retrieval_kd"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _spawn(arguments: argparse.Namespace, contender: str, precision: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--contender", contender, "--precision", precision]
    for name in ("data", "device", "batch_size", "steps", "micro_batch_tokens"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def triples(arguments: argparse.Namespace) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Queries (n,), documents, rows (n, 2) of the documents, teacher scores (n, 2): BM25's, over 10."""
    from retrieval_kd.data import load_collection
    from retrieval_kd.tables import Component
    from retrieval_kd.teachers import load_teacher
    from retrieval_kd.types import Collection

    collection = load_collection(arguments.data)
    rng = np.random.default_rng(SEED)
    texts = next(iter(collection.splits.values())).texts
    count = arguments.steps * arguments.batch_size
    queries = [texts[place] for place in rng.permutation(np.arange(count) % len(texts)).tolist()]
    rows = rng.choice(len(collection), (count, 2), replace=False)
    documents = [collection.documents[row] for row in rows.ravel().tolist()]
    bm25: Any = load_teacher(Component(kind="bm25"), Collection("", documents, documents, {}))
    scores = bm25.score([query for query in queries for _ in range(2)], documents)
    return queries, documents, np.arange(2 * count).reshape(count, 2), scores.reshape(count, 2) / 10


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.manual_seed(SEED)
    contender = {"sentence_transformers": _theirs, "retrieval_kd": _ours}[arguments.contender]
    run, losses, seconds = contender(arguments, *triples(arguments))
    cuda = arguments.device == "cuda"
    before = torch.cuda.memory_allocated() / 2**20 if cuda else resident_mb()
    run()
    peak = (
        torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    return {"seconds": seconds[WARM:], "losses": losses, "peak_mb": peak - before}


def _ours(
    arguments: argparse.Namespace, queries: list[str], documents: list[str], rows: np.ndarray, scores: np.ndarray
) -> Contender:
    from retrieval_kd.stages import Term
    from retrieval_kd.students.dense import Options, load
    from retrieval_kd.weights import MINILM

    student = load(Options(model=MINILM, max_length=LENGTH, dropout=0.0))
    terms = (Term(loss="margin_mse", teachers=("bm25",)),)
    more = {"terms": terms, "precision": arguments.precision[0]}
    return our_trainer(arguments, student, queries, documents, rows, scores, more)


def our_trainer(
    arguments: argparse.Namespace,
    student: Any,
    queries: list[str],
    documents: list[str],
    rows: np.ndarray,
    scores: np.ndarray,
    more: dict[str, Any],
) -> Contender:
    """This loop on the triples; `more` are the stage's terms and the like."""
    from retrieval_kd.stages import Stage, Training
    from retrieval_kd.train import loop
    from retrieval_kd.trainset import Tokens, TrainSet
    from retrieval_kd.types import Hits

    trainset = TrainSet(
        query_tokens=Tokens.pack(student.tokenize(queries, "query")),
        document_tokens=Tokens.pack(student.tokenize(documents, "document")),
        hits=Hits(rows.astype(np.int32), np.zeros(rows.shape, np.float32)),
        teachers=["bm25"],
        scores=scores[None].astype(np.float32),
        positive=np.arange(2) == np.zeros((len(queries), 1), int),
    )
    stage = Stage(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        candidates=2,
        learning_rate=2e-5,
        schedule="constant",
        warmup=0.0,
        **more,
    )
    settings = Training(checkpoint_steps=10**9, micro_batch_tokens=arguments.micro_batch_tokens)
    losses: list[float] = []
    seconds: list[float] = []
    step = loop.Run.step

    def timed(self: Any, number: int) -> Any:
        began = time.perf_counter()
        found = step(self, number)
        losses.append(found[0]["loss"].item())
        seconds.append(time.perf_counter() - began)
        return found

    loop.Run.step = timed  # type: ignore[method-assign, assignment]

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            loop.train(student, trainset, stage, settings, Path(folder), "bench")

    return run, losses, seconds


def _theirs(
    arguments: argparse.Namespace, queries: list[str], documents: list[str], rows: np.ndarray, scores: np.ndarray
) -> Contender:
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MarginMSELoss
    from torch.nn import Dropout

    from retrieval_kd.weights import MINILM, locate_model

    model = SentenceTransformer(str(locate_model(MINILM)), device=arguments.device)
    model.max_seq_length = LENGTH
    for module in model.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
    data, clock, losses, seconds = their_data(arguments, queries, documents, rows, scores)
    settings = SentenceTransformerTrainingArguments(
        bf16=arguments.precision[0] == "bf16", use_cpu=arguments.device == "cpu", **their_settings(arguments)
    )
    trainer = SentenceTransformerTrainer(
        model, settings, train_dataset=data, loss=MarginMSELoss(model), callbacks=[clock]
    )
    return trainer.train, losses, seconds


def their_data(
    arguments: argparse.Namespace, queries: list[str], documents: list[str], rows: np.ndarray, scores: np.ndarray
) -> tuple[Any, Any, list[float], list[float]]:
    """The batches of our loop, in its order, a callback for their trainer, and the losses and seconds that it notes."""
    from datasets import Dataset
    from transformers import TrainerCallback

    from retrieval_kd.stages import Stage, Term
    from retrieval_kd.train.batches import draw
    from retrieval_kd.trainset import Tokens, TrainSet
    from retrieval_kd.types import Hits

    plain = TrainSet(Tokens.pack([[0]] * len(queries)), hits=Hits(rows.astype(np.int32), scores.astype(np.float32)))
    stage = Stage(steps=arguments.steps, batch_size=arguments.batch_size, terms=(Term(loss="margin_mse"),))
    order = np.concatenate([draw(plain, stage, (0, 0), step).queries for step in range(arguments.steps)])
    data = Dataset.from_dict(
        {
            "query": [queries[place] for place in order],
            "positive": [documents[row] for row in rows[order, 0]],
            "negative": [documents[row] for row in rows[order, 1]],
            "label": (scores[order, 0] - scores[order, 1]).tolist(),
        }
    )
    losses: list[float] = []
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:  # type: ignore[override]
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    return data, Clock(), losses, seconds


def their_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Training arguments that make their trainer do what our loop does, batch by batch."""
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from torch.utils.data import SequentialSampler

    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": arguments.steps,
        "per_device_train_batch_size": arguments.batch_size,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "batch_sampler": lambda dataset, batch_size, drop_last, **_: DefaultBatchSampler(
            SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last
        ),
    }


def resident_mb() -> float:
    """Megabytes that this process holds in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()
