"""The vectors of a large collection: encoded in shards that a killed run keeps, and read memory-mapped.

A shard is one .npy file of the vectors of consecutive documents, in 32 or 16 bits, or as 8-bit codes with a scale for
each document. Its name says what went into it (who encoded, the texts, the form), so that a shard is encoded again if
and only if that changed, whatever else of the collection did. `vectors.json` is written last and names them all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.files import atomic, fingerprint, forget, hash_texts, read_json, write_json
from retrieval_kd.progress import progress
from retrieval_kd.types import InputError

Form = Literal["fp32", "fp16", "int8"]
FORMS: tuple[Form, ...] = get_args(Form)
SHARD = 2**14  # documents of a shard, which is what a killed run loses at most
CHUNK = 2**11  # documents encoded at once
MANIFEST, FORMAT = "vectors.json", 1
_LEVELS = 127  # of an 8-bit code, above and below 0

Encode = Callable[[Sequence[str]], NDArray[np.float32]]


class CorpusVectors:
    """The vectors (N, D) of a collection, memory-mapped; indexing gives float32, whatever the form.

    `vectors[a:b]`, `vectors[row]` and `vectors[rows]` read no more than they return, and keep nothing in memory.
    """

    def __init__(self, folder: Path) -> None:
        """Open what `encode_corpus` made; InputError where a shard is gone or damaged."""
        manifest = read_json(folder / MANIFEST)
        if manifest["format"] != FORMAT:
            raise InputError(f"{folder / MANIFEST}: format {manifest['format']!r} is unknown; encode the corpus again.")
        self.form: Form = manifest["form"]
        self.shape: tuple[int, int] = (manifest["documents"], manifest["width"])
        self.ndim = 2
        self._shards = [_open(folder / name, self.form, self.shape[1]) for name in manifest["shards"]]
        self._starts = np.cumsum([0, *map(len, self._shards)])
        if self._starts[-1] != self.shape[0]:
            raise InputError(
                f"{folder}: its shards hold {self._starts[-1]} vectors and {MANIFEST} says {self.shape[0]}; "
                "encode the corpus again."
            )

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice | NDArray[np.int64]) -> NDArray[np.float32]:
        if isinstance(key, int | np.integer):
            row: NDArray[np.float32] = self[int(key) : int(key) + 1][0]
            return row
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            assert step == 1, "consecutive vectors"
            key = np.arange(start, max(start, stop))
        rows = np.asarray(key, np.int64)
        found = np.empty((len(rows), self.shape[1]), np.float32)
        for number in np.unique(np.searchsorted(self._starts, rows, side="right") - 1):
            here = (rows >= self._starts[number]) & (rows < self._starts[number + 1])
            shard = self._shards[number]
            found[here] = _decode(shard[rows[here] - self._starts[number]], self.form)
            forget(shard)
        return found


def encode_corpus(
    folder: Path, texts: Sequence[str], encode: Encode, *, form: Form, identity: Mapping[str, Any], shard: int = SHARD
) -> CorpusVectors:
    """Encode the texts into shards in `folder`, those that it lacks, and open them all.

    Every shard is on the disk before the next begins, so that a killed run goes on where it was. `identity` describes
    who encodes. Shards of other texts or of another encoder are removed at the end. Raises InputError for vectors that
    are no numbers, or too large for 16 bits.
    """
    names = shard_names(texts, form=form, identity=identity, shard=shard)
    there = _there(folder, names)
    with progress("encode documents", len(texts)) as advance:
        for number, name in enumerate(names):
            block = texts[number * shard : (number + 1) * shard]
            if name in there:
                advance(len(block))
                continue
            pieces = []
            for start in range(0, len(block), CHUNK):
                pieces.append(_encode(encode(block[start : start + CHUNK]), form))
                advance(len(pieces[-1]))
            with atomic(folder / name) as scratch, scratch.open("wb") as file:
                np.save(file, np.concatenate(pieces))
    first = np.load(folder / names[0], mmap_mode="r")
    width = first.dtype["vector"].shape[0] if form == "int8" else first.shape[1]
    facts = {"format": FORMAT, "form": form, "documents": len(texts), "width": width, "identity": identity}
    write_json(folder / MANIFEST, {**facts, "shards": names})
    for path in folder.glob("*.npy"):
        if path.name not in names:
            path.unlink()
    return CorpusVectors(folder)


def shard_names(texts: Sequence[str], *, form: Form, identity: Mapping[str, Any], shard: int = SHARD) -> list[str]:
    """The names of the shards of these texts, which say what goes into each."""
    if not texts:
        raise InputError("the collection has no documents, so there is nothing to encode.")
    who = fingerprint(identity)
    blocks = (texts[start : start + shard] for start in range(0, len(texts), shard))
    keys = [fingerprint([FORMAT, who, form, hash_texts(block)]) for block in blocks]
    return [f"{number:05d}-{key}.npy" for number, key in enumerate(keys)]


def encoded(folder: Path, texts: Sequence[str], *, form: Form, identity: Mapping[str, Any], shard: int = SHARD) -> int:
    """How many of the texts have their vectors in `folder` already."""
    names = shard_names(texts, form=form, identity=identity, shard=shard)
    there = _there(folder, names)
    return sum(len(texts[number * shard : (number + 1) * shard]) for number, name in enumerate(names) if name in there)


def bytes_a_vector(form: Form, width: int) -> int:
    """Bytes on disk of a vector."""
    return {"fp32": 4 * width, "fp16": 2 * width, "int8": width + 4}[form]


def check_disk(folder: Path, needed: int, what: str, remedy: str) -> None:
    """InputError unless the disk of `folder`, which need not exist, has `needed` bytes free for `what`."""
    free = disk_free(folder)
    if needed > free:
        raise InputError(
            f"{folder}: {what} take {needed / 1e9:,.3g} GB, and its disk has {free / 1e9:,.3g} GB free. "
            f"Free some space, give a folder on a larger disk, or {remedy}."
        )


def disk_free(folder: Path) -> int:
    """Bytes free on the disk of a folder, which need not exist yet."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def _there(folder: Path, names: Sequence[str]) -> set[str]:
    return {name for name in names if (folder / name).exists()}


