"""Teachers on a local Ray cluster of two; one is killed with work in hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import checksum_teacher
import numpy as np
import pytest
from checksum_teacher import Checksum, Dying, Vectors
from test_workers import DOCUMENTS, HITS, QUERIES, store_of

from retrieval_kd import workers
from retrieval_kd.scoring import fill_scores, fill_vectors
from retrieval_kd.store.operations import verify
from retrieval_kd.types import InputError
from retrieval_kd.workers import Crew

ray = pytest.importorskip("ray", reason="needs the extra `ray`")


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {"env_vars": {"PYTHONPATH": paths}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CHUNK", 8)
    monkeypatch.setattr("retrieval_kd.cluster.CHUNK", 8)


def fill(root: Path, crew: Crew | None) -> np.ndarray:
    return fill_scores(root, "t", Checksum(), QUERIES, DOCUMENTS, HITS, crew)


def test_a_teacher_that_is_killed_costs_nothing_twice(tmp_path: Path) -> None:
    whole = fill(tmp_path / "whole", None)
    crew = Crew(partial(Dying, tmp_path / "mark", "killed"), 2, "ray")
    np.testing.assert_array_equal(fill(tmp_path, crew), whole)
    assert (tmp_path / "mark").exists()
    store = store_of(tmp_path)
    assert store.count("scores") == store_of(tmp_path / "whole").count("scores")
    assert verify(store).doubled == {}
    assert [entry["pairs"] for entry in store.ledger()] == [store.count("scores")]


def test_a_teachers_mistake_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^the key has expired; get another\.$"):
        fill(tmp_path, Crew(partial(Dying, tmp_path / "mark", "refused"), 2, "ray"))


def test_each_processor_has_something_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though all would go into one block, and nobody said how many teachers there are."""
    monkeypatch.setattr("retrieval_kd.cluster.CHUNK", 512)
    load = partial(checksum_teacher.load, tmp_path / "pids", beside=2)
    np.testing.assert_array_equal(fill(tmp_path, Crew(load, None, "ray")), fill(tmp_path / "whole", None))
    assert len(list((tmp_path / "pids").iterdir())) == 2


def test_vectors_come_from_a_cluster(tmp_path: Path) -> None:
    """From as many teachers as it has processors."""
    vectors = fill_vectors(tmp_path, "t", Vectors(), DOCUMENTS, "document", Crew(Vectors, None, "ray"))
    np.testing.assert_array_equal(vectors, Vectors().embed([f"document: {text}" for text in DOCUMENTS], "document"))
