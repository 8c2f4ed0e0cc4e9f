"""Combinations that cannot work fail when the recipe is read; and what stages read."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from retrieval_kd.checks import Needs, check, forms_of, index_of
from retrieval_kd.recipe import Recipe
from retrieval_kd.tables import parse
from retrieval_kd.types import InputError

TEACHERS = [
    {"name": "ce", "kind": "cross_encoder", "model": "m"},
    {"name": "two", "kind": "cross_encoder", "model": "n"},
    {"name": "minilm", "kind": "bi_encoder", "model": "m"},
]
LIVE = [
    {"name": "colbert", "kind": "late_interaction", "model": "m"},
    {"name": "tutor", "kind": "dense", "model": "m", "trainable": True},
]


def recipe(*stages: dict[str, Any], **changes: Any) -> Recipe:
    table = {
        "data": {"collection": "pydocs"},
        "teachers": TEACHERS,
        "live": LIVE,
        "student": {"kind": "dense", "model": "m"},
        "stages": [{"steps": 1, **stage} for stage in stages],
    }
    return parse(Recipe, {**table, **changes}, "recipe.toml")


def needs(*stages: dict[str, Any], **changes: Any) -> Needs:
    return check(recipe(*stages, **changes))[0]


def terms(*terms_: dict[str, Any], **stage: Any) -> dict[str, Any]:
    return {"terms": list(terms_), **stage}


KL = {"loss": "kl", "teachers": ["ce"]}
NCE = {"loss": "info_nce"}


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"loss": "margin_mse"}, "margin_mse compares with teachers; name them"),
        ({**NCE, "teachers": ["ce"]}, "info_nce learns from labels alone; it takes no `teachers`"),
        ({"loss": "embedding_mse"}, "exactly one teacher, not 0"),
        ({"loss": "embedding_mse", "teachers": ["ce", "two"]}, "exactly one teacher, not 2"),
        ({"loss": "embedding_mse", "teachers": ["ce"]}, "teacher 'ce' has no vectors to imitate; use a bi_encoder"),
        ({**KL, "relation": "gram"}, "teacher 'ce' has no vectors to imitate"),
        ({**NCE, "relation": "cross"}, "exactly one teacher, not 0"),
        ({**KL, "teachers": ["minilm"], "relation": "cross"}, "relation 'cross' has positives and no teacher scores"),
        ({"loss": "pld", "teachers": ["minilm"], "relation": "gram"}, "relation 'gram' has no positives"),
        ({**KL, "queue": 10}, "queue belongs to relation 'cross'"),
        (
            {**KL, "teachers": ["minilm"], "relation": "gram", "guide": {"teacher": "minilm"}},
            "guide denies negatives; there are none but with relations 'own' and 'batch'",
        ),
        ({**KL, "relation": "batch"}, "kl with relation 'batch' needs scores of teacher 'ce' for other"),
        (
            {"loss": "mse", "teachers": ["ce"], "relation": "batch", "missing": "zero_probability"},
            "mse compares scores, not probabilities",
        ),
        (
            {"loss": "margin_mse", "teachers": ["minilm"], "relation": "batch"},
            "margin_mse takes the first column for the positive",
        ),
        ({"loss": "margin_mse", "teachers": ["ce"], "temperature": 2.0}, "margin_mse has no temperature; use `scale`"),
        ({**NCE, "teacher_temperature": 2.0}, "info_nce has no teacher_temperature"),
        ({**NCE, "normalize": "minmax"}, "change teacher scores; info_nce"),
        ({"loss": "embedding_mse", "teachers": ["minilm"], "scale": 2.0}, "change teacher scores; embedding_mse"),
        ({**KL, "teachers": ["ce", "two"]}, "scores of 2 teachers are averaged as they are"),
        ({**KL, "select": {}}, "select chooses among teachers; name at least two"),
        ({**KL, "layers": {}}, "layers are those of one live teacher"),
        ({**KL, "detach": False}, "stored scores cannot be trained"),
        ({**NCE, "of": "colbert"}, "of = 'colbert' learns, so it must be a live teacher with trainable = true"),
        ({**NCE, "options": {"combin": "each"}}, "did you mean 'combine'"),
        ({"loss": "ranknett", "teachers": ["ce"]}, "there is no loss 'ranknett'; did you mean 'ranknet'?"),
        ({**KL, "teachers": ["minilmm"]}, "uses teacher 'minilmm', which is not defined; did you mean 'minilm'?"),
    ],
)
def test_terms_that_cannot_work(term: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        needs(terms(NCE), terms(NCE, term))
    assert message in str(raised.value)
    if "no loss" not in message and "not defined" not in message:
        assert str(raised.value).startswith("stages[1].terms[1]: ")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"batching": "cluster"}, "batching 'cluster' needs cluster_by"),
        ({"batching": "cluster", "cluster_by": "ce"}, "batching 'cluster' needs cluster_by"),
        ({"filter": {"student_rank": [2, 15]}}, "filter reads the student's ranks; add mine"),
        ({"filter": {"teacher": "colbert"}}, "filter uses teacher 'colbert', whose scores are not stored"),
        ({"deny": {"teacher": "colbert"}}, "deny uses teacher 'colbert', whose scores are not stored"),
        ({"mine": {"by": "nobody"}}, "stages[0] uses teacher 'nobody', which is not defined"),
        ({"mine": {"by": "snapshot"}}, "mine.by is 'snapshot', which cannot search"),
        ({"average": {"stages": [0]}}, "average.stages names a stage that is not before it"),
        ({"regularizers": [{"name": "flops", "weight": 0.1}]}, "flops counts active vocabulary terms; a dense"),
        ({"regularizers": [{"name": "flop", "weight": 0.1}]}, "did you mean 'flops'"),
    ],
)
def test_stages_that_cannot_work(stage: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=r"stages\[0\]|did you mean") as raised:
        needs(terms(NCE, **stage))
    assert message in str(raised.value)


def test_the_first_stage_has_no_snapshot() -> None:
    snapshot = {"loss": "kl", "teachers": ["snapshot"]}
    with pytest.raises(InputError, match="the first stage has no snapshot"):
        needs(terms(snapshot))
    assert needs(terms(NCE), terms(snapshot)).candidates


def test_a_cross_encoder_makes_no_vectors() -> None:
    student = {"kind": "cross_encoder", "model": "m"}
    for term in ({**NCE, "relation": "batch"}, {"loss": "embedding_mse", "teachers": ["minilm"]}):
        with pytest.raises(InputError, match="makes no vectors, which"):
            needs(terms(term), student=student)
    with pytest.raises(InputError, match="a cross_encoder student cannot search"):
        needs(terms(NCE, mine={"by": "student"}), student=student)


def test_unbounded_regression_on_cosines() -> None:
    student = {"kind": "dense", "model": "m", "normalize": True}
    margin = {"loss": "margin_mse", "teachers": ["ce"]}
    with pytest.raises(InputError, match="the student's scores are cosines"):
        needs(terms(margin), student=student)
    assert needs(terms({**margin, "normalize": "minmax"}), student=student).candidates
    assert needs(terms(margin), student={**student, "normalize": False}).candidates


def test_what_re_ranks_is_not_indexed() -> None:
    student = {"kind": "late_interaction", "model": "m"}
    with pytest.raises(InputError, match=r"cannot be indexed; it re-ranks the candidates\. Leave \[index\] out"):
        needs(terms(NCE), student=student, index={"kind": "faiss"})
    assert needs(terms(NCE), student=student).candidates
    with pytest.raises(InputError, match="widths cuts vectors whose products are scores; a late_interaction has none"):
        needs(terms(NCE, widths=[8]), student=student)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({**KL, "others_only": True}, "others_only belongs to relation 'batch'"),
        (
            {"loss": "embedding_mse", "teachers": ["minilm"], "row_weights": "teacher_confidence"},
            "row_weights go by scores",
        ),
        ({"loss": "embedding_mse", "teachers": ["tutor"], "detach": False}, "trains the teacher through the scores"),
    ],
)
def test_what_would_be_ignored_is_refused(term: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        needs(terms(term))


def test_widths_go_without_what_remembers_or_has_layers() -> None:
    queued = {**NCE, "relation": "cross", "teachers": ["minilm"], "queue": 4}
    layered = {**KL, "teachers": ["tutor"], "relation": "batch", "layers": {}}
    selected = {**KL, "teachers": ["ce", "two"], "normalize": "minmax", "select": {}}
    for term in (queued, layered, selected):
        assert needs(terms(term))
        with pytest.raises(InputError, match="go without `widths`"):
            needs(terms(term, widths=[8]))


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("int8-64", {"student": {"kind": "splade", "model": "m"}}, "'int8-64' cuts dense vectors; those of a splade"),
        ("fp32-binary", {"index": {"kind": "milvus"}}, "leaves signs, which index kind 'milvus' does not take"),
        (
            "int8",
            {"student": {"kind": "inference_free", "model": "m"}},
            "student has no form 'int8'; it is a table, in ",
        ),
        ("openvino-fp32", {"student": {"kind": "static", "model": "m"}}, "has no form .* in fp32 or int8"),
    ],
)
def test_forms_that_a_student_or_its_index_has_not(form: str, changes: dict[str, Any], message: str) -> None:
    stage = terms(NCE)
    assert needs(stage, export={"forms": ["fp32"]}, **changes)
    with pytest.raises(InputError, match=message):
        needs(stage, export={"forms": ["fp32", form]}, **changes)


@pytest.mark.parametrize(
    ("kind", "forms"),
    [
        ("dense", ["fp32", "int8"]),
        ("static", ["fp32", "int8"]),
        ("splade", ["fp32", "int8"]),
        ("inference_free", ["fp32"]),
    ],
)
def test_forms_where_none_are_named(kind: str, forms: list[str]) -> None:
    """Those that the student has: a recipe that names none is not refused for it."""
    silent = recipe(terms(NCE), student={"kind": kind, "model": "m"})
    assert [form.name for form in forms_of(silent)] == forms
    assert check(silent)


def test_forms_that_lack_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "nncf" else find(name, *rest))
    assert needs(terms(NCE), export={"forms": ["openvino-fp32"]})
    with pytest.raises(InputError, match=r"'nncf'.*retrieval-kd\[openvino\]"):
        needs(terms(NCE), export={"forms": ["openvino-int8"]})


def test_sources_are_asked_only_for_stages_without_candidates_of_their_own() -> None:
    mined = terms(KL, mine={"by": "minilm"})
    assert (needs(mined).candidates, needs(mined).sources) == (True, False)
    assert needs(mined, terms(KL)).sources
    imitate = terms({"loss": "embedding_mse", "teachers": ["minilm"]})
    assert (needs(mined, imitate).candidates, needs(mined, imitate).sources) == (True, False)
    selected = terms({**KL, "teachers": ["ce", "two"], "normalize": "minmax", "select": {}})
    assert needs(selected).labels  # its reward is judged


def test_names_are_unique_and_not_taken() -> None:
    for name, message in (("minilm", "two teachers are called 'minilm'"), ("student", "which names the student here")):
        with pytest.raises(InputError, match=message):
            recipe(terms(NCE), live=[{"name": name, "kind": "dense", "model": "m"}])


def test_an_imported_teacher_reads_nothing() -> None:
    teacher = {"name": "file", "kind": "imported", "file": "scores.trec", "layout": "trec"}
    assert check(recipe(terms(NCE), teachers=[teacher]))
    with pytest.raises(InputError, match="teacher 'file' judged ids and reads no text here"):
        check(recipe(terms(NCE), teachers=[{**teacher, "render": {"query": "rewrite"}}]))


def test_what_is_doubtful_is_a_warning() -> None:
    _, warnings = check(recipe(terms({**KL, "interpolate": {}})))
    assert warnings == [
        "stages[0].terms[0]: interpolate mixes teacher and student scores, whose scales may differ; normalize."
    ]
    assert not check(recipe(terms({**KL, "interpolate": {}, "normalize": "zscore"})))[1]


def test_what_stages_need() -> None:
    imitate = {"loss": "embedding_mse", "teachers": ["minilm"]}
    found = needs(terms(imitate), terms({**imitate, "side": "document"}))
    assert (found.candidates, found.documents, found.labels) == (False, True, False)
    assert (found.query_vectors, found.document_vectors) == ({"minilm"}, {"minilm"})
    assert not needs(terms(imitate)).documents
    assert needs(terms(NCE)).labels
    assert needs(terms(NCE)).candidates
    assert not needs(terms({**NCE, "relation": "cross", "teachers": ["minilm"]})).labels
    full = needs(terms({**KL, "teachers": ["minilm"], "relation": "batch"}))
    assert (full.candidates, full.query_vectors, full.document_vectors) == (True, {"minilm"}, {"minilm"})
    assert needs(terms({**KL, "teachers": ["colbert"], "relation": "batch"})).live == {"colbert"}
    assert needs(terms({**NCE, "of": "tutor"})).live == {"tutor"}
    assert needs(terms(NCE, batching="cluster", cluster_by="minilm")).query_vectors == {"minilm"}
    assert needs(terms(KL, deny={"teacher": "ce"})).labels
    assert not needs(terms(KL, deny={"teacher": "ce", "max_score": 0.5})).labels
    guided = {**NCE, "relation": "batch", "guide": {"teacher": "minilm"}}
    assert needs(terms(guided)).query_vectors == needs(terms(guided)).document_vectors == {"minilm"}
    assert needs(terms({**guided, "guide": {"teacher": "colbert"}})).live == {"colbert"}


def test_the_index_goes_by_the_students_vectors() -> None:
    for kind, expected in (("dense", "faiss"), ("splade", "impact"), ("inference_free", "impact")):
        found = index_of(recipe(terms(NCE), student={"kind": kind, "model": "m"}))
        assert found is not None
        assert found.kind == expected
    named = recipe(terms(NCE), index={"kind": "impact", "block": 8}, student={"kind": "splade", "model": "m"})
    assert index_of(named) == named.index
    assert index_of(recipe(terms(NCE), student={"kind": "late_interaction", "model": "m"})) is None
    with pytest.raises(InputError, match=r"'impact' does not take dense vectors.* set index\.kind = 'faiss', or leave"):
        needs(terms(NCE), index={"kind": "impact"})


def test_penalties_need_what_they_penalise() -> None:
    student = {"kind": "splade", "model": "m"}
    imitate = {"loss": "embedding_mse", "teachers": ["minilm"]}
    flops = {"name": "flops", "weight": 1e-3}
    for side in ("document", "both"):
        with pytest.raises(InputError, match=r"regularizers\[0\] penalises documents, of which no term reads any"):
            needs(terms({**imitate, "side": "query"}, regularizers=[{**flops, "side": side}]), student=student)
    needs(terms({**imitate, "side": "query"}, regularizers=[{**flops, "side": "query"}]), student=student)
    placed = {"regularizers": [{**flops, "by_place": True}]}
    with pytest.raises(InputError, match=r"by_place goes by .* of which this stage has none"):
        needs(terms({**imitate, "side": "document"}, **placed), student=student)
    assert needs(terms(NCE, **placed), student=student).sources


def test_a_hybrid_needs_a_student_that_searches_and_a_train_split_or_a_weight() -> None:
    colbert = {"kind": "late_interaction", "model": "m"}
    with pytest.raises(InputError, match="does not search, so it is in no hybrid"):
        needs(terms(NCE), student=colbert, evaluation={"hybrid": {"searcher": "bm25"}})
    bare = {"collection": "c", "train": None, "pseudo_queries": {}}
    with pytest.raises(InputError, match=r"train split; name one \(data\.train\), or give hybrid\.weight"):
        needs(terms(NCE), evaluation={"hybrid": {"searcher": "bm25"}}, data=bare)
    needs(terms(NCE), evaluation={"hybrid": {"searcher": "bm25", "weight": 0.1}}, data=bare)
