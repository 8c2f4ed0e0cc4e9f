"""Static students: a text's vector is the mean of its tokens' rows in a table, with unit length.

The table starts from a teacher's vectors, each token read by itself (Model2Vec) or in the collection's sentences
(SWE). What is saved is StaticEmbedding of Sentence Transformers, the weights of the tokens multiplied into their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from retrieval_kd.bag_student import BagOptions, BagStudent, is_bag, load_bags, load_teacher_tower, save_start
from retrieval_kd.lexical_start import inverse_frequencies
from retrieval_kd.static_start import (
    piece_vectors,
    plain_tokenizer,
    principal_axes,
    sentence_states,
    table_tokens,
    zipf_weights,
)
from retrieval_kd.tables import Positive, Precision

TEACHER = "bi_encoder"  # the kind that reads a saved student
VECTORS = "dense"  # those of a text
SEARCHES = True  # its vectors can be indexed
FORMS = ("fp32", "int8")  # of its query tower, which is a table


class Options(BagOptions):
    """The teacher, how its vectors become rows, and perhaps a frozen document tower."""

    start: Literal["tokens", "sentences"] = "tokens"  # sentences: a token's mean state in the collection's documents
    dimension: Positive | None = None  # of a PCA of tokens or of sentences; absent: the teacher's coordinates, centred
    drop: Annotated[int, Field(ge=0)] = 0  # so many principal components, the first ones, are left out
    weights: Literal["none", "zipf", "idf"] = "none"  # of tokens: none; by their places; by the documents with them


def reads_collection(options: Options) -> bool:
    """Whether the table is to be made: not where the model is one."""
    return not is_bag(options)


def begin(options: Options, documents: Sequence[str], folder: Path, precision: Precision = "fp32") -> None:
    """Make the table of the teacher's vectors and save it."""
    towers = load_teacher_tower(options)
    first: Any = towers.document[0]
    plain = plain_tokenizer(first.tokenizer, first.max_seq_length)
    ids, heard = table_tokens(first.tokenizer)
    table = np.zeros((plain.get_vocab_size(), first.get_embedding_dimension()), np.float32)
    table[ids] = piece_vectors(towers, ids[:, None].tolist(), precision)
    fitted = table[ids]
    if options.start == "sentences":
        table, fitted = sentence_states(towers, documents, table, precision)
    rows: NDArray[Any] = table[ids] - fitted.mean(0)
    if options.dimension is not None:
        rows = rows @ principal_axes(fitted, options.dimension, options.drop)
    if options.weights == "zipf":
        rows = rows * zipf_weights(len(ids))[:, None]
    elif options.weights == "idf":
        read = (one.ids for one in plain.encode_batch(list(documents), add_special_tokens=False))
        rows = rows * inverse_frequencies(read, len(table))[ids, None]
    whole = np.zeros((len(table), rows.shape[1]), np.float32)
    whole[ids] = rows * heard[:, None]
    save_start(StaticEmbedding(plain, embedding_weights=torch.from_numpy(whole)), folder)


def load(options: Options) -> BagStudent:
    """Load a static model, one that `begin` made or a published one."""
    return load_bags(options, StaticEmbedding)
