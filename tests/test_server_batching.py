"""Dynamic batching, with encoders that say what they were given."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from retrieval_kd.server import Batching
from retrieval_kd.server.batching import Batcher
from retrieval_kd.server.errors import Refusal


class Recorder:
    """Encodes a text as its length, slowly, and remembers the batches."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.batches: list[list[str]] = []
        self.seconds = seconds
        self.at_once = self.most = 0
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        with self._lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            self.batches.append(list(texts))
        time.sleep(self.seconds)
        if "fault" in texts:
            raise ZeroDivisionError
        with self._lock:
            self.at_once -= 1
        return np.array([[len(text), len(texts)] for text in texts], np.float32)


def batcher(recorder: Recorder, batching: Batching | None = None, limit: int = 1000) -> Batcher:
    batching = batching or Batching()
    pool = ThreadPoolExecutor(batching.workers)
    return Batcher(recorder.encode, pool, batching, limit, lambda texts, tokens, seconds: None)


def ones(texts: Sequence[str]) -> list[int]:
    return [1] * len(texts)


async def settle(found: Callable[[], bool]) -> None:
    """Wait until something has happened."""
    for _ in range(500):
        if found():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it does not happen")


def test_what_waits_is_encoded_together() -> None:
    recorder = Recorder(0.05)
    queue = batcher(recorder)

    async def run() -> None:
        first = asyncio.create_task(queue.do(["x"], [1]))
        await settle(lambda: bool(recorder.batches))
        others = [asyncio.create_task(queue.do([text, text + "!"], [1, 1])) for text in ("ab", "abc", "abcd")]
        answers = await asyncio.gather(first, *others)
        assert [[row[0] for row in answer] for answer in answers] == [[1], [2, 3], [3, 4], [4, 5]]

    asyncio.run(run())
    assert recorder.batches == [["x"], ["ab", "abc", "abcd", "ab!", "abc!", "abcd!"]]  # one of each in turn
    assert queue.waiting == 0


def test_a_batch_has_its_texts_and_tokens() -> None:
    recorder = Recorder(0.02)
    queue = batcher(recorder, Batching(texts=3, tokens=10))

    async def run() -> None:
        first = asyncio.create_task(queue.do(["x"], [99]))  # one text is a batch, however long
        await settle(lambda: bool(recorder.batches))
        tokens = {"a": 4, "b": 6, "c": 1, "d": 1, "e": 1, "f": 1}
        await asyncio.gather(first, *(queue.do([text], [count]) for text, count in tokens.items()))

    asyncio.run(run())
    assert recorder.batches == [["x"], ["a", "b"], ["c", "d", "e"], ["f"]]


def test_a_long_request_does_not_hold_up_a_short_one() -> None:
    recorder = Recorder(0.01)
    queue = batcher(recorder, Batching(texts=4))

    async def run() -> None:
        long = asyncio.create_task(queue.do(["long"] * 40, [1] * 40))
        await settle(lambda: bool(recorder.batches))
        await queue.do(["short"], [1])
        assert not long.done()
        assert len(await long) == 40

    asyncio.run(run())
    assert "short" in recorder.batches[1]


def test_under_load_a_batch_waits_for_company_but_a_lone_request_does_not() -> None:
    recorder = Recorder()
    queue = batcher(recorder, Batching(texts=3, wait_ms=500))

    async def run() -> None:
        start = time.perf_counter()
        await queue.do(["alone"], [1])
        assert time.perf_counter() - start < 0.25
        await asyncio.gather(queue.do(["a"], [1]), queue.do(["b"], [1]))
        waiting = asyncio.create_task(queue.do(["c"], [1]))
        await asyncio.sleep(0.02)
        assert len(recorder.batches) == 2  # it waits
        start = time.perf_counter()
        await asyncio.gather(queue.do(["d"], [1]), queue.do(["e"], [1]), waiting)
        assert time.perf_counter() - start < 0.25  # the batch was full
        await queue.do(["last"], [1])
        assert 0.45 < time.perf_counter() - start < 0.9  # nobody came: the bound

    asyncio.run(run())
    assert recorder.batches == [["alone"], ["a", "b"], ["c", "d", "e"], ["last"]]


