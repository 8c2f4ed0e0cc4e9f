"""Classifiers that are read at their first token: their last layer need not compute the others."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

# Families whose layers have one form, and whose classifier or pooler reads the first token alone.
FAMILIES = ("Bert", "Camembert", "Electra", "Roberta", "XLMRoberta")


def trim_last_layer(model: Any) -> None:
    """Have the last layer of a BERT-like classifier compute its first token alone, in place.

    Its logits stay the same. The keys and values of all tokens are still computed; queries, output and feed-forward,
    ten twelfths of the layer, are those of one token. Models of another form stay as they are.
    """
    layers = getattr(getattr(model.base_model, "encoder", None), "layer", None)
    if not isinstance(layers, nn.ModuleList):
        return
    names = (type(model).__name__, type(layers[-1]).__name__)
    if names not in [(f"{family}ForSequenceClassification", f"{family}Layer") for family in FAMILIES]:
        return
    if model.config._attn_implementation == "sdpa" and not model.config.is_decoder:
        layers[-1] = _FirstToken(layers[-1])


class _FirstToken(nn.Module):
    """An encoder layer: all states (B, L, D) in, that of the first token (B, 1, D) out."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, states: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        attention = self.layer.attention.self
        first = states[:, :1]

        def heads(vectors: Tensor) -> Tensor:  # (B, heads, L, D / heads)
            shape = (vectors.shape[0], -1, attention.num_attention_heads, attention.attention_head_size)
            return vectors.view(shape).transpose(1, 2)

        mask = None if attention_mask is None else attention_mask[..., :1, :]
        context = F.scaled_dot_product_attention(
            heads(attention.query(first)), heads(attention.key(states)), heads(attention.value(states)), attn_mask=mask
        )
        attended = self.layer.attention.output(context.transpose(1, 2).flatten(2), first)
        output: Tensor = self.layer.output(self.layer.intermediate(attended), attended)
        return output
