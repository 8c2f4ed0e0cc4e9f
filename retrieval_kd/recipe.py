"""Recipes: TOML files that say what to distil from what, checked before anything runs.

A table that names a `kind` (teacher, candidate source, student, index) keeps its other keys for the
module of that name, which declares and checks them itself (`Options`).
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from retrieval_kd.extras import missing_extra
from retrieval_kd.methods import apply_method, expand_teachers
from retrieval_kd.types import ORIGINAL, InputError

T = TypeVar("T", bound=BaseModel)
Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
Precision = Literal["fp32", "bf16"]
Normalize = Literal["none", "minmax", "zscore", "log_odds", "rank"]


class Table(BaseModel):
    """A table of a recipe: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Component(BaseModel):
    """A table whose `kind` names a module; the rest is that module's `Options`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: str

    @property
    def options(self) -> dict[str, Any]:
        """The keys that belong to the module."""
        return dict(self.model_extra or {})


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
    """A source of candidates: `run`, or a kind of teacher that can search, and the texts that it reads."""

    render: Annotated[Rendering, AfterValidator(_reads_one)] = Rendering()

    @model_validator(mode="after")
    def _run_reads_nothing(self) -> Source:
        if self.kind == "run" and self.render != Rendering():
            raise ValueError("a run file holds results, so that it reads no texts; leave `render` out")
        return self


class PseudoQueries(Table):
    """Pieces of documents that serve as training queries without labels."""

    per_document: Positive | None = None  # sentences drawn from each document; absent: all
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


class Ramp(Table):
    """A weight that grows from 0 to `to` over `steps`, then stays."""

    ramp: Literal["linear", "quadratic"]
    to: float
    steps: Positive


class Soften(Table):
    """Operators on the teacher's distribution over a list, each where it is given (`targets.soften_*`)."""

    power: Annotated[float | None, Field(gt=0)] = None  # temperature
    uniform_mix: Annotated[float | None, Field(ge=0, le=1)] = None  # share of the uniform distribution
    top: Positive | None = None  # so many keep their probability, the others share what is left evenly


class Interpolate(Table):
    """TAID: the target moves from the student's own scores to the teacher's as training goes on (arXiv:2501.16937)."""

    start: Annotated[float, Field(ge=0, le=1)] = 0.4
    end: Annotated[float, Field(ge=0, le=1)] = 1.0
    alpha: float = 5e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99


class Guide(Table):
    """Denies candidates that a teacher holds for too good to be negatives: t > t(positive) - margin.

    `relative`: t > t(positive) * (1 - margin).
    """

    teacher: Name
    margin: float = 0.0
    relative: bool = False


class LayerPairs(Table):
    """LEAD: as many layers of either side, in order, drawn anew every so many steps and compared pair by pair.

    A pair weighs softmax(-cross-entropy of the teacher's layer / temperature).
    """

    count: Positive = 3
    every: Positive = 10
    temperature: Annotated[float, Field(gt=0)] = 10.0


class Select(Table):
    """A policy that chooses teachers query by query, trained by REINFORCE (arXiv:2012.06048)."""

    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    baseline: Annotated[float, Field(ge=0, lt=1)] = 0.9  # momentum of the average reward


