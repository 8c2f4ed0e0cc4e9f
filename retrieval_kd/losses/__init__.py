"""Losses: pure functions, tensors in, scalar out, under their usual names.

The module a loss stands in says what it compares: `scores` (student and teacher grids), `labels`
(student grid and positives), `vectors` (student and teacher vectors).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import Literal, cast

from torch import Tensor

from retrieval_kd.types import InputError

Family = Literal["scores", "labels", "vectors"]
FAMILIES: tuple[Family, ...] = ("scores", "labels", "vectors")


def find_loss(name: str) -> tuple[Family, Callable[..., Tensor]]:
    """The family and the function of the loss called `name`; InputError with the nearest name."""
    known: list[str] = []
    for family in FAMILIES:
        module = importlib.import_module(f"retrieval_kd.losses.{family}")
        if name in module.__all__:
            return family, cast(Callable[..., Tensor], getattr(module, name))
        known += module.__all__
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"there is no loss {name!r}{hint or ';'} known: {', '.join(sorted(known))}.")


def takes(loss: Callable[..., Tensor], option: str) -> bool:
    """Whether a loss has the option, such as `temperature`."""
    return option in inspect.signature(loss).parameters
