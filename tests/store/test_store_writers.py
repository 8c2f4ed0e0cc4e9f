"""Several writers at once, and writers killed at any moment."""

from __future__ import annotations

import multiprocessing
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from retrieval_kd.store.store import Store

TEACHER = {"model": "tiny"}
REPOSITORY = Path(__file__).parents[2]


def batch(number: int, n: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs and scores of batch `number`, the same in every process."""
    rng = np.random.default_rng(number)
    return (*rng.integers(0, 2**64, (2, n), dtype=np.uint64), rng.normal(size=n).astype(np.float32))


def append_batches(root: Path, numbers: list[int]) -> None:
    store = Store.open(root, "ce", TEACHER)
    for number in numbers:
        store.append_scores(*batch(number))
        store.record(300, 600, None, 0.1)


def test_processes_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    work = [[1, 2, 3, 4, 5, 0], [11, 12, 13, 14, 15, 0], [21, 22, 23, 24, 25, 0]]  # batch 0 is scored by all
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.starmap(append_batches, [(tmp_path, numbers) for numbers in work])
    store = Store.open(tmp_path, "ce", TEACHER)
    assert len(store.parts("scores")) == 18
    for number in {number for numbers in work for number in numbers}:
        query_keys, document_keys, expected = batch(number)
        scores, found = store.find_scores(query_keys, document_keys)
        assert found.all()
        np.testing.assert_array_equal(scores, expected)
    assert len(store.ledger()) == 18
    assert len(list(tmp_path.iterdir())) == 1


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_store_writers import TEACHER, Store, batch
store = Store.open(Path(sys.argv[1]), "ce", TEACHER)
for number in range(int(sys.argv[2]), 10**9):
    store.append_scores(*batch(number, 20_000))
    print(number, flush=True)
"""


def wait_for_new_file(folder: Path) -> None:
    """Return as soon as `folder` gets a file, whatever its name: the writer is then in the middle of it."""
    before = set(folder.iterdir())
    deadline = time.monotonic() + 60
    while set(folder.iterdir()) <= before:
        assert time.monotonic() < deadline, "the writer writes nothing"


def test_a_killed_writer_loses_at_most_the_batch_in_hand(tmp_path: Path) -> None:
    moments = random.Random(0)
    committed: list[int] = []
    for life in range(6):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(life * 10_000), str(Path(__file__).parent)]
        writer = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        first = writer.stdout.readline()
        if life % 2:
            wait_for_new_file(Store.open(tmp_path, "ce", TEACHER).folder / "scores")
        else:
            time.sleep(moments.uniform(0, 0.15))
        writer.kill()
        rest, _ = writer.communicate()
        # a number counts as promised once its line is whole
        committed += [int(line) for line in (first + rest).splitlines(keepends=True) if line.endswith("\n")]
    assert len({number // 10_000 for number in committed}) == 6, "every writer must have begun"

    store = Store.open(tmp_path, "ce", TEACHER)
    for path in store.parts("scores"):
        assert pq.read_table(path).num_rows == 20_000  # whole, though its line may not have been printed
    assert len(committed) <= len(store.parts("scores")) <= len(committed) + 6
    for number in committed:
        query_keys, document_keys, expected = batch(number, 20_000)
        scores, found = store.find_scores(query_keys, document_keys)
        assert found.all()
        np.testing.assert_array_equal(scores, expected)
