"""Imports go downward only, read from the source; and who may know DeepSpeed and submitit."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# From the bottom up; a module may import what stands on its own line or on a line above it.
LAYERS = [
    [
        "dist_ssl",
        "dist_ssl.config",
        "dist_ssl.ranks",
        "dist_ssl.distributed",
        "dist_ssl.progress",
        "dist_ssl.storage",
        "dist_ssl.large_reads",
    ],
    [
        "dist_ssl.data",
        "dist_ssl.models",
        "dist_ssl.nt_xent_tiles",
        "dist_ssl.nt_xent_triton",
        "dist_ssl.objective",
        "dist_ssl.objective_checks",
        "dist_ssl.optim",
        "dist_ssl.diagnostics",
        "dist_ssl.fragments",
    ],
    [
        "dist_ssl.partition",
        "dist_ssl.engine",
        "dist_ssl.checkpoint",
        "dist_ssl.checkpoint_writer",
        "dist_ssl.observability",
        "dist_ssl.interrupts",
        "dist_ssl.run_directory",
    ],
    ["dist_ssl.step"],
    ["dist_ssl.train", "dist_ssl.evaluation", "dist_ssl.report"],
    ["dist_ssl.planner", "dist_ssl.doctor"],
    ["dist_ssl.cli"],
    ["launch"],
]


def modules():
    for package in ("dist_ssl", "launch"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name, ast.parse(path.read_text())


def layer(name):
    """The line of LAYERS that a module, or the package it is in, stands on."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for number, line in enumerate(LAYERS):
            prefix = ".".join(parts[:length])
            if prefix in line and (prefix != "dist_ssl" or name == "dist_ssl"):
                return number
    raise AssertionError(f"{name}: which layer is it on? Put it into LAYERS")


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


ALL = {name for name, _ in modules()}


def test_imports_go_downward():
    for name, tree in modules():
        for target in imported(tree):
            if target in ALL and target != name:
                assert layer(target) <= layer(name), f"{name} imports {target}, which stands above it"


def test_only_engine_and_partition_know_deepspeed_and_only_the_slurm_launcher_submitit():
    allowed = {
        "deepspeed": {"dist_ssl.engine", "dist_ssl.partition"},
        "submitit": {"launch.slurm"},
    }
    for name, tree in modules():
        for target in imported(tree):
            package = target.split(".")[0]
            assert name in allowed.get(package, {name}), f"{name} imports {target}"


def test_one_loop_and_small_files():
    lines = {
        name: len((ROOT / name.replace(".", "/")).with_suffix(".py").read_text().splitlines())
        for name in ALL
        if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()
    }
    assert {name: n for name, n in lines.items() if n > 400} == {}
