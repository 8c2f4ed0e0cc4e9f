"""Tiny sparse encoders with random weights: a masked language model with its head, in the words of `tiny`."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import MAX_LENGTH, _tokenizer
from transformers import BertConfig, BertForMaskedLM


def tiny_masked_lm(folder: Path, *, layers: int = 2, width: int = 32, seed: int = 0) -> Path:
    """Save a masked language model whose logits are positive for some terms and negative for others."""
    tokenizer = _tokenizer()
    tokenizer.model_max_length = MAX_LENGTH
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=2 * MAX_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForMaskedLM(config)
        with torch.no_grad():
            model.cls.predictions.bias.normal_(-1.5, 0.5)
            model.cls.predictions.decoder.bias.copy_(model.cls.predictions.bias)
    model.save_pretrained(folder)
    return folder
