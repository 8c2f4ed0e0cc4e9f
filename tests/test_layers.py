"""The layers of the package, read from its sources; and what imports without torch."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import retrieval_kd
from retrieval_kd.extras import EXTRA_OF

PACKAGE = Path(retrieval_kd.__file__).parent
LAYERS = [
    {"types", "files", "extras", "recipe", "stages", "tables", "progress", "weights", "methods", "usage", "sample"}
    | {"forms", "suite", "__init__"},
    {"losses", "targets", "schedules", "metrics", "pseudo_queries", "relations", "regularizers", "checks", "gather"}
    | {"prompts", "backward", "fusion"},
    {"data", "layouts", "store", "teachers", "students", "index", "encoder", "towers"}
    | {"engines", "first_token", "lora", "pair_head", "pooling", "token_vectors"}
    | {"bag_student", "lexical_embedding", "ngrams", "static_start", "served_table", "postings", "counting_encoder"}
    | {"decoder_transformer", "lexical_start", "sparse_student", "sparse_towers", "vocabulary_head"}
    | {"endpoint", "chat_model", "language_model"},
    {"candidates", "scoring", "judgements", "synthesis", "trainset", "train", "evaluate", "export", "report"}
    | {"export_onnx", "export_openvino", "export_graph", "export_table"}
    | {"corpus_vectors", "figures", "report_html", "compare", "suite_report"}
    | {"diagnostics", "answers", "workers", "cluster", "pricing"},
    {"pipeline"},
    {
        "cli",
        "cli_diagnostics",
        "cli_evaluate",
        "cli_methods",
        "cli_output",
        "cli_pricing",
        "cli_scores",
        "cli_serve",
        "cli_synthesize",
        "cli_workspace",
        "cli_frontier",
        "cli_index",
        "server",
        "__main__",
    },
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
OF_KINDS = {"teachers", "students", "index"}
FILES = sorted(PACKAGE.rglob("*.py"))
# What `pip install retrieval-kd` brings, by import name (pyproject: dependencies; starlette is FastAPI's).
BASE = {"faiss", "fastapi", "numpy", "onnxruntime", "prometheus_client", "pydantic", "rich", "starlette", "tokenizers"}
BASE |= {"typer", "uvicorn"}

# What a command that only reads its arguments has no use for.
HEAVY = {"torch", "transformers", "sentence_transformers", "openvino", "duckdb", "pyarrow", "scipy", "ranx"}
HEAVY |= {"numba", "ray"}


def blocking(packages: set[str]) -> str:
    """Code after which none of these packages can be imported."""
    return f"""
import importlib.abc, runpy, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages!r}:
            raise RuntimeError("imported " + name)

sys.meta_path.insert(0, Refuse())
"""


def dotted(file: Path) -> str:
    parts = ("retrieval_kd", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names that a source imports, `from a import b` as `a.b` where that is a module."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for child in tree.orelse:
            yield from imports_of(child, module, is_package)
        return
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names)
    elif isinstance(tree, ast.ImportFrom):
        source = tree.module or ""
        if tree.level:
            source = importlib.util.resolve_name(
                "." * tree.level + source, module if is_package else module.rpartition(".")[0]
            )
        for alias in tree.names:
            below = PACKAGE.joinpath(*source.split(".")[1:], alias.name)
            is_module = source.split(".")[0] == "retrieval_kd" and (
                below.with_suffix(".py").is_file() or below.is_dir()
            )
            yield f"{source}.{alias.name}" if is_module else source
    for child in ast.iter_child_nodes(tree):
        yield from imports_of(child, module, is_package)


def imports(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return set(imports_of(tree, dotted(file), file.name == "__init__.py"))


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def violations(file: Path, imported: set[str]) -> list[str]:
    """What `file` may not import, in words."""
    module, found = dotted(file), []
    own = layer_of(module)
    for name in sorted(imported):
        if name.split(".")[0] != "retrieval_kd":
            continue
        other = layer_of(name)
        if LEVEL[other] > LEVEL[own]:
            found.append(f"{module} imports {name} of a higher layer")
        kind_of_other = other in OF_KINDS and len(name.split(".")) > 2
        if own in OF_KINDS and kind_of_other and name != module:
            found.append(f"{module} imports the kind {name}")
    return found


def test_every_module_has_a_layer() -> None:
    assert sum(map(len, LAYERS)) == len(LEVEL)
    assert {layer_of(dotted(file)) for file in FILES} <= set(LEVEL)


@pytest.mark.parametrize("file", FILES, ids=dotted)
def test_imports_go_down(file: Path) -> None:
    if dotted(file) == "retrieval_kd":  # its lazy names are strings, not imports
        assert {layer_of(name) for name in imports(file) if name.startswith("retrieval_kd.")} <= LAYERS[0]
        return
    assert violations(file, imports(file)) == []


def test_the_rule_sees_what_it_forbids() -> None:
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from retrieval_kd.pipeline import Workspace
def f():
    from retrieval_kd import server
    from . import cross_encoder
    import retrieval_kd.train.loop
"""
    found = set(imports_of(ast.parse(source), "retrieval_kd.teachers.bm25", is_package=False))
    assert found == {
        "typing",
        "retrieval_kd.server",
        "retrieval_kd.teachers.cross_encoder",
        "retrieval_kd.train.loop",
    }
    assert violations(PACKAGE / "teachers" / "bm25.py", found) == [
        "retrieval_kd.teachers.bm25 imports retrieval_kd.server of a higher layer",
        "retrieval_kd.teachers.bm25 imports the kind retrieval_kd.teachers.cross_encoder",
        "retrieval_kd.teachers.bm25 imports retrieval_kd.train.loop of a higher layer",
    ]


