"""Two processes that share each batch end where one process does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train_tiny
from tiny import tiny_sentence_transformer

from retrieval_kd import gather
from retrieval_kd.students import dense

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_sentence_transformer(folder / "transformer", width=16).save(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="module")
def shared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes trained."""
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, *TORCHRUN, str(Path(train_tiny.__file__)), str(model), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("recipe", train_tiny.STAGES)
def test_two_processes_equal_one(recipe: str, model: Path, shared: Path, tmp_path: Path) -> None:
    """Own candidates; in-batch with FLOPS of the global batch; a queue under gradient caching."""
    threads = torch.get_num_threads()
    train_tiny.run(str(model), tmp_path, recipe)
    torch.set_num_threads(threads)
    alone, alone_log = torch.load(tmp_path / recipe / "weights.pt")
    found, found_log = torch.load(shared / recipe / "weights.pt")
    untrained = dense.load(dense.Options(model=str(model), normalize=True)).state_dict()
    assert any((tensor - untrained[name]).abs().max() > 1e-4 for name, tensor in alone.items())
    for name, tensor in alone.items():
        if not name.endswith("key.bias"):  # without effect, as it adds one number to a whole row of a softmax: Adam
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)  # makes steps of its rounding errors
    assert [record.keys() for record in found_log] == [record.keys() for record in alone_log]
    for ours, theirs in zip(found_log, alone_log, strict=True):
        assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=1e-5, rel=1e-5)
    assert [path.name for path in (shared / recipe).glob("checkpoint-*")] == ["checkpoint-00000008.pt"]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_cover_the_batch(count: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process's share, put end to end as gathering does, gives the items back in their order."""
    lengths = np.random.default_rng(count).integers(1, 9, count).tolist()
    shares = []
    for rank in range(world):
        monkeypatch.setattr(gather, "process", lambda rank=rank: (rank, world))
        monkeypatch.setattr(gather, "gather", lambda rows: shares.append(rows) or rows.new_zeros(world * len(rows)))
        gather.encode_sorted(list(range(count)), lengths, lambda chunk: torch.tensor(chunk) + 100, micro_batch_tokens=2)
    assert len({len(share) for share in shares}) == 1
    monkeypatch.setattr(gather, "gather", lambda rows: torch.cat(shares))
    whole = gather.encode_sorted(
        list(range(count)), lengths, lambda chunk: torch.tensor(chunk) + 100, micro_batch_tokens=2
    )
    assert whole.tolist() == [100 + item for item in range(count)]


def test_micro_batches_hold_so_many_tokens() -> None:
    """By hand: lengths 1, 2, 2, 5, 5, 9 in at most 10 tokens, padding included; a longer text goes alone."""
    seen: list[list[int]] = []

    def encode(chunk: list[int]) -> torch.Tensor:
        seen.append(chunk)
        return torch.tensor(chunk)

    lengths = [5, 1, 9, 2, 5, 2, 40]
    whole = gather.encode_sorted(list(range(7)), lengths, encode, micro_batch_tokens=10)
    assert seen == [[1, 3, 5], [0, 4], [2], [6]]  # 3 x 2, 2 x 5, 9, 40
    assert whole.tolist() == list(range(7))
