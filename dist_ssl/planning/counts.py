"""What grows with the number of ranks, by count: `dist-ssl plan CONFIG --at-ranks 8,64,1024`.

Legend: W ranks, P parameters in T tensors, L layers of batch norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.table import Table

from dist_ssl.config import Config
from dist_ssl.models import moments
from dist_ssl.planning import method_costs
from dist_ssl.planning.estimate import BUCKET, FLATTENED, Estimate, Sizes, bucket, checkpoint, shown, wire
from dist_ssl.training.online_probe import exchange

GROUPS = 2  # of parameters, with weight decay and without: DeepSpeed gathers one after the other


def collectives(config: Config, sizes: Sizes) -> list[Estimate]:
    """Of a step that is not logged."""
    chunks, peers = config.objective.chunks, max(1, sizes.ranks // config.batch_norm_slices)
    forwards, norms = 2 if chunks > 1 else 1, 0
    if peers > 1:  # else a rank holds its slices whole
        norms = chunks * forwards * _of_moments(sizes.batch_norm_channels, peers, sizes.moment_bytes)
        norms += chunks * (
            _of_moments(sizes.teacher_channels, peers, sizes.moment_bytes) + len(sizes.batch_norm_channels)
        )
    norms += config.batch_norm_slices > 1
    parts = [
        _of_weights(config, sizes),
        Estimate("batch norm", norms, "", "a layer 1 or 2 a forward, 1 backward; of slices, one"),
        Estimate("loss", method_costs.collectives(config, sizes.z_dim, sizes.ranks), "", "forward"),
        Estimate("verdict", 1, "", "an all-reduce of 6 numbers"),
    ]
    if sizes.num_classes:
        dims, images = (sizes.h_dim, sizes.z_dim), config.train.global_batch_size
        called = 3 if exchange(sizes.num_classes, dims, images, sizes.ranks)[0] else 1
        parts.append(Estimate("online probe", called, "", "an all-reduce; of many classes 2 and an all-gather"))
    if config.optimizer.name == "lars" and config.engine.zero_stage:
        parts.append(Estimate("LARS", 1, "", "an all-reduce of each layer's norms"))
    return [*parts, Estimate("collectives of a step", sum(part.value for part in parts), "", "the sum")]


def _of_moments(channels: Sequence[int], ranks: int, bytes_a_number: int) -> int:
    """Of a forward: a gather a layer or, of many ranks, two reductions."""
    return sum(1 if moments.is_gathered(each, ranks, bytes_a_number) else 2 for each in channels)


def _of_weights(config: Config, sizes: Sizes) -> Estimate:
    """As DeepSpeed reduces gradients and gathers weights; more where tensors don't fill its buckets."""
    of_chunk, p = -(-sizes.parameters // bucket(sizes)), sizes.parameters
    match config.engine.zero_stage:
        case 0:
            return Estimate("weights", -(-p // FLATTENED), "", "ceil(P / 5e8)")
        case 1 | 2 as stage:
            reductions = of_chunk * (config.objective.chunks if stage == 2 else 1)
            gathers = GROUPS - 1 + max(1, p // BUCKET)
            return Estimate("weights", reductions + gathers, "", "ceil(P / bucket), ZeRO 2 a chunk; P // 5e7 + 1")
        case _:
            value = len(sizes.tensors) + 2 + of_chunk * config.objective.chunks
            return Estimate("weights", value, "", "T gathers, 2 scalars, ceil(P / bucket) a chunk")


def counts(config: Config, sizes: Sizes) -> list[Estimate]:
    """Of one rank and step, and of a checkpoint."""
    return [
        *(replace(part, name=f"{part.name}: collectives") for part in collectives(config, sizes)[:-1]),
        collectives(config, sizes)[-1],
        *(replace(part, name=f"{part.name}: sent") for part in wire(config, sizes)[:-1]),
        replace(wire(config, sizes)[-1], name="sent by a rank in a step"),
        Estimate("files of a checkpoint", sizes.ranks + 2, "", "W, the state, the manifest"),
        replace(checkpoint(config, sizes)[0], name="bytes of a checkpoint"),
    ]


def table(title: str, config: Config, sizes: Sizes, at_ranks: Sequence[int]) -> Table:
    """A column for each number of ranks."""
    rows = Table("", *(f"W = {ranks:,}" for ranks in at_ranks), "formula", title=title)
    columns = [counts(config, replace(sizes, ranks=ranks)) for ranks in at_ranks]
    for found in zip(*columns, strict=True):
        rows.add_row(found[0].name, *map(shown, found), found[-1].formula)
    return rows
