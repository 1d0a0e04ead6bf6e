"""The report's section on what papers argue with: each layer on each task, spectra, and what the head does to views."""

from __future__ import annotations

from html import escape
from typing import Any

from dist_ssl.evaluation.results import accuracy_matrix
from dist_ssl.report.elements import figure, grid, layer_colour, layer_name, percent, section, table
from dist_ssl.report.svg import Dot, Series, dot_chart, legend, line_chart, number

TOLD = {
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "condition": "condition number",
    "alignment": "alignment",
    "uniformity": "uniformity",
}


def matrix(results: dict[str, Any], on: str = "") -> str:
    """Accuracy of every layer on every task, the winner bold; nothing of one layer or one task."""
    found = accuracy_matrix(results)
    if len(found) < 2:
        return ""
    layers = list(dict.fromkeys(layer for task in found.values() for layer in task["accuracy"]))
    rows = []
    for name, task in found.items():
        cells = {layer: percent(value) for layer, value in task["accuracy"].items()}
        cells[task["best"]] = f"<b>{cells[task['best']]}</b>"
        rows.append([escape(name.replace("_", " ")), *(cells.get(layer, "") for layer in layers)])
    wins = [f"{layer} {sum(task['best'] == layer for task in found.values())}" for layer in layers]
    lead = (
        "Accuracy of each layer on each task, the highest bold (after Bordes et al. 2022); differences of a point may "
        f"be chance. Won: {', '.join(wins)}."
    )
    body = f"<details><summary>{len(rows)} tasks</summary>{table(['task', *layers], rows)}</details>"
    return section(f"Which layer knows what{on}", body, lead)


def geometry(results: dict[str, Any], on: str = "") -> str:
    """Spectra, a table of numbers a layer, and the head's gains."""
    found = results.get("geometry")
    if not found:
        return ""
    series, rows = [], []
    for layer, values in found["layers"].items():
        x, y = zip(*values["spectrum"], strict=True) if values["spectrum"] else ((), ())
        series.append(Series(layer_name(layer), x, y, layer_colour(layer)))
        told = [number(values[key]) if key in values else "" for key in TOLD]
        above = " / ".join(map(str, values["above"]))
        rows.append([escape(layer_name(layer)), f"{values['rank']} of {values['dim']}", above, *told])
    spectra = figure(
        "Singular values of the covariance",
        line_chart(series, label="spectra", x_label="number"),
        "log10 of each by the largest.",
        legend([(one.name, one.colour) for one in series]),
    )
    head = ["layer", "rank", "above 1e-1 / -2 / -3 / -4", *TOLD.values()]
    lead = (
        f"Spectrum, rank, condition and RankMe of all test images; the others of {found['images']} images, "
        f"{found['views']} views each. Definitions: docs/laboratory.md."
    )
    return section(f"Geometry of each layer{on}", grid([spectra, _gains(found)]) + table(head, rows), lead)


def _gains(found: dict[str, Any]) -> str:
    """What the head's Jacobian does to each augmentation, and how much of h is in z."""
    head = found.get("head")
    if not head or not head["gains"]:
        return ""
    dots = [
        Dot(name, one["gain"], one["interval"][0], one["interval"][1], 0 if name in head["trained_on"] else 7)
        for name, one in head["gains"].items()
    ]
    said = (
        "How long the head makes a step of h, by a random step's: below 1 it is shrunk. Blue: what training's views "
        f"are moved by. I(h; z) = {head['information']:.2f} nats, of at most {head['entropy_of_h']:.2f}."
    )
    chart = dot_chart(dots, label="gains", reference=1.0, percent=False)
    return figure("What the head does to augmentations", chart, said)
