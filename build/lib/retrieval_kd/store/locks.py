"""Who may ask a teacher: one run at a time, with the processes that it starts."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from retrieval_kd.progress import say
from retrieval_kd.types import InputError


class Lock:
    """A lock that is held until its last holder ends, whatever ends it.

    A process that is started with it holds it too, so that the workers of a killed run can finish
    and keep what they have in hand before the next run looks what is missing.
    """

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __reduce__(self) -> tuple[Any, ...]:
        return _inherit, (DupFd(self.handle),)


def _inherit(passed: Any) -> Lock:
    return Lock(passed.detach())


@contextmanager
def hold(path: Path, waiting: str) -> Iterator[Lock]:
    """Hold the lock file `path`, which is made if it is not there; says `waiting` where another holds it.

    Raises InputError on a file system without locks.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(waiting)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise InputError(
                f"{path} cannot be locked ({error.strerror}), so two runs could pay for the same answers; "
                "keep the store on a file system with locks."
            ) from error
        yield Lock(handle)
    finally:
        os.close(handle)
