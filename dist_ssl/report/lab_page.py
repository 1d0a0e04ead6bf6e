"""The laboratory's page: a verdict on each claim, a figure like SimCLR's figure 8, a table, what each head loses."""

from __future__ import annotations

from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any

from dist_ssl.config import AS_WIDE_AS_H
from dist_ssl.evaluation.claims import Verdict
from dist_ssl.evaluation.lab import kind_of
from dist_ssl.evaluation.lab_rows import BASELINES, Row, baseline
from dist_ssl.report.elements import FACTOR_COLOURS, figure, grid, percent, section, table
from dist_ssl.report.page import write_page
from dist_ssl.report.svg import NUM_COLOURS, Dot, Series, dot_chart, legend, line_chart

FIGURES = 9  # of what heads keep; the others are a click away, so that a phone shows no wall of panels


def build(summary: dict[str, Any], title: str, output: Path) -> Path:
    """Writes the page of `lab_summary.summarize_lab`'s answer and returns its path."""
    rows: list[Row] = summary["rows"]
    body = [f'<p class="lead">{escape(summary["progress"])}</p>']
    if rows:
        plain = [row for row in rows if not row.control]
        body += [_claims(summary["verdicts"]), _figure(plain, summary["chance"]), _table(rows, summary)]
        body.append(_losses(rows, summary))
    return write_page(title, [part for part in body if part], output)


def _claims(verdicts: list[Verdict]) -> str:
    """A row a claim, those with too few seeds too."""
    if not verdicts:
        return ""
    lines = []
    for verdict in verdicts:
        under = f" under {verdict.method}" if verdict.method else ""
        said = f"{escape(verdict.claim.says + under)}<br><span class='soft'>{escape(verdict.compared)}</span>"
        p = f"{verdict.p:.2g}" if verdict.p is not None else ""
        seeds = str(len(verdict.effect.values))
        lines.append([said, escape(verdict.claim.paper), f"<b>{verdict.outcome}</b>", *verdict.numbers(), seeds, p])
    lead = (
        "Effect: the mean over pairs of cells that differ in nothing else, seed by seed; 95% interval over pretraining "
        f"seeds; p after Holm's correction for {verdicts[0].comparisons} claims. Contradicted: the opposite is."
    )
    head = ["claim", "paper", "outcome", "effect", "interval", "seeds", "p"]
    return section("What papers claim, and what these cells say", table(head, lines, numeric=3), lead)


def _figure(rows: list[Row], chance: float) -> str:
    heads = list(dict.fromkeys(map(_kind, rows)))
    dims = sorted({row.output_dim for row in rows if not _flat(row.head)})
    views = [(probe, layer) for probe in ("linear", "knn") for layer in ("h", "z")]
    if len(dims) > 1:
        charts = [_by_dim(rows, view, heads, dims) for view in views]
    else:
        dots = [_dots(rows, view, heads) for view in views]
        everything = [dot for drawn in dots for dot in drawn]
        charts = [
            (dot_chart(drawn, label=" on ".join(view), reference=chance, beside=everything), "")
            for view, drawn in zip(views, dots, strict=True)
        ]
    figures = [
        figure(" on ".join(view), chart, after=names) for view, (chart, names) in zip(views, charts, strict=True)
    ]
    lead = "Top-1 by head and width of z; whiskers: 95% interval over pretraining seeds. Dashed: chance."
    return section("Heads compared", grid(figures), lead)


def _flat(head: str) -> bool:
    """Whether its z is as wide as h, whatever width is asked for: a level line in the figure."""
    return kind_of(head) in AS_WIDE_AS_H


def _kind(row: Row) -> tuple[str, str, bool]:
    return row.method, row.head, row.batch_norm


def _dots(rows: list[Row], view: tuple[str, str], heads: list[tuple[str, str, bool]]) -> list[Dot]:
    """A dot a head; beside those of h the untrained encoder's and the raw pixels'."""
    probe, layer = view
    dots = [
        Dot(f"{row.method} {row.head}".strip(), e.mean, max(e.low, 0.0), min(e.high, 1.0), heads.index(_kind(row)) % 7)
        for row in rows
        if (e := row.top1.get(view))
    ]
    for colour, (other, said) in zip((7, 6), BASELINES.items(), strict=True):
        pooled = baseline(rows, probe, other)
        if layer == "h" and pooled is not None:
            dots.append(Dot(said, pooled.mean, max(pooled.low, 0.0), min(pooled.high, 1.0), colour))
    return dots


