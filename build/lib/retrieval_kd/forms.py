"""Forms of an exported query encoder: what runs it, in which precision, how wide its vectors are, and whether bits.

A form is one name, `[openvino-]PRECISION[-WIDTH][-binary]`: "int8", "openvino-bf16", "int8-128", "fp32-binary".
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.extras import missing_extra
from retrieval_kd.types import InputError

Runtime = Literal["onnx", "openvino"]
FormPrecision = Literal["fp32", "bf16", "int8", "int8-static"]

_PRECISIONS: dict[Runtime, tuple[FormPrecision, ...]] = {
    "onnx": ("fp32", "int8", "int8-static"),
    "openvino": ("fp32", "bf16", "int8"),
}
_NAME = re.compile(r"(openvino-)?([a-z0-9]+(?:-static)?)(?:-(\d+))?(-binary)?")


@dataclass(frozen=True)
class Form:
    """One form; `width` cuts vectors to their first coordinates (Matryoshka), `binary` leaves their signs."""

    name: str
    runtime: Runtime
    precision: FormPrecision
    width: int | None = None
    binary: bool = False

    @property
    def index(self) -> str:
        """The name of the index that the form searches: documents are cut as queries are."""
        width = f"-{self.width}" if self.width else ""
        return f"index{width}{'-binary' if self.binary else ''}"

    @property
    def cuts(self) -> bool:
        """Whether vectors are not left as they are."""
        return self.width is not None or self.binary

    @property
    def calibrated(self) -> bool:
        """Whether the ranges of activations are taken from texts, once, at export."""
        return self.precision == "int8-static" or (self.runtime, self.precision) == ("openvino", "int8")

    def identity(self, tower: Mapping[str, Any]) -> dict[str, Any]:
        """The identity of a tower whose vectors are cut."""
        cut = {"width": self.width} if self.width else {}
        return {**tower, **cut, **({"binary": True} if self.binary else {})}

    def check_installed(self) -> None:
        """InputError if a package that makes the form is missing."""
        if self.runtime == "openvino":
            for package in ("openvino", *(["nncf"] if self.calibrated else [])):
                if importlib.util.find_spec(package) is None:
                    raise missing_extra(ModuleNotFoundError(name=package))

    def check_width(self, dimension: int) -> None:
        """InputError for a cut that leaves vectors of `dimension` coordinates as they are, or no whole bytes."""
        if self.width is not None and self.width >= dimension:
            raise InputError(
                f"the form {self.name!r} keeps {self.width} coordinates, and the vectors have {dimension}; cut them "
                "shorter, or leave the width out."
            )
        if self.binary and (self.width or dimension) % 8:
            raise InputError(
                f"the form {self.name!r} packs 8 signs a byte, and {self.width or dimension} is no multiple of it."
            )

    def narrow(self, width: int) -> Form:
        """The form whose vectors have `width` coordinates, and which is the same otherwise."""
        runtime = "openvino-" if self.runtime == "openvino" else ""
        return parse_form(f"{runtime}{self.precision}-{width}{'-binary' if self.binary else ''}")

    def cut(self, vectors: NDArray[np.float32], unit: bool) -> NDArray[Any]:
        """Vectors (n, D) as the form has them: (n, width) float32, or their signs packed, (n, width / 8) uint8.

        `unit`: what is cut has unit length again.
        Source: Yamada et al. 2021, arXiv:2106.00882 (binary).
        """
        self.check_width(vectors.shape[1])
        if self.width:
            vectors = cut_width(vectors, self.width, unit)
        return np.packbits(vectors > 0, axis=1) if self.binary else vectors


class CutVectors:
    """Vectors (N, D) that `form` cuts as they are read: what an index takes as an array, though none is in memory."""

    def __init__(self, vectors: Any, form: Form, unit: bool) -> None:
        form.check_width(vectors.shape[1])
        width = form.width or vectors.shape[1]
        self._vectors, self._form, self._unit = vectors, form, unit
        self.shape, self.ndim = (vectors.shape[0], width // 8 if form.binary else width), 2
        self.dtype = np.dtype(np.uint8 if form.binary else np.float32)

    def __getitem__(self, key: Any) -> NDArray[Any]:
        found = self._vectors[key]
        cut = self._form.cut(np.atleast_2d(found), self._unit)
        return cut if found.ndim == 2 else cut[0]


def cut_width(vectors: NDArray[np.float32], width: int, unit: bool) -> NDArray[np.float32]:
    """The first `width` coordinates of vectors (n, D), at unit length again if that is what they had; zero stays zero.

    Source: Kusupati et al. 2022, arXiv:2205.13147 (Matryoshka).
    """
    found = vectors[:, :width]
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12) if unit else found


def parse_form(name: str) -> Form:
    """The form that is called `name`; ValueError for a name that is none."""
    found = _NAME.fullmatch(name)
    runtime: Runtime = "openvino" if found and found[1] else "onnx"
    precision = found[2] if found else ""
    if not found or precision not in _PRECISIONS[runtime] or found[3] == "0":
        known = [*_PRECISIONS["onnx"], *(f"openvino-{one}" for one in _PRECISIONS["openvino"])]
        raise ValueError(
            f"{name!r} is no form; there are {', '.join(known)}, each also cut to its first coordinates (int8-128) "
            "or to their signs (int8-binary, int8-128-binary)"
        )
    return Form(name, runtime, cast(FormPrecision, precision), int(found[3]) if found[3] else None, bool(found[4]))
