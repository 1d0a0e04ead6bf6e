"""Seconds that each command takes before it works: `python -m tests.benchmarks.startup`, two minutes on 2 CPU cores.

Prints a table: the whole command where it only looks, else the time until what the row names. The smallest of
three rounds, each after the files were read once; of what starts ranks one round.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time

ROUNDS = 3
DIST_SSL = [sys.executable, "-m", "dist_ssl.cli"]


def seconds(command: list[str], until: str | None = None) -> float:
    """Until a line of its output holds `until`, or until its end; it runs to its end in any case."""
    started, found = time.monotonic(), 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if until is not None and until in line and not found:
                found = time.monotonic() - started
    took = time.monotonic() - started
    if process.returncode not in (0, 1, 2) or (until is not None and not found):
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}, nothing said of {until!r}")
    return took if until is None else found


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        data, run = f"{place}/data", f"{place}/run"
        subprocess.run([*DIST_SSL, "shards", "write", "shapes:512", data, "--test-fraction", "0.25"], check=True)
        few = ["--set", f"run.dir={run}", "--set", "train.steps=2", "--set", "checkpoint.every_steps=2"]
        config = ["pretrain", "configs/debug_cpu.toml", "--data", data, *few]
        local = [sys.executable, "-m", "launch.local", *config, "--ranks", "2"]
        rows: list[tuple[str, list[str], str | None]] = [
            ("`launch.local pretrain`, 2 ranks, to its first line", local, "starting"),
            ("the same, with --restart, to what it is about to do", [*local, "--restart"], "data: "),
            ("the same, to the end of 2 steps and two checkpoints", [*local, "--restart"], "complete"),
            ("`pretrain`, one rank, to what it is about to do", [*DIST_SSL, *config, "--restart"], "data: "),
            (
                "`evaluate RUN`, to the features of 384 training images",
                [*DIST_SSL, "evaluate", run],
                "features of the train images: ",
            ),
            ("`--help`", [*DIST_SSL, "--help"], None),
            ("`config FILE`", [*DIST_SSL, "config", "configs/quickstart.toml"], None),
            ("`list`", [*DIST_SSL, "list"], None),
            ("`runs DIR`", [*DIST_SSL, "runs", place], None),
            ("`status RUN`", [*DIST_SSL, "status", run], None),
            ("`report RUN`", [*DIST_SSL, "report", run], None),
            ("`plan FILE`", [*DIST_SSL, "plan", "configs/quickstart.toml", "--num-images", "6400"], None),
            ("`export RUN FILE`", [*DIST_SSL, "export", run, f"{place}/encoder.safetensors"], None),
            (
                "a mistake in a config",
                [*DIST_SSL, "pretrain", "configs/quickstart.toml", "--set", "train.stepz=1"],
                None,
            ),
            (
                "an unknown encoder of timm, to `plan`",
                [*DIST_SSL, "plan", "configs/quickstart.toml", "--set", "model.encoder=timm/convnext_ato"],
                None,
            ),
            (
                "`--data` that is not there",
                [*DIST_SSL, "pretrain", "configs/quickstart.toml", "--data", f"{place}/none"],
                None,
            ),
        ]
        print("| command | seconds |\n|---|---|")
        for name, command, until in rows:
            rounds = ROUNDS if until is None else 1
            print(f"| {name} | {min(seconds(command, until) for _ in range(rounds)):.2f} |", flush=True)


if __name__ == "__main__":
    main()
