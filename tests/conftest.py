"""What several test files share; `from tiny import ...` works in all of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
# Tiny models gain nothing from a second thread, and where other work has the cores, threads wait for one another.
# Before torch and FAISS are loaded, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the student `tiny_sentence_transformer(student)` exported into `fp32` and `int8`."""
    from tiny import CHECK_TEXTS, tiny_sentence_transformer

    from retrieval_kd.export_graph import export_graph

    folder = tmp_path_factory.mktemp("exported")
    student = tiny_sentence_transformer(folder / "student")
    for form in ("fp32", "int8"):
        export_graph(student, folder / form, form, identity={"student": "tiny"}, check_texts=CHECK_TEXTS)
    return folder
