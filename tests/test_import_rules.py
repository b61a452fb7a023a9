"""Who may know whom: the table of docs/architecture.md, read from the syntax trees."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("models", "pipelines", "jobs", "infra", "benchmarks", "tests")
MAX_LINES = 400
DEFINITION = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

# What a folder may import besides the standard library; None: any library.
ALLOWED: dict[str, tuple[set[str] | None, set[str]]] = {
    "models": ({"torch", "numpy"}, {"models"}),
    "infra": ({"pyarrow", "boto3", "botocore", "yaml", "psutil", "fsspec", "aiohttp", "cryptography"}, {"infra"}),
    "pipelines": (None, {"models", "pipelines"}),
    "jobs": (None, {"models", "pipelines", "infra", "jobs"}),
}


def _files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; name the module in full"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _offences(folder: str) -> list[str]:
    libraries, own = ALLOWED[folder]
    offences = []
    for path in _files(folder):
        for line, name in _imports(path):
            top = name.partition(".")[0]
            foreign = top in OURS and top not in own
            unknown = libraries is not None and top not in libraries | own and top not in sys.stdlib_module_names
            if foreign or unknown:
                offences.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return offences


@pytest.mark.parametrize("folder", ALLOWED)
def test_folder_imports_only_what_it_may(folder):
    assert _files(folder)
    assert _offences(folder) == []


@pytest.mark.parametrize(
    ("library", "owner"),
    [("mlflow", "pipelines/tracking"), ("ray.tune", "pipelines/sweep"), ("ray.rllib", "pipelines/agents")],
)
def test_library_has_one_owner(library, owner):
    strangers = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for folder in ("models", "pipelines", "jobs", "infra")
        for path in _files(folder)
        for line, name in _imports(path)
        if (name == library or name.startswith(f"{library}."))
        and not str(path.relative_to(ROOT)).startswith((f"{owner}/", f"{owner}.py"))
    ]
    assert strangers == []


def test_no_module_needs_itself():
    graph = {}
    for folder in OURS:
        for path in _files(folder):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            graph[name] = {imported for _, imported in _imports(path)}
    for name, imported in graph.items():  # `from a import b` names a module, or what is in one
        graph[name] = {m if m in graph else m.rpartition(".")[0] for m in imported} & graph.keys() - {name}
    TopologicalSorter(graph).prepare()  # CycleError names the modules of a cycle


def _private_of_ray() -> list[str]:
    """Places that import an underscored part of Ray or, in a file that knows Ray, use an underscored attribute that is
    defined nowhere in this project."""
    trees = {path: ast.parse(path.read_text()) for folder in OURS for path in _files(folder)}
    ours = {node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, DEFINITION)}
    ours |= {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store) and not _of_a_context(node)
    }
    found = []
    for path, tree in trees.items():
        imports = [(line, name) for line, name in _imports(path) if name.partition(".")[0] == "ray"]
        places = [(line, name) for line, name in imports if any(part.startswith("_") for part in name.split("."))]
        if imports:
            places += [
                (node.lineno, node.attr)
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute)
                and re.fullmatch(r"_[a-zA-Z]\w*", node.attr)
                and node.attr not in ours
                and getattr(node.value, "id", "") not in ("os", "sys")
            ]
        found += [f"{path.relative_to(ROOT)}:{line} uses {name}" for line, name in places]
    return found


def _of_a_context(node: ast.AST) -> bool:
    """`context._x = …` sets something of Ray's, where `self._x = …` defines something of ours."""
    return isinstance(node, ast.Attribute) and getattr(node.value, "id", "") != "self"


def test_what_is_private_to_ray_has_one_owner():
    places = _private_of_ray()
    assert {place.partition(":")[0] for place in places} == {"pipelines/ray_private.py"}
    assert any("_max_num_blocks" in place for place in places)  # set, imported and asked: all are seen
    assert any("ray._private.internal_api" in place for place in places)
    assert any("_output_node" in place for place in places)


def test_the_rules_can_fail(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "bad.py").write_text("def f():\n    import ray\n    from pipelines import config\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert _offences("models") == ["models/bad.py:2 imports ray", "models/bad.py:3 imports pipelines.config"]


def test_files_stay_readable():
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in OURS
        for path in _files(folder)
        if (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert long == {}


@pytest.mark.parametrize(
    ("imports", "unwanted"),
    [
        ("models, models.contract, models.gan.dcgan, models.vae.vae", {"ray", "mlflow", "pyarrow"}),
        ("infra.storage, infra.local", {"ray", "mlflow", "torch"}),
        ("jobs.entry", {"ray", "mlflow", "torch"}),
    ],
)
def test_importing_loads_nothing_heavy_that_it_does_not_need(imports, unwanted):
    code = f"import sys, {imports}\nprint(*(set({sorted(unwanted)!r}) & sys.modules.keys()))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
