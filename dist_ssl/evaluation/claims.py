"""What papers claim of projection heads, as data, and what a laboratory's rows say to each: one verdict a claim.

A claim compares two kinds of head (or two layers of one, or one head with and without a control) by one quantity. Its
effect is, for each pretraining seed, the mean difference over all pairs of rows that differ in nothing else; the
interval is Student's t over seeds (95%), and the p-values of all claims together are corrected by Holm (1979), so that
the chance of one verdict too many among them all is 5%.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dist_ssl.config import AS_WIDE_AS_H, WITHOUT_BATCH_NORM
from dist_ssl.evaluation.intervals import holm, t_test
from dist_ssl.evaluation.lab import kind_of, variant_of
from dist_ssl.evaluation.lab_rows import Estimate, Row, paired

MIN_SEEDS = 3  # two differences that happen to be equal would have an interval of no width
SIGNIFICANCE = 0.05

Outcome = Literal["supported", "not supported", "contradicted"]


@dataclass(frozen=True)
class Claim:
    """`quantity[0]` under `heads[0]` and `controls[0]` is more than `quantity[1]` under `heads[1]` and `controls[1]`.

    heads: kinds, with the name of a changed key where one is (`mlp l1`); "any" stands for each.
    quantity: "linear h" (top-1 of a probe on a layer), "bits z" (of `task`), "linear h - z" (a difference of layers).
    task: a factor, a transformation, or "transformations": the mean of all.
    """

    says: str
    paper: str
    heads: tuple[str, str]
    quantity: tuple[str, str] = ("linear h", "linear h")
    task: str = ""
    controls: tuple[str, str] = ("", "")


SIMCLR, BORDES, XUE = "Chen et al. 2020", "Bordes et al. 2022", "Xue et al. 2024"
CLAIMS = (
    Claim("a nonlinear head is better than a linear one", SIMCLR, ("mlp", "linear")),
    Claim("a linear head is better than none", SIMCLR, ("linear", "none")),
    Claim("a nonlinear head is better than none", SIMCLR, ("mlp", "none")),
    Claim("h is better than z", SIMCLR, ("mlp", "mlp"), ("linear h", "linear z")),
    Claim("h holds more transformations than z", SIMCLR, ("mlp", "mlp"), ("bits h", "bits z"), "transformations"),
    Claim("the loss on a part of h is better than on all of it", "Jing et al. 2021", ("direct", "none")),
    Claim("the loss on a part of h is better than a linear head", "Jing et al. 2021", ("direct", "linear")),
    Claim("a fixed reweighting is better than no head", XUE, ("fixed_reweight", "none")),
    Claim("h beside z is better than z alone", "Ma et al. 2023", ("shortcut", "mlp")),
    Claim("a discrete z is better than a free one", "Ouyang et al. 2025", ("discrete", "mlp")),
    Claim("a sparse code is better than an MLP", "Ouyang et al. 2025", ("sae", "mlp")),
    Claim("a sparse last layer is better than a dense one", "Song et al. 2023", ("mlp l1", "mlp")),
    Claim(
        "h is less ahead of z where positives are of one class",
        BORDES, ("mlp", "mlp"), ("linear h - z", "linear h - z"), "", ("", "same_class"),
    ),
    Claim(
        "z keeps hue where no jitter changes it",
        SIMCLR, ("mlp", "mlp"), ("bits z", "bits z"), "hue shift", ("without_jitter", ""),
    ),
    Claim(
        "z keeps whether there is colour where nothing takes it away",
        SIMCLR, ("mlp", "mlp"), ("bits z", "bits z"), "colour or grey", ("without_grey", ""),
    ),
    Claim(
        "z keeps sharpness where no blur changes it",
        SIMCLR, ("mlp", "mlp"), ("bits z", "bits z"), "clean or noisy", ("without_blur", ""),
    ),
    Claim(
        "z keeps size where no crop changes it",
        SIMCLR, ("mlp", "mlp"), ("bits z", "bits z"), "zoom", ("without_crop", ""),
    ),
    Claim(
        "z keeps the horizontal position where no flip changes it",
        SIMCLR, ("mlp", "mlp"), ("bits z", "bits z"), "position_x", ("without_flip", ""),
    ),
    Claim(
        "h holds more than z of colour that training destroyed",
        XUE, ("mlp", "mlp"), ("bits h", "bits z"), "colour or grey", ("always_grey", "always_grey"),
    ),
    Claim(
        "h holds more than z of size that training destroyed",
        XUE, ("mlp", "mlp"), ("bits h", "bits z"), "zoom", ("small_crops", "small_crops"),
    ),
    Claim("training is better than none", "the untrained encoder", ("any", "any"), ("knn h", "knn h_untrained")),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """A claim under one method: its effect, what was compared, p after Holm's correction, and the outcome.

    p is None where there are too few seeds to ask.
    """

    claim: Claim
    method: str
    compared: str
    effect: Estimate
    p: float | None
    comparisons: int

    @property
    def in_bits(self) -> bool:
        return self.claim.quantity[0].startswith("bits")

    @property
    def outcome(self) -> Outcome:
        if self.p is None or self.p >= SIGNIFICANCE:
            return "not supported"
        return "supported" if self.effect.mean > 0 else "contradicted"

    def numbers(self) -> tuple[str, str]:
        """(effect, interval) as people read them, in points or bits; one seed has no interval."""
        scale, unit, digits = (1, "bits", 2) if self.in_bits else (100, "points", 1)
        mean, low, high = (
            f"{scale * value:+.{digits}f}" for value in (self.effect.mean, self.effect.low, self.effect.high)
        )
        return f"{mean} {unit}", f"[{low}, {high}]" if len(self.effect.values) > 1 else "no interval"

    def sentence(self) -> str:
        effect, interval = self.numbers()
        seeds = len(self.effect.values)
        asked = f"{seeds} seeds, p = {self.p:.2g} after Holm over {self.comparisons}" if self.p is not None else (
            f"{seeds} of at least {MIN_SEEDS} seeds"
        )  # fmt: skip
        who = f"{self.claim.paper}, {self.method}" if self.method else self.claim.paper
        return f"{who}: {self.claim.says}: {self.outcome}, {effect} {interval}, {asked} ({self.compared})."

    def json(self) -> dict[str, Any]:
        return {
            "claim": self.claim.says,
            "paper": self.claim.paper,
            "method": self.method,
            "compared": self.compared,
            "unit": "bits" if self.in_bits else "top1",
            "effect": self.effect.json(),
            "p_holm": self.p,
            "outcome": self.outcome,
        }


def verdicts(rows: Sequence[Row], tasks: dict[str, Any]) -> list[Verdict]:
    """Of every claim that the rows can test, for each method, in the order of CLAIMS."""
    found = []
    for method in dict.fromkeys(row.method for row in rows):
        of_method = [row for row in rows if row.method == method]
        for claim in CLAIMS:
            pairs = [(a, b, change) for a, b in _pairs(claim, of_method) if (change := _change(claim, a, b, tasks))]
            if effect := Estimate.mean_of([change for _, _, change in pairs]):
                found.append((claim, method, _compared(claim, pairs), effect))
    asked = [number for number, (_, _, _, effect) in enumerate(found) if len(effect.values) >= MIN_SEEDS]
    corrected = dict(zip(asked, holm([t_test([*found[number][3].values.values()]) for number in asked]), strict=True))
    return [Verdict(*one, corrected.get(number), len(asked)) for number, one in enumerate(found)]


def _pairs(claim: Claim, rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """Rows of the claim's two sides that differ in nothing but what it compares."""
    first, second = (
        [row for row in rows if row.control == control and head in ("any", variant_of(row.head))]
        for head, control in zip(claim.heads, claim.controls, strict=True)
    )
    yield from ((a, b) for a in first for b in second if _alike(a, b))


