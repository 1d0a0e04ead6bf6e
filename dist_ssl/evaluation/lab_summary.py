"""What the laboratory's numbers say: means over pretraining seeds, intervals, paired differences, one paragraph.

An interval here is over pretraining seeds (Student's t, 95%): what another seed would change. With three seeds it is
wide, and a difference whose interval holds zero is not claimed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dist_ssl.evaluation.intervals import mean_interval
from dist_ssl.evaluation.lab import Cell

LAYERS = ("h", "z", "h_untrained")
MIN_SEEDS = 3  # two differences that happen to be equal would have an interval of no width


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, its interval and the seeds' values {seed: value}."""

    mean: float
    low: float
    high: float
    values: dict[int, float]

    @classmethod
    def of(cls, values: dict[int, float]) -> Estimate | None:
        if not values:
            return None
        low, high = mean_interval(list(values.values()))
        return cls(sum(values.values()) / len(values), low, high, values)

    def text(self) -> str:
        """As people read it; one seed has no interval."""
        interval = f" [{max(self.low, 0):.1%}, {min(self.high, 1):.1%}]" if len(self.values) > 1 else " (1 seed)"
        return f"{self.mean:.1%}{interval}"

    def json(self) -> dict[str, Any]:
        return {"mean": self.mean, "interval": [self.low, self.high], "seeds": self.values}


@dataclass(frozen=True)
class Row:
    """One objective and head of the grid: top-1 by (probe, layer), and head information {task: {layer: bits}}."""

    name: str
    method: str  # empty where the grid has one objective
    head: str
    batch_norm: bool
    output_dim: int
    top1: dict[tuple[str, str], Estimate]
    bits: dict[str, dict[str, Estimate]]


def summarize_lab(grid: list[Cell]) -> dict[str, Any]:
    """{"rows": [...], "paragraph", "cells", "done"}: everything that the table, the figure and lab.json show."""
    groups: dict[tuple[str, str, bool, int], list[tuple[Cell, dict[str, Any]]]] = {}
    done = 0
    for cell in grid:
        group = groups.setdefault((cell.method, cell.head, cell.batch_norm, cell.output_dim), [])
        results = cell.results()
        if results is not None:
            done += 1
            group.append((cell, results))
    rows = [_row(key, members) for key, members in groups.items() if members]
    first = next((members[0][1] for members in groups.values() if members), None)
    return {
        "rows": rows,
        "tasks": {n: {"kind": t["kind"], "entropy_bits": t["entropy_bits"]} for n, t in _tasks(first).items()},
        "chance": 1 / first["data"]["num_classes"] if first else 0.0,
        "test_images": first["data"]["test_images"] if first else 0,
        "cells": len(grid),
        "done": done,
        "paragraph": paragraph(rows, len(grid), done),
    }


