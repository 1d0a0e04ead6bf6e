"""What the laboratory's grid says so far: its rows, a verdict on each claim that they can test, and one paragraph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dist_ssl.evaluation.claims import MIN_SEEDS, Verdict, verdicts
from dist_ssl.evaluation.lab import Cell
from dist_ssl.evaluation.lab_rows import BASELINES, Row, baseline, paired, row_of, tasks_of


def summarize_lab(grid: list[Cell]) -> dict[str, Any]:
    """{"rows", "tasks", "verdicts", "paragraph", ...}: everything that the table, the page and lab.json show."""
    groups: dict[tuple[Any, ...], list[tuple[Cell, dict[str, Any]]]] = {}
    done = 0
    for cell in grid:
        group = groups.setdefault((cell.method, cell.head, cell.batch_norm, cell.output_dim, cell.control), [])
        results = cell.results()
        if results is not None:
            done += 1
            group.append((cell, results))
    rows = [row_of(members) for members in groups.values() if members]
    first = next((members[0][1] for members in groups.values() if members), None)
    tasks = {n: {"kind": t["kind"], "entropy_bits": t["entropy_bits"]} for n, t in tasks_of(first).items()}
    found = verdicts(rows, tasks)
    return {
        "rows": rows,
        "tasks": tasks,
        "chance": 1 / first["data"]["num_classes"] if first and first["data"]["num_classes"] else 0.0,
        "test_images": first["data"]["test_images"] if first else 0,
        "cells": len(grid),
        "done": done,
        "verdicts": found,
        "progress": progress(len(grid), done),
        "losses": losses(rows),
        "paragraph": paragraph(rows, found, len(grid), done),
    }


def to_json(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary as plain values, for lab.json."""
    rows, found = ([one.json() for one in summary[key]] for key in ("rows", "verdicts"))
    return summary | {"rows": rows, "verdicts": found}


def progress(cells: int, done: int) -> str:
    if not done:
        return "No cell of the grid is done yet."
    return f"{done} of {cells} cells are done."


def paragraph(rows: Sequence[Row], found: Sequence[Verdict], cells: int, done: int) -> str:
    """How far the grid is, a sentence a claim, and what z holds less of than h: by rule and without favour."""
    text = [progress(cells, done)] if done < cells else []
    return " ".join([*text, *(verdict.sentence() for verdict in found), losses(rows)]).strip()


def losses(rows: Sequence[Row]) -> str:
    """What z holds less of than h, each loss by its own interval: a list to look at, and no claim."""
    lost = []
    for row in rows:
        for task, layers in row.bits.items():
            change = paired(layers.get("h"), layers.get("z"))
            if row.head != "none" and change is not None and change.low > 0 and len(change.values) >= MIN_SEEDS:
                lost.append((change.mean, f"{task} ({change.mean:.2f} bits under {row.name})"))
    if lost:
        shown = ", ".join(name for _, name in sorted(lost, reverse=True)[:6])
        return f"What z holds less of than h, the largest losses first, each by its own interval: {shown}."
    if any(row.bits for row in rows):
        return "No loss of information from h to z is supported at this number of seeds."
    return ""


def show(summary: dict[str, Any], print_: Callable[[Any], None]) -> None:
    """The table and the paragraph, on the terminal."""
    from rich.table import Table

    probes = [(probe, layer) for probe in ("linear", "knn") for layer in ("h", "z")]
    table = Table(title=f"{summary['done']} of {summary['cells']} cells", caption="mean [95% over pretraining seeds]")
    table.add_column("head")
    for probe, layer in probes:
        table.add_column(f"{probe} {layer}", justify="right")
    for row in summary["rows"]:
        found = [row.top1.get(key) for key in probes]
        table.add_row(row.name, *(e.text() if e else "" for e in found))
    for other, said in BASELINES.items():
        without = [baseline(summary["rows"], probe, other) if layer == "h" else None for probe, layer in probes]
        if any(without):
            table.add_row(said, *(e.text() if e else "" for e in without))
    print_(table)
    print_(summary["paragraph"])
