"""The report's sections: probes, head information, settings, how to reproduce. Each returns HTML, or "" when
the run has nothing to show there."""

from __future__ import annotations

import shlex
from html import escape
from itertools import chain, cycle
from typing import Any

from dist_ssl import config as configuration
from dist_ssl.data import quarantine
from dist_ssl.evaluation.results import TEACHER, Stored, converged, probe_name, probes_on_h
from dist_ssl.report import images
from dist_ssl.report.elements import (
    FACTOR_COLOURS,
    dots_figure,
    explained,
    figure,
    grid,
    layer_colour,
    layer_name,
    percent,
    section,
    span,
    table,
)
from dist_ssl.report.geometry import geometry, matrix
from dist_ssl.report.runs import Run
from dist_ssl.report.svg import Dot, Series, legend, line_chart


def not_evaluated(run: Run) -> str:
    command = f"dist-ssl evaluate {shlex.quote(str(run.folder))}"
    return (
        f'<p class="warning">{escape(run.name)} is not evaluated yet: run <code>{escape(command)}</code>, then this '
        "report again.</p>"
    )


def of_one(run: Run) -> list[str]:
    """What one run learned: the newest evaluation, earlier ones as a curve, those on other data after it."""
    latest = run.latest()
    if latest is None:
        return [not_evaluated(run)]
    parts = [_headline(latest.values), _several(run), _probes("What the frozen encoder knows", latest.values)]
    alike = [one for one in run.on(latest.data) if one.name == latest.name]
    parts += [head_information(latest.values), matrix(latest.values), geometry(latest.values), _over_steps(alike)]
    for one in run.results:
        if one not in alike:
            data = _data_name([one]) + ("" if one.step is None else f", step {one.step}")
            parts.append(_probes(f"On {data}", one.values, explain=False))
            parts += [show(one.values, f", on {data}") for show in (head_information, matrix, geometry)]
    return parts


def _headline(results: dict[str, Any]) -> str:
    probe = next((name for name in ("linear", "knn") if name in results["probes"]), None)
    if probe is None:
        return ""
    layers, data = results["probes"][probe], results["data"]
    said = "A linear probe" if probe == "linear" else "Nearest neighbours"
    of = results["checkpoint"] if results["step"] is None else f"step {results['step']}"
    of = f"the teacher of {of}" if results.get("teacher") else of
    text = f"{said} on <b>h</b> of {escape(of)} names the class of <b>{percent(layers['h']['top1'])}</b> "
    text += f"of {data['test_images']:,} test images ({data['num_classes']} classes)"
    others = []
    if "z" in layers:
        others.append(f"{percent(layers['z']['top1'])} on z, which the loss saw")
    if "h_untrained" in layers:
        others.append(f"{percent(layers['h_untrained']['top1'])} on h of the untrained encoder")
    if "pixels" in layers:
        others.append(f"{percent(layers['pixels']['top1'])} on raw pixels")
    return f'<p class="lead">{text}{": against " + " and ".join(others) if others else ""}.</p>'


def _several(run: Run) -> str:
    """The newest results on each data set in one table, as a transfer is told: a row a set, a column a probe on h."""
    newest = [run.on(data)[-1] for data in run.data()]
    if len(newest) < 2:
        return ""
    probes = probes_on_h(newest)
    rows = []
    for one in newest:
        data, found = one.values["data"], one.values["probes"]
        cells = (found.get(probe, {}).get("h") for probe in probes)
        counts = f"{data['num_classes']:,}", f"{data['test_images']:,}"
        rows.append([escape(_data_name([one])), *counts, *(_cell(value) if value else "" for value in cells)])
    head = ["data", "classes", "test images", *(escape(probe_name(probe)) for probe in probes)]
    return section("On each data set", table(head, rows), "Probes on h, top-1, 95% interval over test images.")


