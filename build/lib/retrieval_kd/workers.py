"""Who answers what a store lacks: this process, several of this machine, or teachers on a Ray cluster.

Each of several processes loads the teacher once, gets one chunk of questions after another, and appends
parts of its own. On a cluster the process that started the work appends, so that the machines need share
no disk, and what a teacher that died had in hand is put to another.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.answers import Chunk, answer, keep, recording
from retrieval_kd.progress import progress
from retrieval_kd.store.locks import Lock
from retrieval_kd.store.store import Keys, Store
from retrieval_kd.teachers import Embedder, Metered, Retriever, Teacher
from retrieval_kd.types import InputError

CHUNK = 512  # texts or pairs that a teacher gets at once

Cluster = Literal["ray"]


@dataclass(frozen=True)
class Work:
    """What a store lacks: for each question the places of its texts, one a side, beside the keys of the texts.

    A score is of two sides, a query and a document; a vector is of one. Shapes: places (n, sides).
    """

    method: Literal["score", "embed"]
    texts: tuple[Sequence[str], ...]
    keys: tuple[Keys, ...]
    places: NDArray[np.int64]
    more: tuple[Any, ...] = ()  # arguments after the texts

    def __len__(self) -> int:
        return len(self.places)

    def longest_first(self) -> Work:
        """The same by length of text: little of a chunk is padding, and too little memory shows at once."""
        length = np.zeros(len(self), np.int64)
        for texts, places in zip(self.texts, self.places.T, strict=True):
            wanted, at = np.unique(places, return_inverse=True)
            length += np.array([len(texts[place]) for place in wanted.tolist()], np.int64)[at]
        return replace(self, places=self.places[np.argsort(-length, kind="stable")])

    def chunks(self, size: int) -> Iterator[Chunk]:
        """The questions, so many at a time."""
        for start in range(0, len(self), size):
            sides = self.places[start : start + size].T
            keys = tuple(key[places] for key, places in zip(self.keys, sides, strict=True))
            texts = ([text[place] for place in places.tolist()] for text, places in zip(self.texts, sides, strict=True))
            yield Chunk(keys, (*texts, *self.more))


@dataclass(frozen=True)
class Crew:
    """Other processes that a teacher is asked in, each of which makes its own by `load`.

    `processes` is how many; None is one, or on a cluster one for each of its CPUs.
    """

    load: Callable[[], Teacher]
    processes: int | None = None
    cluster: Cluster | None = None


def work_through(store: Store, name: str, teacher: Teacher, work: Work, lock: Lock, crew: Crew | None = None) -> None:
    """Have all of `work` answered, and the answers kept. `lock` is that of `store.alone`.

    Raises InputError when a process died, after the others have kept what they had in hand.
    """
    if not isinstance(teacher, Metered | Retriever):  # to which the documents of one query come cheaper together
        work = work.longest_first()
    what = f"{work.method} {' '.join((*work.more, name))}"
    with progress(what, len(work)) as advance:
        if crew is not None and crew.cluster is None:
            _in_processes(
                _Job(store, name, crew.load, work.method, work.more, lock), work, crew.processes or 1, advance
            )
            return
        if crew is None:
            size = teacher.chunk if isinstance(teacher, Metered) else CHUNK
            answers = answer(getattr(teacher, work.method), work.chunks(size))
        else:
            from retrieval_kd.cluster import answer_on_ray

            answers = answer_on_ray(work, crew, store.identity)
        with recording(store, name, teacher, _unit(work.method)) as count:

            def note(answered: int, silent: int) -> None:
                count(answered, silent)
                advance(answered)

            keep(answers, _append(store, work.method), note)


def _append(store: Store, method: str) -> Callable[..., None]:
    return store.append_scores if method == "score" else store.append_embeddings


def _unit(method: str) -> Literal["pairs", "texts"]:
    return "pairs" if method == "score" else "texts"


@dataclass(frozen=True)
class _Job:
    """What a process has to know before it gets its first chunk."""

    store: Store
    name: str
    load: Callable[[], Teacher]
    method: str
    more: tuple[Any, ...]
    lock: Lock


def _in_processes(job: _Job, work: Work, processes: int, advance: Callable[[int], None]) -> None:
    """Hand out chunks to processes until all are answered; those of a process that dies stay unanswered."""
    context = multiprocessing.get_context("forkserver")  # processes that have nothing of this one, and start fast
    context.set_forkserver_preload([__name__])
    size = min(CHUNK, -(-len(work) // processes))  # so that each has something to do
    processes = min(processes, -(-len(work) // size))
    chunks = work.chunks(size)
    crew: dict[Connection, Any] = {}
    lost: list[str] = []
    failed: list[Exception] = []
    try:
        for _ in range(processes):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, job, processes))
            process.start()
            there.close()
            crew[here] = process
        while crew:
            for connection in wait(list(crew)):
                assert isinstance(connection, Connection)
                try:
                    report = connection.recv()
                    if isinstance(report, Exception):
                        failed.append(report)
                    else:
                        advance(report)
                        connection.send(None if failed else next(chunks, None))
                except (EOFError, ConnectionError):
                    process = crew.pop(connection)
                    process.join()
                    if process.exitcode:
                        lost.append(f"process {process.pid} {_end(process.exitcode)}")
    finally:
        for connection in crew:
            connection.close()  # a process that finds nobody there keeps what it has in hand, and ends
        for process in crew.values():
            process.join()
    if failed:
        raise failed[0]
    if lost:
        raise InputError(
            f"{job.name}: {', '.join(lost)}, of {processes} processes. What the others answered is kept; give the "
            "command again, and only the rest is asked. A process killed for want of memory needs fewer beside it."
        )


def _end(exit_code: int) -> str:
    return f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with code {exit_code}"


def _serve(connection: Connection, job: _Job, processes: int) -> None:
    """One of several processes: answers chunk after chunk, and keeps the answers."""
    try:
        teacher = load_same(job.load, job.store.identity, job.more)
        if torch := sys.modules.get("torch"):  # a teacher that computes elsewhere has not imported it
            torch.set_num_threads(max(1, torch.get_num_threads() // processes))
        with recording(job.store, job.name, teacher, _unit(job.method)) as count:
            answers = answer(getattr(teacher, job.method), _chunks(connection))
            keep(answers, _append(job.store, job.method), count)
    except KeyboardInterrupt:
        pass  # the process that started this one tells
    except InputError as error:
        _tell(connection, InputError(f"{job.name}: {error}"))
    except Exception:
        _tell(connection, RuntimeError(f"{job.name}: {traceback.format_exc()}"))


def load_same(load: Callable[[], Teacher], identity: dict[str, Any], tower: tuple[Any, ...]) -> Teacher:
    """A teacher made anew, in another process; InputError if it, or its `tower`, is not who fills the store."""
    teacher = load()
    who = teacher.tower_identity(*tower) if isinstance(teacher, Embedder) and tower else teacher.identity
    if (found := json.loads(json.dumps(who))) != identity:
        raise InputError(
            f"another process, or machine, loads another teacher: {found}, not {identity}; give all of them the "
            "same files and the same packages."
        )
    return teacher


def _chunks(connection: Connection) -> Iterable[Chunk]:
    """The chunks that come over a connection, each when the one before is answered, until there are no more."""
    answered = 0
    with suppress(EOFError, ConnectionError):  # nobody is there any more
        while True:
            connection.send(answered)
            chunk = connection.recv()
            if chunk is None:
                return
            yield chunk
            answered = len(chunk.keys[0])


def _tell(connection: Connection, problem: Exception) -> None:
    with suppress(ConnectionError):
        connection.send(problem)
