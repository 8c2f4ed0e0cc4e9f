"""Suites: TOML files that say which systems are measured on which collections, and what is expected to come out."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from retrieval_kd.tables import Component, Name, Positive, Table, did_you_mean, parse
from retrieval_kd.types import ORIGINAL, InputError


class SuiteCollection(Table):
    """A collection of the registry, or any other by its name or folder; keys that are given go before the registry's.

    `label` is what reports call it, where a collection stands twice (two splits, two renderings of the queries).
    """

    name: str
    label: str | None = None
    split: str | None = None
    metric: str | None = None
    relevance: Positive | None = None  # the lowest relevant grade
    self_ids: bool | None = None  # take a query's own document out of its results
    query: str = ORIGINAL  # the rendering of the queries
    allow_mismatch: bool = False  # measure a copy that does not hold what the published one does
    allow_unknown_qrels: bool = False

    @property
    def title(self) -> str:
        """What reports call it."""
        return self.label or self.name


class SuiteSystem(Component):
    """A system: any kind of teacher, `run`, `fusion`, or `student`.

    With `rerank` it re-ranks the best `rerank_depth` results of that system, which one that cannot search must.
    """

    name: Name
    rerank: Name | None = None
    rerank_depth: Positive = 100


class Fusion(Table):
    """Options of the kind `fusion`: earlier systems, whose min-max normalised scores are added."""

    of: Annotated[tuple[Name, ...], Field(min_length=2)]
    shares: tuple[float, ...] = ()  # their weights; none given: equal

    @model_validator(mode="after")
    def _one_share_each(self) -> Fusion:
        if self.shares and len(self.shares) != len(self.of):
            raise ValueError(f"shares has {len(self.shares)} weights for {len(self.of)} systems; give one for each")
        return self


class RunFile(Table):
    """Options of the kind `run`: a TREC run a collection, `{collection}` standing for its name in file names."""

    file: str


class Work(Table):
    """Options of the kind `student`: the folder of a recipe's results, and which form of its student.

    `torch` is the student as it was saved; `fp32` and `int8` are exported query encoders.
    """

    work: str
    form: Literal["torch", "fp32", "int8"] = "torch"


OWN: dict[str, type[Table]] = {"fusion": Fusion, "run": RunFile, "student": Work}


class Expected(Table):
    """What a system is expected to have on a collection (by its label), and how far it may be off."""

    collection: str
    system: Name
    scores: Annotated[dict[str, float], Field(min_length=1)]
    tolerance: float = 0.001
    source: str | None = None  # where a published figure is from


class Suite(Table):
    """Systems by collections."""

    depth: Positive = 1000  # results a query
    metrics: tuple[str, ...] = ("nDCG@10", "MRR@10", "R@100", "R@1000", "MAP")
    collections: Annotated[tuple[SuiteCollection, ...], Field(min_length=1)]
    systems: Annotated[tuple[SuiteSystem, ...], Field(min_length=1)]
    expected: tuple[Expected, ...] = ()

    @model_validator(mode="after")
    def _names_exist(self) -> Suite:
        titles, names = [one.title for one in self.collections], [one.name for one in self.systems]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two systems are called {sorted(doubled)[0]!r}")
        if same := same_file_name(titles):
            raise ValueError(f"collections {same[0]!r} and {same[1]!r} have one file name; give one another label")
        for place, system in enumerate(self.systems):
            if system.rerank and system.kind in ("fusion", "run"):
                raise ValueError(f"system {system.name!r} of kind {system.kind!r} re-ranks nothing; drop `rerank`")
            of = system.options.get("of", ()) if system.kind == "fusion" else ()
            for name in [*of, *([system.rerank] if system.rerank else [])]:
                if name not in names[:place]:
                    guess = did_you_mean(name, names[:place])
                    raise ValueError(f"system {system.name!r} uses {name!r}, which is no system before it{guess}")
        for one in self.expected:
            if one.system not in names:
                raise ValueError(f"expected: there is no system {one.system!r}{did_you_mean(one.system, names)}")
        return self


def is_suite(path: Path) -> bool:
    """Whether a TOML file is a suite: it has systems, which no recipe has."""
    return path.is_file() and "systems" in _read(path)


def load_suite(path: Path) -> Suite:
    """Read and check a suite; InputError names file, table and key."""
    suite = parse(Suite, _read(path), str(path))
    for system in suite.systems:
        if system.kind in OWN:
            own_options(system)
    return suite


def own_options(system: SuiteSystem) -> Any:
    """The checked options of a system of a kind that suites alone have."""
    return parse(OWN[system.kind], system.options, f"system {system.name!r} of kind {system.kind!r}")


def file_name(title: str) -> str:
    """The name of a collection as part of file names: `beir/scifact` is `beir-scifact`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", title).strip("-")


def same_file_name(titles: Sequence[str]) -> tuple[str, str] | None:
    """The first two of the titles whose results would have one folder; None if there are none."""
    seen: dict[str, str] = {}
    for title in titles:
        if (name := file_name(title)) in seen:
            return seen[name], title
        seen[name] = title
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"suite {path} does not exist.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}.") from None
