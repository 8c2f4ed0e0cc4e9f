"""Training: every loss falls, what is frozen stays, and what steers or cuts a step does so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_classifier, tiny_masked_lm
from tiny_training import (
    DOCUMENTS,
    FUSED,
    IMITATE,
    IN_BATCH,
    MARGIN,
    SETTINGS,
    equal,
    make_trainset,
    stage_of,
    texts,
    train_stages,
    value_of,
    weights,
)
from torch import nn

from retrieval_kd.losses import find_loss
from retrieval_kd.stages import Regularizer, Term
from retrieval_kd.students import Batch, Outputs, cross_encoder, dense, own_scores, splade
from retrieval_kd.train.batches import draw
from retrieval_kd.train.loop import Run, make_batch, train
from retrieval_kd.trainset import TrainSet
from retrieval_kd.types import InputError


@pytest.mark.parametrize("name", ["embedding_mse", "info_nce", "kl", "margin_mse", "pld", "ranknet"])
def test_losses_of_every_need_fall(name: str, model: Path, tmp_path: Path) -> None:
    loss = find_loss(name)
    term = Term(loss=name, teachers=("a",) if loss.of == "vectors" or "teacher" in loss.needs else ())
    student = dense.load(dense.Options(model=str(model)))
    log = train(student, make_trainset(student), stage_of(term), SETTINGS, tmp_path, name)
    assert [record["step"] for record in log] == [10, 20, 30, 40]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert log[-1]["loss"] == pytest.approx(log[-1][f"{name}.0"])
    assert not student.training
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == log


def test_weights_add_up_and_ramps_begin_at_nothing(model: Path, tmp_path: Path) -> None:
    student = dense.load(dense.Options(model=str(model)))
    half = FUSED.model_copy(update={"weight": 0.5})
    late = Term(loss="info_nce", relation="batch", weight={"ramp": "linear", "to": 2.0, "steps": 18})
    log = train(student, make_trainset(student), stage_of(half, late, steps=10), SETTINGS, tmp_path, "w")
    record = log[-1]  # of step 10, which is number 9 from 0: half-way up the ramp
    assert record["loss"] == pytest.approx(0.5 * record["kl.0"] + 1.0 * record["info_nce.1"], rel=1e-5)


def test_document_vectors_are_imitated_without_candidates(model: Path, tmp_path: Path) -> None:
    student = dense.load(dense.Options(model=str(model)))
    whole = make_trainset(student)
    trainset = TrainSet(whole.query_tokens, whole.document_tokens, document_vectors=whole.document_vectors)
    term = Term(loss="embedding_mse", teachers=("a",), side="document")
    log = train(student, trainset, stage_of(term, batch_size=24), SETTINGS, tmp_path, "d")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]


def test_a_frozen_tower_stays_and_the_query_tower_learns(model: Path, tmp_path: Path) -> None:
    document = {"model": str(model), "frozen": True}
    student = dense.load(dense.Options(model=str(model), layers=(1,), document=document, freeze_embeddings=True))
    before, frozen = weights(student.query), weights(student.towers.document)
    whole = make_trainset(student)
    known = torch.nn.functional.normalize(torch.from_numpy(whole.document_vectors["a"])).numpy()
    trainset = TrainSet(
        whole.query_tokens, None, whole.hits, whole.teachers, whole.scores, whole.positive, frozen=known
    )
    log = train(student, trainset, stage_of(FUSED, IN_BATCH), SETTINGS, tmp_path, "f")
    assert log[-1]["loss"] < log[0]["loss"]
    assert equal(weights(student.towers.document), frozen)
    after = weights(student.query)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    tables = {name for name in after if name.endswith("word_embeddings.weight")}
    assert len(tables) == 1
    assert not tables & changed  # freeze_embeddings
    assert any(name.endswith("query.weight") for name in changed)


def test_an_unfrozen_document_tower_learns_too(model: Path, tmp_path: Path) -> None:
    student = dense.load(dense.Options(model=str(model), document={"model": str(model)}))
    before = weights(student.query), weights(student.towers.document)
    train(student, make_trainset(student), stage_of(MARGIN, steps=3), SETTINGS, tmp_path, "u")
    assert not equal(before[0], weights(student.query))
    assert not equal(before[1], weights(student.towers.document))
    assert not equal(weights(student.query), weights(student.towers.document))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_classifier(tmp_path_factory.mktemp("classifier"), width=16)


def test_a_cross_encoder_trains_through_the_same_loop(classifier: Path, tmp_path: Path) -> None:
    student = cross_encoder.load(cross_encoder.Options(model=str(classifier), max_length=32))
    terms = (MARGIN, Term(loss="info_nce"))
    log = train(student, make_trainset(student), stage_of(*terms), SETTINGS, tmp_path, "c")
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    for term, message in ((IN_BATCH, "encodes queries and documents apart"), (IMITATE, "this one scores pairs")):
        with pytest.raises(InputError, match=message):
            train(student, make_trainset(student), stage_of(term), SETTINGS, tmp_path / term.loss, "c")


def test_stages_may_differ_in_precision(model: Path, tmp_path: Path) -> None:
    """bf16 in one stage and fp32 in the next, in one process; scores are float32 in both."""
    logs = {}
    for precision in ("fp32", "bf16"):
        student = dense.load(dense.Options(model=str(model)))
        first = stage_of(MARGIN, steps=10, precision=precision)
        second = stage_of(FUSED, steps=10)
        logs[precision] = train_stages(student, [first, second], SETTINGS, tmp_path / precision, "x")
        assert {tensor.dtype for tensor in student.parameters()} == {torch.float32}
    whole, half = ([record["loss"] for record in logs[precision]] for precision in ("fp32", "bf16"))
    assert whole[0] != half[0]
    assert half == pytest.approx(whole, rel=0.1)


def test_scores_keep_float32_under_autocast(model: Path) -> None:
    student = dense.load(dense.Options(model=str(model)))
    tokens = [np.array(ids, np.int32) for ids in student.tokenize(texts(3, 0), "query")]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = student(Batch(tokens, tokens, torch.tensor([[0, 1], [1, -1], [2, 0]]), micro_batch_tokens=8))
    assert outputs.scores.dtype == torch.float32
    assert outputs.queries is not None
    assert outputs.scores[0, 1].item() == pytest.approx((outputs.queries[0] @ outputs.queries[1]).item(), rel=1e-6)


def test_widths_are_a_mean_over_widths(model: Path, tmp_path: Path) -> None:
    """The loss at step 0 is the mean of those of each width alone."""
    student = dense.load(dense.Options(model=str(model), normalize=True))
    trainset = make_trainset(student)

    def first_loss(**settings: object) -> float:
        run = Run({"student": student}, trainset, stage_of(FUSED, **settings), SETTINGS, 0)
        run.optimizer.step = lambda: None
        return run.step(0)[0]["loss"].item()

    whole, both = first_loss(), first_loss(widths=(8, 4))
    student.eval()
    drawn = draw(trainset, stage_of(FUSED), (SETTINGS.seed, 0), 0)
    outputs = student(make_batch(student, drawn, trainset))
    short = []
    for width in (8, 4):
        sides = [nn.functional.normalize(side[:, :width], dim=1) for side in (outputs.queries, outputs.documents)]
        grid = sides[0] @ sides[1].T
        columns = torch.from_numpy(drawn.columns)
        short.append(value_of(FUSED, Outputs(own_scores(grid, columns), grid, *sides), drawn, trainset).item())
    assert both == pytest.approx((whole + sum(short)) / 3, rel=1e-5)


@pytest.fixture
def sparse(tmp_path: Path) -> Callable[[], nn.Module]:
    tiny_masked_lm(tmp_path / "masked")
    return lambda: splade.load(splade.Options(model=str(tmp_path / "masked")))


PENALISED = Regularizer(name="l1", side="document", weight=1e-2, active_terms=20)


def test_a_penalty_is_steered_by_the_active_terms(sparse: Callable[[], nn.Module]) -> None:
    """Its part of the loss is multiplied by the controller's factor, which learns of each step, and is resumed."""
    student = sparse()
    trainset = make_trainset(student)
    stage = stage_of(MARGIN, regularizers=(PENALISED,), learning_rate=1e-5)
    run = Run({"student": student}, trainset, stage, SETTINGS, 0)
    control = run.controls[0]
    assert control is not None
    drawn = draw(trainset, stage, (4, 0), 0, DOCUMENTS)
    views = {"student": run._view("student", student, drawn)}
    plain, values = run._loss(views, drawn, 0)
    assert control.factor == 1
    found, _ = run.step(0)
    assert control.active == pytest.approx(found["active.document"].item())
    first = control.factor
    assert first == pytest.approx((control.active / 20) ** 1.05)
    steered, _ = run._loss(views, drawn, 0)
    assert (steered - plain).item() == pytest.approx(1e-2 * (first - 1) * values["l1.document"].item(), rel=1e-3)
    run.step(1)
    assert control.factor != first
    again = Run({"student": sparse()}, trainset, stage, SETTINGS, 0)
    again.load_state_dict(run.state_dict())
    assert again.controls[0] is not None
    assert again.controls[0].factor == control.factor != 1


def test_no_alarm_where_there_are_no_documents(
    sparse: Callable[[], nn.Module], capfd: pytest.CaptureFixture[str]
) -> None:
    student = sparse()
    stage = stage_of(MARGIN, regularizers=(PENALISED.model_copy(update={"side": "both", "active_terms": None}),))
    run = Run({"student": student}, make_trainset(student), stage, SETTINGS, 0)
    some, none = torch.tensor([[0.0, 1.0, 0.0, 0.0]]), torch.zeros(1, 4)
    assert set(run._count_active(Outputs(none, None, some, none[:0]), 0)) == {"active.query"}
    assert "no term is active" not in capfd.readouterr().err
    run._count_active(Outputs(none, None, some, none), 0)
    assert "document side: no term is active" in capfd.readouterr().err


def test_an_absent_tracker_is_told(model: Path, tmp_path: Path) -> None:
    student = dense.load(dense.Options(model=str(model)))
    settings = SETTINGS.model_copy(update={"trackers": ("mlflow",)})
    with pytest.raises(InputError, match="tracker 'mlflow' is not installed; `pip install mlflow`"):
        train(student, make_trainset(student), stage_of(MARGIN), settings, tmp_path, "t")
