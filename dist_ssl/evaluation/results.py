"""The results of evaluations: where they stand, their format, and the table that the command prints. Needs no torch.

They are kept by checkpoint and data: RUN/evaluation/step-<n>/results.json on the data that the run's config names,
RUN/evaluation/step-<n>/<name>/results.json on any other. Those of a file of weights stand in a folder of their own,
a teacher's in one beside the student's whose name begins with "teacher".

results.json (format 1):

    checkpoint        the checkpoint's folder, or the file of weights;  step: its step, null for a file of weights
    encoder           name;  head: its config, null for a file of weights;  teacher: whether it is the run's teacher
    encoder_digest    {"before", "after"}: SHA-256 of encoder and head; equal, or there would be no file
    layers            the layers read, in depth order: "h", "g1", ..., "z"; then "h_untrained", "pixels" of small images
    data              shards, manifest hashes, counts and the number of classes
    ranks             how many evaluated
    probes            {probe: {layer: {"top1", "interval", "seeds", "spread", ...}}}, accuracies in [0, 1]; a probe that
                      was fitted by L-BFGS has "fits", one a seed: {"converged", "iterations", "gradient_norm"}
    comparisons       [{"probe", "a", "b", "difference", "interval"}]: paired on the same test images
    head_information  {"train_images", "test_images", "tasks": {task: {"chance", "entropy_bits", "layers":
                       {layer: {"accuracy", "accuracy_interval", "bits", "bits_interval", ...}}}}}, a factor's
                       "weight" in the layer too, and {"evenness": {layer: ...}} of these
    geometry          docs/laboratory.md, "Quantities"
    matrix            {task: {"accuracy": {layer: ...}, "best": layer}}: every layer on every task
    config, versions, seconds

`interval` is the 95% interval over test images of the mean over seeds, `spread` the standard deviation over seeds;
`gradient_norm` is that of the fit's end, as a part of that at zero weights.
h_untrained is the encoder of step 0 with batch-norm statistics taken in one pass over training images; pixels are the
images as the encoder got them, before they were normalised.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dist_ssl

log = logging.getLogger(__name__)

FORMAT = 1
FILE = "results.json"
TEACHER = "teacher"


@dataclass(frozen=True)
class Stored:
    """The results of one checkpoint (step None: a file of weights) on one data set; `name` "" is the run's own data."""

    step: int | None
    name: str
    folder: Path
    values: dict[str, Any]

    @property
    def data(self) -> tuple[str, ...]:
        """Equal where the data are: probes fitted on the same images, scored on the same; a teacher's are apart."""
        return data_of(self.values) or (self.name,)


def data_of(values: dict[str, Any]) -> tuple[str, ...]:
    """What tells the data of results apart: its manifests' hashes, and whose features of it they are."""
    hashes = tuple(values["data"][key] for key in ("train_manifest", "test_manifest") if key in values["data"])
    return (*hashes, TEACHER) if values.get("teacher") else hashes


