"""Gradient caching gives the loss and the gradient of the plain path, for every loss and with dropout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_sentence_transformer
from tiny_training import make_trainset, stage_of

from retrieval_kd.losses import find_loss, loss_names
from retrieval_kd.stages import Term, Training
from retrieval_kd.students import dense
from retrieval_kd.train.loop import Run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_sentence_transformer(folder / "transformer", width=16).save(str(folder / "model"))
    return folder / "model"


@pytest.mark.parametrize("name", loss_names())
def test_every_loss_and_gradient(name: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = find_loss(name)
    term = Term(loss=name, teachers=("a",) if loss.of == "vectors" or loss.needs & {"teacher", "preference"} else ())
    found = []
    for caching in (False, True):
        student = dense.load(dense.Options(model=str(model), dropout=0.3))
        stage = stage_of(term, gradient_caching=caching, steps=1)
        run = Run({"student": student}, make_trainset(student), stage, Training(seed=4, micro_batch_tokens=24), 0)
        monkeypatch.setattr(run.optimizer, "step", lambda: None)
        monkeypatch.setattr(run.optimizer, "zero_grad", lambda: None)
        values, _ = run.step(0)
        found.append((values["loss"].item(), [p.grad.clone() for p in run.parameters if p.grad is not None]))
    assert found[0][0] == found[1][0]
    assert all(torch.allclose(plain, cached, atol=1e-7) for plain, cached in zip(found[0][1], found[1][1], strict=True))
    assert sum(gradient.abs().sum() for gradient in found[0][1]) > 0
