"""Poolings that Sentence Transformers lacks, as modules of it.

A folder that has one loads with `SentenceTransformer(folder, trust_remote_code=True)` where this
package is installed: Sentence Transformers asks for that word before it imports another package.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from sentence_transformers.base.modules import Module
from torch import nn

from retrieval_kd.types import InputError


class PMA(Module):
    """Pooling by multi-head attention: one learned seed attends over the token states.

    With states X (L, D), seed s and h heads: a = softmax(W_q s (W_k X)' / sqrt(D)) W_v X, head by head;
    o = norm(s + a); the vector is norm(o + ReLU(W_o o)).
    Source: Lee et al. 2019, arXiv:1810.00825, in the form of D2LLM, Liao et al. 2024, arXiv:2406.17262.
    """

    config_keys = ["dim", "heads"]  # noqa: RUF012  what Sentence Transformers saves

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if dim % heads:
            raise InputError(f"student.pma_heads is {heads}, which does not divide the {dim} dimensions of a state.")
        self.dim = dim
        self.heads = heads
        self.seed = nn.Parameter(torch.empty(1, dim))
        self.query, self.key, self.value, self.feed = (nn.Linear(dim, dim) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        for weight in (self.seed, *(layer.weight for layer in (self.query, self.key, self.value, self.feed))):
            nn.init.xavier_uniform_(weight)

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Token states (n, L, D) under the attention mask (n, L) to sentence vectors (n, D)."""
        states = features["token_embeddings"]
        seed = self.seed.expand(len(states), 1, self.dim)
        query, key, value = (
            layer(read).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (n, heads, 1 or L, D / heads)
            for layer, read in ((self.query, seed), (self.key, states), (self.value, states))
        )
        seen = features["attention_mask"].bool()[:, None, None]
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=self.dim**-0.5)
        pooled = self.norms[0](seed + read.transpose(1, 2).flatten(2))
        vectors = self.norms[1](pooled + F.relu(self.feed(pooled)))
        return {**features, "sentence_embedding": vectors[:, 0]}

    def get_embedding_dimension(self) -> int:
        """Width of its vectors."""
        return self.dim

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write settings and weights, as Sentence Transformers asks."""
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> PMA:
        """Read what `save` wrote."""
        keys = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        where = {key: kwargs[key] for key in keys if key in kwargs}
        module = cls(**cls.load_config(model_name_or_path, **where))
        return cast(PMA, cls.load_torch_weights(model_name_or_path, model=module, **where))


class TopLayers(Module):
    """Token states of the last `count` layers side by side, for the pooling that follows.

    Shapes: states (n, L, D) of each layer to (n, L, count * D), lower layers first. The transformer has to
    be told to give the states of all layers (`output_hidden_states` in its configuration).
    Source: DSE, Barkan et al. 2020, arXiv:1908.05161.
    """

    config_keys = ["count", "dim"]  # noqa: RUF012

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = count
        self.dim = dim

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Replace the token states."""
        if "all_layer_embeddings" not in features:
            raise InputError(
                "the layers of a student with student.top_layers have no vectors of their own to learn by."
            )
        return {**features, "token_embeddings": torch.cat(features["all_layer_embeddings"][-self.count :], dim=-1)}

    def get_embedding_dimension(self) -> int:
        """Width of the states it gives."""
        return self.count * self.dim

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write settings, as Sentence Transformers asks."""
        self.save_config(output_path)
