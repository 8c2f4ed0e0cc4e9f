"""Recipes: TOML files that say what to distil from what, checked before anything runs."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from retrieval_kd.forms import parse_form
from retrieval_kd.methods import apply_method, expand_teachers
from retrieval_kd.stages import Stage, Training
from retrieval_kd.tables import Component, Name, Positive, Precision, Table, did_you_mean, parse
from retrieval_kd.types import ORIGINAL, InputError


def _has_place(template: str) -> str:
    if "{text}" not in template:
        raise ValueError(f"the template {template!r} has no place for the text, written {{text}}")
    return template


Template = Annotated[str, AfterValidator(_has_place)]


class Rendering(Table):
    """Which text a side reads: the names of renderings of the collection, and a template put around each text.

    `original` is the text as it is; a BEIR folder has the renderings NAME of `queries.NAME.jsonl` and
    `corpus.NAME.jsonl`, and `conversation`; `irds:ID` are the texts of another ir_datasets id. In the name of
    a query rendering, `{split}` stands for the split that is read (`irds:neumarco/zh/{split}`).

    A student may read several query renderings: its training queries are then repeated, once for each
    name, with the same ids and judgements, while teachers read theirs; evaluation reads the first.
    In a template, `{text}` is the text: "question: {text}", or "{text} {text}" for an echo.
    """

    query: str | tuple[str, ...] = ORIGINAL
    document: str = ORIGINAL
    query_template: Template = "{text}"
    document_template: Template = "{text}"

    @property
    def query_names(self) -> tuple[str, ...]:
        """The names of the query renderings, usually one."""
        return (self.query,) if isinstance(self.query, str) else self.query

    @model_validator(mode="after")
    def _names_differ(self) -> Rendering:
        if not self.query_names or len(set(self.query_names)) < len(self.query_names):
            raise ValueError(f"query = {list(self.query_names)} must name at least one rendering, and each once")
        return self


def _reads_one(render: Rendering) -> Rendering:
    if len(render.query_names) > 1:
        raise ValueError(
            f"query names {len(render.query_names)} renderings, which only a student can read; give one of them"
        )
    return render


def _without_template(render: Rendering) -> Rendering:
    if render.query_template != "{text}" or render.document_template != "{text}":
        raise ValueError(
            "a student has no templates, which would be lost where it is loaded or served by itself; use its "
            "query_prompt and document_prompt, which are saved and exported with it"
        )
    return render


class Student(Component):
    """The student: its kind, the kind's options, and the texts that it reads in training, evaluation and index."""

    render: Annotated[Rendering, AfterValidator(_without_template)] = Rendering()


class Source(Component):
    """A source of candidates: `run`, or a kind of teacher that can search, and the texts that it reads.

    Training candidates are its results from rank `skip` + 1 to `skip` + `depth`, without the first ones, among which
    unjudged positives are likely. With a `quota` it fills that many places of a list; sources without one share the
    rest, in turn. Test and validation candidates are the best of all sources, in turn.
    """

    quota: Positive | None = None
    skip: Annotated[int, Field(ge=0)] = 0
    depth: Positive | None = None  # absent: that of the candidates
    render: Annotated[Rendering, AfterValidator(_reads_one)] = Rendering()

    @model_validator(mode="after")
    def _run_reads_nothing(self) -> Source:
        if self.kind == "run" and self.render != Rendering():
            raise ValueError("a run file holds results, so that it reads no texts; leave `render` out")
        return self


class PseudoQueries(Table):
    """Pieces of documents that serve as training queries without labels."""

    per_document: Positive | None = None  # sentences drawn from each document; absent: all
    whole_documents: bool = False  # beside the sentences, each document as it is
    minimum_words: Positive = 4
    maximum_words: Positive = 60
    seed: int = 0


class Data(Table):
    """The collection, and which of its splits train and test."""

    collection: str
    train: str | None = "train"
    test: str = "test"
    pseudo_queries: PseudoQueries | None = None
    allow_unknown_qrels: bool = False


class RunFiles(Table):
    """Options of the candidate source `run`: a TREC run for each split that needs candidates."""

    train: Path | None = None
    test: Path | None = None
    validation: Path | None = None


