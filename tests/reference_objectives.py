"""The objectives beside NT-Xent as loops over their papers' sums, of one global batch on one process."""

from __future__ import annotations

import math

import torch

from dist_ssl.objective import gaussian

NARROW, WIDE = 5, 24  # dimensions of z: with 12 images sums travel, or z does
SLICES = 9


def vicreg(z1, z2, invariance=25.0, variance=25.0, covariance=1.0):
    n, d = z1.shape
    loss = invariance * sum((z1[i, j] - z2[i, j]) ** 2 for i in range(n) for j in range(d)) / (n * d)
    for z in (z1, z2):
        centred = [z[:, j] - z[:, j].sum() / n for j in range(d)]
        for j in range(d):
            std = torch.sqrt((centred[j] @ centred[j]) / (n - 1) + 1e-4)
            loss = loss + variance * torch.relu(1 - std) / (2 * d)
            for k in range(d):
                if k != j:
                    loss = loss + covariance * ((centred[j] @ centred[k]) / (n - 1)) ** 2 / d
    return loss


def barlow_twins(z1, z2, off_diagonal=0.0051):
    n, d = z1.shape
    a, b = (
        [(x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-5) for x in z.unbind(dim=1)] for z in (z1, z2)
    )
    c = [[(a[j] * b[k]).sum() / n for k in range(d)] for j in range(d)]
    on = sum((1 - c[j][j]) ** 2 for j in range(d))
    return on + off_diagonal * sum(c[j][k] ** 2 for j in range(d) for k in range(d) if j != k)


def moco_v3(q1, q2, k1, k2, temperature):
    def cross_entropy(queries, keys):
        u, v = ([x / torch.sqrt(x @ x) for x in z] for z in (queries, keys))
        terms = [torch.stack([ui @ vj / temperature for vj in v]) for ui in u]
        return sum(s.logsumexp(0) - s[i] for i, s in enumerate(terms)) / len(u)

    return 2 * temperature * (cross_entropy(q1, k2) + cross_entropy(q2, k1))


def cosines(p, k):
    return [(x @ y) / torch.sqrt((x @ x) * (y @ y)) for x, y in zip(p, k, strict=True)]


def byol(p1, p2, k1, k2):
    return sum(2 - 2 * c for c in cosines(p1, k2) + cosines(p2, k1)) / len(p1)


def simsiam(p1, p2, z1, z2):
    z1, z2 = z1.detach(), z2.detach()
    return sum(-c / 2 for c in cosines(p1, z2) + cosines(p2, z1)) / len(p1)


def sigreg(z, seed, step, num_slices, num_points=17, largest_t=5.0):
    if z.dim() == 3:
        views = z.unbind(dim=1)
        return sum(sigreg(view, seed, step, num_slices, num_points, largest_t) for view in views) / len(views)
    loss, dt = 0.0, 2 * largest_t / (num_points - 1)
    for a in gaussian.slices(z.shape[1], num_slices, seed, step).T:
        u = z @ a
        for point in range(num_points):
            t = -largest_t + dt * point
            area = dt * (0.5 if point in (0, num_points - 1) else 1.0) * math.exp(-t * t / 2)
            real, imaginary = torch.cos(t * u).sum() / len(z) - math.exp(-t * t / 2), torch.sin(t * u).sum() / len(z)
            loss = loss + len(z) * area * (real**2 + imaginary**2) / num_slices
    return loss


# --- each objective as a function of two views, two keys --------------------------------------------------------


def views_of(z1, z2, num_views):
    """(n, V, d): views that lie between the two."""
    return torch.stack([z1 + (z2 - z1) * view / num_views for view in range(num_views)], dim=1)


def call(case, loss, z1, z2, k1, k2, **rows):
    name, *variant = case.split()
    match name:
        case "vicreg" | "barlow_twins":
            return loss(z1, z2, **rows)
        case "moco_v3":
            return loss(z1, z2, k1, k2, 0.2, **rows)
        case "byol":
            return loss(z1, z2, k1, k2, **rows)
        case "simsiam":  # its targets come from the encoder that learns
            return loss(z1, z2, z1 * 2 + z2, z2 * 3 - z1, **rows)
        case "sigreg":
            z = views_of(z1, z2, int(variant[0])) if variant else z1
            return loss(z, 3, 14, SLICES, **rows)
    raise ValueError(case)


CASES = [
    ("vicreg", NARROW),
    ("vicreg", WIDE),
    ("barlow_twins", NARROW),
    ("barlow_twins", WIDE),
    ("moco_v3", NARROW),
    ("byol", NARROW),
    ("simsiam", NARROW),
    ("sigreg", NARROW),
    ("sigreg 2", NARROW),
    ("sigreg 8", NARROW),
]
NAMES = sorted({case.split()[0] for case, _ in CASES})


def inputs(count, n, d, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, dtype=torch.float64, generator=generator).to(dtype) for _ in range(count)]


def gradients(case, loss, n, d, dtype=torch.float64):
    z1, z2, k1, k2 = inputs(4, n, d, dtype)
    z1.requires_grad_()
    z2.requires_grad_()
    value = call(case, loss, z1, z2, k1, k2)
    grads = torch.autograd.grad(value, (z1, z2), allow_unused=True)
    return [value.detach(), *(grad for grad in grads if grad is not None)]
