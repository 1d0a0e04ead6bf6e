"""What the training loop watches beside the loss: geometry of h and z, alarms, linear probes trained beside the run.

How the loop calls it, all three outside the encoder's graph and outside DeepSpeed:

    every diagnostics.every_steps:  metrics = diagnose(h, z, loss=..., temperature=..., num_views=V * B)
                                    for alarm in alarms(metrics | {"step": step}): log.warning(alarm)
    every step, with labels:        probe = OnlineProbe(num_classes, {"h": D, "z": d}).to(device)
                                    probe.update({"h": h[:, 0], "z": z[:, 0]}, labels)  # collective: one all-reduce
    when it logs:                   probe.metrics()                            # {"online_accuracy_h": ..., ...}

`diagnose` sees this rank's rows only and calls no collective; its values are those of a sample of this rank. The
probe's buffers are replicated (every rank holds the same), so rank 0's `state_dict()` is the whole state.

Legend: n images of this rank, V views of each, v = V n, D the encoder's width, d the head's, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dist_ssl.distributed import world_size


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
            f"nothing learned: the loss is {metrics['loss_gap']:.3f} below log(views - 1); try a higher "
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


class OnlineProbe(nn.Module):
    """Linear classifiers on detached features, trained beside the run by Adam, the same on every rank and ZeRO stage.

    All its state is in buffers: it is no part of the model, DeepSpeed never sees it, and `state_dict()` restores it.
    Features are standardised by running statistics that all ranks share. Accuracy is measured on each batch before
    the update that learns from it (prequential), and smoothed over about 1 / (1 - smoothing) updates.
    """

    accuracy: Tensor
    updates: Tensor

    def __init__(
        self, num_classes: int, dims: Mapping[str, int], learning_rate: float = 2e-3, smoothing: float = 0.98
    ) -> None:
        super().__init__()
        self.num_classes, self.dims = num_classes, dict(dims)
        self.learning_rate, self.smoothing = learning_rate, smoothing
        for layer, dim in self.dims.items():
            for name in ("weight", "exp_avg", "exp_avg_sq"):
                self.register_buffer(f"{layer}_{name}", torch.zeros(dim + 1, num_classes))
            self.register_buffer(f"{layer}_mean", torch.zeros(dim))
            self.register_buffer(f"{layer}_variance", torch.ones(dim))
        self.register_buffer("accuracy", torch.zeros(len(self.dims)))
        self.register_buffer("updates", torch.zeros(()))

    @torch.no_grad()
    def update(self, features: Mapping[str, Tensor], labels: Tensor) -> None:
        """One step on features {layer: (n, dim)} and labels (n,); -1 marks a row without a label.

        Collective: one all-reduce of all layers' gradients, feature sums and counts. No host synchronisation.
        """
        device = labels.device
        with torch.autocast(device.type, enabled=False):
            parts = [self._local_sums(layer, features[layer].detach().float(), labels) for layer in self.dims]
            flat = torch.cat([part for parts_of_layer in parts for part in parts_of_layer])
            if world_size() > 1:
                dist.all_reduce(flat)
            sums = flat.split([self._size(layer) for layer in self.dims])
            count = sums[0][-1]
            # An update of no labelled row anywhere changes nothing: every factor below carries `seen`.
            seen = (count > 0).float()
            self.updates += seen
            for position, layer in enumerate(self.dims):
                self._learn(position, layer, sums[position], count.clamp(min=1), seen)

    def metrics(self) -> dict[str, float]:
        """{"online_accuracy_h": ...}: smoothed top-1 accuracy in [0, 1]; empty before the first labelled batch."""
        updates = float(self.updates)
        if updates == 0:
            return {}
        unbias = 1 - self.smoothing**updates
        values = (self.accuracy / unbias).tolist()
        return {f"online_accuracy_{layer}": value for layer, value in zip(self.dims, values, strict=True)}

    def _size(self, layer: str) -> int:
        return (self.dims[layer] + 1) * self.num_classes + 2 * self.dims[layer] + 2

    def _local_sums(self, layer: str, x: Tensor, labels: Tensor) -> list[Tensor]:
        known = labels >= 0
        mask = known.float()[:, None]
        centred = (x - self._buffer(layer, "mean")) * mask
        normal = centred * self._buffer(layer, "variance").add(1e-5).rsqrt()
        inputs = torch.cat([normal, mask], dim=1)  # the last column is the bias
        logits = inputs @ self._buffer(layer, "weight")
        targets = labels.clamp(min=0)
        gradient = logits.softmax(dim=1)
        gradient[torch.arange(len(targets), device=x.device), targets] -= 1
        gradient *= mask
        correct = ((logits.argmax(dim=1) == targets) & known).float().sum()
        sums = [(inputs.T @ gradient).flatten(), centred.sum(0), centred.square().sum(0)]
        return [*sums, correct[None], mask.sum()[None]]

    def _learn(self, position: int, layer: str, sums: Tensor, count: Tensor, seen: Tensor) -> None:
        dim = self.dims[layer]
        gradient, total, squares, correct, _ = sums.split([(dim + 1) * self.num_classes, dim, dim, 1, 1])
        gradient = gradient.view(dim + 1, self.num_classes) / count
        exp_avg, exp_avg_sq = self._buffer(layer, "exp_avg"), self._buffer(layer, "exp_avg_sq")
        exp_avg.lerp_(gradient, 0.1 * seen)
        exp_avg_sq.lerp_(gradient.square(), 0.01 * seen)
        first = exp_avg / (1 - 0.9 ** self.updates.clamp(min=1))
        second = exp_avg_sq / (1 - 0.99 ** self.updates.clamp(min=1))
        self._buffer(layer, "weight").sub_(self.learning_rate * seen * first / (second.sqrt() + 1e-8))
        # The first batch sets the statistics, later ones move them by a tenth.
        rate = torch.where(self.updates <= 1, 1.0, 0.1) * seen
        shift = total / count
        self._buffer(layer, "variance").lerp_((squares / count - shift.square()).clamp(min=0), rate)
        self._buffer(layer, "mean").add_(rate * shift)
        self.accuracy[position].lerp_(correct[0] / count, (1 - self.smoothing) * seen)

    def _buffer(self, layer: str, name: str) -> Tensor:
        return self.get_buffer(f"{layer}_{name}")
