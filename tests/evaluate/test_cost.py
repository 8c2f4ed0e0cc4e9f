"""Latency, threads and the machine."""

import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from retrieval_kd.evaluate import cost
from retrieval_kd.evaluate.cost import machine, one_thread, query_latency
from retrieval_kd.types import InputError


def test_latency_counts_calls_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen = [0.0], []

    def encode(texts: list[str]) -> None:
        seen.append(texts)
        clock[0] += (
            5.0
            if len(seen) <= 5
            else 0.010
            if len(seen) == 13
            else {"a": 0.001, "b": 0.002, "c": 0.003, "d": 0.005}[texts[0]]
        )

    monkeypatch.setattr(cost, "perf_counter", lambda: clock[0])
    latency = query_latency(encode, ["a", "b", "c", "d"], repeats=2, warmup=5)
    assert seen == [[text] for text in "abcdaabcdabcd"]  # one text a call; 5 warm, 8 timed
    assert latency.calls == 8
    assert latency.p50_ms == pytest.approx(2.5)
    assert latency.p95_ms == pytest.approx(np.percentile([1, 2, 3, 5, 1, 2, 3, 10], 95))


def test_latency_is_in_milliseconds() -> None:
    latency = query_latency(lambda texts: time.sleep(0.01), ["a"] * 5, warmup=1)
    assert 10 <= latency.p50_ms < 200


def test_latency_needs_texts() -> None:
    with pytest.raises(InputError, match="at least one query text"):
        query_latency(lambda texts: None, [])


@pytest.mark.parametrize("fails", [False, True])
def test_one_thread_holds_and_restores(fails: bool) -> None:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(2)
    before = {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}
    assert max(before.values()) > 1
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
            assert {pool["num_threads"] for pool in threadpool_info()} == {1}
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert torch.get_num_threads() == 2
    assert {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()} == before


def test_one_thread_sets_torch_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    fake = SimpleNamespace(get_num_threads=lambda: 7, set_num_threads=calls.append)
    monkeypatch.setitem(sys.modules, "torch", fake)
    with one_thread():
        assert calls == [1]
    assert calls == [1, 7]


def test_one_thread_does_not_import_torch() -> None:
    program = (
        "import sys, retrieval_kd.report\n"
        "from retrieval_kd.evaluate.cost import machine, one_thread\n"
        "with one_thread(): machine()\n"
        "assert not {'torch', 'matplotlib', 'ranx', 'scipy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine()
    assert found["processor"]
    assert found["cores"] >= 1
    assert found["memory_gib"] > 0
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["numpy"] == np.__version__

    monkeypatch.setattr(cost, "PACKAGES", {"numpy": ("numpy",), "absent": ("no-such-package-here",)})
    assert machine()["versions"] == {"numpy": np.__version__}
