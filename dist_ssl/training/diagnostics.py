"""What the training loop watches beside the loss: geometry of h and z, and alarms.

How the loop calls it, outside the encoder's graph and outside DeepSpeed, every diagnostics.every_steps:

    metrics = diagnose(h, z, loss=..., temperature=..., num_views=V * B)
    for alarm in alarms(metrics | {"step": step}): log.warning(alarm)

`diagnose` sees this rank's rows only and calls no collective; its values are those of a sample of this rank.

Legend: n images of this rank, V views of each, v = V n, D the encoder's width, d the head's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def effective_rank(features: Tensor) -> Tensor:
    """RankMe of (n, D) features: exp of the entropy of the singular values' shares (Garrido et al. 2023, eq. 1).

    Between 1 and min(n, D). From the Gram matrix's eigenvalues in fp64: square roots of an fp32 Gram's rounding
    would add up to a spectrum where there is none. A matrix of zeros has rank 1.
    """
    wide = features.detach().double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = singular / singular.sum().clamp(min=1e-300) + 1e-7
    return torch.exp(-(shares * shares.log()).sum()).clamp(min=1.0)


@torch.no_grad()
def diagnose(
    h: Tensor,
    z: Tensor,
    *,
    loss: Tensor | float | None = None,
    temperature: float | None = None,
    num_views: int | None = None,
    sample: int = 512,
    gradient_norm: Tensor | float | None = None,
    more: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Metrics of one step, from what it already computed; no collective, one transfer to the host.

    Shapes: h (n, V, D), z (n, V, d), before normalisation. At most `sample` views of each are used. `loss` and
    `num_views` are the global batch's. `more`: scalars on the device that are handed on.

    alignment: mean squared distance of positives, pairs of views of one image, on the sphere; uniformity: log of the
    mean Gaussian potential at t = 2 over pairs of other images (both Wang and Isola 2020, section 4.1). rankme_h,
    rankme_z and their share of what the sample allows (rankme_z_share). positive_similarity, negative_similarity: mean
    cosines. With `loss` and `num_views` loss_gap: log(num_views - 1) - loss, what the batch gave away; near zero
    nothing was learned. norm_h; dead_units_h: the share of h's units that are zero in the whole sample.
    """
    images = min(z.shape[0], max(sample // z.shape[1], 1))
    h = h.flatten(0, 1)[:sample].float()
    z_vnd = z[:images].transpose(0, 1).float()
    unit = F.normalize(z_vnd, dim=2)
    views = unit.flatten(0, 1)
    pairs = torch.combinations(torch.arange(z.shape[1])).tolist()
    values = {
        "alignment": torch.stack([(unit[a] - unit[b]).square().sum(1).mean() for a, b in pairs]).mean(),
        "positive_similarity": torch.stack([(unit[a] * unit[b]).sum(1).mean() for a, b in pairs]).mean(),
        "rankme_h": effective_rank(h),
        "rankme_z": effective_rank(z_vnd.flatten(0, 1)),
        "norm_h": h.norm(dim=1).mean(),
        "dead_units_h": (h.abs().amax(dim=0) == 0).float().mean(),
    }
    values["rankme_h_share"] = values["rankme_h"] / min(h.shape)
    values["rankme_z_share"] = values["rankme_z"] / min(views.shape)
    if images > 1:
        similarity = views @ views.T
        image = torch.arange(images, device=h.device).repeat(z.shape[1])
        other = image[:, None] != image[None, :]
        count = other.sum()
        values["negative_similarity"] = (similarity * other).sum() / count
        # |u - v|^2 = 2 - 2 u.v on the sphere
        potential = torch.where(other, torch.exp(-2.0 * (2.0 - 2.0 * similarity)), similarity.new_zeros(()))
        values["uniformity"] = (potential.sum() / count).log()
    if gradient_norm is not None:
        values["gradient_norm"] = torch.as_tensor(gradient_norm, device=h.device)
    if loss is not None and num_views is not None:
        values["loss_gap"] = math.log(max(num_views - 1, 1)) - torch.as_tensor(loss, device=h.device)
    values |= more or {}
    on_host = torch.stack([value.detach().to(h.device, torch.float64) for value in values.values()]).tolist()
    metrics = dict(zip(values, on_host, strict=True))
    if temperature is not None:
        metrics["temperature"] = float(temperature)
    return metrics


def alarms(metrics: Mapping[str, float]) -> list[str]:
    """One sentence for each thing that looks wrong in `diagnose`'s metrics, with what to try; empty when nothing does.

    `step` among the metrics silences what is normal in the first 200 steps.
    """
    found = []
    infinity = float("inf")
    late = metrics.get("step", infinity) >= 200
    positive, negative = metrics.get("positive_similarity", 0.0), metrics.get("negative_similarity", 0.0)
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        found.append(
            f"not finite: {', '.join(bad)}; try a longer warm-up, a lower optimizer.base_learning_rate, or "
            "engine.precision=fp32"
        )
    if late and negative > 0.95:
        found.append(
            f"collapse: views of different images have cosine {negative:.3f} in z; try a lower "
            "optimizer.base_learning_rate, a longer warm-up, batch norm in the head, or a larger batch"
        )
    elif late and metrics.get("rankme_z", infinity) < 3.0:
        found.append(
            f"dimensional collapse: z spans about {metrics['rankme_z']:.1f} directions; try a lower "
            "optimizer.base_learning_rate, model.head.batch_norm=true or a wider head"
        )
    if late and metrics.get("loss_gap", infinity) < 0.02:
        found.append(
            f"nothing learned: the loss is that of guessing, log(views - 1), {-metrics['loss_gap']:+.3f}; try a higher "
            "optimizer.base_learning_rate, a lower objective.temperature, or a larger augment.min_scale"
        )
    if late and positive > 0.995 and negative < 0.5:
        found.append(
            f"saturated: views of one image have cosine {positive:.4f}; the task is too easy: try stronger "
            "augmentation (augment.min_scale, augment.jitter_strength), a larger batch"
            + (" or a lower objective.temperature" if "temperature" in metrics else "")
        )
    if metrics.get("dead_units_h", 0.0) > 0.5:
        found.append(
            f"dead units: {100 * metrics['dead_units_h']:.0f}% of h is zero for every image of the sample; try a lower "
            "optimizer.base_learning_rate or a longer warm-up"
        )
    return found
