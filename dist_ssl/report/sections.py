"""The report's sections: probes, head information, curves, settings, how to reproduce. Each returns HTML, or "" when
the run has nothing to show there."""

from __future__ import annotations

from html import escape
from itertools import cycle
from typing import Any

from dist_ssl import config as configuration
from dist_ssl.data import quarantine
from dist_ssl.report.runs import Run
from dist_ssl.report.svg import Dot, Series, dot_chart, legend, line_chart

CURVES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "online_accuracy_h": "Online linear probe of h (accuracy)",
    "online_accuracy_z": "Online linear probe of z (accuracy)",
    "rankme_h": "Effective rank of h (RankMe)",
    "rankme_z": "Effective rank of z (RankMe)",
    "positive_similarity": "Cosine of positives",
    "negative_similarity": "Cosine of negatives",
    "alignment": "Alignment (squared distance of positives)",
    "uniformity": "Uniformity (log potential, lower is more even)",
    "loss_gap": "log(2N - 1) minus the loss",
    "gradient_norm": "Gradient norm",
    "norm_h": "Norm of h",
    "dead_units_h": "Dead units of h (share)",
    "images_per_second": "Images a second",
    "data_wait_fraction": "Share of time spent waiting for data",
}

FACTOR_COLOURS = (0, 1, 2, 3, 7, 6, 8, 9, 10, 11, 15, 14)  # neighbours that differ most; from 8 on dashed


def layer_colour(layer: str) -> int:
    """h is blue, z orange, the untrained encoder grey, wherever they appear."""
    fixed = {"h": 0, "z": 1, "h_untrained": 7}
    if layer in fixed:
        return fixed[layer]
    return 2 + (int(layer[1:]) - 1) % 5 if layer[:1] == "g" and layer[1:].isdigit() else 6


def layer_name(layer: str) -> str:
    return "untrained h" if layer == "h_untrained" else layer


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _range(low: float, high: float) -> str:
    return f"{percent(low)} to {percent(high)}"


def figure(title: str, chart: str, caption: str = "", after: str = "") -> str:
    if not chart:
        return ""
    caption = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(title)}</h3>{chart}{after}{caption}</figure>"


def section(title: str, body: str, lead: str = "") -> str:
    lead = f"<p>{lead}</p>" if lead else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>" if body else ""


