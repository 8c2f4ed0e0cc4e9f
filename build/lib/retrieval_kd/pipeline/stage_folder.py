"""A folder that holds what was made of certain inputs, and is made again when they change."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retrieval_kd import __version__
from retrieval_kd.files import atomic, fingerprint, read_json, write_json
from retrieval_kd.progress import say

MANIFEST = "manifest.json"


def is_made(folder: Path, inputs: Any) -> bool:
    """Whether `folder` holds the result for these inputs."""
    path = folder / MANIFEST
    return path.exists() and read_json(path)["key"] == fingerprint(inputs)


def make_folder(folder: Path, name: str, inputs: Any, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Run `work` into `folder` unless it holds the result for the same inputs, and return the manifest.

    `work` fills a scratch folder and returns facts for the manifest; the folder takes its place only when all of it
    is written. `name` is what news call it.
    """
    if is_made(folder, inputs):
        say(f"{name}: up to date")
        kept: dict[str, Any] = read_json(folder / MANIFEST)
        return kept
    if (folder / MANIFEST).exists():
        say(f"{name}: inputs changed, made again")
    began = time.monotonic()
    with atomic(folder) as scratch:
        scratch.mkdir(parents=True)
        facts = work(scratch)
        seconds = round(time.monotonic() - began, 2)
        manifest = {"key": fingerprint(inputs), "seconds": seconds, "version": __version__, **facts}
        write_json(scratch / MANIFEST, manifest)
    say(f"{name}: {_facts(facts)}{seconds:.1f} s")
    return manifest


def _facts(facts: dict[str, Any]) -> str:
    plain = {key: value for key, value in facts.items() if isinstance(value, int | float | str)}
    return "".join(
        f"{key} {value:,}, " if isinstance(value, int) else f"{key} {value}, " for key, value in plain.items()
    )