class Term(Table):
    """One loss of a stage: whose scores learn, from whom, over which relation.

    Scores of several teachers are normalised one by one and averaged with `shares`. `scale`
    multiplies the fused target; temperatures divide (a loss states its factor). Beside the recipe's
    teachers there are its live ones, and `snapshot`: the student as the stage before left it.
    """

    loss: str
    of: Name = "student"  # who learns: the student, or a live teacher that is trained
    teachers: tuple[Name, ...] = ()  # "*" alone: all the recipe's teachers
    shares: tuple[Annotated[float, Field(ge=0)], ...] = ()
    select: Select | None = None
    normalize: Normalize | tuple[Normalize, ...] = "none"  # one way for all teachers, or one for each
    soften: Soften | None = None
    interpolate: Interpolate | None = None
    scale: float = 1.0
    temperature: Annotated[float | None, Field(gt=0)] = None  # absent: the loss's own, mostly 1
    teacher_temperature: Annotated[float | None, Field(gt=0)] = None  # absent: `temperature`
    options: dict[str, Any] = {}  # what else the loss takes
    relation: Literal["own", "batch", "gram", "cross"] = "own"
    side: Literal["query", "document"] = "query"  # of vectors, gram and cross
    missing: Literal["drop", "zero_probability", "list_maximum"] | None = None  # where a teacher gave no score
    others_only: bool = False  # relation batch without the query's own candidates, except its positive
    queue: Annotated[int, Field(ge=0)] = 0  # relation cross: teacher vectors of earlier steps that are kept
    guide: Guide | None = None
    layers: LayerPairs | None = None
    detach: bool = True  # whether the target is fixed; LEAD trains its teacher through it
    row_weights: Literal["none", "teacher_confidence", "student_doubt"] = "none"
    weight: float | Ramp = 1.0

    @model_validator(mode="after")
    def _shares_match(self) -> Term:
        if not isinstance(self.normalize, str) and len(self.normalize) != len(self.teachers):
            raise ValueError(
                f"{len(self.normalize)} ways to normalize for {len(self.teachers)} teachers; give one for each"
            )
        if self.shares and len(self.shares) != len(self.teachers):
            raise ValueError(f"{len(self.shares)} shares for {len(self.teachers)} teachers; give one for each")
        if self.shares and not sum(self.shares):
            raise ValueError("the shares sum to 0; give at least one teacher a share")
        return self


class Regularizer(Table):
    """A penalty on the activations of one side's vectors."""

    name: str
    side: Literal["query", "document", "both"] = "document"
    weight: float | Ramp
    options: dict[str, Any] = {}


class Mine(Table):
    """Candidates found anew before a stage, with the student as it then is, or with a teacher.

    `skip` leaves out the first so many documents, among which unjudged positives are likely.
    """

    by: Name = "student"
    depth: Annotated[int, Field(ge=2)] = 100
    skip: Annotated[int, Field(ge=0)] = 0


class Filter(Table):
    """Keeps the queries whose first positive stands, by rank from 1, where `student` and `teacher_rank` say."""

    student_rank: tuple[int, int] | None = None  # in the stage's candidates, as `mine` orders them
    teacher: Name | None = None
    teacher_rank: tuple[int, int] = (1, 1)


class Average(Table):
    """The mean of weights that takes the place of a stage's last: its last checkpoints, or what stages left."""

    checkpoints: Positive = 1
    stages: tuple[int, ...] = ()


class Stage(Table):
    """One stage of training: from what, on which candidates, how long, in what batches, towards what."""

    steps: Positive
    init: Literal["previous", "start"] = "previous"  # start: the untrained student again
    mine: Mine | None = None
    deny: Guide | None = None
    filter: Filter | None = None
    batch_size: Positive = 32  # B, queries a step, over all processes
    batching: Literal["plain", "no_duplicates", "cluster"] = "plain"
    clusters: Positive = 100
    cluster_by: Name | None = None  # the teacher whose query vectors are clustered
    candidates: Annotated[int, Field(ge=2)] = 8  # C, documents a query
    sampling: Literal["random", "top", "bins"] = "random"
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05  # share of the steps
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    precision: Precision = "fp32"
    gradient_caching: bool = False  # encode twice, keep the activations of one micro-batch at a time
    widths: tuple[Positive, ...] = ()  # Matryoshka: the terms are also those of so many first coordinates
    terms: Annotated[tuple[Term, ...], Field(min_length=1)]
    regularizers: tuple[Regularizer, ...] = ()
    average: Average | None = None

    @property
    def names_used(self) -> list[str]:
        """The teachers that the stage names, and who learns from them."""
        guides = [rule.teacher for rule in (self.deny, self.filter, *(term.guide for term in self.terms)) if rule]
        others = [self.cluster_by, self.mine.by if self.mine else None, *guides]
        return [*(name for term in self.terms for name in (*term.teachers, term.of)), *filter(None, others)]


