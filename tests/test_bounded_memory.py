"""Searches and builds whose memory does not grow with queries times documents, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retrieval_kd.corpus_vectors import encode_corpus
from retrieval_kd.evaluate.cost import memory_bytes

HEAD = """
import json, sys
from pathlib import Path
import numpy as np
from retrieval_kd.evaluate.cost import memory_bytes
from retrieval_kd.index import build_index, open_index
from retrieval_kd.tables import Component
folder = Path(sys.argv[1])
documents = np.random.default_rng(0).normal(size=(60_000, 8)).astype(np.float32)
queries = np.random.default_rng(1).normal(size=(5_000, 8)).astype(np.float32)
ids = [str(row) for row in range(len(documents))]
"""
TAIL = """
print(json.dumps({"grown": memory_bytes()[1] - before}))
"""
PRODUCT = 4 * 60_000 * 5_000  # bytes of every query times every document

RETRIEVE = """
from retrieval_kd.scoring import fill_vectors, retrieve

class Fake:
    identity = {"kind": "fake"}
    def render(self, texts, side): return list(texts)
    def tower_identity(self, side): return {"kind": "fake", "side": side}
    def embed(self, texts, side):
        vectors = queries if side == "query" else documents
        return vectors[[int(text) for text in texts]]
    def score(self, queries, documents): raise AssertionError

names = [str(row) for row in range(len(queries))]
for side, texts in (("query", names), ("document", ids)):
    fill_vectors(folder, "fake", Fake(), texts, side)
before = memory_bytes()[1]
hits = retrieve(folder, "fake", Fake(), names, ids, 100)
assert hits.rows.shape == (5_000, 100)
full = queries[:50] @ documents.T
assert (hits.rows[:50, 0] == full.argmax(1)).all()
"""
FLAT = """
build_index(Component(kind="faiss"), documents, folder / "index", document_ids=ids, identity={})
opened = open_index(folder / "index")
opened.search(queries[:30], 100)
before = memory_bytes()[1]
hits = opened.search(queries, 100)
full = queries[:50] @ documents.T
assert (hits.rows[:50, 0] == full.argmax(1)).all()
"""
BUILD = """
from retrieval_kd.corpus_vectors import CorpusVectors
vectors = CorpusVectors(folder)
names = [str(row) for row in range(len(vectors))]
component = Component(kind="faiss", factory="SQ8")
build_index(component, vectors[:2000], folder / "small", document_ids=names[:2000], identity={})
before = memory_bytes()[1]
build_index(component, vectors, folder / "index", document_ids=names, identity={})
"""


def grown(code: str, folder: Path) -> int:
    """Bytes by which the peak of a process rose in the last part of `code`."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read from /proc")
    command = [sys.executable, "-c", HEAD + code + TAIL, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout.splitlines()[-1])["grown"])


def test_the_peak_sees_a_product(tmp_path: Path) -> None:
    """The measure itself: the whole product would show."""
    code = "before = memory_bytes()[1]\nfull = queries[:1000] @ documents.T\n"
    assert grown(code, tmp_path) > 0.9 * PRODUCT / 5


@pytest.mark.parametrize("code", [RETRIEVE, FLAT], ids=["retrieve", "flat"])
def test_a_search_holds_no_product(code: str, tmp_path: Path) -> None:
    assert grown(code, tmp_path) < PRODUCT / 8


def test_an_index_of_shards_is_built_without_the_array(tmp_path: Path) -> None:
    count, width = 400_000, 96
    encode_corpus(
        tmp_path,
        [str(row) for row in range(count)],
        lambda texts: np.random.default_rng(len(texts)).normal(size=(len(texts), width)).astype(np.float32),
        form="fp16",
        identity={},
    )
    array, index, sample = 4 * count * width, count * width, 4 * 2**18 * width
    assert grown(BUILD, tmp_path) < index + sample + array / 4 < 1.2 * array


def test_memory_now_is_at_most_the_peak() -> None:
    now, most = memory_bytes()
    assert 0 < now <= most
