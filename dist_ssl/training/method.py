"""What a method is in training: its loss, what is measured of it beside the geometry of h and z, and its alarms.

Legend: n images of this rank, V views, d width of z. z and p are (n, V, d); p is the predictor's output, z itself where
the method has none; target is the teacher's z, or z where there is no teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_ssl import objective
from dist_ssl.config import (
    BarlowTwinsConfig,
    BYOLConfig,
    Config,
    DecoupledConfig,
    LeJEPAConfig,
    MoCoV3Config,
    NTXentConfig,
    SimSiamConfig,
    SupervisedConfig,
    VICRegConfig,
)
from dist_ssl.data.stream import Batch
from dist_ssl.distributed import world_size
from dist_ssl.objective.gaussian import squared_distances

WITH_CHANCE = ("nt_xent", "decoupled", "supervised")  # their loss begins near the logarithm of the number of views


def loss_of(config: Config, p: Tensor, target: Tensor, batch: Batch, rows: Sequence[int], step: int) -> Tensor:
    """This rank's loss, a scalar, whose gradient goes to p alone; rows: the images of every rank.

    step: that of the run, by which SIGReg chooses its slices. Collective.
    """
    ids = batch.sample_ids
    match config.objective:
        case NTXentConfig(temperature=tau):
            return objective.nt_xent_views(p, tau, rows_per_rank=rows, sample_ids=ids)
        case DecoupledConfig(temperature=tau):
            return objective.decoupled_views(p, tau, rows_per_rank=rows, sample_ids=ids)
        case SupervisedConfig(temperature=tau):
            return objective.supervised_views(p, tau, batch.labels, rows_per_rank=rows, sample_ids=ids)
        case LeJEPAConfig(weight=weight, num_slices=slices, num_points=points, largest_t=largest_t):
            seed, views = config.run.seed, global_views(config)
            return objective.lejepa(
                p, seed, step, weight, slices, points, largest_t, global_views=views, rows_per_rank=rows
            )
    return _loss_of_two_views(config, p, target, rows)


def _loss_of_two_views(config: Config, p: Tensor, target: Tensor, rows: Sequence[int]) -> Tensor:
    # Under autocast a predictor gives bf16, and an encoder without a head may give fp32.
    dtype = torch.promote_types(p.dtype, target.dtype)
    (p1, p2), (k1, k2) = p.to(dtype).unbind(1), target.to(dtype).unbind(1)
    match config.objective:
        case MoCoV3Config(temperature=tau):
            return objective.moco_v3(p1, p2, k1, k2, tau, rows_per_rank=rows)
        case BYOLConfig():
            return objective.byol(p1, p2, k1, k2, rows_per_rank=rows)
        case SimSiamConfig():
            return objective.simsiam(p1, p2, k1, k2, rows_per_rank=rows)
        case VICRegConfig(invariance=invariance, variance=variance, covariance=covariance):
            return objective.vicreg(p1, p2, invariance, variance, covariance, rows_per_rank=rows)
        case BarlowTwinsConfig(off_diagonal=off_diagonal):
            return objective.barlow_twins(p1, p2, off_diagonal, rows_per_rank=rows)
    raise ValueError(f"expected a method, got {config.objective.name}")


def global_views(config: Config) -> slice:
    """Which of an image's views all views predict: those of the largest size, which stand side by side."""
    first = 0
    for side, num_views in config.augment.sizes():
        if side == config.augment.image_size:
            return slice(first, first + num_views)
        first += num_views
    raise AssertionError("the largest size is one of the sizes")


