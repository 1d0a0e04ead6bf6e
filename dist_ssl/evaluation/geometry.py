"""The quantities that papers since 2020 argue with, of h, each layer of the head and z. None needs a label.

Of all test images, once: the spectrum, RankMe, the condition number (`spectrum`). Of views of a few of them, made by
the pretraining's own augmentation: alignment and uniformity (Wang and Isola 2020), LiDAR (Thilak et al. 2024), matrix
mutual information of h and z (Ouyang et al. 2025), and what the head's Jacobian does to each augmentation
(`jacobian`). docs/laboratory.md defines them.

Legend: n images, V views of each, D a layer's width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_ssl import distributed
from dist_ssl.augment.parameters import BRIGHTNESS, CONTRAST, HUE, SATURATION
from dist_ssl.config import Config, ViewPolicy
from dist_ssl.data.progress import Progress
from dist_ssl.evaluation.features import PIXELS, Features, Split, layer_dims
from dist_ssl.evaluation.frozen import Readable
from dist_ssl.evaluation.jacobian import gains
from dist_ssl.evaluation.linear import Rows
from dist_ssl.evaluation.spectrum import smooth_rank, spectrum
from dist_ssl.evaluation.views import draw, views

NUM_VIEWS = 4
IMAGES_AT_ONCE = 32
WITHIN = 1e-4  # delta of LiDAR
NEUTRAL = {BRIGHTNESS: 1.0, CONTRAST: 1.0, SATURATION: 1.0, HUE: 0.0}
JITTERS = {"brightness": BRIGHTNESS, "contrast": CONTRAST, "saturation": SATURATION, "hue": HUE}


def geometry(test: Split, features: Features, readable: Readable) -> dict[str, Any]:
    """The results' `geometry`: {"images", "views", "layers": {layer: {...}}, "head": {...} where there is one}.

    Collective: ranks share the images; what is made of few of them every rank computes, the same on all.
    """
    device = test.device
    layers: dict[str, dict[str, Any]] = {
        name: spectrum(Rows(values, features.labels, device))
        for name, values in features.layers.items()
        if name != PIXELS
    }
    count = min(test.config.evaluation.geometry_images, test.manifest.num_samples)
    plain, of_views, stepped = _read(test, readable, count)
    for name, values in of_views.items():
        layers[name] |= alignment_and_uniformity(values) | {"lidar": lidar(values)}
    found: dict[str, Any] = {"images": count, "views": NUM_VIEWS, "layers": layers}
    if readable.head is not None and count > 1:
        h = plain["h"]
        steps = {name: moved - h for name, moved in stepped.items()} | {"another image": h.roll(1, 0) - h}
        found["head"] = {
            "information": matrix_information(of_views["h"][:, 0], of_views["z"][:, 0]),
            "entropy_of_h": matrix_entropy(_cosines(of_views["h"][:, 0])),
            "gains": gains(readable.head, h, steps),
            "trained_on": sorted(trained_on(test.config)),
        }
    return found


def alignment_and_uniformity(views_nvd: Tensor) -> dict[str, float]:
    """Wang and Isola 2020, section 4.1, on the unit sphere: alignment at alpha = 2, uniformity at t = 2.

    alignment: mean squared distance of two views of an image. uniformity: log of the mean of exp(-2 |u - v|^2) over
    views of two images.
    """
    unit = F.normalize(views_nvd.double(), dim=2)
    num_images, num_views, _ = unit.shape
    pairs = unit.sum(1).square().sum(1) - num_views  # sum of cosines over ordered pairs of views
    alignment = (2 - 2 * pairs / (num_views * (num_views - 1))).mean()
    flat, potential = unit.flatten(0, 1), unit.new_zeros(())
    for block in unit.split(IMAGES_AT_ONCE):
        potential += torch.exp(4 * (block.flatten(0, 1) @ flat.T) - 4).sum()
    own = torch.exp(4 * (unit @ unit.mT) - 4).sum()
    others = num_images * (num_images - 1) * num_views**2
    uniformity = ((potential - own) / max(others, 1)).clamp(min=1e-300).log()
    return {"alignment": float(alignment), "uniformity": float(uniformity)}


def lidar(views_nvd: Tensor) -> float:
    """LiDAR (Thilak et al. 2024): the smooth rank of the LDA matrix whose classes are images.

    Of S_w^-1/2 S_b S_w^-1/2: S_b the covariance of the images' means, S_w the mean covariance of an image's views plus
    1e-4 I. At most n - 1.
    """
    wide = views_nvd.double()
    means = wide.mean(1)
    within = (wide - means[:, None]).flatten(0, 1)
    within = within.T @ within / len(within) + WITHIN * torch.eye(
        wide.shape[2], dtype=torch.float64, device=wide.device
    )
    centred = means - means.mean(0)
    values, vectors = torch.linalg.eigh(within)
    whitened = centred @ (vectors / values.sqrt())
    return smooth_rank(torch.linalg.svdvals(whitened).square())


def matrix_information(a_nd: Tensor, b_nd: Tensor) -> float:
    """Matrix mutual information of order 2 in nats, as Ouyang et al. 2025 computed it: H(A) + H(B) - H(A o B).

    A and B are the Gram matrices of rows of unit length, o the elementwise product. Between 0 and the lower entropy.
    """
    a, b = _cosines(a_nd), _cosines(b_nd)
    return matrix_entropy(a) + matrix_entropy(b) - matrix_entropy(a * b)


def matrix_entropy(gram: Tensor) -> float:
    """Renyi's entropy of order 2 of the eigenvalues of K / n, whose diagonal is 1: -log |K / n|_F^2, 0 to log n."""
    return -2 * math.log(float(gram.norm()) / len(gram))


