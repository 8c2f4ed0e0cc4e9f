"""A killed run ends as if nothing had happened, and the weights that a stage ends with."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch
from tiny_training import (
    FUSED,
    IMITATE,
    IN_BATCH,
    MARGIN,
    RESUMED,
    SETTINGS,
    equal,
    make_trainset,
    stage_of,
    train_stages,
    weights,
)
from torch import nn

from retrieval_kd.stages import Stage, Validation
from retrieval_kd.students import dense
from retrieval_kd.train.loop import train

STAGES = (
    stage_of(MARGIN, FUSED, steps=7, batch_size=4, candidates=3, schedule="linear"),
    stage_of(IN_BATCH, IMITATE, steps=8, batch_size=3, candidates=3, schedule="cosine"),
)


def train_two_stages(model: Path, folder: Path) -> None:
    """Train with dropout, so that the random state counts, and save the weights once done."""
    torch.set_num_threads(1)
    torch.manual_seed(random.SystemRandom().randrange(2**31))  # what a fresh process holds plays no part
    student = dense.load(dense.Options(model=str(model), dropout=0.2))
    log = train_stages(student, STAGES, RESUMED, folder / "training", "two")
    torch.save((student.state_dict(), log), folder / "weights.pt")


def test_a_run_killed_five_times_ends_with_the_same_weights(model: Path, tmp_path: Path) -> None:
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
    for number in range(5):
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
    (tmp_path / "killed/.checkpoint-00000006.pt.1").write_bytes(b"half")  # as another kill leaves it
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
