"""Stages of training: how long, on which candidates, in what batches, and the terms of the loss."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from retrieval_kd.tables import Name, Positive, Precision, Table
from retrieval_kd.types import Side

Normalize = Literal["none", "minmax", "zscore", "log_odds", "rank"]


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
    """Denies candidates that a teacher holds for too good to be negatives: t > t(positive) - margin, or t > max_score.

    `relative`: t > t(positive) - |t(positive)| * margin. Without `max_score` the margin is 0 where none is given; with
    it, scores are compared with the positive's only where a margin is given too.
    """

    teacher: Name
    margin: float | None = None
    relative: bool = False
    max_score: float | None = None  # as the teacher gives it

    @property
    def below_positive(self) -> float | None:
        """The margin that counts; None where a candidate is not compared with the positive."""
        return 0.0 if self.margin is None and self.max_score is None else self.margin

    @model_validator(mode="after")
    def _relative_to_a_margin(self) -> Guide:
        if self.relative and self.margin is None:
            raise ValueError("`relative` says how a margin is read, and none is given; add `margin`, 0.05 for example")
        return self


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
    options: dict[str, Any] = Field(default_factory=dict)  # what else the loss takes
    relation: Literal["own", "batch", "gram", "cross"] = "own"
    side: Side = "query"  # of vectors, gram and cross
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
    """A penalty on the activations of one side's vectors.

    With `active_terms` the weight is where a controller starts, which steers it until a text has so many active
    terms on average. `by_place` penalises the documents of each place among a query's candidates by themselves.
    """

    name: str
    side: Literal["query", "document", "both"] = "document"
    weight: float | Ramp
    active_terms: Positive | None = None
    by_place: bool = False
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_side(self) -> Regularizer:
        if self.active_terms is not None and (self.side == "both" or self.name == "anti_zero"):
            raise ValueError("active_terms are those of one side; penalise query and document by themselves")
        if self.by_place and (self.side != "document" or self.name != "flops"):
            raise ValueError("by_place belongs to flops of the documents")
        return self


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
    micro_batch_tokens: Positive | None = None  # tokens encoded at once; absent: 1,024 on a CPU, else 65,536
    validation: Validation | None = None
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()  # accelerate's
