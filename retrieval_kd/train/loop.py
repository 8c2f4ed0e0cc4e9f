"""The training loop, once, for every recipe: stages of steps, checkpoints, exact resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from retrieval_kd.files import atomic, fingerprint
from retrieval_kd.progress import progress, say
from retrieval_kd.recipe import Stage, Training
from retrieval_kd.schedules import learning_rate_factor, weight_at
from retrieval_kd.students import Batch, Student
from retrieval_kd.towers import autocast
from retrieval_kd.train.batches import Draw, draw
from retrieval_kd.train.terms import loss_of
from retrieval_kd.trainset import TrainSet


def train(
    student: nn.Module, trainset: TrainSet, stages: Sequence[Stage], settings: Training, folder: Path, key: Any
) -> list[dict[str, float]]:
    """Train `student` in place through all stages; return the log, one record every ten steps.

    `folder` holds checkpoints and `log.jsonl`; a run that was stopped goes on from its last
    checkpoint and ends with the same weights, to the bit on a CPU with the same number of threads.
    `key` identifies what is trained on what: a checkpoint of something else is not taken up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = fingerprint([key, [stage.model_dump() for stage in stages], settings.model_dump()])
    log = folder / "log.jsonl"
    first_stage, first_step, checkpoint = _latest(folder, key)
    records = [record for record in _read_log(log) if (record["stage"], record["step"]) <= (first_stage, first_step)]
    log.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    for number, stage in enumerate(stages):
        if number < first_stage:
            continue
        set_seed(settings.seed + number)
        start = first_step if number == first_stage else 0
        records += _run_stage(student, trainset, stage, settings, folder, key, number, start, checkpoint, log)
        checkpoint = None
    return records


def _run_stage(
    student: nn.Module,
    trainset: TrainSet,
    stage: Stage,
    settings: Training,
    folder: Path,
    key: str,
    number: int,
    start: int,
    checkpoint: Path | None,
    log: Path,
) -> list[dict[str, float]]:
    # Accelerate fixes mixed precision once a process; stages may differ, so autocast is done here.
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
    model, optimizer = accelerator.prepare(student, _optimizer(student, stage))
    model.train()
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        say(f"train: resumed stage {number} at step {start} of {stage.steps}")
    records: list[dict[str, float]] = []
    documents = 0 if trainset.document_tokens is None else len(trainset.document_tokens)
    with progress(f"train stage {number}", stage.steps) as advance, log.open("a", encoding="utf-8") as lines:
        advance(start)
        for step in range(start, stage.steps):
            drawn = draw(trainset, stage, (settings.seed, number), step, documents)
            factor = learning_rate_factor(step, stage.steps, stage.warmup, stage.schedule)
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * factor
            with autocast(stage.precision, accelerator.device.type):
                outputs = model(_batch(student, drawn, trainset), settings.micro_batch)  # type: ignore[arg-type]
            values = [loss_of(term, outputs, drawn, trainset) for term in stage.terms]
            weights = [weight_at(term.weight, step) for term in stage.terms]
            loss = torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum()
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), stage.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 9 or step + 1 == stage.steps:
                record = {"stage": number, "step": step + 1, "loss": loss.item(), "gradient_norm": float(norm)}
                record |= {
                    f"{term.loss}.{i}": value.item()
                    for i, (term, value) in enumerate(zip(stage.terms, values, strict=True))
                }
                records.append(record)
                lines.write(json.dumps(record) + "\n")
                lines.flush()
                advance(0, f"loss {record['loss']:.4f}")
            if (step + 1) % settings.checkpoint_steps == 0 or step + 1 == stage.steps:
                _save_checkpoint(accelerator, folder, key, number, step + 1)
            advance()
    model.eval()
    return records


def _batch(student: Student, drawn: Draw, trainset: TrainSet) -> Batch:
    """The tokens that a draw stands for."""
    vectors = None
    documents: list[Any] = []
    if student.frozen_documents and trainset.frozen is not None:
        vectors = torch.from_numpy(trainset.frozen[drawn.rows])
    elif trainset.document_tokens is not None:
        documents = [trainset.document_tokens[row] for row in drawn.rows]
    queries = [trainset.query_tokens[query] for query in drawn.queries]
    return Batch(queries, documents, torch.from_numpy(drawn.columns), vectors)


def _optimizer(student: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """AdamW, without decay on biases and norms."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": stage.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=stage.learning_rate, fused=True)


def _save_checkpoint(accelerator: Accelerator, folder: Path, key: str, stage: int, step: int) -> None:
    """Save all state as checkpoint-STAGE-STEP, then drop the older ones."""
    path = folder / f"checkpoint-{stage:03d}-{step:08d}"
    with atomic(path) as scratch:
        accelerator.save_state(str(scratch))
        (scratch / "position.json").write_text(json.dumps({"key": key, "stage": stage, "step": step}), encoding="utf-8")
    for leftover in folder.glob(".checkpoint-*"):  # what a kill left half-written or half-removed
        shutil.rmtree(leftover)
    for old in folder.glob("checkpoint-*"):
        if old != path:
            shutil.rmtree(old.rename(folder / f".{old.name}.old"))  # never half a checkpoint under its name


def _latest(folder: Path, key: str) -> tuple[int, int, Path | None]:
    """Stage, step and path of the last checkpoint of this very training; (0, 0, None) without one."""
    for path in sorted(folder.glob("checkpoint-*"), reverse=True):
        position = json.loads((path / "position.json").read_text(encoding="utf-8"))
        if position["key"] == key:
            return position["stage"], position["step"], path
    return 0, 0, None


def _read_log(path: Path) -> list[dict[str, float]]:
    """The whole lines of the log; a line that a kill cut short is left out."""
    if not path.exists():
        return []
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]