def test_workers_encode_at_once() -> None:
    recorder = Recorder(0.05)
    queue = batcher(recorder, Batching(texts=1, workers=2))

    async def run() -> None:
        answers = await asyncio.gather(*(queue.do(["a" * size], [1]) for size in range(1, 7)))
        assert [answer[0][0] for answer in answers] == [1, 2, 3, 4, 5, 6]

    asyncio.run(run())
    assert recorder.most == 2


def test_a_full_queue_refuses() -> None:
    recorder = Recorder(0.05)
    queue = batcher(recorder, Batching(texts=1), limit=3)

    async def run() -> None:
        tasks = [asyncio.create_task(queue.do(["x"], [1]))]
        await settle(lambda: bool(recorder.batches))
        tasks += [asyncio.create_task(queue.do(["x"], [1])) for _ in range(3)]
        await settle(lambda: queue.waiting == 3)
        with pytest.raises(Refusal) as refused:
            await queue.do(["y"], [1])
        assert refused.value.status == 429
        await asyncio.gather(*tasks)
        assert len(await queue.do(["y"] * 5, [1] * 5)) == 5  # into an empty queue, whatever its length

    asyncio.run(run())


def test_a_fault_is_told_to_its_own_batch_alone() -> None:
    recorder = Recorder(0.02)
    queue = batcher(recorder, Batching(texts=2))

    async def run() -> None:
        first = asyncio.create_task(queue.do(["x"], [1]))
        await settle(lambda: bool(recorder.batches))
        texts = [["fault", "rest", "rest"], ["neighbour"], ["fine"]]
        results = await asyncio.gather(first, *(queue.do(some, ones(some)) for some in texts), return_exceptions=True)
        assert [type(result) for result in results] == [list, ZeroDivisionError, ZeroDivisionError, list]

    asyncio.run(run())
    assert queue.waiting == 0
    assert ["rest"] not in recorder.batches  # what is left of the request is not encoded


def test_who_goes_away_is_not_encoded() -> None:
    recorder = Recorder(0.05)
    queue = batcher(recorder, Batching(texts=2))

    async def run() -> None:
        first = asyncio.create_task(queue.do(["x"], [1]))
        await settle(lambda: bool(recorder.batches))
        gone = asyncio.create_task(queue.do(["gone"] * 3, [1] * 3))
        stays = asyncio.create_task(queue.do(["stays"], [1]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(first, stays)
        assert queue.waiting == 0

    asyncio.run(run())
    assert recorder.batches == [["x"], ["stays"]]


@pytest.mark.parametrize("batching", [Batching(texts=1), Batching(texts=5), Batching(wait_ms=0), Batching(workers=3)])
def test_no_answer_is_lost_or_swapped(batching: Batching) -> None:
    """Requests of all sizes that come at random and sometimes give up."""
    recorder = Recorder(0.0005)
    queue = batcher(recorder, batching)
    rng = np.random.default_rng(0)

    async def client(number: int) -> int:
        answered = 0
        for _ in range(20):
            texts = ["a" * int(size) for size in rng.integers(1, 50, size=rng.integers(1, 6))]
            task = asyncio.create_task(queue.do(texts, list(map(len, texts))))
            if rng.random() < 0.1:
                await asyncio.sleep(0.001)
                task.cancel()
            try:
                rows = await task
            except asyncio.CancelledError:
                continue
            assert [row[0] for row in rows] == list(map(len, texts))
            answered += 1
        return answered

    async def run() -> int:
        return sum(await asyncio.gather(*map(client, range(16))))

    assert asyncio.run(run()) > 200
    assert queue.waiting == 0
