"""Training: every loss falls, what is frozen stays, and a killed run ends as if nothing had happened."""

from __future__ import annotations

import json
import math
import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import WORDS, tiny_masked_lm, tiny_sentence_transformer
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from retrieval_kd.losses import find_loss
from retrieval_kd.stages import Regularizer, Stage, Term, Training, Validation
from retrieval_kd.students import Batch, Outputs, cross_encoder, dense, own_scores, splade
from retrieval_kd.train.batches import Draw, draw
from retrieval_kd.train.controllers import TermState
from retrieval_kd.train.loop import Run, make_batch, train
from retrieval_kd.train.terms import Step, loss_of
from retrieval_kd.trainset import Tokens, TrainSet
from retrieval_kd.types import Hits, InputError

QUERIES, DOCUMENTS, WIDTH = 10, 24, 6


def texts(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(2, 9))) for _ in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_sentence_transformer(folder / "transformer", width=16, normalize=False).save(str(folder / "model"))
    return folder / "model"


def make_trainset(student: nn.Module) -> TrainSet:
    """Two teachers whose scores hold NaN, one positive a query, and vectors of 16 numbers."""
    rng = np.random.default_rng(0)
    rows = np.stack([rng.choice(DOCUMENTS, WIDTH, replace=False) for _ in range(QUERIES)]).astype(np.int32)
    rows[3, 4:] = -1
    scores = rng.normal(0, 3, (2, QUERIES, WIDTH)).astype(np.float32)
    scores[0, 5, 2] = np.nan
    scores[:, rows < 0] = -np.inf
    positive = np.zeros(rows.shape, bool)
    positive[:, 1] = True
    return TrainSet(
        query_tokens=Tokens.pack(student.tokenize(texts(QUERIES, 1), "query")),
        document_tokens=Tokens.pack(student.tokenize(texts(DOCUMENTS, 2), "document")),
        hits=Hits(rows, np.where(rows >= 0, 0, -np.inf).astype(np.float32)),
        teachers=["a", "b"],
        scores=scores,
        positive=positive,
        query_vectors={"a": rng.normal(size=(QUERIES, 16)).astype(np.float32)},
        document_vectors={"a": rng.normal(size=(DOCUMENTS, 16)).astype(np.float32)},
        preference_pairs=rng.integers(0, WIDTH, (QUERIES, 9, 2)).astype(np.int32),
        preferences=rng.random((QUERIES, 9)).astype(np.float32),
    )


def stage_of(*terms: Term, **settings: object) -> Stage:
    known = {"steps": 40, "batch_size": QUERIES, "candidates": WIDTH, "learning_rate": 3e-3, "schedule": "constant"}
    return Stage(terms=terms, **{**known, **settings})


MARGIN = Term(loss="margin_mse", teachers=("a",))
FUSED = Term(loss="kl", teachers=("a", "b"), normalize="minmax", scale=5.0)
IN_BATCH = Term(loss="info_nce", relation="batch")
IMITATE = Term(loss="embedding_mse", teachers=("a",))
SETTINGS = Training(seed=4, checkpoint_steps=100, micro_batch_tokens=64)


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


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


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
    folder = tmp_path_factory.mktemp("classifier")
    tower = tiny_sentence_transformer(folder, width=16)
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(folder, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(folder)
    tower.tokenizer.save_pretrained(folder)
    return folder


def test_a_cross_encoder_trains_through_the_same_loop(classifier: Path, tmp_path: Path) -> None:
    student = cross_encoder.load(cross_encoder.Options(model=str(classifier), max_length=32))
    terms = (MARGIN, Term(loss="info_nce"))
    log = train(student, make_trainset(student), stage_of(*terms), SETTINGS, tmp_path, "c")
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    for term, message in ((IN_BATCH, "encodes queries and documents apart"), (IMITATE, "this one scores pairs")):
        with pytest.raises(InputError, match=message):
            train(student, make_trainset(student), stage_of(term), SETTINGS, tmp_path / term.loss, "c")


def value_of(term: Term, outputs: Outputs, drawn: Draw, trainset: TrainSet) -> torch.Tensor:
    return loss_of(term, Step(drawn, trainset, {"student": outputs}, (0, 0, 0)), TermState(term))


def test_in_batch_positives_by_hand() -> None:
    """Document 2, which query 1 brings, is a positive of query 0 as well: never its negative."""
    rows = np.array([[0, 1, 2], [2, 3, -1]], np.int32)
    positive = np.array([[True, False, True], [True, False, False]])
    hits = Hits(rows, np.where(rows >= 0, 0, -np.inf).astype(np.float32))
    trainset = TrainSet(Tokens.pack([[1], [1]]), hits=hits, positive=positive)
    stage = Stage(steps=9, batch_size=2, candidates=2, sampling="top", terms=(IN_BATCH,))
    drawn = next(
        found
        for step in range(50)
        if (found := draw(trainset, stage, (0, 0), step)).rows.tolist() == [0, 1, 2, 3]
        and found.queries.tolist() == [0, 1]
        and 2 not in rows[0][found.places[0]]
    )
    queries = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]]).log()
    documents = torch.eye(4)
    own = torch.einsum("bd,bcd->bc", queries, documents[torch.from_numpy(drawn.columns)])
    outputs = Outputs(own, queries @ documents.T, queries, documents)
    got = value_of(IN_BATCH, outputs, drawn, trainset)
    assert got.item() == pytest.approx((-math.log((1 + 3) / 10) - math.log(2 / 10)) / 2)
    own_list = value_of(Term(loss="info_nce"), outputs, drawn, trainset)
    assert own_list.item() == pytest.approx((-math.log(1 / 3) - math.log(2 / 3)) / 2)