def _row(width: int) -> np.dtype[Any]:
    """A row of an 8-bit shard: its scale, and the codes that are multiplied by it."""
    return np.dtype([("scale", "<f4"), ("vector", "i1", (width,))])


def _encode(vectors: NDArray[np.float32], form: Form) -> NDArray[Any]:
    """Vectors (n, D) as a shard holds them."""
    if form == "int8":
        scale = np.abs(vectors).max(axis=1, initial=0) / np.float32(_LEVELS)
        rows = np.empty(len(vectors), _row(vectors.shape[1]))
        rows["scale"] = np.where(scale == 0, 1, scale)
        _check(rows["scale"])
        rows["vector"] = np.rint(vectors / rows["scale"][:, None]).astype(np.int8)
        return rows
    with np.errstate(over="ignore"):
        kept = vectors.astype(np.float16 if form == "fp16" else np.float32)
    _check(kept)
    return kept


def _check(values: NDArray[Any]) -> None:
    if not np.isfinite(values).all():
        raise InputError(
            "the vectors of some documents are not finite numbers of this form: the student diverged, or its vectors "
            'are too large for 16 bits and need corpus.vectors = "fp32".'
        )


def _decode(shard: NDArray[Any], form: Form) -> NDArray[np.float32]:
    if form == "int8":
        return np.asarray(shard["vector"] * shard["scale"][:, None], np.float32)
    return np.asarray(shard, np.float32)


def _open(path: Path, form: Form, width: int) -> NDArray[Any]:
    """A shard, memory-mapped."""
    try:
        shard: NDArray[Any] = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove it and encode the corpus again.") from None
    kinds = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "int8": _row(width)}
    if shard.dtype != kinds[form] or shard.shape[1:] != (() if form == "int8" else (width,)):
        raise InputError(f"{path} holds other vectors than {MANIFEST} says; remove it and encode the corpus again.")
    return shard
