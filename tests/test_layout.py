"""The house rules that a machine can check: imports point one way, rooms stay small, functions stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Rooms of each package from the ground up: a module imports its own room and rooms before it. Rooms of one line are
# not tied to each other in any other way.
ROOMS = {
    "gisp_kernels": (
        ROOT / "gisp_kernels",
        (
            "_version",
            "_ext",
            "backend",
            "checks",
            "layers",
            "groups",
            "families",
            "alignment",
            "forms",
            "triton",
            "ops",
            "ordering",
            "compaction",
            "record",
            "adapters",
            "testing",
        ),
    ),
    "gisp": (
        ROOT / "python" / "gisp",
        (
            "errors",
            "lazy",
            "files",
            "hub",
            "mapped",
            "progress",
            "config",
            "replicas",
            "model",
            "offload",
            "data",
            "stages",
            "score",
            "select",
            "run",
            "evaluate",
            "compensation",
            "export",
            "target",
            "report",
            "demo",
            "cli",
            "__main__",
        ),
    ),
    "benchmarks": (
        ROOT / "benchmarks",
        ("common", "decoders", "kernels", "embed", "infer", "prune", "studies", "quality"),
    ),
}
# From the ground up, too: what a package may import of the others.
PACKAGES = ("gisp_kernels", "gisp", "benchmarks")
MODULES_PER_FOLDER = 12
LINES_PER_FUNCTION = 60


def modules(package: str) -> dict[str, Path]:
    """Module name -> file of everything in a package but its face."""
    root = ROOMS[package][0]
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and "results" not in parts:
            found[".".join((package, *parts))] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules a file imports, wherever in the file the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down(package: str) -> None:
    known = {name: path for each in PACKAGES for name, path in modules(each).items()}
    rooms = ROOMS[package][1]
    wrong = []
    for name, path in modules(package).items():
        own = rooms.index(name.split(".")[1])
        for other in imports(path, known):
            top, _, rest = other.partition(".")
            if PACKAGES.index(top) > PACKAGES.index(package):
                wrong.append(f"{name} imports {other}, of a package above")
            elif top == package and rest and rooms.index(rest.split(".")[0]) > own:
                wrong.append(f"{name} imports {other}, of a room above")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_through_others(package: str) -> None:
    known = modules(package)
    graph = {name: {other for other in imports(path, known) if other in known} - {name} for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            pytest.fail(" -> ".join((*way[way.index(name) :], name)))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("folder", ["gisp_kernels", "python/gisp", "benchmarks"])
def test_rooms_are_small(folder: str) -> None:
    counts: dict[Path, int] = {}
    for path in (ROOT / folder).rglob("*.py"):
        if not path.name.startswith("__"):
            counts[path.parent] = counts.get(path.parent, 0) + 1
    crowded = {str(place.relative_to(ROOT)): count for place, count in counts.items() if count > MODULES_PER_FOLDER}
    assert not crowded


def test_functions_are_short() -> None:
    long = []
    for package in ("gisp_kernels", "gisp"):
        for name, path in modules(package).items():
            if name.startswith("gisp_kernels.triton."):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    lines = (node.end_lineno or 0) - node.lineno + 1
                    if lines > LINES_PER_FUNCTION:
                        long.append(f"{name}.{node.name}: {lines}")
    assert not long, "\n".join(long)