def grid(figures: list[str]) -> str:
    figures = [one for one in figures if one]
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def table(head: list[str], rows: list[list[str]], numeric: int = 1) -> str:
    """Cells are HTML already; columns from `numeric` on are right-aligned."""
    kind = ["" if i < numeric else ' class="n"' for i in range(len(head))]
    top = "".join(f"<th{k}>{cell}</th>" for k, cell in zip(kind, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{cell}</td>" for k, cell in zip(kind, row, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def not_evaluated(run: Run) -> str:
    command = f"dist-ssl evaluate {run.folder}"
    return (
        f'<p class="warning">{escape(run.name)} is not evaluated yet: run <code>{escape(command)}</code>, then this '
        "report again.</p>"
    )


def of_one(run: Run) -> list[str]:
    """What one run learned: the newest evaluation, earlier ones as a curve, other data's beside it."""
    results = run.latest()
    if results is None:
        return [not_evaluated(run)]
    parts = [f'<p class="lead">{_headline(results)}</p>', _probes("What the frozen encoder knows", results)]
    parts.append(head_information(results))
    parts.append(_over_steps(run))
    for (step, name), other in run.results.items():
        if name:
            parts.append(_probes(f"On {name}, step {step}", other))
    return parts


def _headline(results: dict[str, Any]) -> str:
    probe = next((name for name in ("linear", "knn") if name in results["probes"]), None)
    if probe is None:
        return ""
    layers, data = results["probes"][probe], results["data"]
    said = "A linear probe" if probe == "linear" else "Nearest neighbours"
    text = f"{said} on <b>h</b> of step {results['step']} names the class of <b>{percent(layers['h']['top1'])}</b> "
    text += f"of {data['test_images']:,} test images ({data['num_classes']} classes)"
    others = []
    if "z" in layers:
        others.append(f"{percent(layers['z']['top1'])} on z, which the loss saw")
    if "h_untrained" in layers:
        others.append(f"{percent(layers['h_untrained']['top1'])} on h of the untrained encoder")
    return text + (": against " + " and ".join(others) if others else "") + "."


def _probes(title: str, results: dict[str, Any]) -> str:
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
        chart = dot_chart(dots[probe], label=f"{probe} accuracy", reference=chance, beside=everything)
        figures.append(figure(probe.replace("_", " "), chart))
        for layer, value in layers.items():
            low, high = value["interval"]
            seeds = len(value["seeds"])
            spread = f"{100 * value['spread']:.2f}" if seeds > 1 else ""
            rows.append(
                [
                    escape(probe.replace("_", " ")),
                    escape(layer_name(layer)),
                    percent(value["top1"]),
                    _range(low, high),
                    str(seeds),
                    spread,
                ]
            )
    compared_rows = [
        [
            escape(one["probe"]),
            f"h minus {escape(layer_name(one['b']))}",
            f"{100 * one['difference']:+.1f}",
            f"{100 * one['interval'][0]:+.1f} to {100 * one['interval'][1]:+.1f}",
        ]
        for one in results.get("comparisons", [])
    ]
    data = results["data"]
    lead = (
        f"Probes were fitted on {data['train_images']:,} images and scored on {data['test_images']:,} others. "
        "Whiskers: 95% interval over test images. Dashed: chance."
    )
    digest = results["encoder_digest"]
    proof = (
        f'<p class="soft">The encoder did not change: digest <code>{escape(digest["before"][:16])}</code> before, '
        f"<code>{escape(digest['after'][:16])}</code> after. Checkpoint "
        f"<code>{escape(results['checkpoint'])}</code>.</p>"
    )
    details = table(["probe", "layer", "top-1", "95% interval", "seeds", "spread"], rows, 2)
    if compared_rows:
        details += "<h3>Differences, in points, paired on the same images</h3>"
        details += table(["probe", "difference", "points", "95% interval"], compared_rows, 2)
    return section(title, grid(figures) + f"<details><summary>Numbers</summary>{details}</details>" + proof, lead)


def head_information(results: dict[str, Any]) -> str:
    """The information picture: what a probe can still name at each depth, from h through the head to z."""
    found = results.get("head_information")
    if not found:
        return ""
    layers = [layer for layer in results["layers"] if layer != "h_untrained"]
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
                    [max(value["bits"], 0.0) / entropy for value in values],
                    colour,
                    [max(value["bits_interval"][0], 0.0) / entropy for value in values],
                    [max(value["bits_interval"][1], 0.0) / entropy for value in values],
                )
            )
            rows.append(
                [escape(name.replace("_", " ")), f"{task['entropy_bits']:.2f}", percent(task["chance"])]
                + [f"{value['bits']:.2f} / {percent(value['accuracy'])}" for value in values]
            )
        chart = line_chart(series, label=title, categories=layers, y_min=0.0) if series else ""
        names = legend([(one.name, one.colour) for one in series])
        figures.append(figure(title, chart, "Share of the entropy that the probe recovers; 0 is guessing.", names))
    numbers = table(["", "entropy, bits", "chance", *map(escape, layers)], rows)
    lead = (
        "A small classifier is trained to name what was done to an image, or how it was made, from each layer. What it "
        "recovers is a lower bound of the information there: bits are the label's entropy minus the classifier's "
        "log-loss on other images."
    )
    details = f"<details><summary>Numbers: bits / accuracy</summary>{numbers}</details>"
    return section("What the head keeps, and what it throws away", grid(figures) + details, lead)