def to_json(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary as plain values, for lab.json."""
    rows = [
        {
            "name": row.name,
            "method": row.method,
            "head": row.head,
            "batch_norm": row.batch_norm,
            "output_dim": row.output_dim,
            "top1": {f"{probe}/{layer}": estimate.json() for (probe, layer), estimate in row.top1.items()},
            "bits": {task: {k: v.json() for k, v in layers.items()} for task, layers in row.bits.items()},
        }
        for row in summary["rows"]
    ]
    return summary | {"rows": rows}


def _tasks(results: dict[str, Any] | None) -> dict[str, Any]:
    found: dict[str, Any] = (results or {}).get("head_information", {}).get("tasks", {})
    return found


def _row(key: tuple[str, str, bool, int], members: list[tuple[Cell, dict[str, Any]]]) -> Row:
    method, head, batch_norm, dim = key
    top1, bits = {}, {}
    for probe in members[0][1]["probes"]:
        for layer in LAYERS:
            values = {
                cell.seed: results["probes"][probe][layer]["top1"]
                for cell, results in members
                if layer in results["probes"].get(probe, {})
            }
            estimate = Estimate.of(values)
            if estimate is not None:
                top1[probe, layer] = estimate
    for task in _tasks(members[0][1]):
        layers = list(_tasks(members[0][1])[task]["layers"])
        estimates = {
            layer: Estimate.of({cell.seed: _tasks(results)[task]["layers"][layer]["bits"] for cell, results in members})
            for layer in layers
        }
        bits[task] = {layer: estimate for layer, estimate in estimates.items() if estimate is not None}
    name = head if head == "none" else f"{head}, {dim}{'' if batch_norm else ', no batch norm'}"
    return Row(f"{method}: {name}" if method else name, method, head, batch_norm, dim, top1, bits)


def untrained(rows: list[Row], probe: str) -> Estimate | None:
    """Of h before training, a value a seed: it is the same whatever came after."""
    found = [row.top1[probe, "h_untrained"] for row in rows if (probe, "h_untrained") in row.top1]
    return Estimate.of({seed: value for estimate in found for seed, value in estimate.values.items()})


def paired(a: Estimate, b: Estimate) -> Estimate | None:
    """a - b over the seeds that both have: a seed fixes the data's order and the encoder's start."""
    return Estimate.of({seed: a.values[seed] - b.values[seed] for seed in a.values if seed in b.values})


def paragraph(rows: list[Row], cells: int, done: int) -> str:
    """What the numbers support and what they do not, at 95% over pretraining seeds, by rule and without favour."""
    if not rows:
        return "No cell of the grid is done yet."
    text = [f"{done} of {cells} cells are done."] if done < cells else []
    for row in rows:
        if row.head != "none" and ("linear", "h") in row.top1 and ("linear", "z") in row.top1:
            change = paired(row.top1["linear", "h"], row.top1["linear", "z"])
            text.append(_claim(f"With the head {row.name}, a linear probe on h against one on z", change))
    for better, worse in (("mlp", "linear"), ("linear", "none"), ("mlp", "none")):
        for a in rows:
            for b in rows:
                if _family(a) == better and _family(b) == worse and _matched(a, b) and ("linear", "h") in a.top1:
                    change = paired(a.top1["linear", "h"], b.top1["linear", "h"])
                    text.append(_claim(f"h under {a.name} against h under {b.name}", change))
    for row in rows:
        if row.method and {("knn", "h"), ("knn", "h_untrained")} <= set(row.top1):
            change = paired(row.top1["knn", "h"], row.top1["knn", "h_untrained"])
            text.append(_claim(f"Nearest neighbours on h under {row.name} against the untrained encoder's", change))
    lost = []
    for row in rows:
        for task, layers in row.bits.items():
            if row.head != "none" and {"h", "z"} <= set(layers):
                change = paired(layers["h"], layers["z"])
                if change is not None and change.low > 0 and len(change.values) >= MIN_SEEDS:
                    lost.append((change.mean, f"{task} ({change.mean:.2f} bits under {row.name})"))
    if lost:
        shown = ", ".join(name for _, name in sorted(lost, reverse=True)[:6])
        text.append(f"What z holds less of than h, the largest losses first: {shown}.")
    elif any(row.bits for row in rows):
        text.append("No loss of information from h to z is supported at this number of seeds.")
    return " ".join(text)


def _family(row: Row) -> str:
    return "mlp" if row.head.startswith("mlp") else row.head


def _matched(a: Row, b: Row) -> bool:
    if a.method != b.method:
        return False
    return b.head == "none" or (a.batch_norm == b.batch_norm and a.output_dim == b.output_dim)


def _claim(what: str, change: Estimate | None) -> str:
    if change is None:
        return f"{what}: no seed in common yet."
    points = f"{100 * change.mean:+.1f} points"
    if len(change.values) < MIN_SEEDS:
        return f"{what}: {points} over {len(change.values)} of at least {MIN_SEEDS} seeds, which supports nothing yet."
    interval = f"[{100 * change.low:+.1f}, {100 * change.high:+.1f}], {len(change.values)} seeds"
    if change.low > 0:
        return f"{what}: better by {points} {interval}."
    if change.high < 0:
        return f"{what}: worse, {points} {interval}."
    return f"{what}: no difference is supported, {points} {interval}."


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
    before = [untrained(summary["rows"], probe) if layer == "h" else None for probe, layer in probes]
    table.add_row("untrained", *(e.text() if e else "" for e in before))
    print_(table)
    print_(summary["paragraph"])
