"""The moments of a batch out of those of its ranks' rows: what batch norm's layers exchange forward, on any device.

Legend: G ranks that share a batch, C channels. A part is (2C + 1,): means, sums of squared differences from them, and
how many rows it is of.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ssl.distributed import Peers, all_gather_single

GATHERED_BYTES = 2**20  # that a rank receives, up to which one all-gather is taken for less than two all-reduces


def is_gathered(num_channels: int, num_ranks: int, bytes_a_number: int) -> bool:
    """Whether ranks gather their parts; from shapes alone, so that all choose alike."""
    return (2 * num_channels + 1) * bytes_a_number * (num_ranks - 1) <= GATHERED_BYTES


def sent_bytes(num_channels: int, num_ranks: int, bytes_a_number: int) -> float:
    """That a rank sends for one layer's forward, by rings."""
    if is_gathered(num_channels, num_ranks, bytes_a_number):
        return (2 * num_channels + 1) * bytes_a_number * (num_ranks - 1)
    return 2 * (2 * num_channels + 1) * 8 * (num_ranks - 1) / num_ranks


def exchange(part: Tensor, among: Peers) -> Tensor:
    """(2C + 1,) of this rank -> (G, 2C + 1) of all, or (1, 2C + 1): all merged, by Chan et al. 1979, in fp64.

    The same bits on all ranks. Collective: one all-gather, or two all-reduces, of counts and sums, then of differences
    from the mean of all; never of E[x^2] - E[x]^2.
    """
    channels = len(part) // 2
    if is_gathered(channels, among.size, part.element_size()):
        received = part.new_empty(among.size * len(part))
        all_gather_single(received, part, among.group)
        return received.view(among.size, -1)
    mean, centred, count = part.double().split([channels, channels, 1])
    sums = torch.cat([mean * count, count])
    dist.all_reduce(sums, group=among.group)
    total = sums[-1:]
    merged = sums[:-1] / total
    centred = centred + count * (mean - merged).square()
    dist.all_reduce(centred, group=among.group)
    return torch.cat([merged, centred, total]).to(part.dtype)[None]
