"""Vectors of a large collection in shards: what is read back, what is encoded again, and runs that are killed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from retrieval_kd import corpus_vectors
from retrieval_kd.corpus_vectors import CorpusVectors, Form, bytes_a_vector, check_disk, encode_corpus, encoded
from retrieval_kd.index import build_index, estimate_bytes, open_index
from retrieval_kd.tables import Component
from retrieval_kd.types import InputError

TEXTS = [f"text {number}" for number in range(43)]
WHO = {"model": "fake"}
WIDTH = 24


def fake(texts: Sequence[str]) -> NDArray[np.float32]:
    """A vector that only its own text decides."""
    seeds = [int(text.split()[-1]) for text in texts]
    return np.stack([np.random.default_rng(seed).normal(size=WIDTH) for seed in seeds]).astype(np.float32)


class Counting:
    """`fake`, and the texts that it was given."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.texts += texts
        return fake(texts)


def make(folder: Path, texts: Sequence[str] = TEXTS, form: Form = "fp32", encode: object = fake) -> CorpusVectors:
    return encode_corpus(folder, texts, encode, form=form, identity=WHO, shard=8)  # type: ignore[arg-type]


@pytest.mark.parametrize(("form", "error"), [("fp32", 0.0), ("fp16", 2**-11), ("int8", 0.5 / 127)])
def test_vectors_come_back(tmp_path: Path, form: Form, error: float) -> None:
    made, whole = make(tmp_path, form=form), fake(TEXTS)
    assert (made.shape, len(made), made[0].dtype) == ((43, WIDTH), 43, np.float32)
    bound = error * np.abs(whole).max(axis=1, keepdims=True) * (1 + 1e-5)
    assert (np.abs(made[:] - whole) <= bound).all()
    for key in (slice(5, 19), slice(40, 99), slice(9, 9), np.array([42, 0, 8, 8, 7])):
        np.testing.assert_array_equal(made[key], made[:][key])
    np.testing.assert_array_equal(made[17], made[:][17])
    shards = [path.stat().st_size for path in tmp_path.glob("*.npy")]
    assert len(shards) == 6
    header = 512
    assert 43 * bytes_a_vector(form, WIDTH) <= sum(shards) <= 43 * bytes_a_vector(form, WIDTH) + 6 * header


def test_a_vector_of_zeros_and_one_beyond_16_bits(tmp_path: Path) -> None:
    zeros = encode_corpus(tmp_path / "a", ["x"], lambda _: np.zeros((1, 4), np.float32), form="int8", identity=WHO)
    assert zeros[:].tolist() == [[0, 0, 0, 0]]
    for number, value in enumerate((1e6, np.nan)):
        vectors = np.full((1, 4), value, np.float32)
        with pytest.raises(InputError, match="not finite numbers of this form"):
            encode_corpus(tmp_path / f"b{number}", ["x"], lambda _, v=vectors: v, form="fp16", identity=WHO)
    with pytest.raises(InputError, match="not finite"):
        encode_corpus(tmp_path / "c", ["x"], lambda _: np.full((1, 4), np.nan, np.float32), form="int8", identity=WHO)
    with pytest.raises(InputError, match="nothing to encode"):
        make(tmp_path / "d", [])


def test_only_what_changed_is_encoded_again(tmp_path: Path) -> None:
    make(tmp_path)
    again = Counting()
    make(tmp_path, encode=again)
    assert again.texts == []
    changed = [*TEXTS[:20], "text 99", *TEXTS[21:], "text 100"]  # in the third shard, and one more in the last
    assert encoded(tmp_path, changed, form="fp32", identity=WHO, shard=8) == 43 - 8 - 3
    made = make(tmp_path, changed, encode=again)
    assert again.texts == [*changed[16:24], *changed[40:]]
    np.testing.assert_array_equal(made[:], fake(changed))
    assert len(list(tmp_path.glob("*.npy"))) == 6  # the old ones are gone
    assert encoded(tmp_path, changed, form="fp16", identity=WHO, shard=8) == 0
    assert encoded(tmp_path, changed, form="fp32", identity={"model": "another"}, shard=8) == 0


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    make(tmp_path)
    shard = sorted(tmp_path.glob("*.npy"))[2]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-40])
    with pytest.raises(InputError, match=shard.name):
        CorpusVectors(tmp_path)
    np.save(shard, np.zeros((8, WIDTH), np.float16))
    with pytest.raises(InputError, match="holds other vectors"):
        CorpusVectors(tmp_path)
    shard.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        CorpusVectors(tmp_path)


