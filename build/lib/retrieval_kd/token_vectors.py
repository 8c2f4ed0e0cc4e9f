"""Late interaction: models that give a text one vector a token; a score is their MaxSim.

Models are Sentence Transformers' MultiVectorEncoder, which reads its own folders, PyLate's, Stanford
ColBERT checkpoints, and any transformer, which then gets a new projection. MaxSim, the sum over a
query's tokens of the largest product with a token of the document, is its `similarity`: masked
tokens never count, products of 0 do.
Source: Khattab and Zaharia 2020, arXiv:2004.12832.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.multi_vector_encoder.modules import BaseTokenPooling
from tokenizers import AddedToken
from torch import nn

from retrieval_kd.files import read_json
from retrieval_kd.tables import Precision
from retrieval_kd.towers import describe
from retrieval_kd.types import InputError
from retrieval_kd.weights import locate_model


def load_token_encoder(
    name: str,
    revision: str | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
) -> tuple[Any, bool]:
    """Load a late-interaction model, and say whether it has a projection of its own or a new, random one.

    Prompts default to those of the model: a ColBERT checkpoint's markers ([Q] and [D], or
    [unused0] and [unused1]) are such prompts, each read as one token.
    """
    folder = locate_model(name, revision)
    model: Any = MultiVectorEncoder(str(folder), device="cpu", local_files_only=True)
    model.float().eval()  # files may hold halves, and `precision` says what products are computed in
    modules = list(model)
    if not isinstance(modules[0], Transformer) or any(isinstance(module, BaseTokenPooling) for module in modules):
        kinds = ", ".join(type(module).__name__ for module in modules)
        raise InputError(
            f"model {name!r} is made of {kinds}; a late-interaction model here is one transformer, "
            "followed by modules that keep every token."
        )
    for side, prompt in (("query", query_prompt), ("document", document_prompt)):
        if prompt is not None:
            model.prompts[side] = prompt
            _keep_whole(modules[0].tokenizer, prompt)
    return model, _has_projection(folder)


def set_query_length(
    model: Any,
    query_length: int | None = None,
    query_expansion: bool | None = None,
    attend_to_expansion_tokens: bool | None = None,
) -> None:
    """Set how many tokens a query has: at most `query_length`, or with expansion that number exactly.

    Expansion fills queries up with [MASK] tokens, which are scored like others, and which the
    transformer attends to or not. What is None stays as the model has it.
    """
    first = model[0]
    current = first.query_expansion
    if query_expansion is None:
        query_expansion = current is not None
    if not query_expansion:
        if attend_to_expansion_tokens is not None:
            raise InputError("student.attend_to_expansion_tokens has no meaning without student.query_expansion.")
        first.query_expansion = None
        first.query_length = query_length or first.query_length or (current["length"] if current else None)
        return
    attend = current is not None and current["attend"]
    if attend_to_expansion_tokens is not None:
        attend = attend_to_expansion_tokens
    if current is not None and query_length is None:
        first.query_expansion = {**current, "attend": attend}
        return
    length = query_length or first.query_length
    if length is None:
        raise InputError("student.query_expansion fills queries up to student.query_length tokens; set that too.")
    first.query_length = None
    first.query_expansion = {"strategy": "fixed", "length": length, "attend": attend}


def describe_token_encoder(model: Any, precision: Precision) -> dict[str, Any]:
    """Everything that decides its scores, other than the rendered texts."""
    first = model[0]
    return {
        **describe(nn.ModuleList(model), precision),
        "query_length": first.query_length,
        "document_length": first.document_length,
        "query_expansion": first.query_expansion,
        "similarity": model.similarity_fn_name,
    }


def _keep_whole(tokenizer: Any, prompt: str) -> None:
    """Let a marker at the head of a prompt, such as [unused0], be the one token that the vocabulary has for it."""
    marker = prompt.split(maxsplit=1)[0] if prompt.split() else ""
    if marker in tokenizer.get_vocab() and tokenizer.tokenize(marker) != [marker]:
        tokenizer.add_tokens([AddedToken(marker, normalized=False, special=True)], special_tokens=True)


def _has_projection(folder: Path) -> bool:
    """Whether the files hold a projection, or the loader had to make one up."""
    if (folder / "modules.json").exists():
        return any(module["type"].rpartition(".")[2] == "Dense" for module in read_json(folder / "modules.json"))
    return "HF_ColBERT" in (read_json(folder / "config.json").get("architectures") or [])
