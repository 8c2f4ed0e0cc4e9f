"""The shortest recipe that uses a method: teachers named as its roles, a student of a kind that it trains."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from retrieval_kd.methods import read_method
from retrieval_kd.tables import kinds

PLANNED = {"splade", "inference_free", "static", "lexical"}  # student kinds that may not exist yet
ANY_TEACHER = {"first": "scores: any", "second": "scores: any"}  # of a method without roles
KIND_OF = {"scores": "cross_encoder", "preferences": "cross_encoder", "embeddings": "bi_encoder"}


def student_kind(method: Mapping[str, Any], known: set[str]) -> str | None:
    """The first kind that the method trains, of those `known`; a dense one where it trains any."""
    wanted = ["dense" if kind == "any" else kind for kind in method["trains"]]
    return next((kind for kind in wanted if kind in known), None)


def roles_of(method: Mapping[str, Any]) -> dict[str, str]:
    """What each teacher of the minimal recipe gives; two of any where some term chooses among them, else one."""
    if "roles" in method:
        return dict(method["roles"])
    terms = [term for stage in method["recipe"].get("stages", []) for term in stage["terms"]]
    if not any(term.get("teachers") == ["*"] for term in terms):
        return {}
    wanted = 2 if any("select" in term for term in terms) else 1
    return dict(list(ANY_TEACHER.items())[:wanted])


def live_kind(what: str) -> str:
    """The student kind of a live teacher."""
    return "late_interaction" if "dense" not in what and "late_interaction" in what else "dense"


def recipe_text(
    name: str,
    kind: str,
    models: Mapping[str, str],
    *,
    collection: str = "pydocs",
    without: str = "",
    more: str = "",
) -> str:
    """The minimal recipe in TOML; `without` leaves a role out, and `more` stands before the tables."""
    lines = [f'method = "{name}"', more, "[data]", f"collection = {json.dumps(collection)}"]
    for role, what in roles_of(read_method(name)).items():
        gives = what.split(":")[0]
        if role == without:
            continue
        if gives.startswith("live"):
            live = live_kind(what)
            lines += ["[[live]]", f'name = "{role}"', f'kind = "{live}"', f'model = "{models[live]}"']
            lines += ["trainable = true"] if gives == "live, trainable" else []
        else:
            lines += ["[[teachers]]", f'name = "{role}"', f'kind = "{KIND_OF[gives]}"']
            lines += [f'model = "{models[KIND_OF[gives]]}"']
    lines += ["[student]", f'kind = "{kind}"', f'model = "{models[kind]}"']
    return "\n".join(lines) + "\n"


def existing_kinds() -> set[str]:
    """The student kinds of this package."""
    return set(kinds("students"))
