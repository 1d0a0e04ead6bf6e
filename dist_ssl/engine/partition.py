"""Which rank holds which range of which named parameter, and of its optimizer state, under each ZeRO stage.

DeepSpeed keeps fp32 master weights and optimizer state in flat tensors whose layout is internal and differs by stage;
this module is the only reader of it. The public `safe_get_*` functions do not suffice (they are ZeRO 3 only or include
padding, or raise before the first step). DeepSpeed is pinned to a minor version and `tests/test_partition.py` holds
each stage to the mapping.

A range is given in elements of the parameter flattened in row-major order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dist_ssl.distributed import gather_objects
from dist_ssl.engine.optimizers import Segment


@dataclass(frozen=True)
class Fragment:
    """Elements [offset, offset + length) of parameter `name` stand at `flat[flat_offset:]` on this rank.

    `flat` is the fp32 tensor that the optimizer steps, the key of its state; `replicated`: every rank holds it all.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    length: int
    flat: Tensor
    flat_offset: int
    replicated: bool

    def of(self, tensor: Tensor) -> Tensor:
        """This fragment's elements of the flat master, or of a state tensor shaped like it: a 1-D view."""
        return tensor.detach().view(-1).narrow(0, self.flat_offset, self.length)


def read(engine: Any) -> list[Fragment]:
    """The fragments that this rank holds, of all trainable parameters. Collective: checks that the ranks' tile them."""
    stage = engine.zero_optimization_stage()
    fragments = {0: _whole, 1: _stage_1_and_2, 2: _stage_1_and_2, 3: _stage_3}[int(stage)](engine)
    _check_tiling(engine, fragments)
    return fragments


def _whole(engine: Any) -> list[Fragment]:
    fragments = []
    for group in engine.basic_optimizer.param_groups:
        for p in group["params"]:
            if not p.is_contiguous():
                raise RuntimeError(f"{engine.param_names[p]}: expected contiguous memory, got strides {p.stride()}")
            fragments.append(Fragment(engine.param_names[p], tuple(p.shape), 0, p.numel(), p, 0, True))
    return fragments


def _stage_1_and_2(engine: Any) -> list[Fragment]:
    optimizer, fragments = engine.optimizer, []
    for flat, parameters in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        for p in parameters:
            if p._hp_mapping is None:  # this rank's partition ends before it or starts after it
                continue
            here, there = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
            name = engine.param_names[p]
            fragments.append(Fragment(name, tuple(p.shape), here.start, there.numel, flat, there.start, False))
    return fragments


def _stage_3(engine: Any) -> list[Fragment]:
    optimizer, fragments = engine.optimizer, []
    for number, parameters in enumerate(optimizer.fp16_groups):
        for p in parameters:
            group, flat_offset, partition_length = optimizer.grad_position[optimizer.get_param_id(p)]
            assert group == number
            offset = dist.get_rank(p.ds_process_group) * partition_length
            length = min(partition_length, p.ds_numel - offset)  # the rest is padding, uninitialised memory
            if length <= 0:
                continue
            flat, name = optimizer.fp32_partitioned_groups_flat[group], engine.param_names[p]
            fragments.append(Fragment(name, tuple(p.ds_shape), offset, length, flat, flat_offset, False))
    return fragments


def _check_tiling(engine: Any, fragments: list[Fragment]) -> None:
    held: dict[str, list[tuple[int, int]]] = {}
    for ranges in gather_objects([(f.name, f.offset, f.length) for f in fragments if not f.replicated]):
        for name, offset, length in ranges:
            held.setdefault(name, []).append((offset, length))
    for p, name in engine.param_names.items():
        if not p.requires_grad or (fragments and fragments[0].replicated):
            continue
        position = 0
        for offset, length in sorted(held.get(name, [])):
            if offset != position:
                break
            position += length
        expected = getattr(p, "ds_numel", p.numel())
        if position != expected:
            raise RuntimeError(
                f"{name}: the ranks' fragments cover {position} of {expected} elements: this DeepSpeed lays its state "
                "out in a way that partition.py does not know; install the version that pyproject.toml names"
            )


def gradients(engine: Any, fragments: list[Fragment]) -> list[Tensor]:
    """This rank's part of the averaged gradient, padding left out; to be read when the optimizer's first step begins.

    DeepSpeed hands its optimizer the flat gradient of one group at a time; those of later groups still are in pieces.
    """
    optimizer, stage = engine.optimizer, int(engine.zero_optimization_stage())
    found = [f.of(f.flat.grad) for f in fragments if f.flat.grad is not None]
    if stage in (1, 2):
        for number, flat in enumerate(optimizer.single_partition_of_fp32_groups):
            if flat.grad is None:
                found += optimizer.averaged_gradients.get(number) or []
    elif stage == 3:
        for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            if flat.grad is None:
                pieces = optimizer.averaged_gradients.get(number) or []
                flat_offsets = {f.flat_offset: f.length for f in fragments if f.flat is flat}
                position = 0
                for piece in pieces:
                    found.append(piece.view(-1)[: flat_offsets.get(position, 0)])
                    position += piece.numel()
    return found


def segments(fragments: list[Fragment], layers: Mapping[str, int]) -> dict[Tensor, list[Segment]]:
    """For LARS: the ranges of each flat tensor that are parameters, padding left out; `layers` numbers the names."""
    held: dict[Tensor, list[Segment]] = {}
    for f in fragments:
        held.setdefault(f.flat, []).append(Segment(layers[f.name], f.flat_offset, f.length))
    return held


def before_load(engine: Any) -> None:
    """Make the fragments writable."""
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_prologue()


def after_load(engine: Any) -> None:
    """Carry what was written to the masters over to the weights that forward uses. Collective."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
