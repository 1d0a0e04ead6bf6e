"""The report's top: what was trained, on what, how far, how long, and how good it is."""

from __future__ import annotations

from html import escape
from itertools import pairwise

from dist_ssl.config import AS_WIDE_AS_H
from dist_ssl.data import quarantine
from dist_ssl.data.progress import duration
from dist_ssl.evaluation.results import Stored, probe_name
from dist_ssl.report.elements import layer_name, percent, section, table
from dist_ssl.report.runs import Run


def summary(runs: list[Run]) -> str:
    """One run's facts as a list, several runs' as a table, a column a run."""
    if len(runs) > 1:
        found = [_facts(run) for run in runs]
        names = list(dict.fromkeys(name for facts in found for name in facts))
        rows = [[name, *(escape(facts.get(name, "")) for facts in found)] for name in names]
        return section("The runs", table(["", *(escape(run.name) for run in runs)], rows, 99))
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(said)}</dd></div>" for name, said in _facts(runs[0]).items())
    return f'<dl class="summary">{items}</dl>'


def _facts(run: Run) -> dict[str, str]:
    """Name -> plain text; what is not known is left out."""
    config, progress, found = run.config, run.progress, {"encoder": run.config.model.encoder}
    if progress:
        head = config.model.head
        found["encoder"] += f", head {head.kind}" + ("" if head.kind in AS_WIDE_AS_H else f" to {head.output_dim}")
        found["objective"] = config.objective.name
        found["data"] = str(config.data.shards)
        if progress["epoch"]:
            found["images"] = f"{round(progress['step'] * config.train.global_batch_size / progress['epoch']):,}"
        of = f" of {progress['steps']:,}" if progress["steps"] else ""
        found["steps"] = f"{progress['step']:,}{of}, {config.train.global_batch_size:,} images each"
        found["state"] = progress["state"]
        if progress["epoch"] is not None:
            found["epochs"] = f"{progress['epoch']:.4g}"
        if run.ranks:
            found["ranks"] = f"{run.ranks}, {config.engine.precision}, ZeRO {config.engine.zero_stage}"
        if seconds := _seconds(run):
            found["time"] = f"{duration(seconds)} of steps"
        found["replaced samples"] = f"{len(quarantine.bad_samples(run.folder)):,}"
    latest = run.latest()
    if latest is not None:
        found |= _accuracies(latest)
        found |= _best([one for one in run.on(latest.data) if one.name == latest.name])
    return found


def _seconds(run: Run) -> float:
    """What the steps took, from the rates that were logged; starts, and what a crash threw away, are not counted."""
    _, seen = run.curves.get("samples_seen", ([], []))
    _, rates = run.curves.get("images_per_second", ([], []))
    if len(seen) != len(rates):
        return 0.0
    return sum((now - before) / rate for (before, now), rate in zip(pairwise([0.0, *seen]), rates, strict=True) if rate)


def _accuracies(one: Stored) -> dict[str, str]:
    return {
        f"{probe_name(probe)} on h": percent(layers["h"]["top1"])
        for probe, layers in one.values["probes"].items()
        if "h" in layers
    }


def _best(results: list[Stored]) -> dict[str, str]:
    """The highest accuracy of a trained layer over all steps and probes."""
    found = [
        (value["top1"], f"{probe_name(probe)} on {layer_name(layer)}", one.step)
        for one in results
        for probe, layers in one.values["probes"].items()
        for layer, value in layers.items()
        if layer not in ("h_untrained", "pixels")
    ]
    if not found:
        return {}
    top1, where, step = max(found, key=lambda one: one[0])
    return {"best": f"{percent(top1)}: {where}" + ("" if step is None else f", step {step:,}")}
