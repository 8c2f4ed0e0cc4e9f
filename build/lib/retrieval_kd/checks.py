"""What a recipe's stages read, and combinations that cannot work: found when the recipe is read, not an hour later."""

from __future__ import annotations

from dataclasses import dataclass

from retrieval_kd.forms import Form, parse_form
from retrieval_kd.losses import Loss, check_options, find_loss
from retrieval_kd.recipe import Corpus, Recipe, Rendering
from retrieval_kd.regularizers import find_regularizer
from retrieval_kd.stages import Stage, Term
from retrieval_kd.tables import Component, kind_module
from retrieval_kd.types import InputError

HAS_VECTORS = {"bi_encoder"}  # kinds of cached teachers whose vectors are kept
UNIT_VECTORS = {"static", "lexical"}  # kinds of students whose vectors have unit length, whatever their options
UNBOUNDED = {"margin_mse", "margin_mse_all", "mse", "huber"}  # regressions on scores as they are


@dataclass(frozen=True)
class Needs:
    """What a recipe's stages read besides the training queries."""

    candidates: bool  # some term compares scores of candidates, or their documents
    sources: bool  # such a stage has no candidates of its own: the recipe's sources are asked, and its teachers paid
    labels: bool  # some term learns from judgements
    preferences: bool
    query_vectors: frozenset[str]  # teachers whose query vectors are read
    document_vectors: frozenset[str]
    live: frozenset[str]

    @property
    def documents(self) -> bool:
        """Whether documents take part at all."""
        return self.candidates or bool(self.document_vectors) or bool(self.live)


def check(recipe: Recipe) -> tuple[Needs, list[str]]:
    """What the stages need together, and warnings; InputError for what cannot work."""
    warnings: list[str] = []
    candidates = sources = labels = preferences = False
    queries: set[str] = set()
    documents: set[str] = set()
    live: set[str] = set()
    kinds = {teacher.name: teacher.kind for teacher in recipe.teachers}
    for teacher in recipe.teachers:
        if teacher.kind == "imported" and teacher.render != Rendering():
            raise InputError(f"teacher {teacher.name!r} judged ids and reads no text here; leave its `render` out.")
    for number, stage in enumerate(recipe.stages):
        _check_stage(recipe, number, stage, kinds)
        labels |= (stage.deny is not None and stage.deny.below_positive is not None) or stage.filter is not None
        compares = stage.deny is not None or stage.filter is not None
        if stage.cluster_by:
            queries.add(stage.cluster_by)
        for place, term in enumerate(stage.terms):
            where = f"stages[{number}].terms[{place}]"
            loss = find_loss(term.loss)
            warnings += _check_term(recipe, term, loss, where, kinds)
            if stage.widths and (term.relation == "cross" or term.layers or term.select):
                raise InputError(f"{where}: relation 'cross', layers and select go without `widths`; leave them out.")
            judges = [*term.teachers, *([term.guide.teacher] if term.guide else [])]
            cached = [name for name in judges if name in kinds]
            live |= {name for name in (term.of, *judges) if name in {one.name for one in recipe.live}}
            labels |= ("positive" in loss.needs and term.relation != "cross") or term.select is not None
            preferences |= "preference" in loss.needs
            if loss.of == "vectors" or term.relation in ("gram", "cross"):
                (queries if term.side == "query" else documents).update(cached)
                continue
            compares = True
            if term.relation == "batch":
                full = {name for name in cached if kinds[name] in HAS_VECTORS}
                queries |= full
                documents |= full
        candidates |= compares or stage.mine is not None
        sources |= compares and stage.mine is None
    read = Needs(candidates, sources, labels, preferences, frozenset(queries), frozenset(documents), frozenset(live))
    for number, stage in enumerate(recipe.stages):
        for place, regularizer in enumerate(stage.regularizers):
            where = f"stages[{number}].regularizers[{place}]"
            if regularizer.side != "query" and not read.documents:
                raise InputError(f"{where} penalises documents, of which no term reads any; penalise side = 'query'.")
            if regularizer.by_place and stage.mine is None and not sources:
                raise InputError(
                    f"{where}: by_place goes by the documents' places among a query's candidates, of which this stage "
                    "has none; leave it out."
                )
    _check_hybrid(recipe)
    unit = recipe.student.options.get("normalize") is True or recipe.student.kind in UNIT_VECTORS
    if unit and (beyond := terms_beyond_cosine(recipe)):
        raise InputError(beyond[0])
    _check_export(recipe, index_of(recipe))
    return read, warnings


