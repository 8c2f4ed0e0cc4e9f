"""Dynamic batching: texts of requests that wait at the same time are encoded together.

A request that comes alone is encoded at once. While the encoder is busy others queue, and the next batch takes one
text of each in turn, so that a long request does not hold up a short one. Under load (the batch before was of
several requests) a batch waits up to `wait_ms` for more, or until it is full.
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

Row = TypeVar("Row")  # what one text becomes
Observe = Callable[[int, int, float], None]  # texts, tokens and seconds of a batch


@dataclass(frozen=True)
class Batching:
    """How much goes into one batch, and how many batches are encoded at once."""

    texts: int = 64  # 1: each text by itself
    tokens: int = 2048  # a batch of one longer text is made too
    wait_ms: float = 2.0
    workers: int = 1  # each with the threads that its encoder was loaded with


@dataclass(eq=False)
class _Request(Generic[Row]):
    texts: Sequence[str]
    tokens: Sequence[int]
    arrived: float
    done: asyncio.Future[list[Row]]
    rows: dict[int, Row] = field(default_factory=dict)  # those encoded so far, by place
    taken: int = 0


class Batcher(Generic[Row]):
    """The queue before one encoder, whose batches run in `pool`; at most `limit` texts wait in it.

    `encode` makes one row of each text, in their order.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], Sequence[Row]],
        pool: Executor,
        batching: Batching,
        limit: int,
        observe: Observe,
    ) -> None:
        self.waiting = 0  # texts
        self._encode, self._pool, self._batching, self._limit, self._observe = encode, pool, batching, limit, observe
        self._queue: deque[_Request[Row]] = deque()
        self._running = 0
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio itself would let them be collected
        self._full: asyncio.Future[None] | None = None  # what a batch that waits for more is waiting for
        self._company = False

    async def encode(self, texts: Sequence[str], tokens: Sequence[int]) -> list[Row]:
        """The rows of `texts`, which have so many `tokens` each; Refusal 429 when too many wait.

        A request that is cancelled leaves the queue.
        """
        if self.waiting and self.waiting + len(texts) > self._limit:
            raise Refusal(429, "Too many texts are waiting; try again in a moment.", code="rate_limit_exceeded")
        done: asyncio.Future[list[Row]] = asyncio.get_running_loop().create_future()
        request = _Request(texts, tokens, perf_counter(), done)
        self._queue.append(request)
        self.waiting += len(texts)
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
        """Encode batches until nothing waits, or somebody else is waiting to fill one."""
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

    def _take(self) -> list[tuple[_Request[Row], int]]:
        """The next batch: (request, place of a text in it), one of each request in turn."""
        batch: list[tuple[_Request[Row], int]] = []
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
            if request.taken < len(request.texts):
                self._queue.append(request)
        self._company = len({id(request) for request, _ in batch}) > 1
        return batch

    async def _run(self, batch: list[tuple[_Request[Row], int]]) -> None:
        """Encode a batch and give each request its rows; a fault is the fault of all requests in it."""
        texts = [request.texts[place] for request, place in batch]
        start = perf_counter()
        try:
            rows = await asyncio.get_running_loop().run_in_executor(self._pool, self._encode, texts)
        except Exception as error:
            for request, _ in batch:
                self._drop(request)
                if not request.done.done():
                    request.done.set_exception(error)
            return
        self._observe(len(batch), sum(request.tokens[place] for request, place in batch), perf_counter() - start)
        for (request, place), row in zip(batch, rows, strict=True):
            request.rows[place] = row
            if len(request.rows) == len(request.texts) and not request.done.done():
                request.done.set_result([request.rows[number] for number in range(len(request.texts))])

    def _drop(self, request: _Request[Row]) -> None:
        """Take the rest of a request out of the queue."""
        if request in self._queue:
            self._queue.remove(request)
            self.waiting -= len(request.texts) - request.taken