def _probes(title: str, results: dict[str, Any], explain: bool = True) -> str:
    if not results["probes"]:
        return ""
    chance = 1 / results["data"]["num_classes"]
    figures, rows = [], []
    dots = {
        probe: [
            Dot(layer_name(layer), value["top1"], value["interval"][0], value["interval"][1], layer_colour(layer))
            for layer, value in layers.items()
        ]
        for probe, layers in results["probes"].items()
    }
    everything = [dot for drawn in dots.values() for dot in drawn]
    for probe, layers in results["probes"].items():
        figures.append(dots_figure(probe_name(probe), dots[probe], reference=chance, beside=everything))
        for layer, value in layers.items():
            low, high = value["interval"]
            seeds = len(value["seeds"])
            spread = f"{100 * value['spread']:.2f}" if seeds > 1 else ""
            names = [escape(probe_name(probe)), escape(layer_name(layer))]
            rows.append([*names, percent(value["top1"]), span(low, high), str(seeds), spread, _fit(value)])
    compared_rows = [
        [
            escape(probe_name(one["probe"])),
            f"h minus {escape(layer_name(one['b']))}",
            f"{100 * one['difference']:+.1f}",
            f"{100 * one['interval'][0]:+.1f} to {100 * one['interval'][1]:+.1f}",
        ]
        for one in results.get("comparisons", [])
    ]
    data = results["data"]
    lead = f"Probes were fitted on {data['train_images']:,} images and scored on {data['test_images']:,} others."
    if explain:
        lead += f" Whiskers: 95% interval over test images. Dashed: chance. {explained(results['layers'])}"
    digest = results["encoder_digest"]
    proof = (
        f'<p class="soft">The encoder did not change: digest <code>{escape(digest["before"][:16])}</code> before, '
        f"<code>{escape(digest['after'][:16])}</code> after. Checkpoint "
        f"<code>{escape(results['checkpoint'])}</code>.</p>"
    )
    details = table(["probe", "layer", "top-1", "95% interval", "seeds", "spread", "fit"], rows, 2)
    if compared_rows:
        details += "<h3>Differences, in points, paired on the same images</h3>"
        details += table(["probe", "difference", "points", "95% interval"], compared_rows, 2)
    return section(title, grid(figures) + f"<details><summary>Numbers</summary>{details}</details>" + proof, lead)


def _fit(value: dict[str, Any]) -> str:
    """How the probe's fit ended, its worst seed's where there are several."""
    fits = value.get("fits")
    if not fits:
        return ""
    worst = max(fits, key=lambda fit: float(fit["gradient_norm"]))
    said = f"{worst['iterations']} iterations, gradient {worst['gradient_norm']:.0e}"
    return said if converged(value) else f"<b>not converged</b>: {said}"


def head_information(results: dict[str, Any], on: str = "") -> str:
    """The information picture: what a probe can still name at each depth, from h through the head to z."""
    found = results.get("head_information")
    if not found:
        return ""
    layers = list(next(iter(found["tasks"].values()))["layers"])
    figures, rows = [], []
    for kind, title in (("transformation", "Transformations of the image"), ("factor", "Factors of the image")):
        tasks = {name: task for name, task in found["tasks"].items() if task["kind"] == kind}
        series = []
        for colour, (name, task) in zip(cycle(FACTOR_COLOURS), tasks.items(), strict=False):
            entropy = max(task["entropy_bits"], 1e-9)
            values = [task["layers"][layer] for layer in layers]
            series.append(
                Series(
                    name.replace("_", " "),
                    list(range(len(layers))),
                    [value["bits"] / entropy for value in values],
                    colour,
                    [value["bits_interval"][0] / entropy for value in values],
                    [value["bits_interval"][1] / entropy for value in values],
                )
            )
            rows.append(
                [escape(name.replace("_", " ")), f"{task['entropy_bits']:.2f}", percent(task["chance"])]
                + [f"{value['bits']:.2f} / {percent(value['accuracy'])}" for value in values]
            )
        figures.append(_kept(title, series, layers))
    numbers = table(["", "entropy, bits", "chance", *map(escape, layers)], rows)
    lead = (
        "A small classifier is trained to name what was done to an image, or how it was made, from each layer. What it "
        "recovers is a lower bound of the information there: bits are the label's entropy minus the classifier's "
        "log-loss on other images."
    )
    details = f"<details><summary>Numbers: bits / accuracy</summary>{numbers}</details>"
    return section(f"What the head keeps, and what it throws away{on}", grid(figures) + details, lead)


