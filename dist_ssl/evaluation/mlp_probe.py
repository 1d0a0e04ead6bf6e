"""One classifier for every question: an MLP of one hidden layer, all seeds trained at once as one batched product.

Legend: n training rows, m scored rows, D features, H hidden units, C classes, K seeds.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

HIDDEN, EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 128, 25, 256, 2e-3, 1e-4
PATIENCE = 5  # epochs without a better held-out log-loss


def mlp_log_probabilities(
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray,
    num_classes: int,
    num_seeds: int,
    device: torch.device | None = None,
) -> np.ndarray:
    """(K, m, C) log-probabilities of K probes, each with its own held-out tenth, initial weights and order of rows.

    Features are standardised by the training rows. AdamW; the epoch with the best held-out log-loss is taken, or the
    classes' shares where no epoch beats them, so that overfitting does not understate what the features hold. Not
    collective.
    """
    device = device or torch.device("cpu")
    x, y = torch.from_numpy(np.array(x_train, dtype=np.float32)).to(device), torch.from_numpy(y_train).long().to(device)
    mean, std = x.mean(0), x.std(0)
    inverse = torch.where(std > 1e-6 * (mean.abs() + std.max()).clamp(min=1e-30), 1 / std.clamp(min=1e-30), 0.0)
    x = (x - mean) * inverse
    scored = (torch.from_numpy(np.array(x_test, dtype=np.float32)).to(device) - mean) * inverse
    generator = torch.Generator().manual_seed(0)
    n, held = len(x), max(len(x) // 10, 1)
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(num_seeds)])
    held_out, rows = order[:, :held].to(device), order[:, held:]
    weights = _initial(x.shape[1], num_classes, num_seeds, generator, device)
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    total = EPOCHS * -(-rows.shape[1] // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    # The classes' shares alone are a candidate too: what a probe learned but does not generalise is no information.
    shares = torch.bincount(y, minlength=num_classes).add(1).float()
    best = [torch.zeros_like(weight) for weight in weights]
    best[-1] += (shares / shares.sum()).log()
    with torch.no_grad():
        best_loss = _losses(best, x[held_out], y[held_out]).mean(1)
    worse = 0
    for _ in range(EPOCHS):
        shuffled = torch.stack([row[torch.randperm(len(row), generator=generator)] for row in rows]).to(device)
        for batch in shuffled.split(BATCH, dim=1):
            loss = _losses(weights, x[batch], y[batch]).mean(1).sum()  # seeds do not share weights: a sum of their own
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            losses = _losses(weights, x[held_out], y[held_out]).mean(1)
            better = losses < best_loss
            best_loss = torch.where(better, losses, best_loss)
            for kept, weight in zip(best, weights, strict=True):
                kept[better] = weight[better]
        worse = 0 if bool(better.any()) else worse + 1
        if worse == PATIENCE:
            break
    with torch.no_grad():
        parts = [_logits(best, part.expand(num_seeds, -1, -1)).log_softmax(2) for part in scored.split(4096)]
    return torch.cat(parts, dim=1).cpu().numpy()


def _initial(
    dim: int, num_classes: int, num_seeds: int, generator: torch.Generator, device: torch.device
) -> list[Tensor]:
    first = torch.randn(num_seeds, dim, HIDDEN, generator=generator) * (2 / dim) ** 0.5
    second = torch.randn(num_seeds, HIDDEN, num_classes, generator=generator) * (1 / HIDDEN) ** 0.5
    biases = torch.zeros(num_seeds, 1, HIDDEN), torch.zeros(num_seeds, 1, num_classes)
    return [tensor.to(device).requires_grad_() for tensor in (first, biases[0], second, biases[1])]


def _logits(weights: list[Tensor], x_knd: Tensor) -> Tensor:
    first, first_bias, second, second_bias = weights
    return torch.baddbmm(second_bias, torch.baddbmm(first_bias, x_knd, first).relu(), second)


def _losses(weights: list[Tensor], x_knd: Tensor, y_kn: Tensor) -> Tensor:
    logits = _logits(weights, x_knd)
    return F.cross_entropy(logits.flatten(0, 1), y_kn.flatten(), reduction="none").view(y_kn.shape)
