"""Methods as data: every file is whole, passes every check as a recipe, and is changed where a recipe says so."""

from __future__ import annotations

import json
import re
import tomllib
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from minimal import KIND_OF, PLANNED, existing_kinds, recipe_text, roles_of, student_kind
from typer.testing import CliRunner

from retrieval_kd import checks, cli
from retrieval_kd.checks import check
from retrieval_kd.losses import find_loss
from retrieval_kd.methods import FACTS, method_names, method_text, read_method
from retrieval_kd.recipe import Recipe, load_recipe
from retrieval_kd.tables import options
from retrieval_kd.types import InputError

NAMES = method_names()
MODELS = defaultdict(lambda: "m")
OUTPUTS = {"scores", "preferences", "rankings", "embeddings", "generated texts"}
CATALOGUE = [
    "bd_kd",
    "bert_ranker",
    "biolord",
    "colbert_v2",
    "d2llm",
    "disco",
    "distilcse",
    "dse",
    "efficient_splade",
    "fid_kd",
    "gist",
    "inference_free",
    "inference_free_l0",
    "lambda_loss",
    "lead",
    "leaf",
    "luxical",
    "margin_mse",
    "margin_mse_t2",
    "mistral_splade",
    "model2vec",
    "multilingual_mse",
    "pairdistill",
    "pld",
    "potion",
    "prod",
    "rank_distillm",
    "rankdistil",
    "rankgpt",
    "reinforced_multi_teacher",
    "rkd",
    "sinkhorn",
    "splade_pp",
    "splade_v2",
    "splade_v3",
    "swe",
    "syntriever",
    "taid",
    "tas_balanced",
    "tct_colbert",
    "tct_colbert_hn",
    "translate_distill",
]


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def minimal(name: str, **changes: str) -> str:
    kind = student_kind(read_method(name), existing_kinds() | PLANNED)
    assert kind is not None
    return recipe_text(name, kind, MODELS, **changes)


def refused(folder: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, text)
    return str(caught.value)


def test_the_catalogue_is_whole() -> None:
    assert CATALOGUE == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_file_has_all_facts(name: str) -> None:
    method = read_method(name)
    assert set(method) <= {*FACTS, "notes", "roles", "recipe"}
    assert {*FACTS, "notes", "recipe"} <= set(method)
    for key in ("title", "paper", "figures", "notes"):
        assert method[key].strip(), key
    assert re.search(r"\b(19|20)\d\d\b", method["paper"])
    assert re.search(r"arXiv:\d{4}\.\d{5}\b|doi:10\.\d{4,}/\S+|PMLR \d+:\d+", method["paper"])
    assert set(method["needs"]) <= OUTPUTS
    assert set(method["trains"]) <= existing_kinds() | PLANNED | {"any"}
    assert method["trains"]
    assert set(method["recipe"]) <= set(Recipe.model_fields) - {"method", "teachers", "live"}
    assert max(map(len, method_text(name).splitlines())) <= 120


@pytest.mark.parametrize("name", NAMES)
def test_notes_say_which_student_does_not_exist_yet(name: str) -> None:
    """And no longer than it does not."""
    method = read_method(name)
    absent = PLANNED - existing_kinds()
    said = set(re.findall(r"student kind `(\w+)` does not exist yet", method["notes"]))
    assert said == absent & set(method["trains"])


@pytest.mark.parametrize("name", NAMES)
def test_roles_say_what_they_give(name: str) -> None:
    """So that a recipe can be written from them, as these tests do; and each is used by a stage."""
    method = read_method(name)
    for role, what in method.get("roles", {}).items():
        assert what.split(":")[0] in {*KIND_OF, "live", "live, trainable"}, what
        assert f'"{role}"' in json.dumps(method["recipe"]), role


