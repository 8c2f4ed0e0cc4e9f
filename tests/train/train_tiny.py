"""Trains a tiny student and saves weights and log; run by test_two_processes, alone or under torchrun.

python train_tiny.py MODEL OUT    trains each of `STAGES` into OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from tiny_training import FUSED, IN_BATCH, MARGIN, make_trainset, stage_of

from retrieval_kd.gather import process
from retrieval_kd.stages import Regularizer, Term, Training
from retrieval_kd.students import dense
from retrieval_kd.train.loop import train

PENALTY = Regularizer(name="flops", side="both", weight=0.3)
SETTINGS = {"steps": 8, "batch_size": 5, "learning_rate": 1e-4}
QUEUED = Term(loss="info_nce", relation="cross", teachers=("a",), queue=7, temperature=0.5)
STAGES = {
    "own": stage_of(MARGIN, FUSED, candidates=4, **SETTINGS),
    "batch": stage_of(IN_BATCH, candidates=3, regularizers=(PENALTY,), **SETTINGS),
    "cached": stage_of(IN_BATCH, QUEUED, candidates=3, gradient_caching=True, **SETTINGS),
}


def run(model: str, out: Path, recipe: str) -> None:
    """Train and save."""
    torch.set_num_threads(1)
    student = dense.load(dense.Options(model=model, normalize=True))
    settings = Training(seed=4, checkpoint_steps=3, micro_batch_tokens=16)
    log = train(student, make_trainset(student), STAGES[recipe], settings, out / recipe, recipe)
    if process()[0] == 0:
        torch.save((student.state_dict(), log), out / recipe / "weights.pt")


if __name__ == "__main__":
    for name in STAGES:
        run(sys.argv[1], Path(sys.argv[2]), name)
