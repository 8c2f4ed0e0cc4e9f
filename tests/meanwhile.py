"""What another process does between two steps of this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from retrieval_kd.store.operations import KINDS, compact
from retrieval_kd.store.parts import Kind
from retrieval_kd.store.store import Store


def compact_once_listed(store: Store, monkeypatch: pytest.MonkeyPatch) -> set[Kind]:
    """Let the parts of each kind go once, between their listing and their reading; the kinds it has not happened to."""
    listed, left = Store.parts, set(KINDS)

    def parts(self: Store, kind: Kind) -> list[Path]:
        found = listed(self, kind)
        if self == store and kind in left:
            left.remove(kind)
            assert compact(self, kind)["parts"] == 1
            assert not any(path.exists() for path in found)
        return found

    monkeypatch.setattr(Store, "parts", parts)
    return left