def step_folder(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "evaluation" / f"step-{step}"


def place(folder: Path, name: str | None, data: tuple[str, ...], is_teacher: bool = False) -> Path:
    """Where results on `data` go: `folder`/`name`, or a folder beside it that the data's hash names.

    The second where there is no name, and where results on other data are there already: nothing is overwritten.
    """
    if is_teacher:
        data, name = (*data, TEACHER), None if name is None else "-".join(filter(None, (TEACHER, name)))
    digest = hashlib.sha256(" ".join(data).encode()).hexdigest()[:8]
    if name is not None:
        there = _read(folder / name / FILE)
        if there is None or data_of(there) == data:
            return folder / name
    return folder / (f"{name}-{digest}" if name else f"{TEACHER if is_teacher else 'data'}-{digest}")


def stored_in(folder: Path, step: int | None = None) -> list[Stored]:
    """All results of one checkpoint, by the data's name. What is damaged is left out with a warning."""
    files = [folder / FILE, *sorted(folder.glob(f"*/{FILE}"))]
    found = ((file, _read(file)) for file in files)
    return [
        Stored(step, "" if file.parent == folder else file.parent.name, file.parent, values)
        for file, values in found
        if values is not None
    ]


def stored(run_dir: str | Path) -> list[Stored]:
    """All results of a run, by step and the data's name."""
    steps = (path.name.removeprefix("step-") for path in (Path(run_dir) / "evaluation").glob("step-*"))
    return [
        one
        for step in sorted(map(int, filter(str.isdigit, steps)))
        for one in stored_in(step_folder(run_dir, step), step)
    ]


def newest(results: list[Stored]) -> Iterator[Stored]:
    """Of results in the order of steps the newest on each data set, the run's own first."""
    last = {one.name: one for one in results}
    yield from (last[name] for name in sorted(last))


def _read(file: Path) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(file.read_text())
        data_of(values)
        return values
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s: not readable, left out: %s", file, error)
        return None


def versions(device: Any = None) -> dict[str, str]:
    """What computed the results; `device` is torch's."""
    import numpy as np
    import torch
    import torchvision

    found = {"dist_ssl": dist_ssl.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__}
    found |= {"python": platform.python_version(), "numpy": np.__version__}
    if device is not None:
        found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return found


def write_json(path: Path, value: Any) -> None:
    """All of it or none: written beside its place, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def show(results: dict[str, Any], print_: Callable[[Any], None]) -> None:
    """The tables that the command prints: a row a layer, a column a probe, intervals beside the numbers.

    As many tables as it takes for each to fit a terminal of 80 columns.
    """
    data, probes = results["data"], results["probes"]
    if not probes:
        print_(f"{results['checkpoint']}: no accuracy: the images have no labels, or no probe asks for them")
        return
    caption = f"top-1 in % on {data['test_images']} test images, {data['num_classes']} classes "
    caption += f"(chance {100 / data['num_classes']:.1f}), 95% interval over test images"
    if any(not converged(value) for layers in probes.values() for value in layers.values()):
        caption += "; *: a fit that did not converge"
    encoder = f"{results['encoder']}, the teacher" if results.get("teacher") else results["encoder"]
    rows = [[layer.removeprefix("h_"), *_cells(probes, probes, layer)] for layer in results["layers"]]
    _tables(["layer"], list(probes), rows, 3, f"{encoder}, {results['checkpoint']}", caption, print_)


def show_several(results: list[Stored], print_: Callable[[Any], None]) -> None:
    """The tables of a transfer to several data sets: a row a set, a column a probe, all on h. Nothing for one set."""
    if len(results) < 2:
        return
    probes, rows = probes_on_h(results), []
    for one in results:
        data = one.values["data"]
        counts = [str(data["num_classes"]), str(data["test_images"])]
        rows.append([one.name or "its own", *counts, *_cells(one.values["probes"], probes, "h")])
    title = f"h of {results[0].values['checkpoint']}"
    _tables(["data", "classes", "images"], probes, rows, 2, title, "top-1 in %, 95% interval over test images", print_)


def _cells(found: dict[str, Any], probes: Iterable[str], layer: str) -> list[str]:
    values = (found.get(probe, {}).get(layer) for probe in probes)
    return [told(value) + mark(value) if value else "" for value in values]


def _tables(
    about: list[str],
    probes: list[str],
    rows: list[list[str]],
    at_once: int,
    title: str,
    caption: str,
    print_: Callable[[Any], None],
) -> None:
    """Of columns `about` and, `at_once` in a table, `probes`: the title over the first, the caption under the last."""
    from rich.table import Table

    first = len(about)
    for start in range(0, len(probes), at_once):
        last = start + at_once >= len(probes)
        table = Table(title=title if start == 0 else None, caption=caption if last else None)
        for number, column in enumerate(about):
            table.add_column(column, justify="right" if number else "left", overflow="fold")
        for probe in probes[start : start + at_once]:
            table.add_column(probe_name(probe), justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row[:first], *row[first + start : first + start + at_once])
        print_(table)


def probes_on_h(results: list[Stored]) -> list[str]:
    """The probes that were fitted on h for any of the data sets."""
    return list(
        dict.fromkeys(probe for one in results for probe, layers in one.values["probes"].items() if "h" in layers)
    )


def accuracy_matrix(values: dict[str, Any]) -> dict[str, Any]:
    """{task: {"accuracy": {layer: ...}, "best": layer}}: each layer from h to z on each task at hand, and which wins.

    After Bordes et al. 2022. The class by each probe that read more than one of these layers, then the tasks of head
    information; of equal layers the first in depth.
    """
    layers = [layer for layer in values["layers"] if layer not in ("h_untrained", "pixels")]
    found = {
        f"class, {probe_name(probe)}": {layer: of[layer]["top1"] for layer in layers if layer in of}
        for probe, of in values["probes"].items()
    }
    tasks = values.get("head_information", {}).get("tasks", {})
    found |= {name: {layer: one["accuracy"] for layer, one in task["layers"].items()} for name, task in tasks.items()}
    return {
        task: {"accuracy": accuracy, "best": max(accuracy, key=lambda layer: accuracy[layer])}
        for task, accuracy in found.items()
        if len(accuracy) > 1
    }


def mark(value: dict[str, Any]) -> str:
    """Beside a number, where its fit did not converge."""
    return "" if converged(value) else "*"


def converged(value: dict[str, Any]) -> bool:
    """Whether all fits behind a probe's value did; results of before they were counted say nothing, so no mark."""
    return all(one["converged"] for one in value.get("fits", ()))


def told(value: dict[str, Any]) -> str:
    """A probe's top-1 and its interval, in percent: at most 17 characters."""
    top1, low, high = (f"{100 * one:.1f}".replace("100.0", "100") for one in (value["top1"], *value["interval"]))
    return f"{top1} [{low}, {high}]"


def probe_name(probe: str) -> str:
    """As people read it: few_labels_fine_tuned_0.01 is "fine-tuned, 1%", of the labels."""
    for few, said in (("few_labels_fine_tuned_", "fine-tuned"), ("few_labels_", "linear")):
        if probe.startswith(few):
            return f"{said}, {100 * float(probe.removeprefix(few)):g}%"
    return {"knn": "kNN", "fine_tuned": "fine-tuned"}.get(probe, probe.replace("_", " "))
