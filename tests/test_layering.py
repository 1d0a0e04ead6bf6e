"""The architecture, read from the source: imports go downward, without a cycle, and nothing is named by a string."""

import ast
import functools
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up; a room may import the rooms on lines above its own, and within a line those that stand before it.
LAYERS = [
    ["dist_ssl", "dist_ssl.config"],
    ["dist_ssl.distributed", "dist_ssl.storage"],
    ["dist_ssl.models", "dist_ssl.objective", "dist_ssl.augment", "dist_ssl.data"],
    ["dist_ssl.engine", "dist_ssl.checkpoint"],
    ["dist_ssl.training", "dist_ssl.evaluation", "dist_ssl.report", "dist_ssl.planning"],
    ["dist_ssl.cli"],
    ["launch"],
]
ROOMS = [room for line in LAYERS for room in line]
# Who may name a module by a string, which is how a process starts another: pickled code and command lines.
NAMES_BY_STRING = {
    "dist_ssl.data.stream": {"dist_ssl.data.forkserver"},
}


@functools.cache
def modules(root=ROOT):
    """Module name -> syntax tree, packages under their own name."""
    found = {}
    for package in ("dist_ssl", "launch"):
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text())
    return found


def room(name):
    """The entry of LAYERS that a module is in."""
    parts = name.split(".")
    for length in range(len(parts), 1, -1):
        if ".".join(parts[:length]) in ROOMS:
            return ".".join(parts[:length])
    assert name == "dist_ssl" or parts[0] == "launch", f"{name}: which layer is it on? Put it into LAYERS"
    return parts[0]


def imported(tree, known):
    """What a module imports: of `from package import name` the module package.name where there is one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else node.module


def problems(found):
    """Everything in a source tree that breaks the architecture, one line each."""
    told = []
    graph = {name: {t for t in imported(tree, found) if t in found and t != name} for name, tree in found.items()}
    for name, targets in graph.items():
        for target in sorted(targets):
            if ROOMS.index(room(target)) > ROOMS.index(room(name)):
                told.append(f"{name} imports {target}, which stands above it")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        told.append(f"cycle: {' <- '.join(error.args[1])}")
    for name, tree in found.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                continue
            text = node.value.strip()
            if not re.fullmatch(r"(dist_ssl|launch)(\.\w+)+", text) or text not in found:
                continue
            if room(text) == room(name) or ROOMS.index(room(text)) < ROOMS.index(room(name)):
                continue  # it may look down at what it starts
            if text not in NAMES_BY_STRING.get(name, ()):
                told.append(f"{name} names {text} by a string, which stands above it")
    return told


def test_imports_go_downward_without_cycles_or_names_by_string():
    assert problems(modules()) == []


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("dist_ssl/data/plan.py", "from dist_ssl.training import train", "dist_ssl.data.plan imports "),
        ("dist_ssl/data/random.py", "from dist_ssl.data import plan", "cycle: "),
        ("dist_ssl/data/random.py", "def late():\n    from dist_ssl.data.plan import Plan\n    return Plan", "cycle: "),
        ("dist_ssl/evaluation/knn.py", 'COMMAND = ["-m", "launch.local"]', "dist_ssl.evaluation.knn names launch"),
    ],
)  # fmt: skip
def test_what_is_planted_is_found(file, line, expected):
    found = modules().copy()
    name = file.removesuffix(".py").replace("/", ".")
    found[name] = ast.parse((ROOT / file).read_text() + "\n" + line)
    assert any(problem.startswith(expected) for problem in problems(found))


def test_only_the_engine_knows_deepspeed_and_only_the_slurm_launcher_submitit():
    allowed = {"deepspeed": "dist_ssl.engine.", "submitit": "launch.slurm"}
    found = modules()
    for name, tree in found.items():
        for target in imported(tree, found):
            package = target.split(".")[0]
            assert package not in allowed or name.startswith(allowed[package]), f"{name} imports {target}"


def test_few_rooms_and_small_files():
    entries = {path.name for path in (ROOT / "dist_ssl").iterdir() if path.suffix in ("", ".py")}
    assert len(entries - {"__init__.py", "__pycache__"}) <= 14
    lines = {
        path: len(path.read_text().splitlines()) for p in ("dist_ssl", "launch") for path in (ROOT / p).rglob("*.py")
    }
    assert {str(path): count for path, count in lines.items() if count > 400} == {}
