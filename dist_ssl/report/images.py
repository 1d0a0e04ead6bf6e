"""The report's pictures, from an evaluation's pictures.npz: neighbours, the embedding map, views as trained.

Images are embedded as JPEG data URIs; the file is plain arrays, loaded without pickle.
"""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dist_ssl.report.elements import figure, grid, section
from dist_ssl.report.svg import legend, scatter

MAX_LEGEND = 24


def sections(file: Path, class_names: list[str]) -> list[str]:
    """HTML sections of the pictures that the file holds; classes without a name are numbered."""
    with np.load(file, allow_pickle=False) as stored:
        found = {name: stored[name] for name in stored.files}
    neighbours = grid(
        [
            figure(f"Nearest neighbours in {layer}", _neighbours(found, layer, class_names))
            for layer in ("h", "z")
            if f"neighbours_{layer}" in found
        ]
    )
    maps = grid([figure(f"{name}", chart, after=names) for name, chart, names in _maps(found, class_names)])
    return [
        section("Views as trained", _views(found), "The views of one image, side by side: each other's positives."),
        section(
            "Nearest neighbours",
            neighbours,
            "Outlined in blue: a test image. Then the images nearest to it by cosine; dashed and pale where the class "
            "is another one.",
        ),
        section("Embedding map", maps, "Test images, coloured by class."),
    ]


def _views(found: dict[str, Any]) -> str:
    if "views" not in found:
        return ""
    of_image = ("".join(_image(view, "a view") for view in views) for views in found["views"])
    return f'<div class="views">{"".join(f"<span>{views}</span>" for views in of_image)}</div>'


def _class(number: int, names: list[str]) -> str:
    if number < 0:
        return "no label"
    return names[number] if number < len(names) else f"class {number}"


def _neighbours(found: dict[str, Any], layer: str, class_names: list[str]) -> str:
    rows = []
    labels, images = found["sample_labels"], found["sample_images"]
    for query, neighbours in zip(found["queries"], found[f"neighbours_{layer}"], strict=True):
        cells = [_image(images[query], f"query: {_class(labels[query], class_names)}", "query")]
        for row in neighbours:
            same = labels[row] == labels[query]
            cells.append(_image(images[row], _class(labels[row], class_names), "" if same else "other"))
        rows.append(f'<div class="images">{"".join(cells)}</div>')
    return "".join(rows)


def _maps(found: dict[str, Any], class_names: list[str]) -> list[tuple[str, str, str]]:
    maps = []
    for method in ("pca", "umap"):
        for layer in ("h", "z"):
            points = found.get(f"{method}_{layer}")
            if points is None:
                continue
            labels = found["map_labels"].clip(min=0).tolist()
            names = [_class(number, class_names) for number in range(max(labels) + 1)]
            title = f"{method.upper()} of {layer}"
            if method == "pca":
                share = float(found[f"pca_share_{layer}"])
                title += f" ({100 * share:.0f}% of its variance)"
            if found["map_labels"].max() < 0:
                names = ["images without labels"]
            chart = scatter(points[:, 0].tolist(), points[:, 1].tolist(), labels, names, label=title)
            shown = [(name, number) for number, name in enumerate(names)][:MAX_LEGEND]
            maps.append((title, chart, legend(shown)))
    return maps


def _image(pixels: np.ndarray, text: str, kind: str = "") -> str:
    """uint8 (3, S, S) -> an img element with its pixels inside."""
    buffer = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    picture.save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    side = picture.width
    return (
        f'<img class="{kind}" src="data:image/jpeg;base64,{data}" alt="{escape(text)}" title="{escape(text)}" '
        f'width="{side}" height="{side}">'
    )
