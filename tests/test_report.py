"""The report: what it says, that nothing in it can run or load, and how it looks in a real browser."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dist_ssl import config as configuration
from dist_ssl.config import UserError
from dist_ssl.evaluation.results import show
from dist_ssl.report import svg
from dist_ssl.report.curves import curves
from dist_ssl.report.elements import dots_figure
from dist_ssl.report.page import build
from dist_ssl.report.runs import Run, read_run
from dist_ssl.report.sections import head_information, settings
from tests import chromium

HOSTILE = '<script>alert("x")</script><img src=https://example.com/a.png onerror=alert(1)>'
LAYERS = ["h", "g1", "z", "h_untrained"]


def a_run(folder, *, top1=0.8, class_name="disc", steps=(300, 600)):
    """A run directory with curves, two evaluations, a transfer and pictures."""
    generator = np.random.default_rng(0)
    for step in steps:
        (folder / "evaluation" / f"step-{step}").mkdir(parents=True)
    values = {"run": {"dir": str(folder)}, "train": {"steps": 600, "global_batch_size": 8}}
    (folder / "config.toml").write_text(configuration.dumps(configuration.validate(values, "test")))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 601):
            record = {"step": step, "loss": 5.0 / step + 1, "learning_rate": 1e-4 * step, "images_per_second": 100.0}
            record |= {"samples_seen": 8 * step, "epoch": step / 20, "dead_units_h": 0.25}
            record |= {"gradient_norm": 3.5} if step == 600 else {}
            if step % 50 == 0:
                record |= {"rankme_h": 10.0 + step / 60, "online_accuracy_h": step / 1000}
            file.write(json.dumps(record) + "\n")
        file.write('{"step": 601, "lo')  # a run that is still writing
    for step in steps:
        results = a_result(step, top1, class_name)
        (folder / "evaluation" / f"step-{step}" / "results.json").write_text(json.dumps(results))
    (folder / "evaluation" / "step-600" / "cifar10").mkdir()
    transfer = a_result(600, 0.5, "cat")
    del transfer["probes"]["knn"]
    (folder / "evaluation" / "step-600" / "cifar10" / "results.json").write_text(json.dumps(transfer))
    arrays = {
        "sample_images": generator.integers(0, 255, (30, 3, 32, 32), dtype=np.uint8),
        "sample_labels": generator.integers(0, 8, 30),
        "queries": np.arange(6),
        "views": generator.integers(0, 255, (12, 2, 3, 32, 32), dtype=np.uint8),
        "map_labels": generator.integers(0, 8, 300),
    }
    for layer in ("h", "z"):
        arrays |= {f"neighbours_{layer}": generator.integers(0, 30, (6, 8)), f"pca_share_{layer}": np.float64(0.4)}
        arrays |= {f"pca_{layer}": generator.normal(size=(300, 2))}
    np.savez(folder / "evaluation" / "step-600" / "pictures.npz", **arrays)
    checkpoint = folder / "checkpoints" / "step-00000600"
    (checkpoint / "i0001").mkdir(parents=True)
    for name in ("manifest.json", "i0001/rank-00000.safetensors", "i0001/rank-00001.safetensors"):
        (checkpoint / name).touch()
    return folder


def a_result(step, top1, class_name):
    probes = {}
    for probe, shift in (("linear", 0.0), ("knn", 0.03)):
        probes[probe] = {}
        for depth, layer in enumerate(LAYERS):
            value = top1 - shift - 0.1 * depth
            interval = [value - 0.02, value + 0.02]
            probes[probe][layer] = {"top1": value, "interval": interval, "seeds": [value] * 3, "spread": 0.001}
    tasks = {}
    for number in range(10):
        layers = {
            layer: {"accuracy": 0.9, "accuracy_interval": [0.88, 0.92], "bits": 1 - 0.3 * depth}
            | {"bits_interval": [0.9 - 0.3 * depth, 1.1 - 0.3 * depth]}
            for depth, layer in enumerate(LAYERS[:3])
        }
        kind = "factor" if number < 9 else "transformation"
        tasks[f"task {number}"] = {"kind": kind, "entropy_bits": 1.5, "chance": 0.3, "layers": layers}
    return {
        "checkpoint": f"runs/a/checkpoints/step-{step:08d}",
        "step": step,
        "encoder": "resnet_tiny",
        "encoder_digest": {"before": "ab" * 32, "after": "ab" * 32},
        "layers": LAYERS,
        "data": {"train_images": 900, "test_images": 300, "num_classes": 8, "class_names": [class_name] * 8},
        "probes": probes,
        "comparisons": [{"probe": "linear", "a": "h", "b": "z", "difference": 0.2, "interval": [0.18, 0.22]}],
        "head_information": {"train_images": 90, "test_images": 30, "tasks": tasks},
        "versions": {"torch": "2.14"},
    }


def text_of(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_one_run_says_its_numbers(tmp_path):
    html = build([a_run(tmp_path / "mine")]).read_text()
    text = text_of(html)
    for part in (
        "encoder resnet50, head mlp to 128 objective nt_xent",
        "images 160 steps 600 of 600, 8 images each state complete epochs 30 ranks 2, ",
        "time 48 s of steps replaced samples 0 linear on h 80.0% kNN on h 77.0% best 80.0%: linear on h, step 300",
        "g1 : a hidden layer of the projection head",
        "A linear probe on h of step 600 names the class of 80.0 % of 300 test images",
        "60.0% on z, which the loss saw",
        "On cifar10, step 600",
        "What the head keeps, and what it throws away, on cifar10, step 600",
        "Over training",
        "What the head keeps",
        "1.00 / 90.0%",
        "+18.0 to +22.0",
        "Nearest neighbours in z",
        "PCA of h (40% of its variance)",
        "Views as trained",
        "python -m launch.local pretrain",
        "NEW_DIR --ranks 2",
        "dist-ssl evaluate",
        "global_batch_size = 8",
    ):
        assert part.replace(" %", "%") in text.replace(" %", "%"), part
    assert html.count("<img") == 6 * 9 * 2 + 24


def test_replaced_samples_are_told(tmp_path):
    run = a_run(tmp_path / "mine")
    assert "Replaced samples" not in build([run]).read_text()
    entry = json.dumps({"shard": "000000.tar", "key": "000000/12", "reason": "empty"}) + "\n"
    (run / "quarantine-rank0.jsonl").write_text(entry + entry.replace("12", "13"))
    (run / "quarantine-rank1.jsonl").write_text(entry)
    text = text_of(build([run]).read_text())
    assert "000000/12 (empty), 000000/13 (empty) 2" in text
    assert "replaced samples 2 " in text


def test_what_one_number_says_is_a_number():
    """An axis around one point, or around a level, would say nothing."""
    config = configuration.validate({"train": {"steps": 2}}, "test")
    drawn = {"loss": ([1, 2], [5.0, 4.0]), "norm_h": ([2], [3.5]), "dead_units_h": ([1, 2], [0.25, 0.25])}
    html = curves([Run("mine", Path("mine"), config, drawn, [], None, {})])
    assert html.count("<svg") == 1
    assert "3.5 At its only point." in text_of(html)
    assert "0.25 All along." in text_of(html)
    assert "<svg" not in dots_figure("fine tuned", [svg.Dot("h", 0.5, 0.4, 0.6)])
    assert "50.0% h 40.0% to 60.0%" in text_of(dots_figure("fine tuned", [svg.Dot("h", 0.5, 0.4, 0.6)]))


def test_lines_that_lie_on_each_other_are_told_apart():
    first, equal, other = (svg.Series(name, [1, 2], y, 0) for name, y in (("a", [1, 2]), ("b", [1, 2]), ("c", [2, 1])))
    assert svg.line_chart([first, other], label="").count("stroke-dasharray") == 0
    assert svg.line_chart([first, equal, other], label="").count("stroke-dasharray") == 1
    at = re.findall(r'circle cx="([\d.]+)"', svg.line_chart([first, equal], label="", categories=["", "h", "z"]))
    assert len(set(at)) == 4


def test_negative_bits_are_drawn_as_the_table_says_them():
    def height(bits):
        result = a_result(1, 0.5, "disc")
        for task in result["head_information"]["tasks"].values():
            for layer in task["layers"].values():
                layer |= {"bits": bits, "bits_interval": [bits - 0.1, bits + 0.1]}
        html = head_information(result)
        assert f"{bits:.2f} / 90.0%" in text_of(html)
        reference = float(re.search(r'class="reference".*?y1="([\d.]+)"', html)[1])
        return reference - float(re.search(r'circle cx="[\d.]+" cy="([\d.]+)"', html)[1])

    assert height(-0.2) < 0 < height(0.2)


def test_a_fit_that_did_not_converge_is_marked(tmp_path):
    run = a_run(tmp_path / "mine")
    file = run / "evaluation" / "step-600" / "results.json"
    values = json.loads(file.read_text())
    good, bad = ({"converged": one, "iterations": 300, "gradient_norm": 0.004} for one in (True, False))
    values["probes"]["linear"]["z"]["fits"] = [good, bad]
    values["probes"]["linear"]["h"]["fits"] = [good, good]
    file.write_text(json.dumps(values))
    assert text_of(build([run]).read_text()).count("not converged : 300 iterations, gradient 4e-03") == 1
    assert text_of(build([run, run], tmp_path / "both.html").read_text()).count("(not converged)") == 2
    printed = []
    show(values | {"data": values["data"] | {"num_classes": 8}}, printed.append)
    columns = {column.header: list(column.cells) for column in printed[0].columns}
    assert [cell.endswith("*") for cell in columns["linear"]] == [False, False, True, False]
    assert "did not converge" in printed[0].caption


def test_nothing_in_it_runs_or_loads(tmp_path):
    run = a_run(tmp_path / "mine", class_name=HOSTILE)
    entry = {"shard": HOSTILE, "key": HOSTILE, "reason": HOSTILE}
    (run / "quarantine-rank0.jsonl").write_text(json.dumps(entry))
    html = build([run]).read_text()
    assert "<script" not in html
    assert "onerror=alert" not in re.sub(r"&lt;.*?&gt;", "", html)
    for attribute in re.findall(r'(?:src|href)="([^"]*)"', html):
        assert attribute.startswith("data:image/jpeg;base64,")
    assert "default-src 'none'" in html


def test_a_class_folder_whose_name_is_no_utf8(tmp_path):
    html = build([a_run(tmp_path / "mine", class_name=os.fsdecode(b"caf\xe9"))]).read_text(encoding="utf-8")
    assert r"caf\udce9" in html


def test_names_in_commands_are_quoted(tmp_path):
    evaluated = a_run(tmp_path / "mine") / "evaluation" / "step-600"
    (evaluated / "cifar10").rename(evaluated / "my photos")
    assert "--name &#x27;my photos&#x27;" in build([tmp_path / "mine"]).read_text()


def test_several_runs_are_compared(tmp_path):
    runs = [a_run(tmp_path / "byol-and-a-long-end", top1=0.8), a_run(tmp_path / "vicreg-and-a-long-end", top1=0.7)]
    text = text_of(build(runs, tmp_path / "both.html").read_text())
    for part in (
        "2 runs compared",
        "What differs in their configs",
        "80.0%",
        "70.0%",
        "run.dir",
        " byol 80.0%",
        " vicreg 70.0%",
    ):
        assert part in text, part


def test_every_key_that_differs_is_told_with_its_values():
    def differing(*overrides):
        configs = [configuration.with_overrides(configuration.Config(), one) for one in overrides]
        html = settings([Run(str(i), Path(str(i)), config, {}, [], None, {}) for i, config in enumerate(configs)])
        return text_of(html)

    methods = differing(["objective.name=nt_xent"], ["objective.name=vicreg"])
    for row in ("objective.name nt_xent vicreg", "objective.invariance not set 25.0", "temperature 0.1 not set"):
        assert row in methods, row
    byol = ["objective.name=byol"]
    assert "model.predictor.num_layers not set 3" in differing(byol, [*byol, "model.predictor.num_layers=3"])


def test_a_run_without_an_evaluation_and_a_folder_that_is_none(tmp_path):
    values = configuration.validate({"train": {"steps": 1}}, "test")
    folder = tmp_path / "young"
    folder.mkdir()
    (folder / "config.toml").write_text(configuration.dumps(values))
    assert "young is not evaluated yet" in build([folder]).read_text()
    both = build([folder, a_run(tmp_path / "old")], tmp_path / "both.html").read_text()
    assert "young is not evaluated yet" in both
    assert "old is not evaluated yet" not in both
    with pytest.raises(UserError, match="expected a run's directory"):
        build([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="expected a run's directory"):
        build([folder / "config.toml"])


def test_damaged_lines_are_left_out(tmp_path, caplog):
    run = a_run(tmp_path / "mine")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = "not json"
    (run / "metrics.jsonl").write_text("\n".join(lines))
    curves = read_run(run).curves
    assert len(curves["loss"][0]) == 599
    assert "line 4" in caplog.text


def test_charts_keep_what_they_are_given():
    assert svg.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert svg.ticks(3, 3) == [3]
    assert [svg.number(v) for v in (0, 0.5, 12345, 2_500_000, 0.00025)] == ["0", "0.5", "12.35k", "2.5M", "2.5e-4"]
    many = svg.Series("a", list(range(100_000)), [float(v) for v in range(100_000)])
    chart = svg.line_chart([many], label="a")
    assert len(chart) < 30_000
    assert svg.line_chart([svg.Series("a", [1, 2], [float("nan")] * 2)], label="a") == ""
    spike = svg.Series("a", list(range(10_000)), [0.0] * 5000 + [9.0] + [0.0] * 4999)
    assert "band" in svg.line_chart([spike], label="a")  # a spike survives thinning, in the band


def test_charts_side_by_side_share_an_axis():
    """Two charts of accuracy that are looked at together: the same place means the same value."""
    first, second = svg.Dot("a", 0.5, 0.4, 0.6), svg.Dot("a", 0.5, 0.45, 0.9)

    def place(*dots, beside=()):
        return re.search(r'circle cx="([\d.]+)"', svg.dot_chart(dots, label="", beside=beside))[1]

    assert place(first) != place(second)
    assert place(first, beside=(second,)) == place(second, beside=(first,))


def test_a_long_name_leaves_the_axis_its_room():
    heads = [f"mlp2 activation=silu last_batch_norm={value}" for value in ("false", "true")]
    dots = [svg.Dot(head, value, value, value) for head, value in zip(heads, (0.2, 0.9), strict=True)]
    chart = svg.dot_chart(dots, label="")
    small, large = (float(x) for x in re.findall(r'circle cx="([\d.]+)"', chart))
    assert large - small > 60
    assert f"<title>{heads[0]}: 20.0%" in chart
    drawn = set(re.findall(r'text-anchor="end">(mlp2[^<]*)', chart))
    assert [len(name) for name in drawn] == [svg.MAX_NAME] * 2


@pytest.mark.browser
@pytest.mark.skipif(not chromium.installed(), reason="Debian's chromium is not installed")
@pytest.mark.slow
def test_a_page_that_is_watched_follows_the_run_and_comes_to_rest(tmp_path):
    run, page = a_run(tmp_path / "mine"), tmp_path / "mine" / "report.html"
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:300]))
    command = [sys.executable, "-m", "dist_ssl.cli", "report", str(run), "--watch", "--every-seconds", "1"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    browser = chromium.Browser()
    try:
        seen = until(lambda: page.exists() and "reloads itself every 1 s" in page.read_text())
        assert seen
        browser.open(page, 1280, 800)
        assert "300 of 600" in browser.evaluate("document.querySelector('.summary').innerText")
        (run / "metrics.jsonl").write_text("".join(lines[:600]))
        assert until(lambda: "600 of 600" in (browser.evaluate("document.querySelector('.summary')?.innerText") or ""))
        assert watching.communicate(timeout=20)[0].strip() == str(page)
        assert "reloads" not in page.read_text()
        assert browser.errors == []
    finally:
        watching.kill()
        browser.close()


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


@pytest.mark.browser
@pytest.mark.skipif(not chromium.installed(), reason="Debian's chromium is not installed")
@pytest.mark.slow
def test_it_reads_well_on_a_phone_and_a_desktop_in_light_and_dark(tmp_path):
    one = build([a_run(tmp_path / "mine", class_name=HOSTILE)])
    runs = [a_run(tmp_path / name) for name in ("a-run-with-quite-a-long-name", "b", "c")]
    several = build(runs, tmp_path / "several.html")
    browser = chromium.Browser()
    try:
        for page in (one, several):
            for width, dark in ((360, False), (390, True), (1280, False), (1280, True)):
                browser.open(page, width, 800, dark)
                assert browser.evaluate(OPEN_CURVES) == "3 of 7", "a wall of panels"
                browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
                assert browser.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
                background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
                assert (background == "rgb(20, 23, 27)") is dark
                size = browser.evaluate(
                    "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"
                )
                assert size >= 10, "chart text is too small to read"
                assert browser.evaluate(UNFILLED) < 40, "a chart leaves its card empty"
                assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
                contrast = browser.evaluate(CONTRAST)
                assert contrast >= 4.5, "text is too pale (WCAG 2.2, 1.4.3)"
        pages = {page.resolve().as_uri() for page in (one, several)}
        assert {url for url in browser.requests if not url.startswith("data:")} == pages
        assert browser.errors == []
    finally:
        browser.close()


OPEN_CURVES = """
(() => {
  const figures = [...[...document.querySelectorAll('section')].find(
    s => s.querySelector('h2').textContent == 'Training').querySelectorAll('figure')];
  return figures.filter(f => f.checkVisibility()).length + ' of ' + figures.length;
})()
"""

# Pixels of a figure's width that its chart leaves.
UNFILLED = """
Math.max(...[...document.querySelectorAll('figure svg')].map(
  e => e.closest('figure').getBoundingClientRect().width - e.getBoundingClientRect().width))
"""

# The smallest contrast of text and the series' colours with what is behind them.
CONTRAST = """
(() => {
  const light = c => { const [r, g, b] = c.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05); };
  const card = getComputedStyle(document.querySelector('figure')).backgroundColor;
  const colours = [...document.querySelectorAll('p, figcaption, th, td, svg g[class], .legend i')]
      .map(e => getComputedStyle(e).color);
  colours.push(...[...document.querySelectorAll('svg text')].map(e => getComputedStyle(e).fill));
  return Math.min(...colours.map(c => ratio(c, card)));
})()
"""