def test_every_third_party_import_has_an_extra() -> None:
    found = {name.split(".")[0] for file in FILES for name in imports(file)}
    third_party = found - {"retrieval_kd"} - sys.stdlib_module_names
    assert sorted(third_party - BASE - set(EXTRA_OF)) == []


def test_extras_are_those_of_pyproject() -> None:
    pyproject = PACKAGE.parent / "pyproject.toml"
    if not pyproject.is_file():
        pytest.skip("not run from a checkout")
    declared = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(EXTRA_OF.values()) <= set(declared)


@pytest.mark.parametrize(
    "code",
    [
        "import retrieval_kd",
        "import retrieval_kd.encoder",
        "import retrieval_kd.server",
        "import retrieval_kd; retrieval_kd.Encoder; retrieval_kd.open_index; retrieval_kd.load_collection",
        "sys.argv = ['rkd', '--help']; runpy.run_module('retrieval_kd', run_name='__main__')",
        "sys.argv = ['rkd', 'serve', '--help']; runpy.run_module('retrieval_kd', run_name='__main__')",
        "from retrieval_kd.tables import kind_module; kind_module('index', 'faiss')",
        "import retrieval_kd.served_table",
    ],
)
def test_imports_without_torch(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", blocking(HEAVY) + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["index.impact", "pipeline.scores"])
def test_what_has_an_extra_of_its_own_does_without_torch(module: str) -> None:
    code = blocking({"torch", "transformers", "sentence_transformers"}) + f"import retrieval_kd.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("module", "package"), [("losses", "torch"), ("store.store", "duckdb")])
def test_the_blocker_blocks(module: str, package: str) -> None:
    code = blocking({package}) + f"import retrieval_kd.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"imported {package}" in done.stderr


def test_engines_are_loaded_when_they_are_asked_for() -> None:
    code = blocking({"openvino", "nncf"}) + "import retrieval_kd.engines, retrieval_kd.teachers.cross_encoder"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def protocol_methods(package: str) -> set[str]:
    """Methods that a package's protocols describe, so that its kinds need not."""
    tree = ast.parse((PACKAGE / package / "__init__.py").read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    protocols = [node for node in classes if any(ast.unparse(parent) == "Protocol" for parent in node.bases)]
    methods = [node for protocol in protocols for node in protocol.body if isinstance(node, ast.FunctionDef)]
    return {node.name for node in methods if ast.get_docstring(node)}


@pytest.mark.parametrize("file", FILES, ids=dotted)
def test_public_names_have_docstrings(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    missing = [] if ast.get_docstring(tree) or not tree.body else ["the module"]
    scopes: list[tuple[str, list[ast.stmt]]] = [("", tree.body)]
    described = {"forward"} | (protocol_methods(file.parent.name) if file.parent.name in OF_KINDS else set())
    while scopes:
        prefix, body = scopes.pop()
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node) and not (prefix and node.name in described):
                missing.append(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                scopes.append((f"{node.name}.", node.body))
    assert missing == []
