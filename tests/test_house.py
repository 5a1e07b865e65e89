"""The house: imports go down only, method/ is the paper and nothing else, and no file grows too large to read."""

import ast
import graphlib

from conftest import REPOSITORY

_FLOORS = ("selection.run", "selection.method", "selection.rows", "selection.scores", "selection.report", "selection")
_FLOORS += ("finetune", "scripts")
_BESIDE = {("selection.method", "selection.run"), ("selection.rows", "selection.method")}
FILES = [path for top in ("selection", "finetune", "scripts") for path in sorted((REPOSITORY / top).rglob("*.py"))]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def _name(path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)


def _floor(module: str) -> str:
    return max((floor for floor in _FLOORS if f"{module}.".startswith(f"{floor}.")), key=len)


def _imports(path) -> list[tuple[str, str]]:
    """(module, name) of everything of ours that a file imports, inside functions too."""
    found = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.ImportFrom) and node.module]
    pairs = [(node.module, each.name) for node in found for each in node.names if node.module.split(".")[0] in _FLOORS]
    modules = {_name(path) for path in FILES}
    return [(f"{module}.{name}", "") if f"{module}.{name}" in modules else (module, name) for module, name in pairs]


def test_imports_go_down_and_take_public_names_and_no_file_is_too_long():
    for path in FILES:
        here = _floor(_name(path))
        for module, name in _imports(path):
            if name == "__version__":
                continue
            there = _floor(module)
            assert _FLOORS.index(there) <= _FLOORS.index(here) and (here, there) not in _BESIDE, f"{path}: {module}"
            assert not name.startswith("_"), f"{path} imports {name} of {module}"
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 450, path


def test_no_circle():
    graph = {_name(path): {module for module, _ in _imports(path)} for path in FILES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_method_reads_no_file_prints_nothing_and_raises_value_errors():
    nodes = [node for path in FILES if path.parent.name == "method" for node in ast.walk(TREES[path])]
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("open", "print"), ast.unparse(node)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            assert node.exc.func.id in ("ValueError", "NoPhi"), ast.unparse(node)  # the latter is one too
        if isinstance(node, ast.Import):
            assert {each.name.split(".")[0] for each in node.names}.isdisjoint({"yaml", "json", "pyarrow", "datasets"})
