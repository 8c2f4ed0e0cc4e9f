"""One way to serve a student, measured in a process of its own: `python -m retrieval_kd.evaluate.measure FOLDER STEP`.

FOLDER holds `spec.json`, which names what is needed; STEP is `build`, which makes FOLDER/index and build.json, or
`search`, which asks every query and makes search.json and the results. Each step is a new process on one thread, so
that its peak memory is its own: read from /proc (VmHWM), Python and its libraries included, the searching one before
the deep lists that only the evaluation needs. A page of a memory-mapped file counts while it is in memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from retrieval_kd.corpus_vectors import CorpusVectors
from retrieval_kd.evaluate.cost import machine, memory_bytes, query_latency
from retrieval_kd.files import read_json, save_hits, size_bytes, write_json
from retrieval_kd.forms import CutVectors, cut_width, parse_form
from retrieval_kd.index import Vectors, build_index, open_index
from retrieval_kd.tables import Component
from retrieval_kd.types import InputError

SERVED = 10  # results of a query that is served: the latency and nDCG@10 are those of such searches
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS")


def measure(folder: Path, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Build and search in processes of their own; the facts of both, and the results as files in `folder`.

    Keys of `spec`: `index`, a component's table; `vectors`, the documents' (.npy, .npz, or a folder of shards);
    `document_ids` and `queries`, JSON files of strings; `encoder`, a folder; `depth` of the lists; `repeats` of each
    query in the latencies. Of dense vectors also `form`, the name of the one that the documents are cut as; `narrow`,
    whether queries are cut to its width after the encoder; and `unit`, whether the vectors of either side have unit
    length.
    Raises InputError with what the step said where it failed.
    """
    write_json(folder / "spec.json", dict(spec))
    environment = {**os.environ, **dict.fromkeys(THREADS, "1"), "TOKENIZERS_PARALLELISM": "false"}
    facts: dict[str, Any] = {}
    for step in STEPS:
        command = [sys.executable, "-m", __name__, str(folder), step]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise InputError(said[-1].removeprefix("retrieval_kd.types.InputError: "))
        facts |= read_json(folder / f"{step}.json")
    return facts | {"machine": machine()}


def build(folder: Path, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Build the index; seconds, bytes, and the peak of this process."""
    ids = json.loads(Path(spec["document_ids"]).read_text(encoding="utf-8"))
    began = perf_counter()
    build_index(Component(**spec["index"]), _documents(spec), folder / "index", document_ids=ids, identity={})
    seconds = perf_counter() - began
    return {
        "build_seconds": seconds,
        "index_bytes": size_bytes(folder / "index"),
        "build_peak_bytes": memory_bytes()[1],
    }


def search(folder: Path, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Encode and search every query, one at a time; latencies of both apart, and the peak of this process."""
    queries = json.loads(Path(spec["queries"]).read_text(encoding="utf-8"))
    vector = _encoder(spec)
    opened = open_index(folder / "index", threads=1)
    encoding = query_latency(vector, queries, spec["repeats"])
    vectors = [vector([text]) for text in queries]
    searching = query_latency(lambda one: opened.search(one[0], SERVED), vectors, spec["repeats"])
    peak = memory_bytes()[1]
    joined: Any = np.concatenate(vectors) if isinstance(vectors[0], np.ndarray) else _stack(vectors)
    for name, depth in (("served", SERVED), ("deep", spec["depth"])):
        (folder / name).mkdir()
        save_hits(folder / name, opened.search(joined, depth))
    latencies = {
        f"{what}_{key}_ms": round(getattr(latency, f"{key}_ms"), 4)
        for what, latency in (("encode", encoding), ("search", searching))
        for key in ("p50", "p95", "p99")
    }
    return {**latencies, "calls": encoding.calls, "search_peak_bytes": peak}


STEPS: dict[str, Callable[[Path, Mapping[str, Any]], dict[str, Any]]] = {"build": build, "search": search}


def _documents(spec: Mapping[str, Any]) -> Vectors:
    """The documents' vectors, cut if they are to be."""
    path = Path(spec["vectors"])
    if path.suffix == ".npz":
        import scipy.sparse

        return scipy.sparse.csr_array(scipy.sparse.load_npz(path))
    vectors: Vectors = CorpusVectors(path) if path.is_dir() else np.load(path, mmap_mode="r")
    form = parse_form(spec["form"])
    return CutVectors(vectors, form, spec["unit"]["document"]) if form.cuts else vectors


def _encoder(spec: Mapping[str, Any]) -> Callable[[Sequence[str]], Vectors]:
    """What makes vectors of query texts."""
    from retrieval_kd.encoder import Encoder  # not in the process that builds, whose memory is measured

    encode = Encoder.load(Path(spec["encoder"]), threads=1).encode
    if not spec.get("narrow"):
        return encode
    width, unit = parse_form(spec["form"]).width, spec["unit"]["query"]
    assert width is not None, "a form that cuts"
    return lambda texts: cut_width(encode(texts), width, unit)


def _stack(vectors: Sequence[Vectors]) -> Vectors:
    import scipy.sparse

    return scipy.sparse.csr_array(scipy.sparse.vstack(vectors, format="csr"))


if __name__ == "__main__":
    _folder, _step = Path(sys.argv[1]), sys.argv[2]
    write_json(_folder / f"{_step}.json", STEPS[_step](_folder, read_json(_folder / "spec.json")))