def _check_hybrid(recipe: Recipe) -> None:
    """InputError for a hybrid of a student that does not search, or whose weight nothing tunes."""
    hybrid = recipe.evaluation.hybrid
    if hybrid is None:
        return
    if not kind_module("students", recipe.student.kind).SEARCHES:
        raise InputError(
            f"a {recipe.student.kind} student does not search, so it is in no hybrid; leave evaluation.hybrid out."
        )
    if hybrid.weight is None and recipe.data.train is None:
        raise InputError(
            "evaluation.hybrid tunes its weight on the train split; name one (data.train), or give hybrid.weight."
        )


def index_of(recipe: Recipe) -> Component | None:
    """The index of the student's vectors, by default of the kind that is exact; None for a student that re-ranks.

    InputError for an index that does not take such vectors.
    """
    student = kind_module("students", recipe.student.kind)
    if recipe.corpus != Corpus() and student.VECTORS != "dense":
        raise InputError(f"[corpus] is about the vectors of a dense student, and this one is {recipe.student.kind}.")
    if not student.SEARCHES:
        if recipe.index is not None:
            raise InputError(
                f"a {recipe.student.kind} student cannot be indexed; it re-ranks the candidates. Leave [index] out."
            )
        return None
    index = recipe.index or Component(kind=_INDEX[student.VECTORS])
    if student.VECTORS not in kind_module("index", index.kind).VECTORS:
        raise InputError(
            f"index kind {index.kind!r} does not take {student.VECTORS} vectors, which those of a "
            f"{recipe.student.kind} student are; set index.kind = {_INDEX[student.VECTORS]!r}, or leave [index] out."
        )
    return index


def forms_of(recipe: Recipe) -> list[Form]:
    """The forms that a recipe exports: those that it names, or fp32 and int8 as far as its student has them."""
    kinds = getattr(kind_module("students", recipe.student.kind), "FORMS", DEFAULT_FORMS)
    return [parse_form(name) for name in recipe.export.forms or kinds]


def _check_export(recipe: Recipe, index: Component | None) -> None:
    """Refuse forms that a student or its index has not, and those that lack a package, before it is trained."""
    student = kind_module("students", recipe.student.kind)
    for form in forms_of(recipe) if index else ():
        form.check_installed()
        if form.name not in getattr(student, "FORMS", (form.name,)):
            raise InputError(
                f"export.forms: a {recipe.student.kind} student has no form {form.name!r}; it is a table, in "
                f"{' or '.join(student.FORMS)}."
            )
        if student.VECTORS == "sparse" and (form.width or form.binary):
            raise InputError(
                f"export.forms: {form.name!r} cuts dense vectors; those of a {recipe.student.kind} student are sparse."
            )
        if index and form.binary and "binary" not in kind_module("index", index.kind).VECTORS:
            raise InputError(
                f"export.forms: {form.name!r} leaves signs, which index kind {index.kind!r} does not take; set "
                "index.kind = 'faiss', or leave the form out."
            )


DEFAULT_FORMS = ("fp32", "int8")
_INDEX = {"dense": "faiss", "sparse": "impact"}


