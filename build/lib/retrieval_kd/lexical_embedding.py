"""N-grams through a small network: the module of lexical students that Sentence Transformers lacks.

A folder that has one loads with `SentenceTransformer(folder, trust_remote_code=True)` where this package is
installed: Sentence Transformers asks for that word before it imports another package, whoever wrote the folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sentence_transformers.base.modules import InputModule
from tokenizers import Tokenizer
from torch import Tensor, nn

from retrieval_kd.ngrams import Keys, find_ngrams


class LexicalEmbedding(InputModule):
    """A text's counts of known token n-grams, through a first layer that is a table and a network without biases.

    The first layer adds up the rows of a text's n-grams, as often as they come: rows start multiplied by the inverse
    frequency, so that this is the product of TF-IDF with a matrix, without the matrix of texts by n-grams.
    With x its result of unit length, further layers are ReLU and a matrix, with unit length again before each;
    `residual`, x is added to what they make of it, and x has no ReLU before the first.
    Source: DatologyAI et al. 2025 (Luxical), arXiv:2512.09015; the residual form is ours.
    """

    config_keys = ["longest", "widths", "residual", "max_seq_length"]  # noqa: RUF012  what Sentence Transformers saves

    def __init__(
        self,
        tokenizer: Tokenizer,
        ngrams: Keys,
        longest: int,
        widths: Sequence[int],
        residual: bool,
        max_seq_length: int | None = None,
    ) -> None:
        """`ngrams` are keys that rise (`ngrams.count_ngrams`); `widths` of the table's rows and of each layer."""
        super().__init__()  # type: ignore[no-untyped-call]
        assert not residual or widths[0] == widths[-1], "x is added to the network's result"
        self.tokenizer: Any = tokenizer
        self.longest, self.widths, self.residual, self.max_seq_length = longest, list(widths), residual, max_seq_length
        self.keys = ngrams
        # as int64, the bits of the keys, since files of weights hold no unsigned numbers of 64 bits everywhere
        self.register_buffer("ngrams", torch.from_numpy(ngrams.view(np.int64).copy()))
        self.table = nn.EmbeddingBag(len(ngrams), widths[0], mode="sum")
        self.layers = nn.ParameterList(nn.Parameter(torch.empty(after, before)) for before, after in pairwise(widths))
        for layer in (self.table.weight, *self.layers):
            nn.init.kaiming_uniform_(layer, nonlinearity="relu")

    def find(self, texts: Sequence[str]) -> list[list[int]]:
        """The rows of each text's known n-grams."""
        found = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [find_ngrams(np.array(one.ids, np.int64), self.keys, self.longest).tolist() for one in found]

    def preprocess(self, inputs: list[str], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Rows of texts end to end, and where each text starts."""
        rows = self.find([f"{prompt or ''}{text}" for text in inputs])
        starts = np.cumsum([0, *(len(one) for one in rows[:-1])])
        flat = np.fromiter((row for one in rows for row in one), np.int64)
        return {"input_ids": torch.from_numpy(flat), "offsets": torch.from_numpy(starts)}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Rows `input_ids` (n,) of texts that start at `offsets` (B,) to sentence vectors (B, D)."""
        x = F.normalize(self.table(features["input_ids"], features["offsets"]), dim=1)
        hidden = x
        for number, layer in enumerate(self.layers):
            if number or not self.residual:
                hidden = F.normalize(torch.relu(hidden), dim=1)
            hidden = hidden @ layer.T
        return {**features, "sentence_embedding": x + hidden if self.residual and len(self.layers) else hidden}

    def get_embedding_dimension(self) -> int:
        """Width of its vectors."""
        return self.widths[-1]

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write settings, tokenizer and weights, as Sentence Transformers asks."""
        self.save_config(output_path)
        self.tokenizer.save(str(Path(output_path) / "tokenizer.json"))
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> LexicalEmbedding:
        """Read what `save` wrote."""
        keys = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        where = {key: kwargs[key] for key in keys if key in kwargs}
        config = cls.load_config(model_name_or_path, **where)
        path = cls.load_file_path(model_name_or_path, filename="tokenizer.json", **where)
        weights = cast(dict[str, Tensor], cls.load_torch_weights(model_name_or_path, **where))
        ngrams: NDArray[Any] = weights["ngrams"].numpy().view(np.uint64)
        module = cls(Tokenizer.from_file(str(path)), ngrams, **config)
        module.load_state_dict(weights)
        return module
