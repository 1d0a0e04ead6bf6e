"""Sweeps: every combination of values as a run of its own, and one table of what came out."""

from __future__ import annotations

import itertools
import logging
import re
import sys
from pathlib import Path
from typing import Any

from dist_ssl import config as configuration
from dist_ssl.config import Config, UserError
from dist_ssl.config.environment import EXIT_RUN_ME_AGAIN
from dist_ssl.evaluation.results import converged, newest, stored
from dist_ssl.planning.before_start import check_config
from dist_ssl.report.status import last_line, status
from dist_ssl.storage.layout import checkpoint_store, committed_steps
from dist_ssl.storage.urls import join
from launch import child

log = logging.getLogger(__name__)


def combinations(base: Config, keys: list[str]) -> list[list[str]]:
    """Overrides of each run, its own `run.dir` and `checkpoint.url` included; one empty list where nothing is swept.

    `a.b=1,2` and `c.d=x,y` give four runs, RUN/b=1_d=x and so on. Commas within TOML's lists, tables and strings are a
    value's own. Raises UserError for a key without values, and for two runs of one folder.
    """
    if not keys:
        return [[]]
    choices = []
    for given in keys:
        key, equals, text = given.partition("=")
        values = _values(text)
        if not equals or "." not in key or not all(values):
            raise UserError(f"--sweep {given}: expected section.key=value,value")
        choices.append([f"{key}={value}" for value in values])
    short = [given.partition("=")[0].rpartition(".")[2] for given in keys]
    names = short if len(set(short)) == len(short) else [given.partition("=")[0] for given in keys]
    runs = []
    for combination in itertools.product(*choices):
        parts = [f"{name}={choice.partition('=')[2]}" for name, choice in zip(names, combination, strict=True)]
        folder = re.sub(r"[^\w=.+-]", "-", "_".join(parts))
        url = configuration.with_overrides(base, combination).checkpoint.url
        own = [configuration.override("checkpoint.url", join(url, folder))] if url else []
        runs.append([*combination, *own, configuration.override("run.dir", str(Path(base.run.dir) / folder))])
    if len({run[-1] for run in runs}) < len(runs):
        raise UserError(f"--sweep {' --sweep '.join(keys)}: expected values whose letters and digits differ")
    return runs


def _values(text: str) -> list[str]:
    """What stands between the commas that are in no list, table or string."""
    values, depth = [""], 0
    for token in re.findall(r'"(?:\\.|[^"\\])*"|\'[^\']*\'|.', text):
        depth += (token in "[{") - (token in "]}")
        if token == "," and depth <= 0:
            values.append("")
        else:
            values[-1] += token
    return values


def run(
    file: Path, base: Config, overrides: list[str], keys: list[str], ranks: int | None, evaluate: bool
) -> list[Path]:
    """Run all combinations on this machine, one after another; the directories of those that failed.

    A run whose last step is committed, and evaluated where that is asked for, is left alone; what its folder holds of
    another config is refused by `pretrain`. SystemExit(75) passes a request to be run again on. Raises UserError for a
    combination that no config takes, before the first one is run; StorageError where a store does not answer.
    """
    combined = combinations(base, keys)
    configs = [configuration.with_overrides(base, combination) for combination in combined]
    for config in configs:
        check_config(config, ranks or 1)
    failed = []
    for number, (combination, config) in enumerate(zip(combined, configs, strict=True), 1):
        folder = Path(config.run.dir)
        settings = [part for override in (*overrides, *combination) for part in ("--set", override)]
        of_ranks = ["--ranks", str(ranks)] if ranks else []
        last, commands = _last_step(config), []
        if last is None:
            commands.append(["launch.local", "pretrain", str(file), *settings, *of_ranks])
        if evaluate and not any(one.step == last for one in stored(folder)):
            commands.append(["launch.local", "evaluate", str(folder), *of_ranks])
        log.info("run %d of %d: %s%s", number, len(configs), folder, "" if commands else ", which is complete")
        for command in commands:
            code = child.run([sys.executable, "-m", *command])
            if code == EXIT_RUN_ME_AGAIN:
                raise SystemExit(EXIT_RUN_ME_AGAIN)
            if code:
                log.error("%s: %s ended with code %d", folder, command[1], code)
                failed.append(folder)
                break
    return failed


def _last_step(config: Config) -> int | None:
    """The last step of a run that is complete: committed, and of this config. None for any other.

    That step's metrics say nothing yet: they are written before its commit, which may fail.
    """
    folder = Path(config.run.dir)
    made_by = folder / "config.toml"
    if not made_by.exists() or configuration.resume_diff(configuration.load(made_by), config):
        return None
    committed = max(committed_steps(checkpoint_store(config)), default=None)
    return committed if committed == status(folder)["steps"] else None


def table(folder: str | Path) -> str:
    """A Markdown table with a row a run below `folder`; also written to `folder/table.md`."""
    rows = [_row(run) for run in sorted(Path(folder).iterdir()) if _has_begun(run)]
    if not rows:
        raise UserError(f"{folder}: no run of a sweep has started here")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if any(cell.endswith("%*") for line in lines for cell in line):
        text += "\n\n\\* the probe's fit did not converge"
    (Path(folder) / "table.md").write_text(text + "\n")
    return text


def progress(run_dir: Path) -> str:
    """One line: the last logged step and loss, and how the last start ended."""
    metrics, starts = last_line(run_dir / "metrics.jsonl"), last_line(run_dir / "slurm" / "starts.jsonl")
    trained = f"step {metrics['step']}, loss {_loss(metrics)}" if metrics else "no step logged yet"
    if not starts:
        return f"{trained}; not started yet"
    match starts:
        case {"event": "stop", "reason": reason}:
            return f"{trained}; stopped: {reason}"
        case {"event": "complete"}:
            return f"{trained}; complete"
        case {"event": event, "restart": restart}:
            return f"{trained}; {event} after {restart} requeues"
    raise AssertionError(starts)


def _has_begun(run: Path) -> bool:
    return (run / "slurm" / "starts.jsonl").exists() or (run / "config.toml").exists()


def _row(run: Path) -> dict[str, str]:
    row = {"run": run.name}
    metrics, starts = last_line(run / "metrics.jsonl"), last_line(run / "slurm" / "starts.jsonl")
    row["state"] = starts["event"] if starts else status(run)["state"]
    row |= {"step": str(metrics["step"]), "loss": _loss(metrics)} if metrics else {}
    for one in newest(stored(run)):
        prefix = f"{one.name}: " if one.name else ""
        for probe, layers in one.values["probes"].items():
            for layer, value in layers.items():
                row[f"{prefix}{probe} {layer}"] = f"{value['top1']:.1%}{'' if converged(value) else '*'}"
    return row


def _loss(metrics: dict[str, Any]) -> str:
    """JSON knows no NaN: a loss that was not finite is null in metrics.jsonl."""
    return "not finite" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
