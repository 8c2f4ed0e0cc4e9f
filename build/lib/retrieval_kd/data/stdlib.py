"""The documentation of Python's standard library, read from the interpreter that runs this file.

Run as a script by an interpreter of its own (`read_stdlib`), because libraries that are already
imported change what modules of the standard library hold. It therefore imports nothing else.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
import pkgutil
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator

# Not read: modules that act when imported, belong to the implementation, or repeat another.
_SKIPPED = frozenset(
    "antigravity distutils encodings ensurepip genericpath idlelib lib2to3 nt ntpath nturl2path opcode posix "  # noqa: SIM905
    "posixpath pydoc_data sre_compile sre_constants sre_parse test this tkinter turtle turtledemo venv".split()
)
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def read_stdlib() -> dict[str, tuple[str, str]]:
    """The documents of this Python version, read by a fresh interpreter: id -> (title, text)."""
    command = [sys.executable, "-I", "-S", __file__]
    output = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
    return {name: (title, text) for name, (title, text) in json.loads(output).items()}


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
        text = _ADDRESS.sub("", f"{name}{inspect.signature(value)}\n")  # type: ignore[arg-type]
    except (ValueError, TypeError):  # builtins may have none
        return ""
    for default, expression in ((os.environ, "os.environ"), (sys.executable, "sys.executable")):
        if default:  # as in cgi.parse, whose signature would show this machine's whole environment
            text = text.replace(repr(default), expression)
    return text


if __name__ == "__main__":
    found = json.dumps(documents())
    sys.stdout.buffer.write(found.encode("utf-8"))
