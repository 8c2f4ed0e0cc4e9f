"""Lexical students: TF-IDF of token n-grams through a small network (Luxical, arXiv:2512.09015).

The rows of n-grams, which are the network's first layer, start at random as there, or from a teacher's vectors of
single tokens. Then longer n-grams, whose tokens are counted too, start at 0, and the network adds nothing at first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from retrieval_kd.bag_student import BagOptions, BagStudent, is_bag, load_bags, load_teacher_tower, save_start
from retrieval_kd.lexical_embedding import LexicalEmbedding
from retrieval_kd.ngrams import count_ngrams, ngram_keys
from retrieval_kd.static_start import piece_vectors, plain_tokenizer, table_tokens
from retrieval_kd.tables import Positive, Precision
from retrieval_kd.types import InputError

TEACHER = "bi_encoder"  # the kind that reads a saved student
VECTORS = "dense"  # those of a text
SEARCHES = True  # its vectors can be indexed
FORMS = ("fp32", "int8")  # of its query tower, which is a table


class Options(BagOptions):
    """Tokenizer and teacher, the n-grams, and the network."""

    start: Literal["random", "teacher"] = "random"  # of the rows; teacher: with a residual network, if any
    longest: Positive = 5  # n of the longest n-grams
    at_least: Positive = 2  # times that an n-gram comes in the documents
    at_most: Positive = 2_000_000  # n-grams, the most frequent ones
    hidden: tuple[Positive, ...] = (96, 3072, 3072)  # widths of the hidden layers; the first is that of random rows
    dimension: Positive = 192  # of a text's vector; from a teacher, the teacher's


def reads_collection(options: Options) -> bool:
    """Whether n-grams are to be counted: not where the model has them."""
    return not is_bag(options)


def begin(options: Options, documents: Sequence[str], folder: Path, precision: Precision = "fp32") -> None:
    """Count the n-grams of the documents, make the network and save it."""
    towers = load_teacher_tower(options)
    first: Any = towers.document[0]
    plain = plain_tokenizer(first.tokenizer, first.max_seq_length)
    texts = [np.array(one.ids, np.int64) for one in plain.encode_batch(list(documents), add_special_tokens=False)]
    keys, counts, pieces = count_ngrams(texts, options.longest, options.at_least, options.at_most)
    taught = options.start == "teacher"
    if taught:  # tokens that no document has may come in a query, and the teacher knows them
        ids, heard = table_tokens(first.tokenizer)
        tokens = ids[heard]
        others = tokens[~np.isin(ngram_keys(tokens, 1)[0], keys)]
        keys = np.concatenate([keys, ngram_keys(others, 1)[0]])
        counts, pieces = np.concatenate([counts, np.ones(len(others), np.int64)]), [*pieces, *others[:, None].tolist()]
        order = np.argsort(keys)
        keys, counts, pieces = keys[order], counts[order], [pieces[place] for place in order]
    if not len(keys):
        raise InputError(f"no n-gram comes {options.at_least} times in the documents; lower student.at_least.")
    width = first.get_embedding_dimension()
    widths = [width, *options.hidden, width] if taught and options.hidden else [width] if taught else []
    widths = widths or [*options.hidden, options.dimension]
    module = LexicalEmbedding(plain, keys, options.longest, widths, taught, first.max_seq_length)
    frequency = torch.from_numpy(np.log(counts.sum()) - np.log(counts)).float()[:, None]  # Luxical's, not of documents
    with torch.no_grad():
        if taught:
            single = torch.tensor([len(piece) == 1 for piece in pieces])
            vectors = torch.from_numpy(piece_vectors(towers, [piece for piece in pieces if len(piece) == 1], precision))
            nn.init.zeros_(module.table.weight)
            module.table.weight[single] = vectors - vectors.mean(0)
            if len(module.layers):
                nn.init.zeros_(module.layers[-1])
        module.table.weight.mul_(frequency)
        if taught:  # a mean length of 1, so that one learning rate suits table and network
            module.table.weight.div_(module.table.weight[single].norm(dim=1).mean())
    save_start(module, folder)


def load(options: Options) -> BagStudent:
    """Load a lexical model."""
    return load_bags(options, LexicalEmbedding)
