"""Pickles of plain values. Nothing in one is ever called, so that a file from a stranger can do no harm."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from retrieval_kd.layouts._files import KINDS, malformed, shown, unpacked
from retrieval_kd.types import InputError

PLAIN: dict[str, type] = {"dict": dict, "int": int, "float": float, "str": str}


class _RefusedError(Exception):
    pass


class _Plain(pickle.Unpickler):
    """Knows four built-in types by name and refuses every other global."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in PLAIN:
            return PLAIN[name]
        raise _RefusedError(f"{module}.{name}")


def load_pickle(path: Path, form: str) -> dict[Any, Any]:
    """The dictionary that a pickle holds, read whole; InputError for one that is more than plain values."""
    with unpacked(path) as file:
        try:
            value = _Plain(file).load()
        except _RefusedError as refused:
            raise InputError(
                f"{path} asks for {refused}, which could run anything; only a pickle of dictionaries, numbers and "
                "strings is read. Convert it where you trust it, for example to JSON for layout splade_json."
            ) from None
        except OSError:
            raise  # a torn packed file
        except Exception as error:  # a broken pickle raises nearly anything
            raise malformed(str(path), form, ValueError(f"not a pickle of plain values ({error})")) from None
    if not isinstance(value, dict):
        raise malformed(str(path), form, ValueError(f"{shown(value)} is not {KINDS[dict]}"))
    return value
