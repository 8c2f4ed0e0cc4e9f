"""The store that the tests of operations on whole stores work on."""

from __future__ import annotations

from pathlib import Path

import pytest
from filled_store import filled

from retrieval_kd.store.operations import KINDS
from retrieval_kd.store.store import Store


@pytest.fixture
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Store:
    """A store of the test's kind, or of all."""
    params = getattr(request.node, "callspec", None)
    kind = params and params.params.get("kind")
    return filled(tmp_path, kinds=[kind] if kind else KINDS)