def _check_stage(recipe: Recipe, number: int, stage: Stage, kinds: dict[str, str]) -> None:
    where = f"stages[{number}]"
    for term in stage.terms:
        if number == 0 and "snapshot" in (*term.teachers, term.of):
            raise InputError(f"{where}: the first stage has no snapshot, which is what the stage before it left.")
    for key, teacher in (("deny", stage.deny), ("filter", stage.filter)):
        if teacher is not None and teacher.teacher is not None and teacher.teacher not in kinds:
            raise InputError(f"{where}.{key} uses teacher {teacher.teacher!r}, whose scores are not stored.")
    if stage.batching == "cluster" and (stage.cluster_by is None or kinds.get(stage.cluster_by) not in HAS_VECTORS):
        raise InputError(f"{where}: batching 'cluster' needs cluster_by, the name of a bi_encoder teacher.")
    if stage.sampling == "bins" and not kinds:
        raise InputError(f"{where}: sampling 'bins' goes by a teacher's margins; define a teacher.")
    if stage.filter and stage.filter.student_rank and (stage.mine is None or stage.mine.by != "student"):
        raise InputError(f"{where}.filter reads the student's ranks; add mine = {{ by = 'student' }}.")
    if stage.mine and stage.mine.by not in ("student", *kinds):
        raise InputError(
            f"{where}.mine.by is {stage.mine.by!r}, which cannot search; name the student or a stored teacher."
        )
    student = kind_module("students", recipe.student.kind)
    if stage.widths and not student.SEARCHES:
        raise InputError(f"{where}.widths cuts vectors whose products are scores; a {recipe.student.kind} has none.")
    sparse = student.VECTORS == "sparse"
    if sparse and stage.widths:
        raise InputError(f"{where}.widths cuts dense vectors; those of a {recipe.student.kind} student are sparse.")
    if sparse and any(term.layers for term in stage.terms):
        raise InputError(f"{where}: a {recipe.student.kind} student has no layers to compare; leave `layers` out.")
    if stage.mine and stage.mine.by == "student" and not student.SEARCHES:
        raise InputError(f"{where}.mine: a {recipe.student.kind} student cannot search; mine by a teacher that can.")
    if stage.average and any(not 0 <= other < number for other in stage.average.stages):
        raise InputError(f"{where}.average.stages names a stage that is not before it.")
    for place, regularizer in enumerate(stage.regularizers):
        find_regularizer(regularizer.name)
        if not sparse:
            raise InputError(
                f"{where}.regularizers[{place}]: {regularizer.name} counts active vocabulary terms; a "
                f"{recipe.student.kind} student has none."
            )
        if recipe.student.kind == "inference_free" and regularizer.side == "query":
            raise InputError(
                f"{where}.regularizers[{place}]: an inference_free query has the terms that it consists of, and no "
                "others to penalise; penalise side = 'document'."
            )


