"""Teachers on a Ray cluster: each loads the model once, and answers blocks of questions wherever it is.

Needs the extra `ray`. Texts go to each machine once; questions are numbers. Ray asks another teacher for what
one that died had in hand, and hands over each block of answers once. The teachers compute on the CPU: they ask Ray for
no GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

from retrieval_kd.answers import Answers
from retrieval_kd.teachers import Teacher
from retrieval_kd.types import InputError
from retrieval_kd.workers import CHUNK, Crew, Work, load_same

Block = dict[str, NDArray[Any]]


class _Answerer:
    """A teacher in a process of the cluster. What the user has to mend is handed over, as a problem."""

    def __init__(self, load: Callable[[], Teacher], identity: dict[str, Any], sides: list[Any], call: Any) -> None:
        self.sides: list[tuple[pa.Array, NDArray[np.int64]]] = ray.get(sides)
        self.method, self.more = call
        self.problem = ""
        try:
            self.teacher = load_same(load, identity, self.more)
        except InputError as error:
            self.problem = str(error)

    def __call__(self, block: Block) -> Block:
        numbers = block["number"]
        answers = np.full(len(numbers), np.nan, np.float32)
        if not self.problem:
            texts = [texts.take(pa.array(places[numbers])).to_pylist() for texts, places in self.sides]
            try:
                answers = getattr(self.teacher, self.method)(*texts, *self.more)
            except InputError as error:
                self.problem = str(error)
        return {"number": numbers, "answer": answers, "problem": np.full(len(numbers), self.problem)}


def answer_on_ray(work: Work, crew: Crew, identity: dict[str, Any]) -> Iterator[Answers]:
    """The answers to all of `work`, block by block as they come, from teachers on a cluster.

    The cluster is the one of RAY_ADDRESS, or else this machine. Raises InputError when a teacher does.
    """
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    sides = []
    for texts, places in zip(work.texts, work.places.T, strict=True):
        wanted, at = np.unique(places, return_inverse=True)
        sides.append(ray.put((pa.array([texts[place] for place in wanted.tolist()], pa.large_string()), at)))
    teachers = crew.processes or int(ray.cluster_resources()["CPU"])  # type: ignore[no-untyped-call]
    size = min(CHUNK, -(-len(work) // teachers))
    numbers = np.arange(len(work))
    blocks = [pa.table({"number": numbers[start : start + size]}) for start in range(0, len(work), size)]
    answers = ray.data.from_arrow(blocks).map_batches(
        _Answerer,
        batch_size=None,
        fn_constructor_args=(crew.load, identity, sides, (work.method, work.more)),
        compute=ray.data.ActorPoolStrategy(size=min(teachers, len(blocks))),
    )
    answered = np.zeros(len(work), np.bool_)
    for block in answers.iter_batches(batch_size=None, batch_format="numpy"):
        if block["problem"][0]:
            raise InputError(str(block["problem"][0]))
        number = block["number"]
        assert not answered[number].any(), "each block comes once"
        answered[number] = True
        places = work.places[number].T
        yield tuple(keys[place] for keys, place in zip(work.keys, places, strict=True)), block["answer"]
    assert answered.all(), "no block is left out"
