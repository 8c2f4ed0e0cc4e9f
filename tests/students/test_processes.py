"""Two processes that share a batch end with the gradients of one that has it alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from retrieval_kd.gather import sum_gradients
from retrieval_kd.students import Batch, load_student
from retrieval_kd.tables import Component

TEXTS = ["sort a list", "read", "open the file and close it", "a map, a key: a value", "is"]
STUDENTS: dict[str, dict[str, Any]] = {"late_interaction": {}, "pair_head": {"hidden": [8], "pooling": "pma"}}


def gradients(folder: Path) -> dict[str, torch.Tensor]:
    """Losses and gradients of each student, summed over processes; `folder` holds a model for each."""
    found = {}
    for kind, options in STUDENTS.items():
        student: Any = load_student(Component(kind=kind, model=str(folder / kind), **options), 0).eval()
        tokens = [[np.array(ids, np.int32) for ids in student.tokenize(TEXTS, side)] for side in ("query", "document")]
        for caching in (False, True):
            student.zero_grad(set_to_none=True)
            columns = torch.arange(5).repeat(3, 1)
            batch = Batch(tokens[0][:3], tokens[1], columns, micro_batch_tokens=1, gradient_caching=caching)
            loss = student(batch).scores.softmax(1)[:, 0].log().sum()
            loss.backward()
            parameters = dict(student.named_parameters())
            sum_gradients(list(parameters.values()))
            found[f"{kind}.{caching}"] = loss.detach()
            found |= {f"{kind}.{caching}.{name}": p.grad for name, p in parameters.items() if p.grad is not None}
    return found


def meet(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    """The gradients as process `rank` of two sees them."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    try:
        return gradients(folder)
    finally:
        dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    """This one and another."""
    import colbert
    from tiny import tiny_sentence_transformer

    colbert.stanford(tmp_path / "late_interaction")
    tiny_sentence_transformer(tmp_path / "t").save(str(tmp_path / "pair_head"))
    other = subprocess.Popen([sys.executable, __file__, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    alone = gradients(tmp_path)
    assert sum(name.startswith("pair_head.False.head.") for name in alone) == 4
    for found in (meet(tmp_path, 0), torch.load(tmp_path / "gradients") if other.wait(120) == 0 else {}):
        for name, expected in alone.items():
            torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-3, msg=name)
        assert not any(value.any() for name, value in found.items() if name not in alone)  # of no use to the loss


if __name__ == "__main__":
    torch.save(meet(Path(sys.argv[1]), 1), Path(sys.argv[1]) / "gradients")