def test_teacher_scores_are_normalised_over_the_whole_list() -> None:
    """Not over the drawn candidates: the target of a pair does not depend on who was drawn beside it."""
    rows = np.arange(4, dtype=np.int32)[None]
    hits = Hits(rows, np.zeros((1, 4), np.float32))
    scores = np.array([[[10.0, 4.0, 6.0, 0.0]], [[1.0, 3.0, 2.0, np.nan]]], np.float32)
    trainset = TrainSet(Tokens.pack([[1]]), hits=hits, teachers=["a", "b"], scores=scores, positive=rows == 0)
    stage = Stage(steps=9, batch_size=1, candidates=2, sampling="top", terms=(MARGIN,))
    drawn = draw(trainset, stage, (0, 0), 0)
    assert drawn.places.tolist() == [[0, 1]]
    term = Term(loss="margin_mse", teachers=("b", "a"), shares=(1.0, 3.0), normalize="minmax", scale=10.0)
    value = value_of(term, Outputs(torch.zeros(1, 2)), drawn, trainset)
    # b: 0 and 1; a: 1 and 0.4; shares 1 to 3 of 10
    assert value.item() == pytest.approx((10 * (0.75 * 1 - (0.25 * 1 + 0.75 * 0.4))) ** 2, rel=1e-4)


STAGES = (
    stage_of(MARGIN, FUSED, steps=7, batch_size=4, candidates=3, schedule="linear"),
    stage_of(IN_BATCH, IMITATE, steps=8, batch_size=3, candidates=3, schedule="cosine"),
)
RESUMED = Training(seed=4, checkpoint_steps=2, micro_batch_tokens=64)


def train_stages(
    student: nn.Module, stages: Sequence[Stage], settings: Training, folder: Path, key: str
) -> list[dict[str, float]]:
    """One stage after the other, each with checkpoints of its own; a stage that is done is taken from its last one."""
    log, trainset = [], make_trainset(student)
    for number, stage in enumerate(stages):
        log += train(student, trainset, stage, settings, folder / str(number), key, number=number)
    return log


def train_two_stages(model: Path, folder: Path) -> None:
    """Train with dropout, so that the random state counts, and save the weights once done."""
    torch.set_num_threads(1)
    torch.manual_seed(random.SystemRandom().randrange(2**31))  # what a fresh process holds plays no part
    student = dense.load(dense.Options(model=str(model), dropout=0.2))
    log = train_stages(student, STAGES, RESUMED, folder / "training", "two")
    torch.save((student.state_dict(), log), folder / "weights.pt")


def test_a_run_killed_ten_times_ends_with_the_same_weights(model: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["retrieval_kd.train.loop", "retrieval_kd.students.dense"])
    for name in ("whole", "again", "killed"):
        (tmp_path / name).mkdir()
    for name in ("whole", "again"):  # the second without the imports: how long the work takes
        began = time.monotonic()
        worker = context.Process(target=train_two_stages, args=(model, tmp_path / name))
        worker.start()
        worker.join(120)
        assert worker.exitcode == 0
    seconds = time.monotonic() - began
    training, chance = tmp_path / "killed/training", random.Random(11)

    def place() -> list[str]:
        return sorted(str(path.relative_to(training)) for path in training.glob("*/checkpoint-*"))[-1:]

    places = []
    for number in range(10):
        before = place()
        worker = context.Process(target=train_two_stages, args=(model, tmp_path / "killed"))
        worker.start()
        worker.join(chance.uniform(0.3, 0.9) * seconds)
        while number < 2 and worker.is_alive() and place() == before:  # however slow the machine has become
            time.sleep(0.01)
        worker.kill()
        worker.join()
        places.append(place())
    worker = context.Process(target=train_two_stages, args=(model, tmp_path / "killed"))
    worker.start()
    worker.join(120)
    assert worker.exitcode == 0
    assert len({str(reached) for reached in places}) >= 2, places  # it was stopped on the way
    expected, log = torch.load(tmp_path / "whole/weights.pt")
    for name in ("again", "killed"):
        got, got_log = torch.load(tmp_path / name / "weights.pt")
        assert equal(got, expected)
        assert got_log == log
    assert [(record["stage"], record["step"]) for record in log] == [(0, 7), (1, 8)]
    for number, last in ((0, 7), (1, 8)):
        text = (training / f"{number}/log.jsonl").read_text()
        assert text == (tmp_path / f"whole/training/{number}/log.jsonl").read_text()
        assert [path.name for path in (training / str(number)).glob("*.pt")] == [f"checkpoint-{last:08d}.pt"]


