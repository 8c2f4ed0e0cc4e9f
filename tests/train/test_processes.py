"""Two processes that share each batch end where one process does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_sentence_transformer

from retrieval_kd import gather

SCRIPT = Path(__file__).parent / "train_tiny.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_sentence_transformer(folder / "transformer", width=16).save(str(folder / "model"))
    return folder / "model"


def run(
    model: Path, out: Path, recipe: str, launcher: list[str]
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    out.mkdir()
    command = [sys.executable, *launcher, str(SCRIPT), str(model), str(out), recipe]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    weights, log = torch.load(out / "weights.pt")
    return weights, log


@pytest.mark.parametrize("recipe", ["own", "batch", "cached"])
def test_two_processes_equal_one(recipe: str, model: Path, tmp_path: Path) -> None:
    """Own candidates; in-batch with FLOPS of the global batch; a queue under gradient caching."""
    alone, alone_log = run(model, tmp_path / "one", recipe, [])
    shared, shared_log = run(model, tmp_path / "two", recipe, TORCHRUN)
    start = torch.load(tmp_path / "one/weights.pt")[0]
    for name, tensor in alone.items():
        torch.testing.assert_close(shared[name], tensor, atol=1e-5, rtol=0)
    assert any((start[name] - tensor).abs().max() == 0 for name, tensor in alone.items())
    assert [record.keys() for record in shared_log] == [record.keys() for record in alone_log]
    for ours, theirs in zip(shared_log, alone_log, strict=True):
        assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=1e-5, rel=1e-5)
    assert [path.name for path in (tmp_path / "two").glob("checkpoint-*")] == ["checkpoint-00000008.pt"]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_cover_the_batch(count: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process's share, put end to end as gathering does, gives the items back in their order."""
    lengths = np.random.default_rng(count).integers(1, 9, count).tolist()
    shares = []
    for rank in range(world):
        monkeypatch.setattr(gather, "process", lambda rank=rank: (rank, world))
        monkeypatch.setattr(gather, "gather", lambda rows: shares.append(rows) or rows.new_zeros(world * len(rows)))
        gather.encode_sorted(list(range(count)), lengths, lambda chunk: torch.tensor(chunk) + 100, micro_batch=2)
    assert len({len(share) for share in shares}) == 1
    monkeypatch.setattr(gather, "gather", lambda rows: torch.cat(shares))
    whole = gather.encode_sorted(list(range(count)), lengths, lambda chunk: torch.tensor(chunk) + 100, micro_batch=2)
    assert whole.tolist() == [100 + item for item in range(count)]
