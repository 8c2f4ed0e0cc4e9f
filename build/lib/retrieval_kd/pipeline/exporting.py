"""Exported forms of a student that searches: what they are checked against, and what a search takes of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sentence_transformers.base.modules import Normalize

from retrieval_kd.checks import forms_of
from retrieval_kd.data import load_collection
from retrieval_kd.encoder import Encoder, check_index
from retrieval_kd.evaluate.quality import per_query
from retrieval_kd.export import Quality
from retrieval_kd.export_graph import export_graph
from retrieval_kd.export_table import TABLES, export_table
from retrieval_kd.forms import CutVectors, Form, parse_form
from retrieval_kd.index import Vectors, build_index, open_index, read_manifest
from retrieval_kd.pipeline.documents import encode_documents
from retrieval_kd.pipeline.workspace import Workspace
from retrieval_kd.sample import spread
from retrieval_kd.sparse_towers import encode_sparse
from retrieval_kd.teachers.bi_encoder import BiEncoder
from retrieval_kd.towers import Towers
from retrieval_kd.types import SIDES, Collection, Queries, Side

_PLAIN = parse_form("fp32")


@dataclass(frozen=True)
class Served:
    """A query encoder as it is served: what it is called in runs, its function from texts to vectors, and its index."""

    name: str
    encode: Callable[[Sequence[str]], Vectors]
    folder: Path
    index: Path
    engine: str
    parameters: int


def open_served(workspace: Workspace, threads: int) -> list[Served]:
    """The exported query encoders, each with the index that it searches.

    InputError where an index is there that another document tower made.
    """
    folder, indexes = workspace.folder / "served", workspace.folder / "index"
    served = []
    for form in forms_of(workspace.recipe):
        encoder = Encoder.load(folder / form.name, threads)
        check_index(encoder.manifest, read_manifest(indexes / form.index))
        engine = f"{encoder.manifest['runtime']} {form.precision}"
        parameters = encoder.manifest["parameters"]
        name = student_name(form.name)
        served.append(Served(name, encoder.encode, folder / form.name, indexes / form.index, engine, parameters))
    return served


def student_name(form: str) -> str:
    """What a form of the student is called in runs and reports."""
    return "student" if form == "fp32" else f"student-{form}"


def cuts_of(workspace: Workspace) -> dict[str, Form]:
    """The indexes of the student's documents by name, each with a form that cuts them so: uncut, and as others do."""
    return {form.index: form for form in [*forms_of(workspace.recipe), _PLAIN]}


def build_indexes(workspace: Workspace, vectors: Vectors, document_ids: Sequence[str], folder: Path) -> None:
    """Build the index of the documents' vectors, and one for each other way in which the exported forms cut them."""
    component = workspace.recipe.index
    assert component is not None, "of a student that searches"
    identity = workspace.tower_identity("document")
    for name, form in cuts_of(workspace).items():
        cut = CutVectors(vectors, form, unit_length(workspace, "document")) if form.cuts else vectors
        build_index(component, cut, folder / name, document_ids=document_ids, identity=form.identity(identity))


def export_forms(workspace: Workspace, folder: Path) -> dict[str, Any]:
    """Write the query tower in every form into `folder`, and return what the forms' manifests say of their quality."""
    settings, render = workspace.recipe.export, workspace.recipe.student.render
    towers, identities = _towers(workspace), {side: workspace.tower_identity(side) for side in SIDES}
    training = workspace.query_texts("train", render)
    facts: dict[str, Any] = {}
    with _searched(workspace) as (collection, queries, texts, indexes), tempfile.TemporaryDirectory() as traced:
        checked = [*texts[:64], *workspace.document_texts(render)[:8]]
        expected = _quality(_encode(workspace, texts), indexes / "index", queries, collection)
        facts["torch nDCG@10"] = round(expected, 6)
        tower: list[Any] = list(towers.query)
        for form in forms_of(workspace.recipe):
            given: dict[str, Any] = {
                "identity": identities["query"],
                "document_identity": identities["document"],
                "check_texts": checked,
                "vector_tolerance": settings.vector_tolerance,
                "quality": Quality(
                    texts,
                    partial(_quality, index=indexes / form.index, queries=queries, collection=collection),
                    expected,
                    settings.quality_tolerance,
                    {"collection": collection.name, "split": _split(workspace)},
                ),
            }
            if isinstance(tower[0], TABLES):
                manifest = export_table(tower, folder / form.name, form.name, **given)
            else:
                manifest = export_graph(
                    tower,
                    folder / form.name,
                    form.name,
                    prompt=towers.query_prompt,
                    calibration=[training[place] for place in spread(len(training), settings.calibration)],
                    widths=sorted({width for stage in workspace.recipe.stages for width in stage.widths}),
                    top_k=towers.model.max_active_dims if workspace.sparse else None,
                    traced=Path(traced),
                    **given,
                )
            facts[f"{form.name} nDCG@10"] = manifest["quality"]["ndcg_10"]
    return facts


def _split(workspace: Workspace) -> str:
    settings = workspace.recipe.export
    return workspace.recipe.data.test if settings.collection is None else settings.split


@contextmanager
def _searched(workspace: Workspace) -> Iterator[tuple[Collection, Queries, Sequence[str], Path]]:
    """What quality is measured on: a collection, its queries, their texts, and the folder of the documents' indexes."""
    settings, render = workspace.recipe.export, workspace.recipe.student.render
    if settings.collection is None:
        texts = workspace.query_texts("test", render)
        yield workspace.collection, workspace.test_queries, texts, workspace.folder / "index"
        return
    collection = load_collection(settings.collection, [settings.split])
    queries, name = collection.split(settings.split), render.query_names[0].replace("{split}", settings.split)
    with tempfile.TemporaryDirectory(prefix="rkd-") as scratch:
        vectors = encode_documents(workspace, collection.document_texts(render.document))
        build_indexes(workspace, vectors, collection.document_ids, Path(scratch))
        yield collection, queries, collection.query_texts(queries, name), Path(scratch)


def _quality(vectors: Vectors, index: Path, queries: Queries, collection: Collection) -> float:
    """Mean nDCG@10 of a search with the queries' vectors."""
    hits = open_index(index).search(vectors, 10)
    return float(per_query(hits, queries, collection.document_ids, ["nDCG@10"])["nDCG@10"].mean())


def _encode(workspace: Workspace, texts: Sequence[str]) -> Vectors:
    """The queries' vectors by torch in fp32."""
    towers = _towers(workspace)
    rendered = towers.render(texts, "query")
    if workspace.sparse:
        return encode_sparse(towers, rendered, "query", "fp32")
    return BiEncoder(towers, "fp32").embed(rendered, "query")


def _towers(workspace: Workspace) -> Towers:
    if workspace.sparse:
        return workspace.sparse_towers
    student = workspace.trained
    assert isinstance(student, BiEncoder)
    return student.towers


def unit_length(workspace: Workspace, side: Side) -> bool:
    """Whether a dense tower ends by giving vectors unit length."""
    return isinstance(list(_towers(workspace).side(side))[-1], Normalize)
