"""The laboratory's statistics against scipy and by hand, and what its verdicts may and may not say."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dist_ssl.config import HEADS
from dist_ssl.evaluation.claims import CLAIMS, verdicts
from dist_ssl.evaluation.intervals import holm, mean_interval, t_test
from dist_ssl.evaluation.lab import CONTROLS, variant_of
from dist_ssl.evaluation.lab_rows import Estimate, Row, baseline, paired
from dist_ssl.evaluation.lab_summary import paragraph
from dist_ssl.report import lab_page

TASKS = {name: {"kind": "transformation", "entropy_bits": 1.0} for name in ("zoom", "hue shift")}


def row(head, h, z, bits=None, **keys):
    """h, z: top-1 a seed; bits: {task: (h, z)}, values a seed."""
    layers = {"h": h, "z": z, "h_untrained": [0.1 + 0.01 * seed for seed in range(len(h))]}
    top1 = {(probe, layer): estimate(values) for probe in ("linear", "knn") for layer, values in layers.items()}
    found = {task: dict(zip("hz", map(estimate, both), strict=True)) for task, both in (bits or {}).items()}
    known = {"method": "", "batch_norm": True, "output_dim": 8} | keys
    return Row(name=head, head=head, top1=top1, bits=found, **known)


def estimate(values):
    return Estimate.of(dict(enumerate(values)))


def said(rows, says, method=""):
    (found,) = (one for one in verdicts(rows, TASKS) if one.claim.says == says and one.method == method)
    return found


def test_p_values_are_scipys():
    random = np.random.default_rng(0)
    for count in range(2, 13):
        values = random.normal(0.7, 1, count)
        assert t_test(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-9)
    assert (t_test([0.1, 0.1, 0.1]), t_test([0.0, 0.0])) == (0.0, 1.0)
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_intervals_over_seeds_are_scipys():
    for count in range(2, 61):
        values = np.random.default_rng(count).normal(size=count)
        wanted = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
        found = mean_interval([*values])
        assert np.mean(found) == pytest.approx(np.mean(wanted))
        width = np.ptp(found) / np.ptp(wanted)
        assert width == pytest.approx(1, abs=3e-4) if count < 32 else 1 <= width < 1.03


def test_holm_rejects_a_true_hypothesis_among_many_in_one_of_twenty():
    """Of 12 claims none of which is true; without the correction almost every second grid would support one."""
    random = np.random.default_rng(0)
    grids = [[t_test(random.normal(size=5)) for _ in range(12)] for _ in range(600)]
    assert sum(min(holm(grid)) < 0.05 for grid in grids) / 600 == pytest.approx(0.05, abs=0.02)
    assert sum(min(grid) < 0.05 for grid in grids) / 600 > 0.4


def test_claims_name_what_there_is():
    for claim in CLAIMS:
        assert {head.split()[0] for head in claim.heads} <= {*HEADS, "any"}
        assert set(claim.controls) <= {"", *CONTROLS}
    page = (Path(__file__).parent.parent / "docs" / "laboratory.md").read_text()
    assert all(f"| {claim.says} | {claim.paper} |" in page for claim in CLAIMS)
    assert all(f"| `{kind}` |" in page for kind in HEADS)
    assert all(f"`{control}`" in page for control in CONTROLS)
    assert variant_of("mlp12 l1=0.1 activation=silu") == "mlp l1 activation"


def test_a_verdict_is_what_its_pairs_support():
    none = row("none", [0.50, 0.51, 0.52], [0.50, 0.51, 0.52])
    good = row("mlp2", [0.700, 0.711, 0.719], [0.600, 0.612, 0.618])
    better = row("mlp3", [0.800, 0.811, 0.819], [0.600, 0.612, 0.618])
    found = said([none, good, better], "a nonlinear head is better than none")
    assert found.outcome == "supported"
    assert found.effect.mean == pytest.approx(0.25)  # of both heads, seed by seed
    assert found.compared == "linear h under mlp2, mlp3 less linear h under none"
    assert (
        "Chen et al. 2020: a nonlinear head is better than none: supported, +25.0 points [+24.8, +25.2], 3 seeds, p = "
        in found.sentence()
    )
    assert said([none, good, better], "h is better than z").effect.mean == pytest.approx(0.15)
    worse = row("mlp2", [0.300, 0.311, 0.319], [0.4, 0.41, 0.42])
    assert said([none, worse], "a nonlinear head is better than none").outcome == "contradicted"
    noisy = row("mlp2", [0.70, 0.40, 0.60], [0.6, 0.61, 0.52])
    assert said([none, noisy], "a nonlinear head is better than none").outcome == "not supported"
    single = [row("none", [0.5], [0.5]), row("mlp2", [0.9], [0.1])]
    text = paragraph(single, verdicts(single, TASKS), 6, 2)
    assert text.startswith(
        "2 of 6 cells are done. Chen et al. 2020: a nonlinear head is better than none: not supported"
    )
    assert "no interval, 1 of at least 3 seeds" in text
    assert ": supported" not in text
    # One alone would be supported; among others it is not.
    values = [0.70, 0.715, 0.725]
    few, many = (
        [none, row("mlp2", values, values)],
        [none, *(row(h, values, values) for h in ("mlp2", "direct", "linear"))],
    )
    assert said(few, "a nonlinear head is better than none").p < said(many, "a nonlinear head is better than none").p
    # Pairing is by seed, not by position.
    assert paired(Estimate.of({1: 0.5, 2: 0.7}), Estimate.of({2: 0.6, 3: 0.1})).values == pytest.approx({2: 0.1})


def test_only_cells_that_differ_in_nothing_else_are_compared():
    wide, narrow = row("mlp2", [0.7] * 3, [0.6] * 3, output_dim=16), row("mlp2", [0.5] * 3, [0.4] * 3)
    linear = row("linear", [0.4] * 3, [0.3] * 3)
    assert said([wide, narrow, linear], "a nonlinear head is better than a linear one").effect.mean == pytest.approx(
        0.1
    )
    none = row("none", [0.3] * 3, [0.3] * 3)  # has no width
    assert said([wide, narrow, none], "a nonlinear head is better than none").effect.mean == pytest.approx(0.3)
    other = row("none", [0.1] * 3, [0.1] * 3, method="vicreg")
    claims = {one.claim.says for one in verdicts([narrow, other], TASKS)}
    assert "a nonlinear head is better than none" not in claims
    sparse, deep = row("mlp2 l1=0.1", [0.6] * 3, [0.6] * 3), row("mlp3", [0.9] * 3, [0.9] * 3)
    found = said([narrow, sparse, deep], "a sparse last layer is better than a dense one")
    assert found.effect.mean == pytest.approx(0.1)
    byol = [row("mlp2", [0.6, 0.63, 0.61], [0.5] * 3, method="byol")]
    against = said(byol, "training is better than none", "byol")
    assert against.effect.mean == pytest.approx(0.613333 - 0.11, abs=1e-5)
    assert "encoder, byol: training is better than none: supported" in against.sentence()
    assert baseline(byol, "knn", "h_untrained").mean == pytest.approx(0.11)


def test_information_and_controls_are_compared_in_bits():
    zoom = {"zoom": ([0.90, 0.91, 0.89], [0.20, 0.22, 0.21]), "hue shift": ([0.50, 0.52, 0.50], [0.1, 0.1, 0.11])}
    plain = row("mlp2", [0.70, 0.71, 0.72], [0.60, 0.61, 0.62], zoom)
    all_of_them = said([plain], "h holds more transformations than z")
    assert all_of_them.effect.mean == pytest.approx((0.69 + 0.403333) / 2, abs=1e-5)
    assert all_of_them.numbers()[0] == "+0.55 bits"
    kept = {"zoom": ([0.90, 0.91, 0.89], [0.80, 0.83, 0.80])}
    uncropped = row("mlp2", [0.65, 0.65, 0.66], [0.60, 0.60, 0.61], kept, control="without_crop")
    assert said([plain, uncropped], "z keeps size where no crop changes it").effect.mean == pytest.approx(0.6)
    labelled = row("mlp2", [0.90, 0.91, 0.92], [0.89, 0.90, 0.91], control="same_class")
    found = said([plain, uncropped, labelled], "h is less ahead of z where positives are of one class")
    assert found.effect.mean == pytest.approx(0.09)
    assert found.compared == "linear h - z under mlp2 less linear h - z under mlp2 with same_class"
    assert "zoom (0.69 bits under mlp2)" in paragraph([plain], [], 1, 1)


def test_the_page_says_each_verdict_and_draws_each_head(tmp_path):
    heads = ["none", "linear", "mlp2", "fixed_reweight", "direct"]
    rows = [row(head, [0.5 + dim / 100] * 3, [0.5] * 3, output_dim=dim) for head in heads for dim in (8, 16)]
    rows = [one for one in rows if one.output_dim == 8 or one.head not in ("none", "fixed_reweight")]
    rows += [row("mlp2", [0.4] * 3, [0.4] * 3, control="same_class")]
    found = verdicts(rows, TASKS)
    summary = {
        "rows": rows,
        "verdicts": found,
        "tasks": TASKS,
        "chance": 0.1,
        "test_images": 9,
        "cells": 30,
        "done": 30,
    }
    page = lab_page.build(summary | {"progress": "", "losses": ""}, "lab", tmp_path / "lab.html").read_text()
    assert all(verdict.claim.says in page and verdict.claim.paper in page for verdict in found)
    assert page.count("<b>contradicted</b>") + page.count("<b>supported</b>") > 3
    assert "fixed_reweight" in page.split("<table")[1]