def _by_dim(
    rows: list[Row], view: tuple[str, str], heads: list[tuple[str, str, bool]], dims: list[int]
) -> tuple[str, str]:
    """A line a head over the output dims, and its legend."""
    found = [(row, row.top1[view]) for row in rows if view in row.top1]
    series = []
    for colour, (method, head, batch_norm) in enumerate(heads):
        mine = [(row, e) for row, e in found if _kind(row) == (method, head, batch_norm)]
        if _flat(head) and mine:
            mine = [mine[0] for _ in dims]
        places = list(range(len(dims))) if _flat(head) else [dims.index(row.output_dim) for row, _ in mine]
        series.append(
            Series(
                " ".join([method, head]).strip() + ("" if batch_norm or _flat(head) else ", no batch norm"),
                places[: len(mine)],
                [e.mean for _, e in mine],
                colour % NUM_COLOURS,
                [max(e.low, 0.0) for _, e in mine],
                [min(e.high, 1.0) for _, e in mine],
            )
        )
    chart = line_chart(series, label=" on ".join(view), categories=[str(dim) for dim in dims], x_label="output dim")
    return chart, legend([(one.name, one.colour) for one in series])


def _table(rows: list[Row], summary: dict[str, Any]) -> str:
    columns = [(probe, layer) for probe in ("linear", "knn") for layer in ("h", "z") if (probe, layer) in rows[0].top1]
    cells = []
    for row in rows:
        line = [escape(row.name), str(len(row.top1[columns[0]].values)) if columns else ""]
        for column in columns:
            e = row.top1.get(column)
            seeds = " ".join(percent(value) for value in e.values.values()) if e else ""
            line.append(f"{e.text()}<br><span class='soft'>{seeds}</span>" if e else "")
        cells.append(line)
    for other, said in BASELINES.items():
        without = [baseline(rows, probe, other) if layer == "h" else None for probe, layer in columns]
        if any(without):
            cells.append([said, "", *(e.text() if e else "" for e in without)])
    head = ["head", "seeds", *(f"{probe}, {layer}" for probe, layer in columns)]
    lead = (
        f"{summary['done']} of {summary['cells']} cells done; {summary['test_images']:,} test images. Mean over "
        "pretraining seeds, 95% interval over them, and each seed's number."
    )
    return section("Table", table(head, cells), lead)


def _losses(rows: list[Row], summary: dict[str, Any]) -> str:
    tasks: dict[str, dict[str, Any]] = summary["tasks"]
    heads = [row for row in rows if row.bits]
    if not tasks or not heads:
        return ""
    cells = []
    for task, about in tasks.items():
        line = [escape(task.replace("_", " ")), f"{about['entropy_bits']:.2f}"]
        for row in heads:
            layers = row.bits.get(task, {})
            line.append(" → ".join(f"{layers[layer].mean:.2f}" for layer in ("h", "z") if layer in layers))
        cells.append(line)
    figures = [
        figure(f"{row.name}: {kind}s", *_depth_chart(row, kind, tasks))
        for row in heads
        if row.head != "none"
        for kind in ("transformation", "factor")
    ]
    head = ["bits, h → z", "entropy", *(escape(row.name) for row in heads)]
    lead = (
        "Bits against depth: the share of the entropy that a probe recovers, mean over seeds; 0 is guessing. Whiskers: "
        f"95% over seeds. {escape(summary['losses'])}"
    )
    shown = grid(figures[:FIGURES])
    if len(figures) > FIGURES:
        shown += f"<details><summary>{len(figures) - FIGURES} more heads</summary>{grid(figures[FIGURES:])}</details>"
    return section("What each head keeps", shown + table(head, cells), lead)


def _depth_chart(row: Row, kind: str, tasks: dict[str, dict[str, Any]]) -> tuple[str, str, str]:
    """(chart, caption, legend): a line a task of that kind, from h to z."""
    depth = list(next(iter(row.bits.values())))
    series = []
    drawn = [task for task in tasks if tasks[task]["kind"] == kind and task in row.bits]
    for colour, task in zip(cycle(FACTOR_COLOURS), drawn, strict=False):
        entropy = max(tasks[task]["entropy_bits"], 1e-9)
        found = [row.bits[task][layer] for layer in depth]
        series.append(
            Series(
                task.replace("_", " "),
                list(range(len(depth))),
                [e.mean / entropy for e in found],
                colour,
                [max(e.low, min(e.mean, 0.0)) / entropy for e in found],  # of few seeds it is wide: cut at 0
                [min(max(e.high, 0.0) / entropy, 1.0) for e in found],
            )
        )
    chart = line_chart(series, label=f"{row.name}, {kind}s", categories=depth, y_min=0.0) if series else ""
    return chart, "", legend([(one.name, one.colour) for one in series])
