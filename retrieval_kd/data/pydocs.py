"""The embedded collection `pydocs`: Python's standard library, with questions programmers ask.

Documents are taken from the running interpreter: one for each public class and function that
has documentation of its own, titled by its qualified name. Nothing of them is shipped. The
questions and their graded judgements are ours, in `pydocs.jsonl` beside this file, one a line:
`{"_id", "text", "split": "train" | "test", "relevant": {"module.name": grade}}`, grade 2 for the
answer itself, 1 for a document that helps.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from importlib import resources
from typing import Any

from retrieval_kd.types import Collection, Queries

# Not read: modules that act when imported, belong to the implementation, or repeat another.
_SKIPPED = frozenset(
    "antigravity distutils encodings ensurepip genericpath idlelib lib2to3 nt ntpath nturl2path opcode posix "  # noqa: SIM905
    "posixpath pydoc_data sre_compile sre_constants sre_parse test this tkinter turtle turtledemo venv".split()
)
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def documents() -> dict[str, tuple[str, str]]:
    """Read the interpreter's documentation: id -> (title, text), in the order of the ids.

    The title is the qualified name, the text the signature (where there is one) and the
    docstring. An object that several modules export stands once, under its shortest module.
    """
    found: dict[str, tuple[str, str]] = {}
    seen: set[int] = set()
    for module_name in sorted(_modules(), key=lambda name: (name.count("."), name)):
        module = _import(module_name)
        if module is None:
            continue
        listed = getattr(module, "__all__", None)
        for name in listed or [name for name in vars(module) if not name.startswith("_")]:
            value = getattr(module, name, None)
            text = getattr(value, "__doc__", None)
            if not (inspect.isclass(value) or inspect.isroutine(value)) or id(value) in seen:
                continue
            if not isinstance(text, str) or not text.strip() or _inherited(value, text):
                continue
            home = getattr(value, "__module__", None) or module_name
            if listed is None and home not in ("builtins", module_name, f"_{module_name}"):
                continue  # imported from elsewhere, and not offered as this module's own
            seen.add(id(value))
            title = f"{module_name}.{name}"
            found[title] = (title, f"{_signature(name, value)}{inspect.cleandoc(text)}")
    return dict(sorted(found.items()))


def load_pydocs() -> Collection:
    """Build the collection: about 2,400 documents, and questions split into train and test.

    Judgements of names that this Python version lacks are dropped, and questions left without a
    judgement with them; `notes` say how many.
    """
    found = documents()
    row_of = {name: row for row, name in enumerate(found)}
    splits: dict[str, tuple[list[str], list[str], list[dict[int, int]]]] = {}
    missing = dropped = 0
    for question in questions():
        qrels = {row_of[name]: grade for name, grade in question["relevant"].items() if name in row_of}
        missing += len(question["relevant"]) - len(qrels)
        if not qrels:
            dropped += 1
            continue
        ids, texts, judged = splits.setdefault(question["split"], ([], [], []))
        ids.append(question["_id"])
        texts.append(question["text"])
        judged.append(qrels)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Collection(
        name="pydocs",
        document_ids=list(found),
        documents=[f"{title} {text}" for title, text in found.values()],
        splits={name: Queries(*parts) for name, parts in splits.items()},
        notes=[
            f"Python {version}: {missing} judged names are absent in this version and were dropped, "
            f"{dropped} questions with them."
        ],
    )


def questions() -> list[dict[str, Any]]:
    """The questions as stored, in file order, whatever this Python version has."""
    text = (resources.files("retrieval_kd.data") / "pydocs.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _modules() -> Iterator[str]:
    for name in sorted(sys.stdlib_module_names - _SKIPPED):
        if name.startswith("_"):
            continue
        yield name
        for path in getattr(_import(name), "__path__", ()):
            for found in pkgutil.iter_modules([path]):
                if not found.name.startswith("_") and found.name not in ("test", "tests"):
                    yield f"{name}.{found.name}"
    yield "os.path"


def _import(name: str) -> object | None:
    """Import a module of the standard library; None where the platform lacks it."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return importlib.import_module(name)
        except (ImportError, OSError):  # not built, or for another system
            return None


def _inherited(value: object, text: str) -> bool:
    return inspect.isclass(value) and any(base.__doc__ == text for base in value.__mro__[1:])


def _signature(name: str, value: object) -> str:
    try:
        return _ADDRESS.sub("", f"{name}{inspect.signature(value)}\n")  # type: ignore[arg-type]
    except (ValueError, TypeError):  # builtins may have none
        return ""