class Validation(Table):
    """Early stopping, and the best checkpoint, by nDCG@10 of the student re-ranking a split's candidates."""

    split: str = "dev"
    every: Positive = 100  # steps
    patience: Positive = 5  # validations without a better one before the stage ends


class Training(Table):
    """What holds for all stages."""

    seed: int = 0
    checkpoint_steps: Positive = 200
    micro_batch: Positive = 16  # texts encoded at once, of similar length
    validation: Validation | None = None
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()  # accelerate's


class Evaluation(Table):
    """What the report holds besides the student: baselines, depth, metrics."""

    depth: Positive = 1000
    baseline: str | None = None  # the system the others are tested against; absent: the first
    fused: bool = True  # add the fused teachers, re-ranking the merged candidates
    latency_queries: Positive = 200
    shares: tuple[float, ...] = ()  # of the teachers in the fused row, where no term fuses them; none given: equal


class Export(Table):
    """The forms of the student that are exported and measured."""

    forms: tuple[Literal["fp32", "int8"], ...] = ("fp32", "int8")
    vector_tolerance: float = 1e-4  # fp32 against torch, largest difference of a coordinate
    quality_tolerance: float = 0.01  # nDCG@10 lost at the most, relative


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
    index: Component = Component(kind="faiss")
    evaluation: Evaluation = Evaluation()
    export: Export = Export()

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
                        f"stages[{number}] uses teacher {name!r}, which is not defined{_did_you_mean(name, known)}"
                    )
        readers = {f"teacher {teacher.name!r}": teacher.render for teacher in self.teachers}
        readers |= {f"candidate source {source.kind!r}": source.render for source in self.candidates.sources}
        for reader, render in {**readers, "the student": self.student.render}.items():
            if self.data.pseudo_queries and render.query_names != (ORIGINAL,):
                raise ValueError(f"data.pseudo_queries have no other renderings, and {reader} reads {render.query!r}")
        return self


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; `overrides` are `dotted.key=value` with TOML values.

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


def parse(model: type[T], table: Mapping[str, Any], where: str) -> T:
    """Validate `table` against `model`; InputError with the key and, if unknown, the nearest one."""
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise InputError("\n".join(_explain(model, problem, where) for problem in error.errors())) from None


def kinds(package: str) -> list[str]:
    """The kinds that a package of this project has: the names of its modules."""
    folder = importlib.import_module(f"retrieval_kd.{package}").__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def kind_module(package: str, kind: str) -> ModuleType:
    """Import the module that a `kind` names; InputError for an unknown kind or a missing extra."""
    try:
        known = kinds(package)
        if kind not in known:
            hint = _did_you_mean(kind, known)
            raise InputError(f"there is no {package} kind {kind!r}{hint}; known: {', '.join(known)}.")
        return importlib.import_module(f"retrieval_kd.{package}.{kind}")
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error


def options(package: str, component: Component) -> Any:
    """The checked `Options` of a component, as its module declares them."""
    module = kind_module(package, component.kind)
    return parse(module.Options, component.options, f"{package} kind {component.kind!r}")


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
    try:
        for part in parents:
            here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})
        here[int(last) if isinstance(here, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        raise InputError(f"--set {override!r}: the recipe has no place {key!r}.") from None


def _explain(model: type[BaseModel], problem: Any, where: str) -> str:
    """One line for one problem that pydantic found."""
    path = ".".join(f"{part}" for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{where}: {path + ': ' if path else ''}{problem['msg'].removeprefix('Value error, ')}."
    return f"{where}: unknown key {path!r}{_did_you_mean(str(problem['loc'][-1]), _keys(model, problem['loc'][:-1]))}."


def _keys(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The keys of the table at `location`, found by walking the models' annotations."""
    for part in location:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        inner = _model_in(model.model_fields[part].annotation)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := _model_in(argument)) is not None:
            return found
    return None


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
