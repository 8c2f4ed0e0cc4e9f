"""Tiny language models with random weights, and a tokenizer of single bytes with a chat template like Qwen's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SPECIAL = ["<pad>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
MERGES = [("y", "e"), ("ye", "s"), ("n", "o"), ("t", "r"), ("u", "e"), ("tr", "ue")]
MERGES += [("f", "a"), ("l", "s"), ("fa", "ls"), ("fals", "e")]


def tiny_tokenizer(chat: bool = True, end: bool = False, begin: bool = False) -> PreTrainedTokenizerFast:
    """Every byte is a token, and so are yes, no, true, false.

    `end` adds </s> to a text, as T5's does; `begin` puts a token before it and knows no padding, as Llama's does.
    """
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES)]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    if begin:
        first = {"single": "<|im_start|> $A", "special_tokens": [("<|im_start|>", 2)]}
        tokenizer.post_processor = processors.TemplateProcessing(**first)
    names = {"bos_token": "<|im_start|>"} if begin else {"pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", model_max_length=2048, **names)
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


def save_tiny_lm(folder: Path, kind: str = "llama", chat: bool = True, seed: int = 0, begin: bool = False) -> Path:
    """Save a model of kind llama, mistral (which sees 8 tokens back), gpt2, qwen3 or t5 and its tokenizer."""
    tokenizer = tiny_tokenizer(chat, end=kind == "t5", begin=begin)
    tokenizer.save_pretrained(folder)
    shape: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1}
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = {**shape, **layers, "num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any
        if kind == "t5":
            sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
            model = T5ForConditionalGeneration(
                T5Config(**shape, **sizes, decoder_start_token_id=0, initializer_factor=2.0, dropout_rate=0.0)
            )
        elif kind == "mistral":
            model = MistralForCausalLM(MistralConfig(**decoder, sliding_window=8))
        elif kind == "gpt2":
            sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
            model = GPT2LMHeadModel(GPT2Config(**shape, **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        elif kind == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**decoder, head_dim=8))
        else:
            model = LlamaForCausalLM(LlamaConfig(**decoder))
    model.save_pretrained(folder)
    return folder
