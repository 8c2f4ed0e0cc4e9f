"""Published methods as data: one TOML file each, which a recipe uses by `method = "NAME"`.

A file says what the method is (`title`, `paper`, `needs`, `trains`, `figures`, perhaps `notes`), which teachers it
expects by name (`roles`, a table of name -> what it gives), and under `recipe` what it adds to a recipe.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from retrieval_kd.types import InputError

FACTS = ("title", "paper", "needs", "trains", "figures")


def method_names() -> list[str]:
    """The names of all methods."""
    found = (entry.name for entry in files("retrieval_kd.methods").iterdir())
    return sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml"))


def method_text(name: str) -> str:
    """The file of a method; InputError with the nearest name for an unknown one."""
    known = method_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise InputError(f"there is no method {name!r}{hint} `rkd methods` lists them.")
    return files("retrieval_kd.methods").joinpath(f"{name}.toml").read_text(encoding="utf-8")


def read_method(name: str) -> dict[str, Any]:
    """A method's file as a table."""
    return tomllib.loads(method_text(name))


def apply_method(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The recipe with what its `method` adds; what the recipe says itself holds.

    The stages are the method's, each changed by the recipe's table `stage`. Teachers must have the
    names that the method expects, those that it lists as `roles`. Raises InputError.
    """
    method = read_method(str(table["method"]))
    if "stages" in table:
        raise InputError(f"{where}: `method` brings its stages; change all of them in [stage], or leave `method` out.")
    names = [teacher.get("name") for teacher in (*table.get("teachers", []), *table.get("live", []))]
    for role, what in method.get("roles", {}).items():
        if role not in names:
            raise InputError(
                f"{where}: method {table['method']!r} expects a teacher named {role!r} ({what}); the recipe has "
                f"{', '.join(map(repr, names)) or 'none'}."
            )
    merged = _merge(method["recipe"], {key: value for key, value in table.items() if key != "stage"})
    merged["stages"] = [_merge(stage, table.get("stage", {})) for stage in method["recipe"].get("stages", [])]
    return merged


def expand_teachers(table: dict[str, Any]) -> None:
    """Put the names of all the recipe's teachers where a term says `teachers = ["*"]`."""
    names = [teacher.get("name") for teacher in table.get("teachers", [])]
    for stage in table.get("stages", []):
        for term in stage.get("terms", []):
            if term.get("teachers") == ["*"]:
                term["teachers"] = names


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Tables merged key by key, `above` winning; a list is one value."""
    merged = dict(below)
    for key, value in above.items():
        known = merged.get(key)
        merged[key] = _merge(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return merged