def _kept(title: str, series: list[Series], layers: list[str]) -> str:
    """The tasks over the layers; of a lone layer, such as a file of weights has, a row a task."""
    said = "Share of the label's entropy that the probe recovers; 0 (dashed) is guessing, less is worse than that."
    if len(layers) > 1:
        chart = line_chart(series, label=title, categories=layers, y_min=0.0, reference=0.0)
        return figure(title, chart, said, legend([(one.name, one.colour) for one in series]))
    dots = [Dot(one.name, one.y[0], one.low[0], one.high[0], one.colour) for one in series if one.low and one.high]
    return dots_figure(f"{title}, from {layers[0]}", dots, reference=0.0, caption=said)


def _over_steps(results: list[Stored]) -> str:
    if len(results) < 2:
        return ""
    own = [(one.step or 0, one.values) for one in results]
    figures = []
    for probe in ("linear", "knn"):
        series = []
        for layer in ("h", "z"):
            points = [(s, r["probes"][probe][layer]) for s, r in own if layer in r["probes"].get(probe, {})]
            series.append(
                Series(
                    layer,
                    [float(step) for step, _ in points],
                    [value["top1"] for _, value in points],
                    layer_colour(layer),
                    [value["interval"][0] for _, value in points],
                    [value["interval"][1] for _, value in points],
                )
            )
        chart = line_chart(series, label=f"{probe} over steps", x_label="step")
        figures.append(
            figure(f"{probe_name(probe)} over training", chart, after=legend([(s.name, s.colour) for s in series]))
        )
    return section("Over training", grid(figures))


def compared(runs: list[Run]) -> list[str]:
    """For each data set a table and a chart a probe and layer, a row a run: results on other data don't compare."""
    own = [data for run in runs for data in run.data()[:1]]
    data = list(dict.fromkeys([*own, *(data for run in runs for data in run.data())]))
    if not data:
        return ['<p class="warning">None of these runs is evaluated yet.</p>']
    parts = [_compared_on(runs, one, only=len(data) == 1) for one in data]
    return parts + [not_evaluated(run) for run in runs if not run.results]


def _compared_on(runs: list[Run], data: tuple[str, ...], only: bool) -> str:
    found = [(position, run, run.on(data)[-1]) for position, run in enumerate(runs) if run.on(data)]
    probes = [p for p in ("linear", "knn") if any(p in one.values["probes"] for _, _, one in found)]
    layers = ["h", "z", "h_untrained"]
    if any("pixels" in one.values["layers"] for _, _, one in found):
        layers.append("pixels")
    columns = [(probe, layer) for probe in probes for layer in layers]
    rows = []
    for _, run, one in found:
        values = [one.values["probes"].get(probe, {}).get(layer) for probe, layer in columns]
        cells = [_cell(value) if value else "" for value in values]
        rows.append([escape(run.name), "" if one.step is None else str(one.step), *cells])
    head = ["run", "step", *(f"{probe_name(probe)}, {layer_name(layer)}" for probe, layer in columns)]
    short = _short([run.name for run in runs])
    dots = {
        f"{probe_name(probe)} on {layer}": [
            Dot(short[position], value["top1"], value["interval"][0], value["interval"][1], position)
            for position, run, one in found
            if (value := one.values["probes"].get(probe, {}).get(layer))
        ]
        for probe in probes
        for layer in ("h", "z")
    }
    everything = [dot for drawn in dots.values() for dot in drawn]
    figures = [dots_figure(name, drawn, beside=everything) for name, drawn in dots.items()]
    absent = [run.name for run in runs if run.results and not run.on(data)]
    missing = f'<p class="soft">Not evaluated on these images: {escape(", ".join(absent))}.</p>' if absent else ""
    title = "What the frozen encoders know"
    if not only:
        title += f", on {_data_name([one for _, _, one in found])}"
    lead = f"Whiskers: 95% interval over test images. {explained(layers)}"
    return section(title, grid(figures) + table(head, rows) + missing, lead)


def _short(names: list[str], limit: int = 14) -> list[str]:
    """What tells names apart, for a chart's margin: without the parts that all begin or end with."""
    parts = [name.split("-") for name in names]
    while max(map(len, names)) > limit and len(names) > 1 and min(map(len, parts)) > 1:
        if len({part[-1] for part in parts}) == 1:
            parts = [part[:-1] for part in parts]
        elif len({part[0] for part in parts}) == 1:
            parts = [part[1:] for part in parts]
        else:
            break
    shortened = ("-".join(part) for part in parts)
    return [name if len(name) <= limit else f"{name[: limit - 1]}…" for name in shortened]


