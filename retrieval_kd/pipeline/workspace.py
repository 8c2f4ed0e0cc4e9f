"""A recipe at work: its folder, what it has loaded so far, and which of its stages are done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from retrieval_kd import __version__
from retrieval_kd.data import load_collection
from retrieval_kd.files import atomic, fingerprint, hash_texts, read_json, write_json
from retrieval_kd.losses import find_loss
from retrieval_kd.progress import say
from retrieval_kd.pseudo_queries import make_pseudo_queries
from retrieval_kd.recipe import Component, RunFiles, load_recipe, options, parse
from retrieval_kd.students import load_student
from retrieval_kd.teachers import Teacher, load_teacher
from retrieval_kd.train.terms import Needs, needs
from retrieval_kd.types import Collection, InputError, Queries


class Workspace:
    """A recipe, the folder of its results, and the score store it shares with other recipes.

    The folder holds one sub-folder a stage, each with a `manifest.json` that names the fingerprint
    of all that went into it. The recipe is checked whole when the workspace is made.
    """

    def __init__(
        self, recipe: Path, folder: Path | None = None, store: Path | None = None, overrides: Sequence[str] = ()
    ) -> None:
        self.path = recipe
        self.recipe = load_recipe(recipe, overrides)
        self.folder = folder or Path("work") / recipe.stem
        self.store = store or self.folder.parent / "store"
        self.needs: Needs = needs(self.recipe.stages)
        for teacher in self.recipe.teachers:
            # the model of a teacher that is trained first is known when it is
            options("teachers", with_model(teacher, "") if teacher.trained_by else teacher)
        for source in self.recipe.candidates.sources:
            if source.kind == "run":
                parse(RunFiles, source.options, "candidate source kind 'run'")
            else:
                options("teachers", source)
        options("students", self.recipe.student)
        for term in (term for stage in self.recipe.stages for term in stage.terms) if self.reranks else ():
            if term.relation == "batch" or find_loss(term.loss)[0] == "vectors":
                raise InputError(f"{recipe}: a cross_encoder student makes no vectors, which {term.loss} needs here.")
        options("index", self.recipe.index)
        write_json(self.folder / "recipe.json", self.recipe.model_dump(mode="json"))

    @cached_property
    def collection(self) -> Collection:
        """The collection, read once."""
        data = self.recipe.data
        collection = load_collection(
            data.collection, [name for name in (data.train, data.test) if name], data.allow_unknown_qrels
        )
        for note in collection.notes:
            say(f"{collection.name}: {note}")
        return collection

    @cached_property
    def train_queries(self) -> Queries:
        """The queries of the train split, followed by the pseudo-queries, which have no judgements."""
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
    def teachers(self) -> dict[str, Teacher]:
        """The recipe's teachers by name; one that another recipe trains has that recipe run first."""
        return {teacher.name: self._teacher(teacher) for teacher in self.recipe.teachers}

    @cached_property
    def sources(self) -> dict[str, Teacher]:
        """The candidate sources that are teachers too, by a name that says what they are."""
        return {
            source_name(source): load_teacher(source, self.collection)
            for source in self.recipe.candidates.sources
            if source.kind != "run"
        }

    @cached_property
    def student(self) -> Any:
        """The untrained student."""
        return load_student(self.recipe.student, self.recipe.training.seed)

    @property
    def reranks(self) -> bool:
        """Whether the student reads pairs, so that it can re-rank and nothing else."""
        return self.recipe.student.kind == "cross_encoder"

    @cached_property
    def trained(self) -> Teacher:
        """The trained student, as the teacher that it can be."""
        kind = "cross_encoder" if self.reranks else "bi_encoder"
        settings = {"model": str(self.folder / "student"), "precision": self.recipe.precision}
        if self.reranks:
            settings["max_length"] = self.student.max_length
        return load_teacher(Component(kind=kind, **settings), self.collection)

    @cached_property
    def texts_key(self) -> str:
        """A fingerprint of the collection's documents and of the training and test queries."""
        parts = (self.collection.documents, self.train_queries.texts, self.test_queries.texts)
        return fingerprint([hash_texts(part) for part in parts])

    def make(self, name: str, inputs: Any, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Run `work` into the folder `name` unless it holds the result for the same inputs.

        `work` fills a scratch folder and returns facts for the manifest; the folder takes its place
        only when all of it is written. Returns the manifest.
        """
        key = fingerprint(inputs)
        folder = self.folder / name
        if (folder / "manifest.json").exists():
            manifest: dict[str, Any] = read_json(folder / "manifest.json")
            if manifest["key"] == key:
                say(f"{name}: up to date")
                return manifest
            say(f"{name}: inputs changed, made again")
        began = time.monotonic()
        with atomic(folder) as scratch:
            scratch.mkdir()
            facts = work(scratch)
            seconds = round(time.monotonic() - began, 2)
            manifest = {"key": key, "seconds": seconds, "version": __version__, **facts}
            write_json(scratch / "manifest.json", manifest)
        say(f"{name}: {_facts(facts)}{seconds:.1f} s")
        return manifest

    def made(self, name: str, command: str) -> dict[str, Any]:
        """The manifest of a stage that must be done; InputError names the command to run first."""
        path = self.folder / name / "manifest.json"
        if not path.exists():
            raise InputError(f"{self.folder / name} is not there yet; run `rkd {command} {self.path}` first.")
        manifest: dict[str, Any] = read_json(path)
        return manifest

    def _teacher(self, teacher: Any) -> Teacher:
        if teacher.trained_by is None:
            return load_teacher(teacher, self.collection)
        from retrieval_kd import pipeline

        path = self.path.parent / teacher.trained_by
        say(f"teacher {teacher.name}: trained by {path}")
        other = Workspace(path, self.folder.parent / path.stem, self.store)
        for stage in (pipeline.mine, pipeline.score, pipeline.train):  # no-ops when nothing changed
            stage(other)
        if not (other.folder / "report" / "report.json").exists():
            pipeline.run(other)
        return load_teacher(with_model(teacher, str(other.folder / "student")), self.collection)


def with_model(component: Component, model: str) -> Component:
    """The component with another `model`."""
    return Component(kind=component.kind, **{**component.options, "model": model})


def source_name(source: Component) -> str:
    """A short name for a candidate source: its kind, and its model or file."""
    what = source.options.get("model") or source.options.get("test")
    return f"{source.kind}-{Path(str(what)).name}" if what else source.kind


def _facts(facts: dict[str, Any]) -> str:
    plain = {key: value for key, value in facts.items() if isinstance(value, int | float | str)}
    return "".join(
        f"{key} {value:,}, " if isinstance(value, int) else f"{key} {value}, " for key, value in plain.items()
    )
