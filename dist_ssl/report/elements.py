"""What every section of a page is put together from: figures, tables, names, numbers and colours, as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from dist_ssl.report.svg import Dot, colour_class, dot_chart

FACTOR_COLOURS = (0, 1, 2, 3, 7, 6, 8, 9, 10, 11, 15, 14)  # neighbours that differ most; from 8 on dashed

LAYERS = {
    "h": "what the encoder gives, and what is used afterwards",
    "g": "a hidden layer of the projection head (g1 the first)",
    "z": "what the head gives, which only the loss sees",
    "h_untrained": "h of the same encoder before training",
    "pixels": "the images themselves, with no encoder",
}


def layer_colour(layer: str) -> int:
    """h is blue, z orange, the untrained encoder grey, wherever they appear; of ranks the slowest is orange."""
    fixed = {"h": 0, "z": 1, "h_untrained": 7, "pixels": 6, "median": 0, "slowest": 1, "fastest": 2}
    if layer in fixed:
        return fixed[layer]
    return 2 + (int(layer[1:]) - 1) % 5 if layer[:1] == "g" and layer[1:].isdigit() else 6


def layer_name(layer: str) -> str:
    return {"h_untrained": "untrained h", "pixels": "raw pixels"}.get(layer, layer)


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def span(low: float, high: float) -> str:
    return f"{percent(low)} to {percent(high)}"


def figure(title: str, chart: str, caption: str = "", after: str = "") -> str:
    if not chart:
        return ""
    caption = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(title)}</h3>{chart}{after}{caption}</figure>"


def dots_figure(
    title: str, dots: Sequence[Dot], *, reference: float | None = None, beside: Sequence[Dot] = (), caption: str = ""
) -> str:
    """A row a value, with its interval; a lone value is told as a number, since an axis would say nothing."""
    if len(dots) == 1:
        (dot,) = dots
        return numbers_figure(
            title, [(dot.name, percent(dot.value), dot.colour)], f"{span(dot.low, dot.high)}. {caption}"
        )
    return figure(title, dot_chart(dots, label=title, reference=reference, beside=beside), caption)


def numbers_figure(title: str, values: Sequence[tuple[str, str, int]], caption: str = "") -> str:
    """(name, number, colour) each, instead of a chart of one point; a lone name that is empty is left out."""
    items = "".join(
        f'<li><b class="{colour_class(colour)}">{escape(number)}</b> {escape(name)}</li>'
        for name, number, colour in values
    )
    return figure(title, f'<ul class="numbers">{items}</ul>', caption)


def explained(layers: Iterable[str]) -> str:
    """What the names of layers mean, in a line."""
    said, told = [], set()
    for layer in layers:
        kind = "g" if layer[:1] == "g" else layer
        if kind in LAYERS and kind not in told:
            told.add(kind)
            said.append(f"<b>{escape(layer_name(layer))}</b>: {LAYERS[kind]}")
    return "; ".join(said) + "."


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
