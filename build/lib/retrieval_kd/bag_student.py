"""Students whose text is a bag of rows of a table, so that a query needs no transformer.

Their modules are those of Sentence Transformers (and `LexicalEmbedding`), the first of which finds a text's rows.
Documents are read as queries are, or keep the vectors of a transformer, whose space the queries then learn (LEAF,
arXiv:2509.12539).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.base.modules import Normalize
from torch import Tensor, nn

from retrieval_kd.gather import encode_sorted
from retrieval_kd.students import Batch, Outputs, own_scores
from retrieval_kd.tables import Positive, Table
from retrieval_kd.towers import BAGS, Towers, join_towers, load_towers, tokenize
from retrieval_kd.types import InputError, Side
from retrieval_kd.weights import locate_model

BATCH_ROWS = 2**19  # looked up at once: bags are not padded, and few pieces cost less than many


class Document(Table):
    """A document tower that stays as it is: a model of Sentence Transformers."""

    model: str
    revision: str | None = None
    max_length: Positive | None = None  # tokens; absent: the model's own


class BagOptions(Table):
    """What all students of bags have."""

    model: str  # of a teacher whose tokens and vectors the rows start from; or a student of this kind
    revision: str | None = None
    max_length: Positive | None = None  # tokens; absent: the model's own
    document: Document | None = None  # absent: documents are read as queries are
    document_prompt: str | None = None  # of the document tower; absent: the one saved with it


class BagStudent(nn.Module):
    """A table, what follows it, and perhaps a frozen document tower; vectors have unit length."""

    def __init__(self, towers: Towers, frozen_documents: bool) -> None:
        super().__init__()
        self.towers = towers
        self.frozen_documents = frozen_documents
        self.query = towers.query  # what is registered is trained and kept in checkpoints: not a frozen tower

    def tokenize(self, texts: Sequence[str], side: Side) -> list[list[int]]:
        """The rows of texts; of documents of a frozen tower, its token ids."""
        return tokenize(self.towers.side(side), self.towers.render(texts, side))

    def forward(self, batch: Batch) -> Outputs:
        queries = run_bags(self.query, batch.queries, batch)
        if batch.document_vectors is not None:
            documents = batch.document_vectors.to(queries.device)
        else:
            documents = run_bags(self.query, batch.documents, batch)
        with torch.autocast(queries.device.type, enabled=False):
            grid = queries @ documents.T  # (B, U)
            return Outputs(own_scores(grid, batch.columns), grid, queries, documents)

    def save(self, folder: Path) -> None:
        """Save into an existing folder, as Sentence Transformers loads it."""
        self.towers.model.save(str(folder), create_model_card=False)


def run_bags(modules: nn.ModuleList, rows: Sequence[NDArray[np.int32]], batch: Batch) -> Tensor:
    """Encode texts given by their rows, with gradient, in the order given: (n, D) float32."""
    device = next(modules.parameters()).device

    def encode(rows: list[NDArray[np.int32]]) -> Tensor:
        starts = np.cumsum([0, *(len(one) for one in rows[:-1])])
        flat = np.concatenate(rows).astype(np.int64)
        features: Any = {"input_ids": torch.from_numpy(flat).to(device), "offsets": torch.from_numpy(starts).to(device)}
        for module in modules:
            features = module(features)
        vectors: Tensor = features["sentence_embedding"].float()
        return vectors

    if not rows:
        first: Any = modules[0]
        return torch.zeros(0, first.get_embedding_dimension(), device=device)
    lengths = [max(1, len(one)) for one in rows]
    return encode_sorted(rows, lengths, encode, max(batch.micro_batch_tokens, BATCH_ROWS), batch.gradient_caching)


def is_bag(options: BagOptions) -> bool:
    """Whether the model is a student of bags already, and not a teacher that one starts from."""
    modules = locate_model(options.model, options.revision) / "modules.json"
    return modules.exists() and any(kind.__name__ in modules.read_text(encoding="utf-8") for kind in BAGS)


def load_teacher_tower(options: BagOptions) -> Towers:
    """The transformer that rows start from."""
    towers = load_towers(options.model, options.revision, options.max_length)
    first: Any = towers.document[0]
    if not hasattr(first, "auto_model"):
        raise InputError(f"student.model {options.model!r} begins with {type(first).__name__}, not a transformer.")
    return towers


def save_start(first: nn.Module, folder: Path) -> None:
    """Save in `folder`/model the student that begins with module `first`."""
    modules = [first, Normalize()]
    join_towers(modules, modules, "", "").model.save(str(folder / "model"), create_model_card=False)


def load_bags(options: BagOptions, kind: type[Any]) -> BagStudent:
    """Load a student that begins with a module of this kind; InputError for another model."""
    if not is_bag(options):
        raise InputError(
            f"model {options.model!r} is no {kind.__name__}; one that starts from a teacher is made by `rkd train`."
        )
    loaded = load_towers(options.model, options.revision, options.max_length)
    if not isinstance(loaded.query[0], kind) or any(not isinstance(module, Normalize) for module in loaded.query[1:]):
        found = ", ".join(type(module).__name__ for module in loaded.query)
        raise InputError(f"model {options.model!r} is of {found}, where {kind.__name__} and Normalize are expected.")
    modules = [loaded.query[0], Normalize()]
    if options.document is None:
        return BagStudent(join_towers(modules, modules, "", ""), frozen_documents=False)
    document = options.document
    tower = load_towers(document.model, document.revision, document.max_length, None, options.document_prompt)
    if not tower.normalized:
        raise InputError(f"student.document.model {document.model!r} does not normalise; queries have unit length.")
    tower.document.requires_grad_(False)
    towers = join_towers(modules, list(tower.document), "", tower.document_prompt)
    width = loaded.model.get_embedding_dimension()
    other = tower.model.get_embedding_dimension()
    if width != other:
        raise InputError(f"queries have {width} numbers and student.document.model {other}; make them equal.")
    return BagStudent(towers, frozen_documents=True)
