"""SPLADE training: this loop against Sentence Transformers' SparseEncoderTrainer, same weights, batches and lengths.

    RKD_DATA=... python scripts/bench_splade_memory.py                 # SciFact documents of 128 tokens
    RKD_DATA=... python scripts/bench_splade_memory.py --length 256

Margin-MSE and FLOPS of the documents (weight 1e-3) on triples (query, document, document) of a masked language model
with the shape and vocabulary of all-MiniLM-L6-v2. As `bench_train.py`, whose pieces it uses, it runs each contender in
processes of its own; time is the median step's, memory the peak over what the process held before.
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
from pathlib import Path
from typing import Any

import bench_train
import numpy as np

SEED, WARM, PENALTY = 0, 1, 1e-3


def main() -> None:
    """Run both contenders in turns and print the table, then one JSON line."""
    arguments = _arguments()
    if arguments.contender:
        print(json.dumps(_measure(arguments)))
        return
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds):
        for contender in ("sentence_transformers", "retrieval_kd"):
            runs.setdefault(contender, []).append(_spawn(arguments, contender))
    figures: dict[str, Any] = {"batch_size": arguments.batch_size, "length": arguments.length}
    print("| trainer | seconds a step | peak MB over start | losses (first, last) |\n|---|---:|---:|---|")
    for name, found in runs.items():
        seconds = statistics.median(second for run in found for second in run["seconds"])
        peak, losses = max(run["peak_mb"] for run in found), found[0]["losses"]
        figures[name] = {"seconds": round(seconds, 3), "peak_mb": round(peak), "losses": losses}
        print(f"| {name} | {seconds:.2f} | {peak:.0f} | {losses[0]:.5f}, {losses[-1]:.5f} |")
    theirs, ours = figures["sentence_transformers"], figures["retrieval_kd"]
    difference = float(np.abs(np.array(theirs["losses"]) / np.array(ours["losses"]) - 1).max())
    figures["memory_ratio"] = round(ours["peak_mb"] / theirs["peak_mb"], 3)
    figures["largest_relative_loss_difference"] = float(f"{difference:.2g}")
    figures["machine"] = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps(figures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="scifact", help="a folder of RKD_DATA or an ir_datasets id")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--contender", choices=("sentence_transformers", "retrieval_kd"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _spawn(arguments: argparse.Namespace, contender: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--contender", contender]
    for name in ("data", "batch_size", "length", "steps", "micro_batch_tokens"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from retrieval_kd.weights import MINILM, locate_model

    folder = Path(tempfile.mkdtemp())
    torch.manual_seed(SEED)
    source = locate_model(MINILM)
    model: Any = AutoModelForMaskedLM.from_pretrained(source, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    del model
    contender = {"sentence_transformers": _theirs, "retrieval_kd": _ours}[arguments.contender]
    run, losses, seconds = contender(arguments, folder, *bench_train.triples(arguments))
    before = bench_train.resident_mb()
    run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds[WARM:], "losses": losses, "peak_mb": peak - before}


def _ours(
    arguments: argparse.Namespace,
    folder: Path,
    queries: list[str],
    documents: list[str],
    rows: np.ndarray,
    scores: np.ndarray,
) -> bench_train.Contender:
    from retrieval_kd.stages import Regularizer, Term
    from retrieval_kd.students.splade import Options, load

    student = load(Options(model=str(folder), max_length=arguments.length))
    more = {
        "terms": (Term(loss="margin_mse", teachers=("bm25",)),),
        "regularizers": (Regularizer(name="flops", weight=PENALTY),),
    }
    return bench_train.our_trainer(arguments, student, queries, documents, rows, scores, more)


def _theirs(
    arguments: argparse.Namespace,
    folder: Path,
    queries: list[str],
    documents: list[str],
    rows: np.ndarray,
    scores: np.ndarray,
) -> bench_train.Contender:
    from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
    from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import SpladeRegularizerWeightSchedulerCallback
    from sentence_transformers.sparse_encoder.losses import SparseMarginMSELoss, SpladeLoss

    model = SparseEncoder(str(folder), device="cpu")
    model.max_seq_length = arguments.length
    data, clock, losses, seconds = bench_train.their_data(arguments, queries, documents, rows, scores)
    settings = SparseEncoderTrainingArguments(use_cpu=True, **bench_train.their_settings(arguments))
    loss = SpladeLoss(model, SparseMarginMSELoss(model), document_regularizer_weight=PENALTY)
    trainer = SparseEncoderTrainer(model, settings, train_dataset=data, loss=loss, callbacks=[clock])
    trainer.remove_callback(SpladeRegularizerWeightSchedulerCallback)  # a penalty of constant weight
    loss.document_regularizer_weight = PENALTY
    return trainer.train, losses, seconds


if __name__ == "__main__":
    main()
