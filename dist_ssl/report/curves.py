"""The report's curves: what a run logged, and below each what it means; a few are open, the others a click away."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from dist_ssl.report.elements import figure, grid, layer_colour, numbers_figure, section
from dist_ssl.report.runs import Run
from dist_ssl.report.svg import Series, legend, line_chart, number


@dataclass(frozen=True)
class Panel:
    """A chart: its title, what it means, and its metrics by the layers that they are of, "" where there is none."""

    title: str
    meaning: str
    metrics: dict[str, str]


def _of_h_and_z(name: str) -> dict[str, str]:
    return {"h": f"{name}_h", "z": f"{name}_z"}


OPEN = (
    Panel("Loss", "What is minimised, before the step.", {"": "loss"}),
    Panel(
        "Online linear probe (accuracy)",
        "A classifier that learns beside the run, on views of training images; it sends nothing back to the encoder.",
        _of_h_and_z("online_accuracy"),
    ),
    Panel(
        "Effective rank (RankMe)",
        "In how many dimensions the features spread: exp of the entropy of their singular values. A fall towards 1 is "
        "a collapse.",
        _of_h_and_z("rankme"),
    ),
)
MORE = (
    Panel("Learning rate", "", {"": "learning_rate"}),
    Panel(
        "Cosine of positives",
        "Of two views of one image: 1 where z does not tell them apart.",
        {"": "positive_similarity"},
    ),
    Panel(
        "Cosine of negatives", "Of views of different images: near 0 where they spread.", {"": "negative_similarity"}
    ),
    Panel("Alignment", "Mean squared distance of positives on the sphere: less is closer.", {"": "alignment"}),
    Panel(
        "Uniformity",
        "Log of the mean Gaussian potential of pairs: lower is more even on the sphere.",
        {"": "uniformity"},
    ),
    Panel(
        "log(views - 1) minus the loss",
        "log(2N - 1), for N images of two views, is the loss of a guess among all other views of the batch. What the "
        "loss is below it, in nats, is a lower bound of what a view tells about its partner.",
        {"": "loss_gap"},
    ),
    Panel("Invariance", "Mean squared difference of the views.", {"": "invariance"}),
    Panel("Prediction", "Mean squared distance to the mean of the global views.", {"": "prediction"}),
    Panel("SIGReg", "How far z is from a standard normal distribution, along random directions.", {"": "sigreg"}),
    Panel("Standard deviation of z", "Mean over its dimensions.", {"": "std_z"}),
    Panel("Dead dimensions of z", "Share whose standard deviation is below 0.5.", {"": "low_std_share"}),
    Panel("Correlation of a dimension between the views", "1 where it is the same in both.", {"": "diagonal"}),
    Panel("Correlation of different dimensions, squared", "0 where none repeats another.", {"": "off_diagonal"}),
    Panel("Cosine of prediction and target", "", {"": "prediction_similarity"}),
    Panel("Queries that find their key", "Share, among the keys of the sample.", {"": "query_accuracy"}),
    Panel("Gradient norm", "Of the averaged gradient.", {"": "gradient_norm"}),
    Panel("Norm of h", "Mean over images.", {"": "norm_h"}),
    Panel("Dead units of h", "Share that is 0 for every image of the sample.", {"": "dead_units_h"}),
    Panel("Images a second", "Of all ranks together.", {"": "images_per_second"}),
    Panel("Waiting for data", "Share of the time.", {"": "data_wait_fraction"}),
    Panel(
        "A rank's own seconds a step",
        "Waiting for its data and making its views: what the others can't be the reason of. Slowest, median, fastest.",
        {"slowest": "rank_seconds_max", "median": "rank_seconds_median", "fastest": "rank_seconds_min"},
    ),
    Panel("Slowest rank", "Which one it was: always the same one is a straggler.", {"": "slowest_rank"}),
)


def curves(runs: list[Run]) -> str:
    """Every known metric that a run logged, the runs laid over one another; of one run h and z are."""
    shown = grid([one for panel in OPEN for one in _figures(panel, runs)])
    more = [one for panel in MORE for one in _figures(panel, runs)]
    names = legend([(run.name, position) for position, run in enumerate(runs)]) if len(runs) > 1 else ""
    if more:
        summary = f"{len(more)} more: learning rate, geometry of h and z, speed"
        shown += f"<details><summary>{summary}</summary>{grid(more)}</details>"
    return section("Training", names + shown) if shown else ""


def _figures(panel: Panel, runs: list[Run]) -> list[str]:
    """The charts of a panel: one of one run, one a layer of several."""
    if len(runs) == 1:
        found = [
            Series(layer, *runs[0].curves[metric], layer_colour(layer) if layer else 0)
            for layer, metric in panel.metrics.items()
            if metric in runs[0].curves
        ]
        names = legend([(one.name, one.colour) for one in found]) if len(panel.metrics) > 1 else ""
        return [_figure(panel.title, panel.meaning, found, names)] if found else []
    figures = []
    for layer, metric in panel.metrics.items():
        found = [Series(run.name, *run.curves[metric], place) for place, run in enumerate(runs) if metric in run.curves]
        title = f"{panel.title}, {layer}" if layer else panel.title
        figures += [_figure(title, panel.meaning, found, "")] if found else []
    return figures


def _figure(title: str, meaning: str, series: list[Series], names: str) -> str:
    """Numbers where each series has one point or one value, else a chart."""
    if all(len(set(one.y)) == 1 for one in series):
        said = "at its only point" if all(len(one.y) == 1 for one in series) else "all along"
        values = [(one.name, number(one.y[0]), one.colour) for one in series]
        return numbers_figure(title, values, f"{said.capitalize()}. {escape(meaning)}")
    return figure(title, line_chart(series, label=title, x_label="step"), escape(meaning), names)