class Candidates(Table):
    """Where a query's candidate documents come from, and how many are kept."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)] = (Source(kind="bm25"),)
    depth: Positive = 50

    @model_validator(mode="after")
    def _quotas_fit(self) -> Candidates:
        quotas = [source.quota for source in self.sources if source.quota is not None]
        if sum(quotas) > self.depth:
            raise ValueError(f"the quotas sum to {sum(quotas)} places, and a list has {self.depth} (depth)")
        if len(quotas) == len(self.sources) and sum(quotas) < self.depth:
            raise ValueError(
                f"the quotas sum to {sum(quotas)} of {self.depth} places (depth), and every source has one; leave one "
                "source without, which fills the rest"
            )
        return self


class Teacher(Component):
    """A teacher: its name in this recipe, its kind, the kind's options, and the texts that it reads.

    `trained_by` names another recipe, beside this one, whose student is the teacher's model: it is
    run first.
    """

    name: Name
    trained_by: str | None = None
    render: Annotated[Rendering, AfterValidator(_reads_one)] = Rendering()


class Live(Component):
    """A student kind's model at work inside the training step: it judges every pair of the batch.

    With `trainable` it learns too, from the terms that are `of` it.
    """

    name: Name
    trainable: bool = False
    render: Annotated[Rendering, AfterValidator(_reads_one)] = Rendering()


class Hybrid(Table):
    """Another searcher, whose results are fused with the student's: student + weight * searcher."""

    searcher: str  # a teacher or a candidate source that searches
    weight: float | None = None  # absent: tuned on the judged queries of the train split


class Corpus(Table):
    """Where the vectors of a dense student's documents are kept.

    "store": in the score store, in 32 bits, all of them in memory when the index is built. Otherwise in shards of the
    run's folder, in that form, which are encoded one by one and read from the disk.
    """

    vectors: Literal["store", "fp32", "fp16", "int8"] | None = None  # absent: the store; above LARGE documents fp16
    shard: Positive = 2**14  # documents, which is what a killed run loses at most


class Evaluation(Table):
    """What the report holds besides the student: baselines, depth, metrics."""

    depth: Positive = 1000
    baseline: str | None = None  # the system the others are tested against; absent: the first
    hybrid: Hybrid | None = None  # add the fusion of the student with another searcher
    fused: bool = True  # add the fused teachers, re-ranking the merged candidates
    latency_queries: Positive = 200
    shares: tuple[float, ...] = ()  # of the teachers in the fused row, where no term fuses them; none given: equal


def _is_form(name: str) -> str:
    parse_form(name)
    return name


class Point(Table):
    """A way to serve the student: an index, and what encodes the queries.

    `query` is an exported form, whose index has documents that are cut as it cuts queries, or "each", which makes a
    point of every one; absent: the last of `export.forms` that cuts nothing, if there is one.
    """

    name: Name
    index: Component
    query: str | None = None
    share: Annotated[float, Field(gt=0, lt=1)] | None = None  # of dense coordinates that is kept, the first ones


class Frontier(Table):
    """What `rkd frontier` measures; without points, those of frontier.toml for the student's kind."""

    points: tuple[Point, ...] = ()
    steps: tuple[Name, ...] = ()  # points of the waterfall, after the teacher
    teacher: str | None = None  # a system of the report; absent: the fused teachers, or the best one
    repeats: Positive = 1  # of every query in the latencies


class Export(Table):
    """The forms of the student that are exported and measured.

    A form is `[openvino-]PRECISION[-WIDTH][-binary]`: "fp32", "int8" and "int8-static" run on onnxruntime, and
    "openvino-fp32", "openvino-bf16" and "openvino-int8" on OpenVINO; "int8-128" keeps 128 coordinates (Matryoshka), and
    "int8-binary" the signs alone. Documents are cut alike, in an index of their own.
    """

    forms: tuple[Annotated[str, AfterValidator(_is_form)], ...] = ()  # absent: fp32, and int8 if the student has it
    vector_tolerance: float = 1e-4  # fp32 against torch, largest difference of a coordinate
    quality_tolerance: float = 0.01  # nDCG@10 lost at the most, relative
    collection: str | None = None  # where nDCG@10 is measured; absent: the recipe's own
    split: str = "test"  # of that collection
    calibration: Positive = 128  # training queries that static int8 forms are calibrated on

    @model_validator(mode="after")
    def _once(self) -> Export:
        if len(set(self.forms)) < len(self.forms):
            raise ValueError(f"forms = {list(self.forms)} names a form twice")
        return self


