"""What each ZeRO stage costs a run, and which one costs the least of those that fit a GPU: part of `dist-ssl plan`.

Gradients that are reduced while backward runs cost no time where the wire keeps up; what a step waits for is the rest:
under ZeRO 0 the whole all-reduce, under 1 and 2 the all-gather of the weights. ZeRO 3 gathers ahead of use too, but
DeepSpeed's host waits for the device in it several times a step, so it is for models that fit in no other way.

Legend: P parameters, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from dist_ssl.config import WITH_TEACHER, Config
from dist_ssl.planning.estimate import FP32, Estimate, Sizes, memory, shown, wire

USABLE = 0.9  # of a GPU's memory: the allocator's gaps and the kernels' workspace take the rest


@dataclass(frozen=True)
class Stage:
    """Of one GPU and step, in bytes; `exposed_bytes` of those sent are sent while nothing is computed."""

    zero_stage: int
    memory_bytes: float
    sent_bytes: float
    exposed_bytes: float
    host_waits: bool


def stages(config: Config, sizes: Sizes) -> list[Stage]:
    """ZeRO 0 to 3, with a teacher 0 to 2, for this config, whatever its own stage is."""
    weights, found = FP32 * sizes.parameters * (sizes.ranks - 1) / sizes.ranks, []
    for number in range(3 if config.objective.name in WITH_TEACHER else 4):
        engine = config.engine.model_copy(update={"zero_stage": number})
        staged = config.model_copy(update={"engine": engine})
        sent = wire(staged, sizes)[0].value
        exposed = {0: sent, 1: weights if config.objective.chunks == 1 else sent, 2: weights, 3: 0.0}[number]
        found.append(Stage(number, memory(staged, sizes)[-1].value, sent, exposed, number == 3))
    return found


def recommended(found: list[Stage], gpu_memory_bytes: float) -> Stage | None:
    """The one that a step waits for least, of those that fit; None where none does."""
    fitting = [stage for stage in found if stage.memory_bytes <= USABLE * gpu_memory_bytes]
    return min(
        fitting,
        key=lambda s: (s.host_waits, s.exposed_bytes, s.sent_bytes, s.memory_bytes, s.zero_stage),
        default=None,
    )


def table(found: list[Stage], gpu_memory_gb: float) -> Table:
    """The stages, the recommended one marked; memory in GB of 1e9 bytes."""
    best = recommended(found, gpu_memory_gb * 1e9)
    rows = Table("ZeRO", "memory a GPU", "sent a step", "not behind backward", "host waits", "", title="ZeRO stages")
    for stage in found:
        sizes = (stage.memory_bytes, stage.sent_bytes, stage.exposed_bytes)
        fits = stage.memory_bytes <= USABLE * gpu_memory_gb * 1e9
        remark = "recommended" if stage is best else "" if fits else f"more than {USABLE:.0%} of {gpu_memory_gb:g} GB"
        cells = [shown(Estimate("", size, "bytes", "")) for size in sizes]
        rows.add_row(str(stage.zero_stage), *cells, "each step" if stage.host_waits else "no", remark)
    if best is None:
        rows.caption = "none fits: raise objective.chunks or the number of GPUs, or set model.activation_checkpointing"
    else:
        rows.caption = f"--set engine.zero_stage={best.zero_stage}"
    return rows