def _check_term(recipe: Recipe, term: Term, loss: Loss, where: str, kinds: dict[str, str]) -> list[str]:
    """Raise InputError for what cannot work; return warnings for what is doubtful."""
    warnings: list[str] = []
    live = {one.name: one for one in recipe.live}
    taught = "teacher" in loss.needs or loss.of == "vectors" or term.relation == "cross"
    cached = [name for name in term.teachers if name in kinds]
    check_options(loss, term.options, where)
    if loss.of == "vectors" or term.relation in ("gram", "cross"):
        what = f"{term.loss} with relation {term.relation!r}" if loss.of == "scores" else term.loss
        if len(term.teachers) != 1:
            raise InputError(f"{where}: {what} imitates the vectors of exactly one teacher, not {len(term.teachers)}.")
        if cached and kinds[cached[0]] not in HAS_VECTORS:
            raise InputError(f"{where}: teacher {cached[0]!r} has no vectors to imitate; use a bi_encoder.")
        if not kind_module("students", recipe.student.kind).VECTORS:
            raise InputError(f"{where}: a {recipe.student.kind} student makes no vectors, which {what} needs here.")
    if taught and not term.teachers:
        raise InputError(f"{where}: {term.loss} compares with teachers; name them in `teachers`.")
    if not taught and term.teachers and "preference" not in loss.needs:
        raise InputError(f"{where}: {term.loss} learns from labels alone; it takes no `teachers`.")
    if term.relation == "cross" and "positive" not in loss.needs:
        raise InputError(f"{where}: relation 'cross' has positives and no teacher scores; use info_nce.")
    if term.relation == "gram" and "positive" in loss.needs:
        raise InputError(f"{where}: relation 'gram' has no positives; use a loss that compares with a teacher.")
    if term.guide and (loss.of == "vectors" or term.relation in ("gram", "cross")):
        raise InputError(f"{where}: guide denies negatives; there are none but with relations 'own' and 'batch'.")
    if term.queue and term.relation != "cross":
        raise InputError(f"{where}: queue belongs to relation 'cross'.")
    if term.relation == "batch":
        if recipe.student.kind == "cross_encoder" and term.of == "student":
            raise InputError(f"{where}: a cross_encoder student makes no vectors, which {term.loss} needs here.")
        listed = [name for name in cached if kinds[name] not in HAS_VECTORS]
        if listed and term.missing is None:
            raise InputError(
                f"{where}: {term.loss} with relation 'batch' needs scores of teacher {listed[0]!r} for other "
                "queries' candidates, which are not stored; say what they count for (missing = 'drop' or "
                "'zero_probability'), use relation 'own', or a bi_encoder teacher, whose vectors give all pairs."
            )
    if term.relation in ("batch", "gram") and term.loss == "margin_mse":
        raise InputError(
            f"{where}: margin_mse takes the first column for the positive, which it is in relation 'own' alone; use "
            "margin_mse_all."
        )
    if term.missing == "zero_probability" and loss.of == "scores" and term.loss in UNBOUNDED:
        raise InputError(f"{where}: {term.loss} compares scores, not probabilities; missing = 'drop'.")
    if term.temperature is not None and "temperature" not in loss.options:
        raise InputError(f"{where}: {term.loss} has no temperature; use `scale` to stretch its target.")
    if term.teacher_temperature is not None and "teacher_temperature" not in loss.options:
        raise InputError(f"{where}: {term.loss} has no teacher_temperature.")
    shaped = term.normalize != "none" or term.scale != 1.0 or term.soften or term.interpolate or term.select
    if shaped and ("teacher" not in loss.needs or loss.of == "vectors"):
        raise InputError(f"{where}: `normalize`, `scale` and the like change teacher scores; {term.loss} reads none.")
    if term.row_weights != "none" and ("teacher" not in loss.needs or loss.of == "vectors"):
        raise InputError(
            f"{where}: row_weights go by scores of teacher and student, which {term.loss} does not compare."
        )
    if term.others_only and term.relation != "batch":
        raise InputError(f"{where}: others_only belongs to relation 'batch'.")
    if "preference" in loss.needs and len(term.teachers) != 1:
        raise InputError(
            f"{where}: {term.loss} reads the preferences of exactly one teacher, not {len(term.teachers)}."
        )
    if len(term.teachers) > 1 and term.normalize == "none" and not term.shares and "teacher" in loss.needs:
        raise InputError(
            f"{where}: scores of {len(term.teachers)} teachers are averaged as they are, though their scales "
            "differ; set normalize = 'minmax' or 'zscore', or say by `shares` that it is meant."
        )
    if term.select and len(term.teachers) < 2:
        raise InputError(f"{where}: select chooses among teachers; name at least two.")
    if term.layers and (len(term.teachers) != 1 or term.teachers[0] not in live):
        raise InputError(f"{where}: layers are those of one live teacher; stored scores have none.")
    if not term.detach and (
        loss.of == "vectors" or len(term.teachers) != 1 or (shaped and term.scale == 1.0) or cached
    ):
        raise InputError(
            f"{where}: detach = false trains the teacher through the scores it gives; it takes one live teacher or "
            "the student, as it is: stored scores cannot be trained."
        )
    if term.of != "student" and (term.of not in live or not live[term.of].trainable):
        raise InputError(f"{where}: of = {term.of!r} learns, so it must be a live teacher with trainable = true.")
    if term.interpolate and term.normalize == "none":
        warnings.append(f"{where}: interpolate mixes teacher and student scores, whose scales may differ; normalize.")
    return warnings


def terms_beyond_cosine(recipe: Recipe) -> list[str]:
    """What is wrong with terms that ask for scores that cosines cannot reach, if the student's vectors are unit."""
    kinds = {teacher.name: teacher.kind for teacher in recipe.teachers}
    other = "" if recipe.student.kind in UNIT_VECTORS else ", or student.normalize = false"
    found = []
    for number, stage in enumerate(recipe.stages):
        for place, term in enumerate(stage.terms):
            plain = term.normalize == "none" and term.scale == 1.0
            unfit = [name for name in term.teachers if name in kinds and kinds[name] not in HAS_VECTORS]
            if term.loss in UNBOUNDED and plain and unfit:
                found.append(
                    f"stages[{number}].terms[{place}]: the student's scores are cosines, between -1 and 1, and those "
                    f"of teacher {unfit[0]!r} are not: {term.loss} cannot meet them. Set normalize = 'minmax' or a "
                    f"scale{other}."
                )
    return found
