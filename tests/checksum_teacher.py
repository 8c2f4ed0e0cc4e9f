"""A teacher that costs nothing and can be checked: it scores by a checksum of both texts. No torch."""

from __future__ import annotations

import os
import signal
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retrieval_kd import answers
from retrieval_kd.types import InputError


def checksum(query: str, document: str) -> float:
    return np.nan if "unsure" in document else zlib.crc32(f"{query}|{document}".encode()) / 2**16


class Checksum:
    """NaN for documents that hold "unsure"; `pause` is what a call takes, in seconds."""

    def __init__(self, identity: str = "fake", pause: float = 0.0) -> None:
        self.identity = {"kind": identity}
        self.pause = pause

    def render(self, texts: Sequence[str], side: str) -> list[str]:
        return [f"{side}: {text}" for text in texts]

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        time.sleep(self.pause)
        return np.array([checksum(*pair) for pair in zip(queries, documents, strict=True)], np.float32)


class Dying(Checksum):
    """Ends its process at its third call, if nobody did before."""

    def __init__(self, mark: Path, how: str) -> None:
        super().__init__()
        self.mark, self.how, self.left = mark, how, 3

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        self.left -= 1
        if not self.left and not self.mark.exists():
            self.mark.touch()
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise InputError("the key has expired; get another.") if self.how == "refused" else ValueError("a bug")
        time.sleep(0.01)
        return super().score(queries, documents)


class Vectors(Checksum):
    """Scores by the dot product of checksums."""

    def tower_identity(self, side: str) -> dict[str, str]:
        return {"kind": "tower", "side": side}

    def embed(self, texts: Sequence[str], side: str) -> np.ndarray:
        time.sleep(self.pause)
        return np.array([[checksum(text, str(place)) for place in range(3)] for text in texts], np.float32)


def load(folder: Path, pause: float = 0.0, beside: int = 1, kind: type[Checksum] = Checksum) -> Checksum:
    """The teacher in a process that leaves its number in `folder`, waits for those beside it, and commits often."""
    answers.COMMIT_SECONDS = 0.02
    folder.mkdir(parents=True, exist_ok=True)
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < beside:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return kind(pause=pause)
