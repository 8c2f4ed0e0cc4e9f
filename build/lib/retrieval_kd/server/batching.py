"""Dynamic batching: what waits at the same time is done together, texts encoded or queries searched.

A request that comes alone is served at once. While the work is going on others queue, and the next batch takes one
item of each in turn, so that a long request does not hold up a short one. Under load (the batch before was of
several requests) a batch waits up to `wait_ms` for more, or until it is full.

What is gained depends on the work. One query of some ten tokens keeps a processor core as busy as a batch does, so
encoding gains little more than the overhead (and int8 graphs, which take texts one by one, nothing); an exact search
of many vectors reads them all once for a whole batch.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Generic, TypeVar

from retrieval_kd.server.errors import Refusal

Item = TypeVar("Item")  # a text or a vector
Row = TypeVar("Row")  # what one item becomes
Observe = Callable[[int, int, float], None]  # items, tokens and seconds of a batch


@dataclass(frozen=True)
class Batching:
    """How much goes into one batch, and how many batches are worked on at once."""

    texts: int = 64  # 1: each by itself
    tokens: int = 2048  # a batch of one longer text is made too
    wait_ms: float = 2.0
    workers: int = 1  # each with the threads that its encoder was loaded with


@dataclass(eq=False)
class _Request(Generic[Item, Row]):
    items: Sequence[Item]
    tokens: Sequence[int]
    arrived: float
    done: asyncio.Future[list[Row]]
    rows: dict[int, Row] = field(default_factory=dict)  # those made so far, by place
    taken: int = 0


class Batcher(Generic[Item, Row]):
    """The queue before one piece of work, whose batches run in `pool`; at most `limit` items wait in it.

    `work` makes one row of each item, in their order.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Row]],
        pool: Executor,
        batching: Batching,
        limit: int,
        observe: Observe,
    ) -> None:
        self.waiting = 0  # items
        self._work, self._pool, self._batching, self._limit, self._observe = work, pool, batching, limit, observe
        self._queue: deque[_Request[Item, Row]] = deque()
        self._running = 0
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio itself would let them be collected
        self._full: asyncio.Future[None] | None = None  # what a batch that waits for more is waiting for
        self._company = False

    async def do(self, items: Sequence[Item], tokens: Sequence[int]) -> list[Row]:
        """The rows of `items`, which have so many `tokens` each; Refusal 429 when too many wait.

        A request that is cancelled leaves the queue.
        """
        if self.waiting and self.waiting + len(items) > self._limit:
            raise Refusal(429, "Too many are waiting; try again in a moment.", code="rate_limit_exceeded")
        done: asyncio.Future[list[Row]] = asyncio.get_running_loop().create_future()
        request = _Request(items, tokens, perf_counter(), done)
        self._queue.append(request)
        self.waiting += len(items)
        if self._full is not None and not self._full.done() and self._enough():
            self._full.set_result(None)
        self._start()
        try:
            return await done
        finally:
            self._drop(request)

    def _start(self) -> None:
        """See to it that somebody takes what waits, unless all workers are busy or one is about to take it."""
        if self._queue and self._full is None and self._running < self._batching.workers:
            self._running += 1
            task = asyncio.get_running_loop().create_task(self._drain())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _drain(self) -> None:
        """Work on batches until nothing waits, or somebody else is waiting to fill one."""
        try:
            while self._queue and self._full is None:
                if self._company:
                    await self._fill()
                if batch := self._take():
                    self._start()
                    await self._run(batch)
        finally:
            self._running -= 1

    async def _fill(self) -> None:
        """Wait until a batch is full, at most as long as its first request may have to."""
        left = self._queue[0].arrived + self._batching.wait_ms / 1000 - perf_counter()
        if left <= 0 or self._enough():
            return
        self._full = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(left):
                await self._full
        except TimeoutError:
            pass
        finally:
            self._full = None

    def _enough(self) -> bool:
        tokens = sum(sum(request.tokens[request.taken :]) for request in self._queue)
        return self.waiting >= self._batching.texts or tokens >= self._batching.tokens

    def _take(self) -> list[tuple[_Request[Item, Row], int]]:
        """The next batch: (request, place of an item in it), one of each request in turn."""
        batch: list[tuple[_Request[Item, Row], int]] = []
        left = self._batching.tokens
        while self._queue and len(batch) < self._batching.texts:
            request = self._queue[0]
            left -= request.tokens[request.taken]
            if batch and left < 0:
                break
            self._queue.popleft()
            batch.append((request, request.taken))
            request.taken += 1
            self.waiting -= 1
            if request.taken < len(request.items):
                self._queue.append(request)
        self._company = len({id(request) for request, _ in batch}) > 1
        return batch

    async def _run(self, batch: list[tuple[_Request[Item, Row], int]]) -> None:
        """Work on a batch and give each request its rows; a fault is the fault of all requests in it."""
        items = [request.items[place] for request, place in batch]
        start = perf_counter()
        try:
            rows = await asyncio.get_running_loop().run_in_executor(self._pool, self._work, items)
        except Exception as error:
            for request, _ in batch:
                self._drop(request)
                if not request.done.done():
                    request.done.set_exception(error)
            return
        self._observe(len(batch), sum(request.tokens[place] for request, place in batch), perf_counter() - start)
        for (request, place), row in zip(batch, rows, strict=True):
            request.rows[place] = row
            if len(request.rows) == len(request.items) and not request.done.done():
                request.done.set_result([request.rows[number] for number in range(len(request.items))])

    def _drop(self, request: _Request[Item, Row]) -> None:
        """Take the rest of a request out of the queue."""
        if request in self._queue:
            self._queue.remove(request)
            self.waiting -= len(request.items) - request.taken
