"""Recipes: what is wrong in one is named before anything runs; those we ship are right."""

from __future__ import annotations

import builtins
import importlib
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import retrieval_kd
from retrieval_kd.extras import EXTRA_OF, missing_extra
from retrieval_kd.recipe import Recipe, Rendering, load_recipe
from retrieval_kd.tables import Component, kind_module, kinds, options, parse
from retrieval_kd.types import InputError

PACKAGE = Path(retrieval_kd.__file__).parent
SHIPPED = sorted([PACKAGE / "demo.toml", *(PACKAGE.parent / "scripts" / "recipes").rglob("*.toml")])

GOOD = """
[data]
collection = "pydocs"

[[teachers]]
name = "bm25"
kind = "bm25"

[[teachers]]
name = "minilm"
kind = "bi_encoder"
model = "sentence-transformers/all-MiniLM-L6-v2"

[student]
kind = "dense"
model = "sentence-transformers/all-MiniLM-L6-v2"
layers = [0, 5]

[[stages]]
steps = 10
terms = [{ loss = "kl", teachers = ["bm25", "minilm"], shares = [0.25, 0.75], normalize = "minmax" }]

[[stages]]
steps = 20
terms = [{ loss = "margin_mse", teachers = ["minilm"], weight = { ramp = "linear", to = 0.5, steps = 5 } }]
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(text: str) -> Path:
        path = tmp_path / "r.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return put


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_forms_of_export(write: Write) -> None:
    path = write(GOOD + '\n[export]\nforms = ["int8-static", "openvino-int8-128"]\n')
    assert load_recipe(path).export.forms == ("int8-static", "openvino-int8-128")
    assert "export.forms.0: 'fp16' is no form; there are fp32, int8" in refused(path, 'export.forms=["fp16"]')
    assert "names a form twice" in refused(path, 'export.forms=["int8", "int8"]')


def test_a_good_recipe(write: Write) -> None:
    recipe = load_recipe(write(GOOD))
    assert [teacher.name for teacher in recipe.teachers] == ["bm25", "minilm"]
    assert recipe.teachers[1].options == {"model": "sentence-transformers/all-MiniLM-L6-v2"}
    assert recipe.student.options == {"model": "sentence-transformers/all-MiniLM-L6-v2", "layers": [0, 5]}
    assert recipe.stages[0].terms[0].shares == (0.25, 0.75)
    weight = recipe.stages[1].terms[0].weight
    assert not isinstance(weight, float)
    assert (weight.ramp, weight.to, weight.steps) == ("linear", 0.5, 5)
    assert recipe.candidates.sources[0].kind == "bm25"
    assert parse(Recipe, recipe.model_dump(mode="json"), "again") == recipe  # what recipe.json holds


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 10", "stepz = 10", "unknown key 'stages.0.stepz'; did you mean 'steps'?."),
        ("steps = 10", "steps = 10\nbatch_sise = 4", "unknown key 'stages.0.batch_sise'; did you mean 'batch_size'?."),
        ("collection =", "colection =", "unknown key 'data.colection'; did you mean 'collection'?."),
        ("shares =", "share =", "unknown key 'stages.0.terms.0.share'; did you mean 'shares'?."),
        ("[student]", "[studnet]", "unknown key 'studnet'; did you mean 'student'?."),
        ("[student]", "[zzz]\nx = 1\n[student]", "unknown key 'zzz'."),
        ("[data]", "[data]\npseudo_queries = { maximum_word = 3 }", "did you mean 'maximum_words'?"),
        ('"bm25", "minilm"]', '"bm25", "minilmm"]', "stages[0] uses teacher 'minilmm', which is not defined; did you"),
        ('teachers = ["minilm"]', 'teachers = ["x"]', "stages[1] uses teacher 'x', which is not defined."),
        ('name = "minilm"', 'name = "bm25"', "two teachers are called 'bm25'; names are unique"),
        ("[0.25, 0.75]", "[1.0]", "stages.0.terms.0: 1 shares for 2 teachers; give one for each"),
        ("[0.25, 0.75]", "[0.5, 0.3, 0.2]", "3 shares for 2 teachers"),
        ("steps = 10", 'steps = "many"', "stages.0.steps: Input should be a valid integer"),
        ("steps = 10", "steps = 0", "stages.0.steps: Input should be greater than or equal to 1"),
        ("steps = 10", "steps = 2.5", "stages.0.steps: Input should be a valid integer"),
        ("steps = 10", "steps = 10\ncandidates = 1", "stages.0.candidates: Input should be greater than or equal to 2"),
        ("steps = 10", "steps = 10\nwarmup = 1.0", "stages.0.warmup: Input should be less than 1"),
        ("steps = 10", 'steps = 10\nschedule = "step"', "stages.0.schedule: Input should be 'linear', 'cosine' or"),
        ('name = "bm25"', 'name = "a b"', "teachers.0.name: String should match pattern"),
        ('kind = "dense"', "", "student.kind: Field required"),
        ('collection = "pydocs"', "", "data.collection: Field required"),
        ('collection = "pydocs"', 'collection = ["pydocs"]', "data.collection: Input should be a valid string"),
        ("terms = [{ loss", "terms = []\nother = [{ loss", "stages.0.terms: Tuple should have at least 1 item"),
        ("[data]", "[evaluation]\nshares = [1.0]\n[data]", "evaluation.shares has 1 shares for 2 teachers"),
        ("[student]", "[student", "not valid TOML"),
        (
            "[student]",
            "[student]\nrender = { qeury = 'de' }",
            "unknown key 'student.render.qeury'; did you mean 'query'?",
        ),
        (
            "[student]",
            "[student]\nrender = { query = [] }",
            "student.render: query = [] must name at least one rendering",
        ),
        ("[student]", "[student]\nrender = { query = ['a', 'a'] }", "query = ['a', 'a'] must name at least one"),
        ("[student]", "[student]\nrender = { query_template = '{text} {text}' }", "a student has no templates, which"),
        (
            "[student]",
            "[student]\nrender = { document_template = 'd: {text}' }",
            "query_prompt and document_prompt, which",
        ),
        (
            "[[teachers]]",
            "[[teachers]]\nrender = { query = ['a', 'b'] }",
            "teachers.0.render: query names 2 renderings, which",
        ),
        (
            "[[teachers]]",
            "[[teachers]]\nrender = { query_template = 'q' }",
            "the template 'q' has no place for the text",
        ),
        (
            "[data]",
            "[candidates]\nsources = [{ kind = 'bm25', render = { query = ['a', 'b'] } }]\n[data]",
            "candidates.sources.0.render: query names 2 renderings, which only a student can read",
        ),
        (
            "[data]",
            "[candidates]\nsources = [{ kind = 'run', render = { query = 'a' } }]\n[data]",
            "candidates.sources.0: a run file holds results, so that it reads no texts; leave `render` out",
        ),
        (
            "[data]",
            "[candidates]\nsources = [{ kind = 'bm25', quota = 40 }, { kind = 'run', quota = 20 }]\n[data]",
            "candidates: the quotas sum to 60 places, and a list has 50 (depth)",
        ),
        (
            "[data]",
            "[candidates]\nsources = [{ kind = 'bm25', quota = 40 }]\n[data]",
            "candidates: the quotas sum to 40 of 50 places (depth), and every source has one; leave one source without",
        ),
        (
            "[data]",
            "[candidates]\nsources = [{ kind = 'bm25', skip = -1 }]\n[data]",
            "candidates.sources.0.skip: Input",
        ),
        (
            "steps = 10",
            "steps = 10\ndeny = { teacher = 'minilm', relative = true }",
            "stages.0.deny: `relative` says how a margin is read, and none is given; add `margin`",
        ),
        (
            "[[teachers]]",
            "[data.pseudo_queries]\n[[teachers]]\nrender = { query = 'de' }",
            "data.pseudo_queries have no other renderings, and teacher 'bm25' reads 'de'",
        ),
    ],
)
def test_mistakes_are_named(write: Write, old: str, new: str, message: str) -> None:
    assert GOOD.count(old) >= 1
    path = write(GOOD.replace(old, new, 1))
    found = refused(path)
    assert found.startswith(f"{path}: ")
    assert message in found


def test_renderings_are_no_options_of_a_kind(write: Write) -> None:
    recipe = load_recipe(write(GOOD))
    assert {reader.render for reader in (recipe.student, *recipe.teachers, *recipe.candidates.sources)} == {Rendering()}
    assert Rendering().query_names == ("original",)
    recipe = load_recipe(write(GOOD.replace("[student]", "[student]\nrender = { query = ['original', 'de'] }")))
    assert recipe.student.render.query_names == ("original", "de")
    assert "render" not in recipe.student.options
    assert parse(Recipe, recipe.model_dump(mode="json"), "again") == recipe
    recipe = load_recipe(write(GOOD), ["teachers.0.render.query=rewrite", "student.render.document=de"])
    assert (recipe.teachers[0].render.query, recipe.student.render.document) == ("rewrite", "de")


def test_ramps_have_their_own_keys(write: Write) -> None:
    found = refused(write(GOOD.replace("to = 0.5", "too = 0.5")))
    assert "did you mean 'to'?" in found


def test_every_mistake_has_its_line(write: Write) -> None:
    found = refused(write(GOOD.replace("steps = 10", "stepz = 10").replace("collection", "colection")))
    assert len(found.splitlines()) == 4  # two unknown keys, two missing ones


def test_missing_and_unreadable_recipes(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "none.toml")
    assert str(tmp_path) in refused(tmp_path)  # a folder
    path = tmp_path / "latin.toml"
    path.write_bytes('a = "é"'.encode("latin-1"))
    assert "latin.toml: not valid TOML" in refused(path)


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("training.seed=7", lambda r: r.training.seed, 7),
        ("evaluation.depth = 20", lambda r: r.evaluation.depth, 20),
        ("stages.1.steps=3", lambda r: [s.steps for s in r.stages], [10, 3]),
        ("stages.0.terms.0.shares=[0.5, 0.5]", lambda r: r.stages[0].terms[0].shares, (0.5, 0.5)),
        ("student.layers=[1,2,3]", lambda r: r.student.options["layers"], [1, 2, 3]),
        ("student.model=org/some-model", lambda r: r.student.options["model"], "org/some-model"),
        ('student.model="org/some-model"', lambda r: r.student.options["model"], "org/some-model"),
        ("student.document.model=other", lambda r: r.student.options.get("document"), {"model": "other"}),
        ("data.collection=a=b", lambda r: r.data.collection, "a=b"),
        ("precision=bf16", lambda r: r.precision, "bf16"),
        ("data.allow_unknown_qrels=true", lambda r: r.data.allow_unknown_qrels, True),
        ("data.pseudo_queries={seed=2}", lambda r: r.data.pseudo_queries and r.data.pseudo_queries.seed, 2),
        ("teachers.0.name=minilm2", lambda r: None, None),
    ],
)
def test_overrides(write: Write, override: str, place: Callable[[Recipe], Any], value: Any) -> None:
    path = write(GOOD)
    before = load_recipe(path)
    if value is None:
        assert "uses teacher 'bm25', which is not defined" in refused(path, override)  # checked after the override
        return
    assert place(before) != value
    assert place(load_recipe(path, [override])) == value
    assert load_recipe(path) == before


def test_an_override_of_every_table_that_has_the_key(write: Write) -> None:
    """In lists and tables of any depth, also where the table is of a method, and nowhere else."""
    text = GOOD.replace("steps = 10", 'steps = 10\nprecision = "bf16"').replace(
        'kind = "dense"', 'kind = "dense"\ndocument = { model = "org/other", precision = "bf16" }'
    )
    found = load_recipe(write(text), ["*.precision=fp32", "*.model=org/one"])
    assert [stage.precision for stage in found.stages] == ["fp32", "fp32"]
    assert found.student.options["document"] == {"model": "org/one", "precision": "fp32"}
    assert found.student.options["model"] == "org/one"
    untouched = load_recipe(write(text), ["precision=fp32"])
    assert untouched.stages[0].precision == "bf16"
    assert "no table of the recipe has the key 'precison'" in refused(write(text), "*.precison=fp32")


def test_later_overrides_win(write: Write) -> None:
    assert load_recipe(write(GOOD), ["training.seed=1", "training.seed=2"]).training.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.seed", "expected dotted.key=value"),
        ("stages.5.steps=1", "the recipe has no place 'stages.5.steps'"),
        ("stages.5=1", "the recipe has no place 'stages.5'"),
        ("stages.first.steps=1", "the recipe has no place"),
        ("data.collection.name=x", "the recipe has no place"),
        ("data.collection.name.first=x", "the recipe has no place"),
        ("training.sede=1", "unknown key 'training.sede'; did you mean 'seed'?"),
        ("training.seed=abc", "training.seed: Input should be a valid integer"),
    ],
)
def test_bad_overrides(write: Write, override: str, message: str) -> None:
    assert message in refused(write(GOOD), override)


def test_kinds_are_the_modules() -> None:
    for package in ("teachers", "students", "index"):
        files = {path.stem for path in (PACKAGE / package).glob("*.py") if not path.stem.startswith("_")}
        folders = {path.parent.name for path in (PACKAGE / package).glob("*/__init__.py")}
        assert kinds(package) == sorted(files | folders)


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(InputError, match=r"no teachers kind 'bm52'; did you mean 'bm25'.* known: .*bm25"):
        kind_module("teachers", "bm52")
    with pytest.raises(InputError, match="no index kind 'zzzz'; known:"):
        options("index", Component(kind="zzzz"))
    with pytest.raises(InputError, match="no teachers kind '__init__'"):
        kind_module("teachers", "__init__")


def test_options_are_checked_by_their_kind() -> None:
    component = Component.model_validate({"kind": "bi_encoder", "model": "m", "precison": "bf16"})
    with pytest.raises(
        InputError, match=r"teachers kind 'bi_encoder': unknown key 'precison'; did you mean 'precision'"
    ):
        options("teachers", component)
    with pytest.raises(InputError, match="students kind 'dense': model: Field required"):
        options("students", Component(kind="dense"))


@pytest.mark.parametrize(
    ("package", "kind", "missing"),
    [("teachers", "bm25", "bm25s"), ("teachers", "bi_encoder", "torch"), ("students", "dense", "torch")],
)
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, package: str, kind: str, missing: str) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == missing or name.startswith(("retrieval_kd.towers", f"retrieval_kd.{package}")):
            monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(retrieval_kd, package, None, raising=False)  # importing binds it: put back afterwards
    with pytest.raises(InputError, match=rf"'{missing}', which is not installed.*retrieval-kd\[train\]"):
        kind_module(package, kind)


def test_missing_modules_of_no_extra_are_left_as_they_are() -> None:
    error = ModuleNotFoundError("No module named 'numpyy'", name="numpyy")
    assert missing_extra(error) is error
    assert missing_extra(ModuleNotFoundError("?")).args == ("?",)
    explained = missing_extra(ModuleNotFoundError("No module named 'ray.data'", name="ray.data"))
    assert isinstance(explained, InputError)
    assert "retrieval-kd[ray]" in str(explained)
    assert EXTRA_OF["ray"] == "ray"


def test_recipes_are_shipped() -> None:
    assert PACKAGE / "demo.toml" in SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(PACKAGE.parent).as_posix())
def test_shipped_recipes_pass_every_check(path: Path) -> None:
    check = importlib.import_module("retrieval_kd.checks").check
    recipe = load_recipe(path)
    assert set(tomllib.loads(path.read_text(encoding="utf-8"))) <= set(Recipe.model_fields)
    assert check(recipe)[1] == []
    for teacher in recipe.teachers:
        if teacher.trained_by is None:
            options("teachers", teacher)
        else:
            assert (path.parent / teacher.trained_by).is_file()
            options("teachers", Component.model_validate({**teacher.options, "kind": teacher.kind, "model": "m"}))
    for source in recipe.candidates.sources:
        if source.kind == "run":
            assert {"test"} <= set(source.options)
        else:
            options("teachers", source)
    options("students", recipe.student)
    if recipe.index is not None:
        options("index", recipe.index)
