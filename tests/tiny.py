"""A tiny student with random weights, made in a moment: BERT with a WordPiece vocabulary."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from retrieval_kd.types import Collection

MAX_LENGTH = 24  # tokens a text
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    "a",
    "the",
    "of",
    "to",
    "in",
    "is",
    "for",
    "list",
    "sort",
    "file",
    "read",
    "write",
    "open",
    "close",
    "dict",
    "key",
    "value",
    "string",
    "number",
    "integer",
    "float",
    "set",
    "map",
    "path",
    "join",
    "split",
    "line",
    "print",
    "error",
    "raise",
    "catch",
    "class",
    "function",
    "return",
    "call",
    "module",
    "import",
    "test",
    "time",
    "date",
    "thread",
    "lock",
]
CHECK_TEXTS = ["sort a list", "read a file line by line and close it", "xylophone?", "Naïve café", "call (the) lock"]
_CHARACTERS = string.ascii_lowercase + string.digits + ".,:;!?'\"()-_"


def collection_of(documents: Sequence[str]) -> Collection:
    """A collection of these documents, without queries."""
    return Collection("tiny", [f"d{number}" for number in range(len(documents))], documents, {})


def tiny_sentence_transformer(
    folder: Path, *, layers: int = 2, width: int = 32, seed: int = 0, normalize: bool = True
) -> SentenceTransformer:
    """A model of `width` dimensions with seeded weights; its transformer is saved in `folder`."""
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(_config(len(tokenizer), layers, width))
    model.save_pretrained(folder)
    modules: list[torch.nn.Module] = [Transformer(str(folder), max_seq_length=MAX_LENGTH), Pooling(width, "mean")]
    if normalize:
        modules.append(Normalize())
    return SentenceTransformer(modules=modules, device="cpu").eval()


def tiny_masked_lm(folder: Path, *, layers: int = 2, width: int = 32, seed: int = 0) -> Path:
    """Save a masked language model whose logits are positive for some terms and negative for others."""
    tokenizer = _tokenizer()
    tokenizer.model_max_length = MAX_LENGTH
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForMaskedLM(_config(len(tokenizer), layers, width))
        with torch.no_grad():
            model.cls.predictions.bias.normal_(-1.5, 0.5)
            model.cls.predictions.decoder.bias.copy_(model.cls.predictions.bias)
    model.save_pretrained(folder)
    return folder


def tiny_classifier(folder: Path, *, labels: int = 1, layers: int = 2, width: int = 32, seed: int = 0) -> Path:
    """Save a cross-encoder of so many logits, which differ from text to text."""
    tokenizer = _tokenizer()
    tokenizer.model_max_length = MAX_LENGTH
    tokenizer.save_pretrained(folder)
    config = _config(len(tokenizer), layers, width)
    config.num_labels = labels
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def stored_as(folder: Path, source: Path, dtype: torch.dtype) -> Path:
    """A copy of a model with its weights rounded to halves, and kept in files of `dtype`."""
    shutil.copytree(source, folder)
    for path in folder.rglob("*.safetensors"):
        halves = {name: tensor.half().to(dtype) for name, tensor in load_file(path).items()}
        save_file(halves, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
    return folder


def _config(vocabulary: int, layers: int, width: int) -> BertConfig:
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=2 * MAX_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,  # wide, so that texts differ
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """Words above whole, other words in single characters."""
    pieces = dict.fromkeys([*SPECIAL, *_CHARACTERS, *(f"##{character}" for character in _CHARACTERS), *WORDS])
    tokenizer = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
