"""The training loop, once, for every recipe: steps, checkpoints, exact resume.

Under `torchrun` or `accelerate launch` processes share the batch (see `gather`), and all compute the loss of the
whole of it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from retrieval_kd.backward import add_rows_in_place, attend_plainly
from retrieval_kd.files import fingerprint
from retrieval_kd.gather import process, sum_gradients
from retrieval_kd.progress import progress, say
from retrieval_kd.schedules import learning_rate_factor, weight_at
from retrieval_kd.stages import Stage, Training
from retrieval_kd.students import Batch, Outputs, own_scores
from retrieval_kd.towers import autocast
from retrieval_kd.train.batches import Draw, draw
from retrieval_kd.train.checkpoints import Checkpoints
from retrieval_kd.train.controllers import ActiveTerms, TermState
from retrieval_kd.train.terms import Step, active_terms, cut, loss_of, penalty
from retrieval_kd.trainset import Tokens, TrainSet
from retrieval_kd.types import InputError

Record = dict[str, float]
LOG_STEPS = 10


def train(
    student: nn.Module,
    trainset: TrainSet,
    stage: Stage,
    settings: Training,
    folder: Path,
    key: Any,
    *,
    number: int = 0,
    live: Mapping[str, nn.Module] | None = None,
    snapshot: nn.Module | None = None,
    validate: Callable[[nn.Module], float] | None = None,
) -> list[Record]:
    """Train `student` in place through one stage; return the log, one record every ten steps.

    `live` are teachers that judge each batch, trained too where their parameters require gradients;
    `snapshot` is the student as the stage before left it. `validate` measures nDCG@10 for
    early stopping. `folder` holds checkpoints and `log.jsonl`: a run that was stopped goes on from its last
    checkpoint and ends with the same weights, to the bit on a CPU with the same number of threads.
    `key` identifies what is trained on what: a checkpoint of something else is not taken up.
    """
    tracked = list(settings.trackers)
    for name in tracked:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"tracker {name!r} is not installed; `pip install {name}`, or take it out of training.trackers."
            )
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=tracked or None, project_dir=folder)
    if tracked:
        accelerator.init_trackers("retrieval_kd", config=stage.model_dump(mode="json"))
    views = {"student": student, **(live or {}), **({} if snapshot is None else {"snapshot": snapshot})}
    for module in views.values():
        module.to(accelerator.device)
    run = Run(views, trainset, stage, settings, number)
    identity = fingerprint([key, number, stage.model_dump(), settings.model_dump(exclude={"trackers"})])
    keep = stage.average.checkpoints if stage.average else 1
    checkpoints = Checkpoints(folder, identity, run.state_dict, run.load_state_dict, keep)
    start = checkpoints.resume()
    if start:
        say(f"train: resumed stage {number} at step {start} of {stage.steps}")
    records = checkpoints.records(start)
    with progress(f"train stage {number}", stage.steps) as advance:
        advance(start)
        for step in range(start, stage.steps):
            if run.finished:
                break
            values, norm = run.step(step)
            done = step + 1
            quality: Record = {}
            if validate is not None and settings.validation and done % settings.validation.every == 0:
                student.eval()
                quality = {"nDCG@10": validate(student)}
                run.learn_quality(quality["nDCG@10"], done, settings.validation.patience)
            if quality or done % LOG_STEPS == 0 or done == stage.steps:
                record = {
                    "stage": number,
                    "step": done,
                    "gradient_norm": norm,
                    **{k: v.item() for k, v in values.items()},
                    **quality,
                }
                records.append(record)
                checkpoints.log(record)
                if tracked:
                    accelerator.log(record, step=done)
                advance(0, f"loss {record['loss']:.4f}")
            if done % settings.checkpoint_steps == 0 or done == stage.steps or run.finished:
                checkpoints.save(done)
                accelerator.wait_for_everyone()
            advance()
    if run.best_weights is not None:
        student.load_state_dict(run.best_weights)
    elif keep > 1:
        student.load_state_dict(average([state["models"]["student"] for state in checkpoints.states()]))
    student.eval()
    if tracked:
        accelerator.end_training()
    return records


class Run:
    """A stage at work: models, optimiser, what terms remember, and the best weights so far."""

    def __init__(
        self, models: dict[str, nn.Module], trainset: TrainSet, stage: Stage, settings: Training, number: int
    ) -> None:
        self.models, self.trainset, self.stage, self.settings, self.number = models, trainset, stage, settings, number
        trained = {term.of for term in stage.terms}
        trained |= {name for term in stage.terms if not term.detach for name in term.teachers}
        self.learners = {
            name: model
            for name, model in models.items()
            if name in trained and any(parameter.requires_grad for parameter in model.parameters())
        }
        for model in self.learners.values():
            add_rows_in_place(model)
            if stage.precision == "bf16" and next(model.parameters()).device.type == "cpu":
                attend_plainly(model)
        self.parameters = [p for model in self.learners.values() for p in model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(self.parameters, stage)
        self.terms = [TermState(term) for term in stage.terms]
        wanted = [one.active_terms for one in stage.regularizers]
        self.controls = [None if number is None else ActiveTerms(number) for number in wanted]
        self.layered = {name for term in stage.terms if term.layers is not None for name in (term.of, term.teachers[0])}
        self.best, self.best_step, self.worse = -1.0, 0, 0
        self.best_weights: dict[str, Tensor] | None = None
        self.finished = False
        self.alarmed: set[str] = set()

    def step(self, step: int) -> tuple[dict[str, Tensor], float]:
        """One step of the optimiser: the loss and its parts by name, and the gradient's norm."""
        stage, seed = self.stage, (self.settings.seed, self.number)
        # Random numbers of a step depend on the step alone, so that a resumed run needs no state of theirs.
        torch.manual_seed(int(np.random.SeedSequence([*seed, step, process()[0]]).generate_state(1)[0]))
        documents = 0 if self.trainset.document_tokens is None else len(self.trainset.document_tokens)
        documents = documents or (0 if self.trainset.frozen is None else len(self.trainset.frozen))
        drawn = draw(self.trainset, stage, seed, step, documents)
        factor = learning_rate_factor(step, stage.steps, stage.warmup, stage.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = stage.learning_rate * factor
        views = {name: self._view(name, model, drawn) for name, model in self.models.items()}
        loss, values = self._loss(views, drawn, step)
        torch.autograd.backward(loss)
        sum_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, stage.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for state, value in zip(self.terms, list(values.values())[1:], strict=False):
            if state.taid is not None:
                state.taid.update(value.item(), (step + 1) / stage.steps)
        return {**values, **self._count_active(views["student"], step)}, float(norm)

    def _count_active(self, outputs: Outputs, step: int) -> dict[str, Tensor]:
        """Active terms a text of the sides that are penalised; an alarm, once a side, if there are none or too many."""
        counts = {}
        penalised = [one.side for one in self.stage.regularizers]
        for side in ("query", "document"):
            if not {side, "both"} & set(penalised):
                continue
            texts = outputs.queries if side == "query" else outputs.documents
            if texts is None or not len(texts):  # a stage may read queries alone
                continue
            active, size = active_terms(side, outputs)
            counts[f"active.{side}"] = outputs.scores.new_tensor(active)
            for one, control in zip(self.stage.regularizers, self.controls, strict=True):
                if control is not None and one.side == side:
                    control.update(active)
            late = 2 * step >= self.stage.steps
            if side not in self.alarmed and (not active or (late and active > size / 2)):
                self.alarmed.add(side)
                none = "no term is active, so that nothing more is learned; weaken the penalty or let it grow slower"
                many = f"{active:.0f} of {size} terms are active, too many for an inverted index; raise the penalty"
                say(f"stages[{self.number}], step {step + 1}, {side} side: {many if active else none}.")
        return counts

    def _view(self, name: str, model: nn.Module, drawn: Draw) -> Outputs:
        """What one model makes of a batch; without gradient where it does not learn."""
        learns = name in self.learners
        model.train(learns)
        device = next(model.parameters()).device.type
        batch = replace(
            make_batch(model, drawn, self.trainset, name),
            micro_batch_tokens=self.settings.micro_batch_tokens or (1024 if device == "cpu" else 65_536),
            gradient_caching=self.stage.gradient_caching,
            layers=name in self.layered,
        )
        with torch.set_grad_enabled(learns), autocast(self.stage.precision, device):
            outputs: Outputs = model(batch)
        return outputs

    def _loss(self, views: dict[str, Outputs], drawn: Draw, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        stage, seed = self.stage, (self.settings.seed, self.number, step)
        values: dict[str, Tensor] = {}
        total = views["student"].scores.new_zeros(())
        for place, (term, state) in enumerate(zip(stage.terms, self.terms, strict=True)):
            widths: list[int | None] = [None, *stage.widths]
            parts = [
                loss_of(term, Step(drawn, self.trainset, _cut(views, width, drawn), seed, width), state)
                for width in widths
            ]
            values[f"{term.loss}.{place}"] = torch.stack(parts).mean()
            total = total + weight_at(term.weight, step) * values[f"{term.loss}.{place}"]
        for regularizer, control in zip(stage.regularizers, self.controls, strict=True):
            value = penalty(regularizer, views["student"], torch.from_numpy(drawn.columns))
            values[f"{regularizer.name}.{regularizer.side}"] = value
            total = total + weight_at(regularizer.weight, step) * (1.0 if control is None else control.factor) * value
        return total, {"loss": total, **values}

    def learn_quality(self, quality: float, step: int, patience: int) -> None:
        """Keep the weights if they are the best so far; end the stage after `patience` validations that were not."""
        if quality > self.best:
            self.best, self.best_step, self.worse = quality, step, 0
            self.best_weights = {name: value.clone() for name, value in self.models["student"].state_dict().items()}
        else:
            self.worse += 1
            self.finished = self.worse >= patience

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        quality = {name: getattr(self, name) for name in _QUALITY}
        return {
            "models": {name: model.state_dict() for name, model in self.learners.items()},
            "optimizer": self.optimizer.state_dict(),
            "terms": [state.state_dict() for state in self.terms],
            "controls": [control.state_dict() if control else None for control in self.controls],
            "quality": quality,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        for name, model in self.learners.items():
            model.load_state_dict(state["models"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        for term, values in zip(self.terms, state["terms"], strict=True):
            term.load_state_dict(values)
        for control, values in zip(self.controls, state["controls"], strict=True):
            if control is not None:
                control.load_state_dict(values)
        vars(self).update(state["quality"])


_QUALITY = ("best", "best_step", "worse", "best_weights", "finished")


def make_batch(model: Any, drawn: Draw, trainset: TrainSet, name: str = "student") -> Batch:
    """The tokens that a draw stands for, as the student or the live teacher `name` reads them."""
    documents: Tokens | None
    queries, documents = trainset.live.get(name, (trainset.query_tokens, trainset.document_tokens))
    vectors = None
    if name in ("student", "snapshot") and model.frozen_documents and trainset.frozen is not None:
        vectors, documents = torch.from_numpy(trainset.frozen[drawn.rows]), None
    return Batch(
        [queries[query] for query in drawn.queries],
        [] if documents is None else [documents[row] for row in drawn.rows],
        torch.from_numpy(drawn.columns),
        vectors,
    )


def average(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of weights of one architecture and one start; whole numbers are the first's."""
    return {
        name: torch.stack([state[name] for state in states]).mean(0) if value.is_floating_point() else value
        for name, value in states[0].items()
    }


def _cut(views: dict[str, Outputs], width: int | None, drawn: Draw) -> dict[str, Outputs]:
    """The student's outputs in their first `width` coordinates."""
    student = views["student"]
    if width is None or student.queries is None or student.documents is None:
        return views
    queries, documents = cut(student.queries, width), cut(student.documents, width)
    grid = queries @ documents.T
    return {**views, "student": Outputs(own_scores(grid, torch.from_numpy(drawn.columns)), grid, queries, documents)}


def _optimizer(parameters: list[nn.Parameter], stage: Stage) -> torch.optim.Optimizer:
    """AdamW, without decay on biases and norms."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": stage.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=stage.learning_rate, fused=True)