@pytest.mark.parametrize("name", NAMES)
def test_every_method_passes_every_check(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that of a student that does not exist yet, taken for one with vectors and an index."""
    method = read_method(name)
    if student_kind(method, existing_kinds()) is None:
        monkeypatch.setattr(
            checks,
            "kind_module",
            lambda package, _: SimpleNamespace(SEARCHES=True, VECTORS=("dense",) if package == "index" else "dense"),
        )
    recipe = load(tmp_path, minimal(name))
    assert recipe.method == name
    stages = method["recipe"].get("stages", [])
    assert [stage.steps for stage in recipe.stages] == [stage["steps"] for stage in stages]
    assert bool(stages) == (name != "model2vec")
    needs, warnings = check(recipe)
    assert warnings == []
    live = {role for role, what in roles_of(method).items() if what.startswith("live")}
    assert needs.live == live
    assert needs.preferences == ("preferences" in method["needs"])
    vectors = {role for role, what in roles_of(method).items() if what.startswith("embeddings")}
    assert vectors == needs.query_vectors | needs.document_vectors
    told = {name for term in _terms(recipe) for name in (*term.teachers, term.of)} - {"student", "snapshot"}
    other = {stage.cluster_by for stage in recipe.stages} | {stage.mine and stage.mine.by for stage in recipe.stages}
    other |= {term.guide.teacher for term in _terms(recipe) if term.guide}
    assert told | other - {"student", None} == set(roles_of(method))


@pytest.mark.parametrize("name", [name for name in NAMES if student_kind(read_method(name), existing_kinds()) is None])
def test_a_student_that_does_not_exist_yet_is_told(name: str, tmp_path: Path) -> None:
    recipe = load(tmp_path, minimal(name))
    with pytest.raises(InputError, match=rf"there is no students kind '{recipe.student.kind}'"):
        options("students", recipe.student)


def _terms(recipe: Recipe) -> list[Any]:
    return [term for stage in recipe.stages for term in stage.terms]


@pytest.mark.parametrize("name", NAMES)
def test_labels_and_teachers_are_what_the_losses_read(name: str, tmp_path: Path) -> None:
    """A method that needs no teacher output has no term that compares with one, but for the student's own past."""
    recipe = load(tmp_path, minimal(name))
    compares = [
        set(term.teachers) - {"snapshot", "student"}
        for term in _terms(recipe)
        if "teacher" in find_loss(term.loss).needs or term.relation == "cross" or find_loss(term.loss).of == "vectors"
    ]
    guided = any(term.guide for term in _terms(recipe))
    asked = any("preference" in find_loss(term.loss).needs for term in _terms(recipe))
    assert bool(read_method(name)["needs"]) == (any(compares) or guided or asked)


@pytest.mark.parametrize("name", [name for name in NAMES if "roles" in read_method(name)])
def test_missing_roles_are_refused(name: str, tmp_path: Path) -> None:
    roles = read_method(name)["roles"]
    role = list(roles)[-1]
    found = refused(tmp_path, minimal(name, without=role))
    assert f"method '{name}' expects a teacher named '{role}' ({roles[role]})" in found
    others = [f"'{other}'" for other in roles if other != role]
    assert all(other in found for other in others)
    assert others or "the recipe has none." in found


def test_an_unknown_method_gets_the_nearest_name(tmp_path: Path) -> None:
    text = minimal("pld")
    assert "no method 'marginmse'; did you mean 'margin_mse'?" in refused(
        tmp_path, text.replace('"pld"', '"marginmse"')
    )
    assert "no method 'zzz'. `rkd methods` lists them" in refused(tmp_path, text.replace('"pld"', '"zzz"'))


def test_a_method_brings_its_stages(tmp_path: Path) -> None:
    stages = '\n[[stages]]\nsteps = 1\nterms = [{ loss = "info_nce" }]\n'
    assert "`method` brings its stages" in refused(tmp_path, minimal("pld") + stages)
    assert "none is named; did you mean [[stages]]?" in refused(
        tmp_path, minimal("pld").replace('method = "pld"', "") + "\n[stage]\nsteps = 1\n"
    )


def test_the_table_stage_changes_every_stage(tmp_path: Path) -> None:
    before, recipe = load(tmp_path, minimal("prod")), load(tmp_path, minimal("prod") + "\n[stage]\nsteps = 7\n")
    assert [stage.steps for stage in recipe.stages] == [7] * 6
    assert [stage.learning_rate for stage in recipe.stages] == [stage.learning_rate for stage in before.stages]
    assert load(tmp_path, minimal("prod"), "stage.steps=7") == recipe
    one = load(tmp_path, minimal("prod"), "stages.3.steps=9", "stages.3.terms.0.weight=0.25", "stage.steps=7")
    assert [stage.steps for stage in one.stages] == [7, 7, 7, 9, 7, 7]
    assert one.stages[3].terms[0].weight == 0.25
    assert "unknown key 'stages.0.stepz'; did you mean 'steps'?" in refused(
        tmp_path, minimal("pld") + "\n[stage]\nstepz = 7\n"
    )


def test_what_a_recipe_says_itself_holds(tmp_path: Path) -> None:
    text = minimal("colbert_v2")
    assert load(tmp_path, text).candidates.depth == 64
    changed = load(tmp_path, text + 'dim = 16\n[candidates]\nsources = [{ kind = "bm25" }]\ndepth = 10\n')
    assert changed.candidates.depth == 10
    assert changed.student.options == {"model": "m", "document_length": 180, "dim": 16}
    dense = load(tmp_path, recipe_text("pairdistill", "dense", MODELS))
    assert dense.student.kind == "dense"
    fid = load(tmp_path, minimal("fid_kd") + "project = 32\n")
    assert fid.student.options == {"model": "m", "pooling": "mean", "normalize": False, "project": 32}


def test_any_teachers_means_all_of_the_recipe(tmp_path: Path) -> None:
    recipe = load(tmp_path, minimal("reinforced_multi_teacher"))
    assert [term.teachers for term in _terms(recipe)] == [(), ("first", "second")] * 2
    assert recipe.stages[1].terms[1].select is not None


def rkd(*arguments: str) -> str:
    done = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(cli.app, ["methods", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_lists_methods() -> None:
    listed = rkd()
    for name in NAMES:
        assert re.search(rf"^\W*{name}\s", listed, re.MULTILINE), name
    assert "Margin-MSE" in listed
    found = json.loads(rkd("--json").splitlines()[-1])["methods"]
    assert [method["name"] for method in found] == NAMES
    assert found[NAMES.index("leaf")] == {
        "name": "leaf",
        "title": read_method("leaf")["title"],
        "paper": "Vujanic and Rueckstiess 2025, arXiv:2509.12539",
        "needs": ["embeddings"],
        "trains": ["dense"],
    }
    assert rkd("--quiet") == ""


def test_the_command_shows_a_method() -> None:
    assert rkd("show", "prod") == method_text("prod")
    assert tomllib.loads(rkd("show", "prod"))["recipe"] == read_method("prod")["recipe"]
    assert json.loads(rkd("show", "prod", "--json")) == {"name": "prod", **read_method("prod")}
    failed = CliRunner().invoke(cli.app, ["methods", "show", "prodd"])
    assert isinstance(failed.exception, InputError)
    assert "did you mean 'prod'?" in str(failed.exception)
