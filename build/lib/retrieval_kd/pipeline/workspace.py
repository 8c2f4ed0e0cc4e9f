"""A recipe at work: its folder, what it has loaded so far, and which of its stages are done."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch

from retrieval_kd.checks import check, index_of, terms_beyond_cosine
from retrieval_kd.data import load_collection
from retrieval_kd.engines import calibration_rows
from retrieval_kd.files import fingerprint, hash_texts, read_json, write_json
from retrieval_kd.gather import process
from retrieval_kd.pipeline.stage_folder import is_made, make_folder
from retrieval_kd.progress import say
from retrieval_kd.pseudo_queries import make_pseudo_queries
from retrieval_kd.recipe import Rendering, RunFiles, Source, load_recipe
from retrieval_kd.recipe import Teacher as TeacherTable
from retrieval_kd.sparse_towers import load_sparse_towers
from retrieval_kd.students import begin, begins, begun, load_student
from retrieval_kd.tables import Component, did_you_mean, kind_module, options, parse
from retrieval_kd.teachers import Embedder, Teacher, load_teacher, scored_as
from retrieval_kd.towers import Towers, describe
from retrieval_kd.types import ORIGINAL, Collection, InputError, Queries
from retrieval_kd.workers import Cluster, Crew

Split = Literal["train", "test", "validation"]


class Workspace:
    """A recipe, the folder of its results, and the score store it shares with other recipes.

    The folder holds one sub-folder a stage, each with a `manifest.json` that names the fingerprint
    of all that went into it. The recipe is checked whole when the workspace is made, and saved there unless
    `dry`; then no teacher is trained either.
    """

    def __init__(
        self,
        recipe: Path,
        folder: Path | None = None,
        store: Path | None = None,
        overrides: Sequence[str] = (),
        dry: bool = False,
    ) -> None:
        self.path = recipe
        self.dry = dry
        self.recipe = load_recipe(recipe, overrides)
        self.folder = folder or Path("work") / recipe.stem
        self.store = store or self.folder.parent / "store"
        self.processes: int | None = None  # in which the teachers are asked, and on what cluster: see `Crew`
        self.cluster: Cluster | None = None
        self.needs, warnings = check(self.recipe)
        for warning in warnings:
            say(f"{recipe}: {warning}")
        self.recipe = self.recipe.model_copy(update={"index": index_of(self.recipe)})
        self._documents: dict[tuple[str, str], Sequence[str]] = {}
        self._hashes: dict[tuple[str, Rendering], str] = {}
        for teacher in self.recipe.teachers:
            # the model of a teacher that is trained first is known when it is
            options("teachers", with_model(teacher, "") if teacher.trained_by else teacher)
        for source in self.recipe.candidates.sources:
            if source.kind == "run":
                parse(RunFiles, source.options, "candidate source kind 'run'")
            else:
                options("teachers", source)
        options("students", self.recipe.student)
        for live in self.recipe.live:
            options("students", live)
            if begins(live):
                raise InputError(
                    f"live teacher {live.name!r} would begin with the collection, which the student alone does; train "
                    "it by a recipe of its own, and name the folder of that student as its model."
                )
        if self.recipe.index is not None:
            options("index", self.recipe.index)
        if (hybrid := self.recipe.evaluation.hybrid) is not None:
            files = {name for name, source in self.named_sources.items() if source.kind == "run"}
            searchers = [name for name in dict.fromkeys([*self.renders, *self.named_sources]) if name not in files]
            if hybrid.searcher not in searchers:
                hint = did_you_mean(hybrid.searcher, searchers) or "."
                raise InputError(
                    f"evaluation.hybrid.searcher is {hybrid.searcher!r}, which is no teacher and no candidate source "
                    f"that searches here; there are: {', '.join(searchers)}{hint}"
                )
        if not dry:
            write_json(self.folder / "recipe.json", self.recipe.model_dump(mode="json"))

    @cached_property
    def collection(self) -> Collection:
        """The collection, read once."""
        data = self.recipe.data
        collection = load_collection(
            data.collection, [name for name in self._split_names.values() if name], data.allow_unknown_qrels
        )
        for note in collection.notes:
            say(f"{collection.name}: {note}")
        return collection

    @cached_property
    def train_queries(self) -> Queries:
        """The queries of the train split, followed by the pseudo-queries, which have no judgements.

        All of them are repeated for each query rendering that the student reads.
        """
        once, times = self._train_queries, self.repeats
        return Queries([*once.ids] * times, [*once.texts] * times, [*once.qrels] * times)

    @property
    def repeats(self) -> int:
        """How often each training query is there: once for each query rendering that the student reads."""
        return len(self.recipe.student.render.query_names)

    @cached_property
    def _train_queries(self) -> Queries:
        data = self.recipe.data
        split = self.collection.split(data.train) if data.train else Queries([], [])
        if data.pseudo_queries is None:
            return split
        made = make_pseudo_queries(self.collection.documents, data.pseudo_queries)
        ids = [f"pseudo-{number}" for number in range(len(made))]
        qrels = [*split.qrels, *({} for _ in made)] if split.qrels else []
        return Queries([*split.ids, *ids], [*split.texts, *made], qrels)

    @cached_property
    def test_queries(self) -> Queries:
        """The queries of the test split, with judgements."""
        return self.collection.split(self.recipe.data.test)

    @cached_property
    def validation_queries(self) -> Queries:
        """The queries of the split that early stopping goes by."""
        return self.collection.split(str(self._split_names["validation"]))

    def queries(self, split: Split) -> Queries:
        """The queries of a split: of train, those of `train_queries`."""
        if split == "train":
            return self.train_queries
        return self.test_queries if split == "test" else self.validation_queries

    @property
    def scored_splits(self) -> list[Split]:
        """The splits whose candidates the teachers score before training."""
        return ["test", "train"] if self.needs.sources else ["test"]

    @property
    def _split_names(self) -> dict[Split, str | None]:
        """What the recipe's splits are called in the collection."""
        data, validation = self.recipe.data, self.recipe.training.validation
        return {"train": data.train, "test": data.test, "validation": validation.split if validation else None}

    def query_texts(self, split: Split, render: Rendering) -> Sequence[str]:
        """The texts that somebody reads of the queries of a split, in their order.

        Of several renderings, each repetition of the training queries has its own; other queries have the first.
        """
        names = render.query_names
        if split == "train":
            queries = self._train_queries
            names = names * self.repeats if len(names) == 1 else names
        else:
            queries, names = self.queries(split), names[:1]
        named = self._split_names[split] or ""
        texts = {name: self.collection.query_texts(queries, name.replace("{split}", named)) for name in names}
        return _fill(render.query_template, [text for name in names for text in texts[name]])

    def document_texts(self, render: Rendering) -> Sequence[str]:
        """The texts that somebody reads of the documents, by row."""
        key = (render.document, render.document_template)
        if key not in self._documents:
            self._documents[key] = _fill(render.document_template, self.collection.document_texts(render.document))
        return self._documents[key]

    def read_by(self, render: Rendering) -> Collection:
        """The collection with the documents as somebody reads them."""
        return replace(self.collection, documents=self.document_texts(render))

    def fingerprint_texts(self, *sides: Literal["documents"] | Split, renders: Sequence[Rendering]) -> str:
        """A fingerprint of what the readers `renders` read of the documents and of the queries of a split."""
        return fingerprint([self._hash(side, render) for render in renders for side in sides])

    def _hash(self, side: Literal["documents"] | Split, render: Rendering) -> str:
        key = (side, render)
        if key not in self._hashes:
            self._hashes[key] = hash_texts(
                self.document_texts(render) if side == "documents" else self.query_texts(side, render)
            )
        return self._hashes[key]

    @cached_property
    def teachers(self) -> dict[str, Teacher]:
        """The recipe's teachers by name; one that another recipe trains has that recipe run first."""
        return {
            teacher.name: load_teacher(self._components[teacher.name], self.read_by(teacher.render))
            for teacher in self.recipe.teachers
        }

    def load_teacher(self, teacher: TeacherTable) -> Teacher:
        """The teacher of a table, which is the recipe's own or a changed one."""
        return load_teacher(self._component(teacher), self.read_by(teacher.render))

    def scored_by(self, split: Split) -> list[Any]:
        """Who scores the candidates of a split, and what they read."""
        identities = {name: scored_as(teacher) for name, teacher in self.teachers.items()}
        return [identities, self.fingerprint_texts("documents", split, renders=list(self.renders.values()))]

    @cached_property
    def _components(self) -> dict[str, Component]:
        """What loads each teacher, by its name."""
        return {teacher.name: self._component(teacher) for teacher in self.recipe.teachers}

    def crew(self, name: str) -> Crew | None:
        """The other processes that the teacher `name` is asked in, if there are to be any."""
        if self.cluster is None and (self.processes or 1) == 1:
            return None
        # What an int8 model is calibrated on; a teacher that needs more is asked in this process.
        ids, texts = self.collection.document_ids, self.document_texts(self.renders[name])
        rows = calibration_rows(len(texts))
        sample = Collection(self.collection.name, [ids[row] for row in rows], [texts[row] for row in rows], {})
        return Crew(partial(load_teacher, self._components[name], sample), self.processes, self.cluster)

    @property
    def renders(self) -> dict[str, Rendering]:
        """What each teacher reads, by its name."""
        return {teacher.name: teacher.render for teacher in self.recipe.teachers}

    @cached_property
    def sources(self) -> dict[str, Teacher]:
        """The candidate sources that are teachers too, by name."""
        return {
            name: load_teacher(source, self.read_by(source.render))
            for name, source in self.named_sources.items()
            if source.kind != "run"
        }

    @property
    def named_sources(self) -> dict[str, Source]:
        """The candidate sources by a name that says what they are; equal names are numbered."""
        names: dict[str, Source] = {}
        for source in self.recipe.candidates.sources:
            name, number = source_name(source), 1
            while (numbered := f"{name}-{number}" if number > 1 else name) in names:
                number += 1
            names[numbered] = source
        return names

    @cached_property
    def student(self) -> Any:
        """The untrained student."""
        return self.load_student()

    def load_student(self) -> Any:
        """The untrained student, once more."""
        return load_student(self.start, self.recipe.training.seed)

    @cached_property
    def start(self) -> Component:
        """The student's table; where it starts from the collection, its model is what is made of that, once."""
        student, seed, precision = self.recipe.student, self.recipe.training.seed, self.recipe.precision
        if not begins(student):
            return student

        def work(folder: Path) -> dict[str, Any]:
            begin(student, self.document_texts(student.render), folder, seed, precision)
            return {}

        texts = self.fingerprint_texts("documents", renders=[student.render])
        self.make("start", [student.model_dump(), seed, precision, texts], work)
        return begun(student, self.folder / "start")

    @property
    def start_key(self) -> Any:
        """What identifies the untrained student."""
        made = self.start is not self.recipe.student
        return [self.recipe.student.model_dump(), *([self.made("start", "train")["key"]] if made else [])]

    def check_scale(self) -> None:
        """Refuse terms that a student of unit vectors cannot fit; loads the student if there are such terms."""
        beyond = terms_beyond_cosine(self.recipe)
        if beyond and self.recipe.student.kind == "dense" and self.student.towers.normalized:
            raise InputError(beyond[0])

    @property
    def reranks(self) -> bool:
        """Whether the student can re-rank and nothing else."""
        return not self._student_module.SEARCHES

    @property
    def sparse(self) -> bool:
        """Whether the student's vectors are weights of vocabulary terms."""
        return bool(self._student_module.VECTORS == "sparse")

    @property
    def _student_module(self) -> Any:
        return kind_module("students", self.recipe.student.kind)

    @cached_property
    def trained(self) -> Teacher:
        """The trained student, as the teacher that it can be."""
        return load_teacher(self.student_as_teacher(self.folder / "student"), self.read_by(self.recipe.student.render))

    @cached_property
    def sparse_towers(self) -> Towers:
        """The trained student of sparse vectors."""
        return load_sparse_towers(str(self.folder / "student"))

    def tower_identity(self, side: Literal["query", "document"]) -> dict[str, Any]:
        """Everything that one side's vectors depend on in the trained student that searches, other than the texts."""
        if self.sparse:
            towers = self.sparse_towers
            return {**describe(towers.side(side), self.recipe.precision), "top_k": towers.model.max_active_dims}
        student = self.trained
        assert isinstance(student, Embedder)
        return student.tower_identity(side)

    def student_as_teacher(self, folder: Path) -> Component:
        """The teacher that a student saved in `folder` is."""
        kind = self._student_module.TEACHER
        settings = {"model": str(folder), "precision": self.recipe.precision}
        if kind == "cross_encoder":  # its folder does not hold the length that it was trained with
            settings["max_length"] = self.student.max_length
        return Component(kind=kind, **settings)

    def make(
        self, name: str, inputs: Any, work: Callable[[Path], dict[str, Any]], together: bool = False
    ) -> dict[str, Any]:
        """Run `work` into the folder `name` unless it holds the result for the same inputs.

        `work` fills a scratch folder and returns facts for the manifest; the folder takes its place
        only when all of it is written. Returns the manifest. Of several processes the first does the
        work; `together`, all do it and the first one's result is kept.
        """
        rank, world = process()
        if world == 1:
            return make_folder(self.folder / name, name, inputs, work)
        if rank == 0:
            make_folder(self.folder / name, name, inputs, work)
        elif together and not is_made(self.folder / name, inputs):
            with tempfile.TemporaryDirectory(prefix="rkd-") as scratch:
                work(Path(scratch))
        torch.distributed.barrier()
        return self.made(name, "train")

    def made(self, name: str, command: str) -> dict[str, Any]:
        """The manifest of a stage that must be done; InputError names the command to run first."""
        path = self.folder / name / "manifest.json"
        if not path.exists():
            raise InputError(f"{self.folder / name} is not there yet; run `rkd {command} {self.path}` first.")
        manifest: dict[str, Any] = read_json(path)
        return manifest

    def _component(self, teacher: TeacherTable) -> Component:
        if teacher.trained_by is None:
            return Component(kind=teacher.kind, **teacher.options)
        from retrieval_kd import pipeline

        path = self.path.parent / teacher.trained_by
        folder = self.folder.parent / path.stem
        if self.dry:
            if not (folder / "student").is_dir():
                raise InputError(f"teacher {teacher.name!r} is trained by {path}; run `rkd run {path}` first.")
            return with_model(teacher, str(folder / "student"))
        say(f"teacher {teacher.name}: trained by {path}")
        other = Workspace(path, folder, self.store)
        for stage in (pipeline.mine, pipeline.score, pipeline.train):  # no-ops when nothing changed
            stage(other)
        if not (other.folder / "report" / "report.json").exists():
            pipeline.run(other)
        return with_model(teacher, str(folder / "student"))


def with_model(component: Component, model: str) -> Component:
    """The component with another `model`."""
    return Component(kind=component.kind, **{**component.options, "model": model})


def source_name(source: Source) -> str:
    """A short name for a candidate source: its kind, its model or file, and the renderings that it reads."""
    what = source.options.get("model") or source.options.get("test")
    parts = [source.kind, *([Path(str(what)).name] if what else [])]
    parts += [name for name in (*source.render.query_names, source.render.document) if name != ORIGINAL]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(parts))  # the name of a folder of the store


def _fill(template: str, texts: Sequence[str]) -> Sequence[str]:
    return texts if template == "{text}" else [template.replace("{text}", text) for text in texts]
