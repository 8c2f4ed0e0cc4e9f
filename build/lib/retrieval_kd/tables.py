"""Tables: what recipes are made of, checked as they are read, with the nearest key for a mistyped one.

A table that names a `kind` (teacher, candidate source, student, index) keeps its other keys for the
module of that name, which declares and checks them itself (`Options`).
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from retrieval_kd.extras import missing_extra
from retrieval_kd.types import InputError

T = TypeVar("T", bound=BaseModel)
Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
Precision = Literal["fp32", "bf16"]


class Table(BaseModel):
    """A table of a recipe: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Component(BaseModel):
    """A table whose `kind` names a module; the rest is that module's `Options`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: str

    @property
    def options(self) -> dict[str, Any]:
        """The keys that belong to the module."""
        return dict(self.model_extra or {})


def parse(model: type[T], table: Mapping[str, Any], where: str) -> T:
    """Validate `table` against `model`; InputError with the key and, if unknown, the nearest one."""
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise InputError("\n".join(_explain(model, problem, where) for problem in error.errors())) from None


def kinds(package: str) -> list[str]:
    """The kinds that a package of this project has: the names of its modules."""
    folder = importlib.import_module(f"retrieval_kd.{package}").__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def kind_module(package: str, kind: str) -> ModuleType:
    """Import the module that a `kind` names; InputError for an unknown kind or a missing extra."""
    try:
        known = kinds(package)
        if kind not in known:
            hint = did_you_mean(kind, known)
            raise InputError(f"there is no {package} kind {kind!r}{hint}; known: {', '.join(known)}.")
        return importlib.import_module(f"retrieval_kd.{package}.{kind}")
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error


def options(package: str, component: Component) -> Any:
    """The checked `Options` of a component, as its module declares them."""
    module = kind_module(package, component.kind)
    return parse(module.Options, component.options, f"{package} kind {component.kind!r}")


def _explain(model: type[BaseModel], problem: Any, where: str) -> str:
    """One line for one problem that pydantic found."""
    path = ".".join(f"{part}" for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{where}: {path + ': ' if path else ''}{problem['msg'].removeprefix('Value error, ')}."
    return f"{where}: unknown key {path!r}{did_you_mean(str(problem['loc'][-1]), _keys(model, problem['loc'][:-1]))}."


def _keys(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The keys of the table at `location`, found by walking the models' annotations."""
    for part in location:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        inner = _model_in(model.model_fields[part].annotation)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := _model_in(argument)) is not None:
            return found
    return None


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A question with the nearest of the known words, or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
