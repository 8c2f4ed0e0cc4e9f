"""Runs killed at any moment, alone or with processes beside them: nothing is lost, and nothing paid for twice."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType

import checksum_teacher
import numpy as np
import pyarrow.parquet as pq
import pytest
from checksum_teacher import Checksum

from retrieval_kd import workers
from retrieval_kd.scoring import fill_scores
from retrieval_kd.store.store import Store
from retrieval_kd.types import Hits, InputError
from retrieval_kd.workers import Crew

PROCESSES = 3
QUERIES = [f"query {number}" for number in range(60)]
DOCUMENTS = [f"document {number}" if number % 7 else f"unsure {number}" for number in range(90)]
ROWS = np.stack([np.random.default_rng(number).permutation(90)[:80] for number in range(60)]).astype(np.int32)
HITS = Hits(ROWS, np.zeros(ROWS.shape, np.float32))


def run(root: Path, pids: Path, out: Path, processes: int) -> None:
    """Score 4,800 pairs, 8 at a time."""
    workers.CHUNK = 8
    load = partial(checksum_teacher.load, pids, 0.004)
    crew = Crew(load, processes) if processes > 1 else None
    with suppress(InputError):  # its processes were killed
        np.save(out, fill_scores(root, "slow", load(), QUERIES, DOCUMENTS, HITS, crew))


def committed(root: Path) -> dict[tuple[int, int], bytes]:
    """What is on disk, once nobody is at work there any more; each pair must be there once."""
    store = Store.open(root, "slow", {"kind": "fake"})
    found: dict[tuple[int, int], bytes] = {}
    with store.alone("the test"):
        for path in store.parts("scores"):
            for query, document, score in zip(*(column.to_numpy() for column in pq.read_table(path)), strict=True):
                assert (query, document) not in found, "paid for twice"
                found[query, document] = score.tobytes()
    return found


def living(pids: Path, run_pid: int) -> list[int]:
    """The processes that have the teacher, without the one that started them where there are others."""
    found = [int(path.name) for path in pids.iterdir()]
    return [pid for pid in found if pid != run_pid and Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("count", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))  # or every process would import pytest
    whole = fill_scores(tmp_path / "whole", "slow", Checksum(), QUERIES, DOCUMENTS, HITS)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["retrieval_kd.scoring"])
    chance = random.Random(0)
    kills = {"run": 0, "one of its processes": 0}
    number = 0
    while sum(kills.values()) < count:
        number += 1
        root, out = tmp_path / f"killed-{number}", tmp_path / f"{number}.npy"
        before: dict[tuple[int, int], bytes] = {}
        while not out.exists():
            pids = tmp_path / "pids" / str(chance.random())
            pids.mkdir(parents=True)
            processes = chance.choice([1, *[PROCESSES] * 5])
            worker = context.Process(target=run, args=(root, pids, out, processes))
            worker.start()
            assert worker.pid is not None
            while worker.is_alive() and sum(kills.values()) < count:
                parts = len(list(root.glob("*/scores/part-*")))
                deadline = time.monotonic() + 60
                while worker.is_alive() and len(list(root.glob("*/scores/part-*"))) == parts:
                    assert time.monotonic() < deadline, "nothing is scored"
                    time.sleep(0.001)
                time.sleep(chance.uniform(0, 0.03))
                others = living(pids, worker.pid)
                victim = chance.choice(others) if others and chance.random() < 0.8 else worker.pid
                if worker.is_alive():
                    with suppress(ProcessLookupError):
                        os.kill(victim, signal.SIGKILL)
                        kills["run" if victim == worker.pid else "one of its processes"] += 1
            worker.join(60)
            after = committed(root)
            assert before.items() <= after.items(), "lost after its commit"
            before = after
        assert len(before) == ROWS.size
        np.testing.assert_array_equal(np.load(out), whole)
    assert min(kills.values()) >= count // 8, kills
