"""Checkpoints and log of a stage: written whole or not at all, by the first process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from retrieval_kd.files import atomic
from retrieval_kd.gather import process


class Checkpoints:
    """The folder of a stage's checkpoints: `checkpoint-STEP.pt`, the last `keep` of them, and `log.jsonl`.

    `read` gives the state to save and `write` takes it up; a checkpoint with another `key` is of
    another training and is left alone until this one saves its first.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        read: Callable[[], dict[str, Any]],
        write: Callable[[dict[str, Any]], None],
        keep: int = 1,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.key, self.read, self.write, self.keep = folder, key, read, write, keep

    def resume(self) -> int:
        """Take up the last checkpoint of this very training; return its step, 0 without one."""
        for path in sorted(self.folder.glob("checkpoint-*.pt"), reverse=True):
            saved = torch.load(path, map_location="cpu", weights_only=False)
            if saved["key"] == self.key:
                self.write(saved["state"])
                if process()[0] == 0:  # a kill may have come between saving the last one and dropping those before
                    for old in self._ours()[: -self.keep]:
                        old.unlink()
                return int(saved["step"])
        return 0

    def save(self, step: int) -> None:
        """Save the state of `step`, then drop what is older than the last `keep` and what is not ours."""
        if process()[0] != 0:
            return
        path = self.folder / f"checkpoint-{step:08d}.pt"
        with atomic(path) as scratch:
            torch.save({"key": self.key, "step": step, "state": self.read()}, scratch)
        for leftover in self.folder.glob(".checkpoint-*"):  # what a kill left half-written
            leftover.unlink()
        ours = self._ours()
        for old in self.folder.glob("checkpoint-*.pt"):
            if old not in ours[-self.keep :]:
                old.unlink()

    def states(self) -> list[dict[str, Any]]:
        """The states that are kept, oldest first."""
        return [torch.load(path, map_location="cpu", weights_only=False)["state"] for path in self._ours()]

    def records(self, step: int) -> list[dict[str, float]]:
        """The log up to `step`, which is cut there; a line that a kill cut short is left out."""
        path = self.folder / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        records = [record for line in lines if line.endswith("\n") and (record := json.loads(line))["step"] <= step]
        if process()[0] == 0:
            with atomic(path) as scratch:
                scratch.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return records

    def log(self, record: dict[str, float]) -> None:
        """Add a line to the log."""
        if process()[0] == 0:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")

    def _ours(self) -> list[Path]:
        """The checkpoints of this training, oldest first."""
        return [path for path in sorted(self.folder.glob("checkpoint-*.pt")) if self._is_ours(path)]

    def _is_ours(self, path: Path) -> bool:
        return bool(torch.load(path, map_location="cpu", weights_only=False, mmap=True)["key"] == self.key)