def _cell(value: dict[str, Any]) -> str:
    mark = "" if converged(value) else " (not converged)"
    return f"{percent(value['top1'])}{mark}<br><span class='soft'>{span(*value['interval'])}</span>"


def _data_name(results: list[Stored]) -> str:
    """What people call a data set: the name of its results, or where its test images are."""
    names = [one.name for one in results if one.name]
    if names and results[0].values.get("teacher"):
        return f"{names[0].removeprefix(TEACHER).removeprefix('-') or 'its own data'}, by the teacher"
    return names[0] if names else str(results[0].values["data"].get("test_shards", "their own data"))


def pictures(run: Run) -> list[str]:
    """Images: neighbours, the embedding map, views as trained."""
    shown = run.pictures()
    if shown is None:
        return []
    return images.sections(shown.folder / "pictures.npz", shown.values["data"].get("class_names", []))


def bad_samples(runs: list[Run]) -> str:
    """How many samples could not be used, and the first of them."""
    rows = []
    for run in runs:
        found = quarantine.bad_samples(run.folder)
        named = ", ".join(f"{one['key']} ({one.get('reason')})" for one in found[: quarantine.NUM_TOLD])
        if found:
            rows.append([escape(run.name), escape(named), str(len(found))])
    lead = (
        "Samples that could not be read or decoded, each replaced by the next one of its shard whenever its turn came."
    )
    return section("Replaced samples", table(["run", "the first of them", "samples"], rows, 2), lead) if rows else ""


def settings(runs: list[Run]) -> str:
    """One run's config, or what differs between several."""
    if len(runs) == 1:
        text = escape(configuration.dumps(runs[0].config))
        return section("Config", f"<details><summary>config.toml</summary><pre><code>{text}</code></pre></details>")
    flat = [configuration.flat(run.config) for run in runs]
    keys = [key for key in dict.fromkeys(chain(*flat)) if any(one.get(key) != flat[0].get(key) for one in flat)]
    rows = [[f"<code>{escape(key)}</code>", *(escape(str(one.get(key, "not set"))) for one in flat)] for key in keys]
    return section("What differs in their configs", table(["key", *(escape(run.name) for run in runs)], rows, 99))


def reproduce(runs: list[Run]) -> str:
    """Commands, with as many ranks as there were, and the versions that were used."""
    lines, rows = [], []
    for run in runs:
        if run.curves or run.ranks:
            config = shlex.quote(f"{run.folder}/config.toml")
            lines.append(_on_ranks(f"pretrain {config} --set run.dir=NEW_DIR", run.ranks))
        latest = [run.on(data)[-1] for data in run.data()]
        lines += [_evaluation(run, one) for one in latest] or [f"dist-ssl evaluate {shlex.quote(str(run.folder))}"]
        if latest:
            versions = latest[0].values["versions"]
            rows.append([escape(run.name), escape(", ".join(f"{k} {v}" for k, v in versions.items()))])
    commands = escape("\n".join([*lines, "dist-ssl report " + shlex.join(str(run.folder) for run in runs)]))
    body = f"<pre><code>{commands}</code></pre>" + (table(["run", "versions"], rows, 9) if rows else "")
    return section("How to reproduce", body)


def _evaluation(run: Run, one: Stored) -> str:
    """The command that gave these results."""
    values, data, folder = one.values, one.values["data"], shlex.quote(str(run.folder))
    if one.step is None:
        weights = shlex.quote(str(values["checkpoint"]))
        what = f"evaluate --weights {weights} --encoder {values['encoder']} --output {folder}"
    else:
        what = f"evaluate {folder} --checkpoint {one.step}"
    if (one.step is None or one.name) and "train_shards" in data:
        train, test = (shlex.quote(data[f"{part}_shards"]) for part in ("train", "test"))
        what += f" --train-shards {train} --test-shards {test}"
    if values.get("teacher"):
        what += " --teacher"
        return _on_ranks(what + _named(one.name.removeprefix(TEACHER).removeprefix("-")), values.get("ranks"))
    return _on_ranks(what + _named(one.name), values.get("ranks"))


def _named(data: str) -> str:
    return f" --name {shlex.quote(data)}" if data else ""


def _on_ranks(command: str, ranks: int | None) -> str:
    return f"python -m launch.local {command} --ranks {ranks}" if ranks and ranks > 1 else f"dist-ssl {command}"