def test_a_full_disk_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_vectors, "disk_free", lambda _: 2_500_000_000)
    check_disk(tmp_path / "new/deep", 2_400_000_000, "vectors", "less")
    with pytest.raises(InputError, match=r"vectors take 6\.76 GB, and its disk has 2\.5 GB free.*or keep less\."):
        check_disk(tmp_path / "new/deep", 6_758_400_000, "vectors", "keep less")


SLOW = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_corpus_vectors as own
from retrieval_kd import corpus_vectors

def slow(texts):
    with Path(sys.argv[3]).open("a") as log:
        log.writelines(text + "\\n" for text in texts)
    time.sleep(0.03)
    return own.fake(texts)

corpus_vectors.CHUNK = 4
own.make(Path(sys.argv[2]), encode=slow)
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    log, folder, chance = tmp_path / "log", tmp_path / "shards", random.Random(0)
    kills = 0
    while not (folder / "vectors.json").exists():
        before = {path.name: path.read_bytes() for path in folder.glob("*.npy")}
        command = [sys.executable, "-c", SLOW, str(Path(__file__).parent), str(folder), str(log)]
        run = subprocess.Popen(command)
        deadline = time.monotonic() + 60
        while kills < 3 and run.poll() is None and len(list(folder.glob("*.npy"))) <= len(before):
            assert time.monotonic() < deadline, "nothing is encoded"
            time.sleep(0.002)
        if kills < 3:
            time.sleep(chance.uniform(0, 0.05))
            run.send_signal(signal.SIGKILL)
            kills += run.wait() == -signal.SIGKILL
        else:
            assert run.wait(60) == 0
        for name, content in before.items():
            assert (folder / name).read_bytes() == content
    assert kills == 3
    np.testing.assert_array_equal(CorpusVectors(folder)[:], fake(TEXTS))
    assert len(log.read_text().splitlines()) <= len(TEXTS) + 8 * kills  # a kill loses one shard at most


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "HNSW8", "IVF2,Flat"])
def test_an_index_of_shards_is_that_of_the_array(tmp_path: Path, factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {number}" for number in range(300)]
    monkeypatch.setattr("retrieval_kd.index.faiss.BLOCK", 64)
    monkeypatch.setattr("retrieval_kd.index.BLOCK", 50)
    options = Component(kind="faiss", factory=factory)
    hits = []
    for name, vectors in (("array", fake(texts)), ("shards", make(tmp_path / "vectors", texts))):
        build_index(options, vectors, tmp_path / name, document_ids=texts, identity={})
        hits.append(open_index(tmp_path / name).search(fake(["7", "8", "2000"]), 20))
    np.testing.assert_array_equal(hits[0].rows, hits[1].rows)
    np.testing.assert_array_equal(hits[0].scores, hits[1].scores)


def test_a_shard_with_nan_is_refused_by_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval_kd.index.BLOCK", 10)
    made = make(tmp_path / "vectors")
    path = sorted((tmp_path / "vectors").glob("*.npy"))[3]
    shard = np.load(path)
    shard[2, 5] = np.nan
    np.save(path, shard)
    with pytest.raises(InputError, match="the vector of document 'text 26' has values that are not finite"):
        build_index(Component(kind="faiss"), made, tmp_path / "index", document_ids=TEXTS, identity={})


@pytest.mark.parametrize(
    "factory",
    [
        "Flat",
        "SQ8",
        "SQfp16",
        "HNSW32",
        "HNSW16,SQ8",
        "IVF16,Flat",
        "IVF16,PQ8x4",
        "PCA32,Flat",
        "RaBitQ",
        "RaBitQ,Refine(SQ8)",
        "IVF16,RaBitQ",
    ],
)
def test_the_size_of_an_index_is_foreseen(tmp_path: Path, factory: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(3000, 64)).astype(np.float32)
    options = Component(kind="faiss", factory=factory)
    ids = [str(row) for row in range(len(vectors))]
    build_index(options, vectors, tmp_path / "index", document_ids=ids, identity={})
    size = (tmp_path / "index/index.faiss").stat().st_size
    assert estimate_bytes(options, *vectors.shape) == pytest.approx(size, rel=0.1)


def test_a_size_that_nobody_foresees() -> None:
    assert estimate_bytes(Component(kind="faiss", factory="PQ8x4fs"), 1000, 64) is None
    assert estimate_bytes(Component(kind="impact"), 1000, 64) is None