@torch.no_grad()
def measure(config: Config, loss: Tensor, z: Tensor, p: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The method's own metrics, scalars on the device, of `diagnostics.sample` views of this rank. Not collective.

    vicreg: invariance; off_diagonal, the mean over views of the squared covariances per dimension; std_z, the mean
    standard deviation of z's dimensions; low_std_share, of dimensions below 0.5. barlow_twins: diagonal, the mean
    correlation of a dimension with itself in the other view; off_diagonal, the mean square of the others. byol and
    simsiam: prediction_similarity, a cosine; std_z, of normalised z times sqrt(d): 1 where z is spread, 0 where it has
    collapsed (Chen and He 2021, section 4.1). moco_v3: query_accuracy, for how many queries their image's key is the
    nearest of the sample. lejepa: prediction, of this rank's images, and sigreg, of all ranks'; std_z, low_std_share.
    """
    if len(z) < 2:
        return {}
    images = slice(0, max(config.diagnostics.sample // z.shape[1], 2))
    z1, z2 = z[images, 0].float(), z[images, 1].float()
    match config.objective:
        case VICRegConfig():
            return _spread(z[images]) | {
                "invariance": (z1 - z2).square().mean(),
                "off_diagonal": torch.stack([_off_squares(_covariance(x)) / x.shape[1] for x in (z1, z2)]).mean(),
            }
        case BarlowTwinsConfig():
            a, b = ((x - x.mean(dim=0)) / (x.std(dim=0, correction=0) + 1e-5) for x in (z1, z2))
            correlation, d = a.T @ b / len(a), z.shape[2]
            off = _off_squares(correlation) / max(d * (d - 1), 1)
            return {"diagonal": correlation.diagonal().mean(), "off_diagonal": off}
        case BYOLConfig() | SimSiamConfig():
            similarity = F.cosine_similarity(p[images].float(), target[images].float().flip(1), dim=2)
            std = F.normalize(z[images].flatten(0, 1).float(), dim=1).std(dim=0).mean()
            return {"prediction_similarity": similarity.mean(), "std_z": std * z.shape[2] ** 0.5}
        case MoCoV3Config():
            queries = F.normalize(p[images].float(), dim=2)
            keys = F.normalize(target[images].float(), dim=2).flip(1)
            nearest = (queries.transpose(0, 1) @ keys.permute(1, 2, 0)).argmax(dim=2)  # (V, images)
            return {"query_accuracy": (nearest == torch.arange(nearest.shape[1], device=z.device)).float().mean()}
        case LeJEPAConfig(weight=weight):
            distances = squared_distances(z, global_views(config))
            found = _spread(z[images]) | {"prediction": distances / z.numel()}
            if weight > 0:  # this rank's loss is weighted by its part of the batch, SIGReg is the same on all
                part = distances * (world_size() / (config.train.global_batch_size * z[0].numel()))
                found["sigreg"] = (loss - (1 - weight) * part) / weight
            return found
    return {}


def _spread(z: Tensor) -> dict[str, Tensor]:
    std = z.float().std(dim=0)  # (V, d)
    return {"std_z": std.mean(), "low_std_share": (std < 0.5).float().mean()}


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=0)
    return centred.T @ centred / max(len(x) - 1, 1)


def _off_squares(matrix: Tensor) -> Tensor:
    return matrix.square().sum() - matrix.diagonal().square().sum()


def alarms(metrics: Mapping[str, float]) -> list[str]:
    """One sentence for each thing that looks wrong in `measure`'s metrics, with what to try.

    `step` among the metrics silences what is normal in the first 200 steps.
    """
    found: list[str] = []
    infinity = float("inf")
    if metrics.get("step", infinity) < 200:
        return found
    if (share := metrics.get("low_std_share", 0.0)) > 0.5:
        found.append(
            f"collapse: {100 * share:.0f}% of z's dimensions have a deviation below 0.5 where 1 is asked for; try a "
            "larger objective.variance (lejepa: objective.weight) or a lower optimizer.base_learning_rate"
        )
    elif metrics.get("std_z", infinity) < 0.1:
        found.append(
            f"collapse: the deviation of normalised z is {metrics['std_z']:.3f} of that of a spread one; try batch "
            "norm in head and predictor, a teacher_decay nearer 1, or a lower optimizer.base_learning_rate"
        )
    if metrics.get("diagonal", infinity) < 0.1:
        found.append(
            f"nothing learned: z's dimensions correlate by {metrics['diagonal']:.3f} between the two views; try a "
            "higher optimizer.base_learning_rate or a smaller objective.off_diagonal"
        )
    if metrics.get("query_accuracy", infinity) < 0.02:
        found.append(
            f"nothing learned: {100 * metrics['query_accuracy']:.1f}% of the queries find their image's key; try a "
            "higher optimizer.base_learning_rate, a longer warm-up, or a larger augment.min_scale"
        )
    return found
