"""The model that the tests of training begin with."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_sentence_transformer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_sentence_transformer(folder / "transformer", width=16, normalize=False).save(str(folder / "model"))
    return folder / "model"