def _alike(a: Row, b: Row) -> bool:
    kinds = [kind_of(row.head) for row in (a, b)]
    if kinds[0] == kinds[1] and a.head.split()[0] != b.head.split()[0]:
        return False  # mlp3 with l1 is compared with mlp3
    width = any(kind in AS_WIDE_AS_H for kind in kinds) or a.output_dim == b.output_dim
    return width and (any(kind in WITHOUT_BATCH_NORM for kind in kinds) or a.batch_norm == b.batch_norm)


def _change(claim: Claim, a: Row, b: Row, tasks: dict[str, Any]) -> Estimate | None:
    first, second = (_measured(row, what, claim.task, tasks) for row, what in zip((a, b), claim.quantity, strict=True))
    return paired(first, second)


def _measured(row: Row, quantity: str, task: str, tasks: dict[str, Any]) -> Estimate | None:
    probe, layer, *less = quantity.replace(" - ", " ").split()
    if probe != "bits":
        found = [row.top1.get((probe, name)) for name in (layer, *less)]
    else:
        chosen = [name for name in row.bits if name == task or task == f"{tasks[name]['kind']}s"]
        found = [Estimate.mean_of([row.bits[name].get(part) for name in chosen]) for part in (layer, *less)]
    return paired(*found) if less else found[0]


def _compared(claim: Claim, pairs: list[tuple[Row, Row, Estimate]]) -> str:
    sides = [", ".join(dict.fromkeys(row.head for row in rows)) for rows in list(zip(*pairs, strict=True))[:2]]
    told = [f"{quantity} of {claim.task}" if claim.task else quantity for quantity in claim.quantity]
    under = [f" with {control}" if control else "" for control in claim.controls]
    first, second = (f"{told[i]} under {sides[i]}{under[i]}" for i in (0, 1))
    return f"{first} less {second}"