class Recipe(Table):
    """A whole distillation, from data to export."""

    method: str | None = None  # whose stages these are
    precision: Precision = "fp32"  # of encoding with the student, outside training
    data: Data
    candidates: Candidates = Candidates()
    teachers: tuple[Teacher, ...] = ()
    live: tuple[Live, ...] = ()
    student: Student
    training: Training = Training()
    stages: tuple[Stage, ...] = ()
    corpus: Corpus = Corpus()
    index: Component | None = None  # absent: see checks.index_of
    evaluation: Evaluation = Evaluation()
    export: Export = Export()
    frontier: Frontier = Frontier()

    @model_validator(mode="after")
    def _names_exist(self) -> Recipe:
        names = [teacher.name for teacher in self.teachers]
        if self.evaluation.shares and len(self.evaluation.shares) != len(names):
            given = len(self.evaluation.shares)
            raise ValueError(f"evaluation.shares has {given} shares for {len(names)} teachers; give one for each")
        every = [*names, *(live.name for live in self.live)]
        if doubled := {name for name in every if every.count(name) > 1}:
            raise ValueError(f"two teachers are called {sorted(doubled)[0]!r}; names are unique")
        if taken := {"student", "snapshot"} & set(every):
            raise ValueError(f"a teacher is called {sorted(taken)[0]!r}, which names the student here; rename it")
        known = [*every, "student", "snapshot"]
        for number, stage in enumerate(self.stages):
            for name in stage.names_used:
                if name not in known:
                    raise ValueError(
                        f"stages[{number}] uses teacher {name!r}, which is not defined{did_you_mean(name, known)}"
                    )
        readers = {f"teacher {teacher.name!r}": teacher.render for teacher in self.teachers}
        readers |= {f"candidate source {source.kind!r}": source.render for source in self.candidates.sources}
        for reader, render in {**readers, "the student": self.student.render}.items():
            if self.data.pseudo_queries and render.query_names != (ORIGINAL,):
                raise ValueError(f"data.pseudo_queries have no other renderings, and {reader} reads {render.query!r}")
        return self


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; `overrides` are `dotted.key=value` with TOML values.

    `*.key=value` changes the key in every table that has it, as in `*.precision=fp32`.

    Raises InputError naming file, table and key, with the nearest known key for a mistyped one.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"recipe {path} does not exist.") from None
    except IsADirectoryError:
        raise InputError(f"recipe {path} is a folder; give a TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}.") from None
    late = []
    for override in overrides:  # the stages of a method are there to be changed once it is known which one
        if override.startswith(("method", "stage.", "teachers")):
            _override(table, override)
        else:
            late.append(override)
    if "method" in table:
        table = apply_method(table, str(path))
    elif "stage" in table:
        raise InputError(
            f"{path}: [stage] changes the stages of a `method`, and none is named; did you mean [[stages]]?"
        )
    for override in late:
        _override(table, override)
    expand_teachers(table)
    return parse(Recipe, table, str(path))


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise InputError(f"--set {override!r}: expected dotted.key=value, for example student.layers=[0,5].")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *parents, last = key.strip().split(".")
    here: Any = table
    if parents == ["*"]:
        if not (places := list(_tables_with(last, table))):
            raise InputError(f"--set {override!r}: no table of the recipe has the key {last!r}.")
        for place in places:
            place[last] = value
        return
    try:
        for part in parents:
            here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})
        here[int(last) if isinstance(here, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        raise InputError(f"--set {override!r}: the recipe has no place {key!r}.") from None


def _tables_with(key: str, value: Any) -> Iterator[dict[str, Any]]:
    """Every table in `value` that has the key."""
    if isinstance(value, dict):
        if key in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _tables_with(key, inner)
