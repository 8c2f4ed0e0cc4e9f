"""Write an exported encoder that is the student, or none: the gate that graphs and tables pass alike.

What is written is loaded as it will be served (`retrieval_kd.encoder`) and compared with torch before the folder
appears. `export_graph` and `export_table` say what is written of which student.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.encoder import FORMAT, MANIFEST, Encoder
from retrieval_kd.files import atomic, read_json, sha256, write_json
from retrieval_kd.forms import Form, parse_form
from retrieval_kd.types import InputError

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Quality:
    """What retrieval with a form is compared with: nDCG@10 of torch's query vectors, of which a share may be lost.

    `measure` takes the vectors of `queries`, as `Encoder.encode` gives them; `facts` say what it searches.
    """

    queries: Sequence[str]
    measure: Callable[[Any], float]
    expected: float
    tolerance: float  # relative
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Exported:
    """One form of a query encoder: how its files are made, and what is known of it in torch.

    `write` puts those of fp32 into a folder, which `facts` describe; `convert` turns them into the form's, in place,
    and returns what that changes in the manifest. `expected` are torch's vectors of `texts`, (n, D), or (2, n, D):
    those of texts together, and of each alone.
    """

    form: Form
    facts: Mapping[str, Any]
    texts: Sequence[str]
    expected: Vectors
    write: Callable[[Path], None]
    convert: Callable[[Path], Mapping[str, Any]] | None = None


def parse(form: str) -> Form:
    """The form of this name; InputError if there is none."""
    try:
        return parse_form(form)
    except ValueError as error:
        raise InputError(f"{error}.") from None


def write_checked(exported: Exported, folder: Path, tolerance: float, quality: Quality | None) -> dict[str, Any]:
    """Write a form into `folder` and return its manifest; InputError, and no folder, if it is not the student.

    Of `texts`, together and one by one, no coordinate of fp32 may differ from torch by more than `tolerance`. How far
    another precision is from torch is in the manifest, and whether it retrieves well enough `quality` says.
    """
    form, texts, expected = exported.form, exported.texts, exported.expected
    if not np.isfinite(expected).all():
        raise InputError("the student's own vectors are not finite numbers; its training diverged.")
    with atomic(folder) as scratch:
        scratch.mkdir()
        exported.write(scratch)
        manifest = {"format": FORMAT, "form": "fp32", "precision": "fp32", **exported.facts}
        manifest["dimension"] = expected.shape[-1]
        _describe_files(scratch, manifest)
        vectors = _served_vectors(scratch, texts)
        fp32_error = _max_error(vectors, expected)
        _check_error(vectors, expected, tolerance, folder, texts)
        if exported.convert is not None:
            manifest |= exported.convert(scratch)
            _describe_files(scratch, manifest)
            vectors = _served_vectors(scratch, texts)
            if form.precision == "fp32":
                _check_error(vectors, expected, tolerance, folder, texts)
        cosines = _cosines(vectors, expected)
        manifest |= {"form": form.name, "precision": form.precision}
        manifest["parity"] = {
            "texts": len(texts),
            "tolerance": tolerance,
            "fp32_max_error": fp32_error,
            "max_error": _max_error(vectors, expected),
            "min_cosine": float(cosines.min()),
            "mean_cosine": float(cosines.mean()),
        }
        if form.binary:
            manifest |= {"vectors": "binary"}
            manifest["parity"]["equal_bits"] = float(((vectors > 0) == (expected > 0)).mean())
        write_json(scratch / MANIFEST, manifest)
        if quality is not None:
            manifest["quality"] = _check_quality(Encoder.load(scratch), form, quality, folder)
            write_json(scratch / MANIFEST, manifest)
    return dict(read_json(folder / MANIFEST))


def _check_error(vectors: Vectors, expected: Vectors, tolerance: float, folder: Path, texts: Sequence[str]) -> None:
    """InputError where a coordinate of what is served is further from torch than allowed."""
    error = _max_error(vectors, expected)
    if not error <= tolerance:  # also when it is NaN
        worst = texts[int(np.abs(vectors - expected).max(axis=(0, 2)).argmax())]
        raise InputError(
            f"{folder}: not written, because the exported encoder differs from torch by {error:.2e} in a "
            f"coordinate and {tolerance:.2e} is allowed; it is worst on {worst[:60]!r}. A module "
            "of your own may behave differently when it is exported."
        )


def _check_quality(encoder: Encoder, form: Form, quality: Quality, folder: Path) -> dict[str, Any]:
    """What the manifest says of retrieval with the form; InputError where it loses more than it may."""
    found = quality.measure(encoder.encode(quality.queries))
    change = found / quality.expected - 1 if quality.expected else 0.0
    if change < -quality.tolerance:
        raise InputError(
            f"{folder}: not written, because the form {form.name!r} has nDCG@10 {found:.4f} against "
            f"{quality.expected:.4f} in torch, more than {quality.tolerance:.1%} lost; leave it out of "
            "export.forms, or allow it (export.quality_tolerance)."
        )
    return {
        **quality.facts,
        "queries": len(quality.queries),
        "torch_ndcg_10": round(quality.expected, 6),
        "ndcg_10": round(found, 6),
        "change": round(change, 6),
        "tolerance": quality.tolerance,
    }


def _served_vectors(folder: Path, texts: Sequence[str]) -> Vectors:
    """The vectors of the encoder in `folder`, together and one by one: (2, n, D)."""
    encoder = Encoder.load(folder)
    found = [encoder.encode(texts), *(encoder.encode([text]) for text in texts)]
    if encoder.manifest["vectors"] == "sparse":
        found = [vectors.toarray() for vectors in found]
    return np.stack([found[0], np.concatenate(found[1:])])


def _max_error(vectors: Vectors, expected: Vectors) -> float:
    return float(np.abs(vectors - expected).max())


def _cosines(vectors: Vectors, expected: Vectors) -> Vectors:
    """Cosines of the last axis; 1 where both are zeros, as of a query without any term."""
    norms = np.linalg.norm(vectors, axis=-1) * np.linalg.norm(expected, axis=-1)
    empty = ~vectors.any(-1) & ~expected.any(-1)
    return np.where(empty, 1.0, (vectors * expected).sum(-1) / np.maximum(norms, 1e-12))


def _describe_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Put fingerprints and size of the other files into the manifest, and write it."""
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    manifest["fingerprints"] = {file.name: sha256(file) for file in files}
    manifest["bytes"] = sum(file.stat().st_size for file in files)
    write_json(folder / MANIFEST, manifest)
