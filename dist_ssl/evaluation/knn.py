"""The k-nearest-neighbour probe: cosine similarity, votes weighted by exp(similarity / temperature) (Wu et al. 2018).

Queries and bank are read in blocks, so that neither the N x N matrix nor the features are ever in memory whole; with
several ranks each takes its slice of the queries.

Legend: q queries, n rows of the bank, D features, C classes, k neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_ssl.distributed import gather_rows, rank, world_size

QUERY_ROWS = 4096  # the bank is read once for as many queries
BANK_BYTES = 64 * 2**20


def nearest(queries: np.ndarray, bank: np.ndarray, k: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Similarities and rows, both (q, k), of the k rows of `bank` nearest to each query by cosine, best first.

    Not collective.
    """
    device = device or torch.device("cpu")
    k = min(k, len(bank))
    bank_rows = max(BANK_BYTES // (4 * max(bank.shape[1], QUERY_ROWS)), k)
    found_similarity, found_rows = [], []
    for start in range(0, len(queries), QUERY_ROWS):
        query = F.normalize(_read(queries, start, start + QUERY_ROWS, device), dim=1)
        best = torch.full((len(query), 0), 0.0, device=device)
        rows = torch.zeros((len(query), 0), dtype=torch.int64, device=device)
        for first in range(0, len(bank), bank_rows):
            block = F.normalize(_read(bank, first, first + bank_rows, device), dim=1)
            similarity = query @ block.T
            top, where = similarity.topk(min(k, len(block)), dim=1)
            best, rows = torch.cat([best, top], dim=1), torch.cat([rows, where + first], dim=1)
            if best.shape[1] > k:
                best, order = best.topk(k, dim=1)
                rows = rows.gather(1, order)
        best, order = best.sort(dim=1, descending=True)
        found_similarity.append(best)
        found_rows.append(rows.gather(1, order))
    return torch.cat(found_similarity), torch.cat(found_rows)


def knn_predict(
    queries: np.ndarray,
    bank: np.ndarray,
    bank_labels: np.ndarray,
    num_classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | None = None,
) -> Tensor:
    """Predicted classes (q,) on every rank. Collective: one all-gather of the ranks' predictions.

    Of classes with equal votes the smallest wins.
    """
    cuts = np.linspace(0, len(queries), world_size() + 1).astype(int)
    mine = queries[cuts[rank()] : cuts[rank() + 1]]
    labels = torch.from_numpy(np.array(bank_labels, dtype=np.int64))
    if len(mine):
        similarity, rows = nearest(mine, bank, k, device)
        # exp(1 / 0.07) fits fp32, but a smaller temperature would not: shifting every vote by the best is the same.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(mine), num_classes, device=similarity.device)
        votes.scatter_add_(1, labels.to(rows.device)[rows], weights)
        predicted = votes.argmax(dim=1)
    else:
        predicted = torch.zeros(0, dtype=torch.int64, device=device)
    return gather_rows(predicted, np.diff(cuts).tolist())


def _read(array: np.ndarray, start: int, stop: int, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(array[start:stop], dtype=np.float32)).to(device)