def _cosines(rows_nd: Tensor) -> Tensor:
    unit = F.normalize(rows_nd.double(), dim=1)
    return unit @ unit.T


def directions(config: Config) -> dict[str, ViewPolicy]:
    """One augmentation each, always applied, as strong as in the run's first view, or as SimCLR's where it has none."""
    own, paper = config.augment.policies()[0], ViewPolicy()
    crop = own if own.min_scale < 1 else paper
    still = {"min_scale": 1.0, "max_scale": 1.0, "jitter_strength": own.jitter_strength or paper.jitter_strength}
    still |= {f"{name}_probability": 0.0 for name in ("flip", "jitter", "grey", "blur", "solarise")}
    nothing = own.model_copy(update=still)
    found = {"crop": nothing.model_copy(update={"min_scale": crop.min_scale, "max_scale": crop.max_scale})}
    for name in ("flip", *JITTERS, "grey", "blur", "solarise"):
        key = "jitter_probability" if name in JITTERS else f"{name}_probability"
        found[name] = nothing.model_copy(update={key: 1.0})
    return found


def trained_on(config: Config) -> set[str]:
    """Which of the directions any view of the run is moved in."""
    found = set()
    for policy in config.augment.policies():
        found |= {"crop"} if policy.min_scale < 1 else set()
        found |= set(JITTERS) if policy.jitter_probability * policy.jitter_strength > 0 else set()
        found |= {name for name in ("flip", "grey", "blur", "solarise") if getattr(policy, f"{name}_probability") > 0}
    return found


def _read(
    test: Split, readable: Readable, count: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Of the first `count` images: {"h": (n, D)}, {layer: (n, V, D)} of views, {direction: (n, D)} of h. Collective."""
    own = test.config.augment.policies()
    policies = [own[view % len(own)] for view in range(NUM_VIEWS)]
    alone = directions(test.config) if readable.head is not None else {}
    cuts = np.linspace(0, count, distributed.world_size() + 1).astype(int)
    start, stop = (int(cuts[distributed.rank() + side]) for side in (0, 1))
    found: dict[tuple[str, str], list[Tensor]] = {}
    error = None
    try:
        with Progress("views of the test images", stop - start, distributed.rank() == 0) as progress:
            for batch in test.batches(start, stop):
                for images, ids in zip(
                    batch.images.split(IMAGES_AT_ONCE), batch.sample_ids.split(IMAGES_AT_ONCE), strict=True
                ):
                    _read_some(test, readable, images, ids.numpy(), policies, alone, found)
                    progress.advance(len(ids))
    except Exception as failure:
        error = failure
    distributed.raise_together(error)
    return _gathered(found, np.diff(cuts).tolist(), layer_dims(test, [readable]), list(alone), test.device)


@torch.inference_mode()
def _read_some(
    test: Split,
    readable: Readable,
    images: Tensor,
    ids: np.ndarray,
    policies: list[ViewPolicy],
    alone: dict[str, ViewPolicy],
    found: dict[tuple[str, str], list[Tensor]],
) -> None:
    found.setdefault(("plain", "h"), []).append(readable.encoder(test.pixels(images)).float())
    pixels = views(test, images, policies, *draw(ids, policies))
    for layer, values in readable.read(pixels.flatten(0, 1)).items():
        found.setdefault(("views", layer), []).append(values.float().unflatten(0, pixels.shape[:2]))
    for name, policy in alone.items():
        parameters, uniforms = draw(ids, [policy])
        for jitter, column in JITTERS.items():
            if jitter != name:
                parameters[..., column] = NEUTRAL[column]
        h = readable.encoder(views(test, images, [policy], parameters, uniforms)[:, 0])
        found.setdefault(("steps", name), []).append(h.float())


def _gathered(
    found: dict[tuple[str, str], list[Tensor]],
    rows_per_rank: list[int],
    dims: dict[str, int],
    names: list[str],
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """All ranks' rows of each, in the images' order, on every rank; a rank may have none. Collective."""
    shapes: dict[tuple[str, str], tuple[int, ...]] = {("plain", "h"): (dims["h"],)}
    shapes |= {("views", layer): (NUM_VIEWS, dim) for layer, dim in dims.items()}
    shapes |= {("steps", name): (dims["h"],) for name in names}
    whole: dict[str, dict[str, Tensor]] = {"plain": {}, "views": {}, "steps": {}}
    for (kind, name), shape in shapes.items():
        mine = found.get((kind, name))
        whole[kind][name] = distributed.gather_rows(
            torch.cat(mine) if mine else torch.zeros(0, *shape, device=device), rows_per_rank
        )
    return whole["plain"], whole["views"], whole["steps"]
