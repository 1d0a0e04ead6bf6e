"""What a method's loss sends and holds, for `estimate`: bytes of one rank in a step, with the formula.

Legend: W ranks, N images a step, n = N/W of a rank, V views of each, M = V N, d width of z, s bytes of a number of z.
"""

from __future__ import annotations

import torch

from dist_ssl.config import Config, LeJEPAConfig
from dist_ssl.objective import covariance

FP32, FP64 = 4, 8


def sent(config: Config, num_views: int, z_dim: int, ranks: int) -> tuple[str, float, str]:
    """(what, bytes that a rank sends by a ring, formula), forward; no loss sends anything in backward."""
    images, share, dtype = config.train.global_batch_size, (ranks - 1) / ranks, _dtype(config)
    match config.objective.name:
        case "nt_xent" | "decoupled" | "supervised":
            value = (FP32 * num_views * images * (z_dim + 1) + 8 * images) * share
            return "z and its log-sum-exps", value, "(4 M (d + 1) + 8 N) (W-1)/W, 8 of an image's number"
        case "moco_v3":
            return "keys", dtype.itemsize * 2 * images * z_dim * share, "s 2 N d (W-1)/W"
        case "vicreg" | "barlow_twins" as name:
            gathered, value = covariance.exchange(name, _rows(images, ranks), z_dim, dtype)
            sums = " + 2 * 4 * 2 d" if name == "barlow_twins" else ""
            if gathered:
                return "z, gathered since that is less than d x d", value, f"(s 2 N d{sums}) (W-1)/W"
            return "d x d sums, reduced since that is less than z", value, "2 * 4 (d + 4) d (W-1)/W"
        case "lejepa":
            assert isinstance(config.objective, LeJEPAConfig)
            points = num_views * config.objective.num_slices * (config.objective.num_points // 2)
            return "characteristic functions", 2 * FP64 * 2 * points * share, "2 * 8 * 2 V slices (points // 2) (W-1)/W"
        case "byol" | "simsiam" as name:
            return f"{name}'s loss", 0.0, "each image's own views, nothing"


def collectives(config: Config, z_dim: int, ranks: int) -> int:
    """How many a loss calls in a step."""
    match config.objective.name:
        case "nt_xent" | "decoupled" | "supervised" | "barlow_twins":
            return 2
        case "vicreg" as name:
            images = config.train.global_batch_size
            return 1 if covariance.exchange(name, _rows(images, ranks), z_dim, _dtype(config))[0] else 2
        case "moco_v3" | "lejepa":
            return 1
        case _:
            return 0


def held(config: Config, num_views: int, z_dim: int, ranks: int) -> tuple[float, str]:
    """(bytes, formula) of what a loss holds at its fullest."""
    images, d = config.train.global_batch_size, z_dim
    own = -(-images // ranks)
    match config.objective.name:
        case "nt_xent" | "decoupled" | "supervised":
            views = num_views * images
            return 3.0 * FP32 * views * d + 2.0 * FP32 * views, "3 * 4 M d + 2 * 4 M"
        case "moco_v3":
            return FP32 * (3.0 * images * d + 6.0 * own * d), "4 (3 N d + 6 n d)"
        case "vicreg" | "barlow_twins" as name:
            if covariance.exchange(name, _rows(images, ranks), d, _dtype(config))[0]:
                return FP32 * (4.0 * images * d + own * images + 6.0 * own * d), "4 (4 N d + n N + 6 n d)"
            return FP32 * (4.0 * d * d + 8.0 * own * d), "4 (4 d^2 + 8 n d)"
        case "lejepa":
            return FP32 * 5.0 * own * num_views * d, "4 * 5 n V d, and tiles"
        case "byol" | "simsiam":
            return FP32 * 8.0 * own * d, "4 * 8 n d"


def _rows(images: int, ranks: int) -> list[int]:
    return [images // ranks + (rank < images % ranks) for rank in range(ranks)]


def _dtype(config: Config) -> torch.dtype:
    """Of z under autocast."""
    return torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
