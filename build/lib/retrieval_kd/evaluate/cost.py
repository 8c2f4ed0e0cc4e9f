"""What a query costs: latency of encoding on one thread, and the machine it was measured on."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from retrieval_kd.types import InputError

# import name -> distributions that provide it
PACKAGES = {
    "numpy": ("numpy",),
    "torch": ("torch",),
    "sentence_transformers": ("sentence-transformers",),
    "transformers": ("transformers",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "faiss": ("faiss-cpu", "faiss-gpu"),
}


@dataclass(frozen=True)
class Latency:
    """Milliseconds a call: median, 95th and 99th percentile over `calls`."""

    p50_ms: float
    p95_ms: float
    calls: int
    p99_ms: float | None = None


def query_latency(
    encode: Callable[[list[Any]], object], texts: Sequence[Any], repeats: int = 1, warmup: int = 10
) -> Latency:
    """Time `encode` on one text a call, every text `repeats` times, after `warmup` calls that do not count.

    The caller holds the threads to one: `one_thread()` around this call, and the session options of
    an ONNX model when it is opened.
    """
    if not texts:
        raise InputError("latency needs at least one query text to encode; there are none.")
    for number in range(warmup):
        encode([texts[number % len(texts)]])
    milliseconds = []
    for text in [*texts] * repeats:
        start = perf_counter()
        encode([text])
        milliseconds.append((perf_counter() - start) * 1e3)
    p50, p95, p99 = np.percentile(milliseconds, [50, 95, 99])
    return Latency(float(p50), float(p95), len(milliseconds), float(p99))


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold BLAS, OpenMP and (if it is imported) torch to one thread inside the block, in the calling thread.

    Libraries loaded inside the block escape it: import and load before. ONNX sessions own their
    threads and are not reached.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    torch: Any = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None
    with threadpool_limits(limits=1):
        try:
            if torch:
                torch.set_num_threads(1)
            yield
        finally:
            if torch:
                torch.set_num_threads(threads)


def memory_bytes() -> tuple[int, int]:
    """What this process has in memory, and the most that it had since it began its program.

    From /proc, where there is one: `ru_maxrss` counts what the process that started this one had, too.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        now, most = (int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
        return now, most
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return most, most


def memory_free() -> int | None:
    """Bytes of memory that programs could still take; None where the system does not say."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def machine() -> dict[str, object]:
    """The machine and the libraries: what a reader needs to place a latency. Absent packages are left out."""
    facts: dict[str, object] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        facts["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return facts | {"python": platform.python_version(), "platform": platform.platform(), "versions": _versions()}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name, distributions in PACKAGES.items():
        for distribution in distributions:
            try:
                found.setdefault(name, version(distribution))
            except PackageNotFoundError:
                continue
    return found