def _over_steps(run: Run) -> str:
    own = [(step, results) for (step, name), results in run.results.items() if name == ""]
    if len(own) < 2:
        return ""
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
        figures.append(figure(f"{probe} over training", chart, after=legend([(s.name, s.colour) for s in series])))
    return section("Over training", grid(figures))


def compared(runs: list[Run]) -> str:
    """A table and one chart a probe and layer, a row a run."""
    evaluated = [(position, run, run.latest()) for position, run in enumerate(runs)]
    found = [(position, run, results) for position, run, results in evaluated if results is not None]
    if not found:
        return '<p class="warning">None of these runs is evaluated yet.</p>'
    probes = [p for p in ("linear", "knn") if any(p in results["probes"] for _, _, results in found)]
    columns = [(probe, layer) for probe in probes for layer in ("h", "z", "h_untrained")]
    rows = []
    for _, run, results in found:
        cells = []
        for probe, layer in columns:
            value = results["probes"].get(probe, {}).get(layer)
            cells.append(
                f"{percent(value['top1'])}<br><span class='soft'>{percent(value['interval'][0])} to "
                f"{percent(value['interval'][1])}</span>"
                if value
                else ""
            )
        rows.append([escape(run.name), str(results["step"]), *cells])
    head = ["run", "step", *(f"{probe}, {layer_name(layer)}" for probe, layer in columns)]
    dots = {
        f"{probe} on {layer}": [
            Dot(run.name[-14:], value["top1"], value["interval"][0], value["interval"][1], position)
            for position, run, results in found
            if (value := results["probes"].get(probe, {}).get(layer))
        ]
        for probe in probes
        for layer in ("h", "z")
    }
    everything = [dot for drawn in dots.values() for dot in drawn]
    figures = [figure(name, dot_chart(drawn, label=name, beside=everything)) for name, drawn in dots.items()]
    body = grid(figures) + table(head, rows) + "".join(not_evaluated(run) for run in runs if run.latest() is None)
    return section("What the frozen encoders know", body, "95% interval over test images.")


def curves(runs: list[Run]) -> str:
    """Every known metric that a run logged, the runs laid over one another."""
    figures = []
    for name, title in CURVES.items():
        series = [
            Series(run.name, *run.curves[name], colour=position)
            for position, run in enumerate(runs)
            if name in run.curves
        ]
        figures.append(figure(title, line_chart(series, label=title, x_label="step") if series else ""))
    names = legend([(run.name, position) for position, run in enumerate(runs)]) if len(runs) > 1 else ""
    body = grid(figures)
    return section("Training", names + body) if body else ""


def pictures(run: Run) -> list[str]:
    """Images: neighbours, the embedding map, views as trained."""
    file = run.pictures()
    if file is None:
        return []
    from dist_ssl.report import images

    results = run.latest()
    assert results is not None  # pictures lie beside results
    return images.sections(file, results["data"].get("class_names", []))


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
    flat = [_flatten(run.config.model_dump()) for run in runs]
    keys = [key for key in flat[0] if len({str(one.get(key)) for one in flat}) > 1]
    rows = [[f"<code>{escape(key)}</code>", *(escape(str(one.get(key))) for one in flat)] for key in keys]
    return section("What differs in their configs", table(["key", *(escape(run.name) for run in runs)], rows, 99))


def reproduce(runs: list[Run]) -> str:
    """Commands, and the versions that were used."""
    lines, rows = [], []
    for run in runs:
        folder = run.folder
        lines += [f"dist-ssl pretrain {folder}/config.toml --set run.dir=NEW_DIR", f"dist-ssl evaluate {folder}"]
        results = run.latest()
        if results:
            rows.append([escape(run.name), escape(", ".join(f"{k} {v}" for k, v in results["versions"].items()))])
    commands = escape("\n".join([*lines, "dist-ssl report " + " ".join(str(run.folder) for run in runs)]))
    body = f"<pre><code>{commands}</code></pre>" + (table(["run", "versions"], rows, 9) if rows else "")
    return section("How to reproduce", body)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
