"""The laboratory's numbers, a row for each objective, head and control: means over pretraining seeds, with intervals.

An interval here is over pretraining seeds (Student's t, 95%): what another seed would change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_ssl.evaluation.intervals import mean_interval
from dist_ssl.evaluation.lab import Cell

BASELINES = {"h_untrained": "untrained", "pixels": "raw pixels"}  # the same whatever head was trained
LAYERS = ("h", "z", *BASELINES)


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

    @classmethod
    def mean_of(cls, found: Sequence[Estimate | None]) -> Estimate | None:
        """The mean of several, over the seeds that all of them have; None where one is missing."""
        there = [one.values for one in found if one is not None]
        if not there or len(there) < len(found):
            return None
        seeds = [seed for seed in there[0] if all(seed in values for values in there)]
        return cls.of({seed: sum(values[seed] for values in there) / len(there) for seed in seeds})

    def text(self) -> str:
        """As people read it; one seed has no interval."""
        interval = f" [{max(self.low, 0):.1%}, {min(self.high, 1):.1%}]" if len(self.values) > 1 else " (1 seed)"
        return f"{self.mean:.1%}{interval}"

    def json(self) -> dict[str, Any]:
        return {"mean": self.mean, "interval": [self.low, self.high], "seeds": self.values}


def paired(a: Estimate | None, b: Estimate | None) -> Estimate | None:
    """a - b over the seeds that both have: a seed fixes the data's order and the encoder's start."""
    if a is None or b is None:
        return None
    return Estimate.of({seed: a.values[seed] - b.values[seed] for seed in a.values if seed in b.values})


@dataclass(frozen=True, kw_only=True)
class Row:
    """One objective, head and control: top-1 by (probe, layer), and head information {task: {layer: bits}}."""

    name: str
    method: str  # empty where the grid has one objective
    head: str
    batch_norm: bool
    output_dim: int
    control: str = ""
    top1: dict[tuple[str, str], Estimate]
    bits: dict[str, dict[str, Estimate]]

    def json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "method": self.method,
            "head": self.head,
            "batch_norm": self.batch_norm,
            "output_dim": self.output_dim,
            "control": self.control,
            "top1": {f"{probe}/{layer}": estimate.json() for (probe, layer), estimate in self.top1.items()},
            "bits": {task: {k: v.json() for k, v in layers.items()} for task, layers in self.bits.items()},
        }


def row_of(members: Sequence[tuple[Cell, dict[str, Any]]]) -> Row:
    """Of the cells of one group, which differ in the seed alone, and their results."""
    cell, first = members[0]
    top1, bits = {}, {}
    for probe in first["probes"]:
        for layer in LAYERS:
            values = {
                cell.seed: results["probes"][probe][layer]["top1"]
                for cell, results in members
                if layer in results["probes"].get(probe, {})
            }
            if estimate := Estimate.of(values):
                top1[probe, layer] = estimate
    for task, about in tasks_of(first).items():
        estimates = {
            layer: Estimate.of(
                {cell.seed: tasks_of(results)[task]["layers"][layer]["bits"] for cell, results in members}
            )
            for layer in about["layers"]
        }
        bits[task] = {layer: estimate for layer, estimate in estimates.items() if estimate is not None}
    return Row(
        name=cell.row_name,
        method=cell.method,
        head=cell.head,
        batch_norm=cell.batch_norm,
        output_dim=cell.output_dim,
        control=cell.control,
        top1=top1,
        bits=bits,
    )


def tasks_of(results: dict[str, Any] | None) -> dict[str, Any]:
    """The head information of some results: what was asked of each layer."""
    found: dict[str, Any] = (results or {}).get("head_information", {}).get("tasks", {})
    return found


def baseline(rows: Sequence[Row], probe: str, layer: str) -> Estimate | None:
    """Of a layer of BASELINES, a value a seed."""
    found = [row.top1[probe, layer] for row in rows if (probe, layer) in row.top1]
    return Estimate.of({seed: value for estimate in found for seed, value in estimate.values.items()})
