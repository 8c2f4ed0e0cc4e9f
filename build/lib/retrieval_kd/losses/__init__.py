"""Losses: pure functions, tensors in, scalar out, under their usual names.

A loss says by the names of its parameters what it needs:

    student      (R, C) scores; (R, D) vectors for the functions of `vectors`
    teacher      the same of the teacher, which losses do not detach
    valid        (R, C) bool: the candidate exists and, where a teacher is compared, is scored
    positive     (R, C) bool: judged relevant
    preference   (R, C, C): the probability that i beats j, NaN where not asked
    row_weights  (R,) weights of the rows in the mean, or None

Every other parameter is an option, with a default, that a recipe may set. A new loss is a function
named in the `__all__` of its module.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_type_hints

from pydantic import ConfigDict, create_model
from torch import Tensor

from retrieval_kd.tables import parse
from retrieval_kd.types import InputError

MODULES = ("choice", "labels", "orders", "pairs", "regression", "transport", "vectors")
_NEEDS = frozenset({"teacher", "positive", "preference"})
_GIVEN = _NEEDS | {"student", "valid", "row_weights"}


@dataclass(frozen=True)
class Loss:
    """A loss and what it takes; `options` maps their names to their defaults."""

    name: str
    function: Callable[..., Tensor]
    of: Literal["scores", "vectors"]  # what of the student it compares
    needs: frozenset[str]  # of "teacher", "positive", "preference"
    options: Mapping[str, Any]


def loss_names() -> list[str]:
    """The names of all losses, sorted."""
    return sorted(_modules())


@functools.cache
def find_loss(name: str) -> Loss:
    """The loss called `name`; InputError with the nearest name."""
    modules = _modules()
    if name not in modules:
        known = loss_names()
        raise InputError(f"there is no loss {name!r}{_did_you_mean(name, known)} known: {', '.join(known)}.")
    function = cast(Callable[..., Tensor], getattr(_module(modules[name]), name))
    parameters = inspect.signature(function).parameters
    return Loss(
        name=name,
        function=function,
        of="vectors" if modules[name] == "vectors" else "scores",
        needs=_NEEDS & parameters.keys(),
        options={key: parameter.default for key, parameter in parameters.items() if key not in _GIVEN},
    )


def check_options(loss: Loss, options: Mapping[str, Any], where: str) -> None:
    """InputError, beginning with `where`, for an option the loss lacks, or a value it cannot take."""
    for key in options:
        if key not in loss.options:
            known = ", ".join(loss.options) or "none"
            hint = _did_you_mean(key, loss.options)
            raise InputError(f"{where}: {loss.name} has no option {key!r}{hint} known: {known}.")
    types = get_type_hints(loss.function, include_extras=True)
    fields: dict[str, Any] = {key: (types[key], default) for key, default in loss.options.items()}
    parse(create_model(loss.name, __config__=ConfigDict(strict=True), **fields), options, where)


@functools.cache
def _modules() -> dict[str, str]:
    """The module of each loss."""
    return {name: module for module in MODULES for name in _module(module).__all__}


def _module(name: str) -> Any:
    return importlib.import_module(f"retrieval_kd.losses.{name}")


def _did_you_mean(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ";"