def test_a_checkpoint_of_something_else_is_not_taken_up(model: Path, tmp_path: Path) -> None:
    def run(folder: Path, key: str, stage: Stage) -> dict[str, torch.Tensor]:
        student = dense.load(dense.Options(model=str(model)))
        train(student, make_trainset(student), stage, RESUMED, folder, key)
        return weights(student)

    five, three = stage_of(MARGIN, steps=5), stage_of(MARGIN, steps=3)
    expected = run(tmp_path / "a", "x", three)
    run(tmp_path / "b", "x", five)
    assert equal(run(tmp_path / "b", "x", three), expected)
    assert equal(run(tmp_path / "b", "y", three), expected)


def test_a_kill_while_an_old_checkpoint_goes_leaves_the_new_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    def fresh() -> nn.Module:
        return dense.load(dense.Options(model=str(model)))

    stage, trainset = stage_of(MARGIN, steps=6), make_trainset(fresh())
    expected, student = fresh(), fresh()
    train(expected, trainset, stage, RESUMED, tmp_path / "whole", "x")
    with monkeypatch.context() as patch:
        patch.setattr("retrieval_kd.train.checkpoints.Path.unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            train(student, trainset, stage, RESUMED, tmp_path / "killed", "x")
    train(resumed := fresh(), trainset, stage, RESUMED, tmp_path / "killed", "x")
    assert equal(weights(resumed), weights(expected))
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["checkpoint-00000006.pt", "log.jsonl"]


def test_a_log_line_cut_short_is_left_out(model: Path, tmp_path: Path) -> None:
    student = dense.load(dense.Options(model=str(model)))
    trainset = make_trainset(student)
    log = train(student, trainset, stage_of(MARGIN, steps=20), SETTINGS, tmp_path, "x")
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text() + '{"stage": 0, "st')
    assert train(student, trainset, stage_of(MARGIN, steps=20), SETTINGS, tmp_path, "x") == log
    assert path.read_text().count("\n") == 2


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


def test_early_stopping_keeps_the_best_weights_also_when_resumed(model: Path, tmp_path: Path) -> None:
    """Qualities 0.3, 0.5, 0.4, 0.2: the weights of the second validation, and no step after the fourth."""
    stage, settings = (
        stage_of(MARGIN, steps=40),
        RESUMED.model_copy(update={"validation": Validation(every=3, patience=2)}),
    )

    def run(folder: Path, killed_after: int) -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
        student, seen = dense.load(dense.Options(model=str(model))), []

        def validate(student: nn.Module) -> float:
            assert not student.training
            seen.append(weights(student))
            if len(seen) > killed_after:
                raise KeyboardInterrupt
            return [0.3, 0.5, 0.4, 0.2, 0.9][done + len(seen) - 1]

        done = 3 if (folder / "checkpoint-00000010.pt").exists() else 0
        train(student, make_trainset(student), stage, settings, folder, "v", validate=validate)
        return student, seen

    student, seen = run(tmp_path / "whole", 9)
    log = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert [record["nDCG@10"] for record in log if "nDCG@10" in record] == [0.3, 0.5, 0.4, 0.2]
    assert len(seen) == 4
    assert equal(weights(student), seen[1])
    assert not equal(seen[1], seen[3])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", 3)  # checkpoints every second step: resumed at 10, validated three times
    again, late = run(tmp_path / "killed", 9)
    assert len(late) == 1
    assert equal(weights(again), weights(student))


def test_the_mean_of_the_last_checkpoints(model: Path, tmp_path: Path) -> None:
    def run(name: str, steps: int, checkpoints: int) -> dict[str, torch.Tensor]:
        student = dense.load(dense.Options(model=str(model)))
        stage = stage_of(MARGIN, steps=steps, warmup=0.0, average={"checkpoints": checkpoints})
        train(student, make_trainset(student), stage, RESUMED, tmp_path / name, name)
        return weights(student)

    averaged, single = run("a", 6, 3), [run(f"s{steps}", steps, 1) for steps in (2, 4, 6)]
    for name, tensor in averaged.items():
        expected = torch.stack([one[name].double() for one in single]).mean(0)
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-5)
    assert not equal(averaged, single[-1])


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
