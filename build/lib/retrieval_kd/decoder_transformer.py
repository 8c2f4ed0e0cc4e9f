"""A causal language model as a sparse encoder: the module that Sentence Transformers lacks.

The file stands by itself: a copy of it goes into the folder of every model that uses it, which then loads with
`SparseEncoder(folder, trust_remote_code=True)` where this package is not installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.base.modules import Transformer


class DecoderTransformer(Transformer):
    """A decoder with its language model's head, which gives each token of a text logits of all vocabulary terms.

    With `echo` the decoder reads the text twice, and the logits are those of the second copy, each of whose tokens has
    seen the whole text. A token of the tokenizer that marks the beginning (BOS) is read once, before the first copy,
    and never pooled, with echo or without: it says nothing of the text, and being what attention falls back on, it
    would win the maximum of many terms. `max_seq_length` counts the tokens of one copy.
    Source: Doshi et al. 2024 (Mistral-SPLADE), arXiv:2408.11119; echo, Springer et al. 2024, arXiv:2402.15449.
    """

    config_keys = [*Transformer.config_keys, "echo"]  # noqa: RUF012  what Sentence Transformers saves

    def __init__(self, model_name_or_path: str, *, echo: bool = False, **settings: Any) -> None:
        settings |= {
            "transformer_task": "text-generation",
            "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
            "module_output_name": "token_embeddings",
        }
        super().__init__(model_name_or_path, **settings)
        self.echo = echo
        tokenizer: Any = self.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # whichever, since nothing reads it
        if echo and (limit := getattr(self.config, "max_position_embeddings", None)):
            self.max_seq_length = min(self.max_seq_length or limit, limit // 2)

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **_: Any) -> dict[str, Any]:  # type: ignore[override]
        """Token ids of texts as they stand, without a chat template: `input_ids` and `attention_mask`, both (n, L)."""
        tokenizer: Any = self.tokenizer
        texts = [f"{prompt or ''}{text}" for text in inputs]
        found = tokenizer(texts, padding=True, truncation=True, max_length=self.max_seq_length, return_tensors="pt")
        return {name: found[name].long() for name in ("input_ids", "attention_mask")}  # no tokens at all are floats

    def forward(self, features: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Tokens `input_ids` (n, L) to `token_embeddings` (n, L + 1, V), with the `attention_mask` of those to pool.

        The decoder reads a text's tokens to the right of all padding, with positions from 0, so that neither the
        side of padding nor the length of a text's neighbours changes anything.
        """
        tokenizer: Any = self.tokenizer
        bos = -1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        copies = 2 if self.echo else 1
        # one place of padding more, so that there is one even where all texts are empty
        ids, mask = (F.pad(features[name], (0, 1)) for name in ("input_ids", "attention_mask"))
        width, length = ids.shape[1], mask.sum(1, keepdim=True)
        first = mask.argmax(1, keepdim=True)  # where a text begins
        own = length - torch.eq(ids.gather(1, first), bos).long()  # tokens less BOS
        read = length + (copies - 1) * own
        places = torch.arange(-copies * width, 0, device=ids.device) + read  # in what is read; below 0: padding
        source = torch.where(places < length, places, places - own)
        inputs = {
            "input_ids": ids.gather(1, first + source.clamp(min=0)),
            "attention_mask": (places >= 0).long(),
            "position_ids": places.clamp(min=0),
            "logits_to_keep": torch.arange(-width, 0, device=ids.device) + copies * width,  # of the last copy
        }
        logits = super().forward(inputs, **more)["token_embeddings"]
        pooled = (places[:, -width:] >= read - own).long()
        return {**features, "token_embeddings": logits, "attention_mask": pooled}
