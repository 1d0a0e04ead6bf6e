"""`dist-ssl plan`: what a run will need, by formulas that are printed beside the numbers.

For sizes that nobody can rent for a try: 512 GPUs, a batch of 65,536, a billion images. What can be measured on this
machine is (the parameters, the activations of two images), and tests hold the rest against real runs.

Legend: P parameters, W ranks, B images a step, V views of each, M = V B views, n = B/W images a rank, d width of z, k
values of optimizer state a parameter (LARS 1, AdamW 2), a bytes that the forward of one image's views keeps for
backward, p values of their pixels: 3 S^2 of each view of side S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from dist_ssl import config as configuration
from dist_ssl.config import WITH_TEACHER, Config
from dist_ssl.data.manifest import Manifest
from dist_ssl.models import ContrastiveModel, GlobalBatchNorm, build_model, moments
from dist_ssl.planning import method_costs
from dist_ssl.planning.method_costs import FP32
from dist_ssl.training.online_probe import exchange

BUCKET, OVERLAPPED_BUCKET = 50_000_000, 6_553_600  # elements; engine.py gives them to DeepSpeed's reductions
FLATTENED = 500_000_000  # elements that DeepSpeed copies together for a reduction under ZeRO 0
PERSISTENT = 100_000  # elements; DeepSpeed's stage3_param_persistence_threshold
PIECE_BYTES = 113  # of a piece of a tensor in the header of a checkpoint's file, measured: tests.benchmarks.many_ranks


@dataclass(frozen=True)
class Estimate:
    """A number with its unit, and the formula that it came from."""

    name: str
    value: float
    unit: str
    formula: str


@dataclass(frozen=True)
class Sizes:
    """What the formulas start from."""

    tensors: tuple[int, ...]  # elements of each that the parameters are in
    buffer_bytes: int
    batch_norm_channels: tuple[int, ...]  # of each pass through one in a forward: the encoder's once a size of views
    activation_bytes: int  # the views of one image
    optimizer_values: int  # k
    ranks: int
    z_dim: int  # d
    teacher_bytes: int = 0
    teacher_channels: tuple[int, ...] = ()  # of its batch norm
    h_dim: int = 0
    num_classes: int = 0  # that the online probe learns; 0 without one
    moment_bytes: int = FP32  # of a number of batch norm's statistics: FP32 on a GPU, FP64 on a CPU

    @property
    def parameters(self) -> int:
        return sum(self.tensors)

    @property
    def small_parameters(self) -> int:
        """In tensors that DeepSpeed's stage 3 never releases."""
        return sum(size for size in self.tensors if size < PERSISTENT)

    @staticmethod
    def of(config: Config, ranks: int, measure: bool = True, num_classes: int = 0) -> Sizes:
        """Counts the model's parameters, and measures what the forward of an image keeps. Not collective.

        num_classes: of the data, 0 where it has no labels.
        """
        model = build_model(config)
        passes = [*(model.encoder for _ in config.augment.sizes()), model.head, model.predictor]
        norms = [m for part in passes if part is not None for m in part.modules() if isinstance(m, GlobalBatchNorm)]
        teacher = [model.encoder, model.head] if config.objective.name in WITH_TEACHER else []
        return Sizes(
            tuple(p.numel() for p in model.parameters()),
            sum(b.nbytes for b in model.buffers()),
            tuple(norm.num_features for norm in norms),
            activation_bytes(model, config) if measure else 0,
            {"lars": 1, "adamw": 2}[config.optimizer.name],
            ranks,
            model.widths["z"],
            sum(t.nbytes for part in teacher for t in part.state_dict().values()),
            tuple(m.num_features for part in teacher for m in part.modules() if isinstance(m, GlobalBatchNorm)),
            model.widths["h"],
            num_classes if config.diagnostics.online_probe else 0,
        )


def activation_bytes(model: ContrastiveModel, config: Config) -> int:
    """Bytes that the forward of one image's views keeps for backward, measured: two images less one."""

    def kept(num_images: int) -> int:
        held: dict[int, Tensor] = {}
        given = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            place = tensor.untyped_storage().data_ptr()
            if place not in given:
                held[place] = tensor  # kept alive, so that no other tensor gets its place
            return tensor

        shapes = [(num_images * num_views, 3, side, side) for side, num_views in config.augment.sizes()]
        views = [torch.zeros(shape).contiguous(memory_format=torch.channels_last) for shape in shapes]
        bf16 = config.engine.precision == "bf16"
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False),
        ):
            outputs = model(*views)
        del outputs
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())

    return kept(2) - kept(1)


def pixel_values(config: Config) -> int:
    """p, of the views of one image."""
    return sum(num_views * 3 * side * side for side, num_views in config.augment.sizes())


def described_views(config: Config) -> str:
    """An image's views in words: 2 x 224 + 6 x 96."""
    return " + ".join(f"{num_views} x {side}" for side, num_views in config.augment.sizes())


def bucket(sizes: Sizes) -> int:
    """Elements that one reduction of gradients takes on GPUs: small where it overlaps with backward."""
    overlapped = max(OVERLAPPED_BUCKET, *sizes.tensors)
    return min(sizes.parameters, overlapped if sizes.ranks > 1 else BUCKET)


def state_bytes(sizes: Sizes, zero_stage: int) -> Estimate:
    """Bytes that a rank holds between steps: weights, fp32 masters, optimizer state."""
    p, w, k = sizes.parameters, sizes.ranks, sizes.optimizer_values
    match zero_stage:
        case 0:
            return Estimate("model and optimizer state", FP32 * p * (1 + k), "bytes", "4 P (1 + k)")
        case 1 | 2:
            return Estimate("model and optimizer state", FP32 * p * (1 + (1 + k) / w), "bytes", "4 P (1 + (1 + k) / W)")
        case 3:
            value = FP32 * (p * (3 + k) / w + bucket(sizes) + sizes.small_parameters)
            formula = "4 (P (3 + k) / W + bucket + P in tensors below 1e5)"
            return Estimate("model and optimizer state", value, "bytes", formula)
    raise ValueError(f"expected a ZeRO stage of 0 to 3, got {zero_stage}")


def gradient_bytes(sizes: Sizes, zero_stage: int, chunks: int = 1) -> Estimate:
    """Bytes more while backward runs: gradients, reduction buckets; under ZeRO 3 the gathered weights."""
    p, w, size = float(sizes.parameters), sizes.ranks, bucket(sizes)
    match zero_stage:
        case 0:
            value, formula = p + min(p, FLATTENED), "gradients, flattened: 4 (P + min(P, 5e8))"
        case 1 if w == 1 or chunks > 1:  # not reduced before backward has ended
            value, formula = p + p / w + min(p, BUCKET), "4 (P + P / W + min(P, 5e7))"
        case 1 | 2:
            parts, buckets = min(chunks, 2), 2 if w > 1 or chunks > 1 else 1
            value, formula = parts * p / w + buckets * size, f"4 ({parts} * P / W + {buckets} * bucket of {size:.1e})"
        case _:
            value, formula = p, "gathered weights: 4 P"
    return Estimate("gradients and weights of backward", FP32 * value, "bytes", formula)


def memory(config: Config, sizes: Sizes) -> list[Estimate]:
    """Of one rank's device, at its fullest: the end of the forward, and backward."""
    stage, width, pixels = config.engine.zero_stage, sizes.z_dim, pixel_values(config)
    images = -(-config.train.global_batch_size // sizes.ranks)
    chunk = -(-images // config.objective.chunks)
    loss = method_costs.held(config, config.augment.num_views, width, sizes.ranks)
    views_bytes = 2 if config.engine.precision == "bf16" else FP32
    parts = [
        state_bytes(sizes, stage),
        gradient_bytes(sizes, stage, config.objective.chunks),
        Estimate(
            "activations", float(chunk * sizes.activation_bytes), "bytes",
            f"n / chunks * a, a = {sizes.activation_bytes / 1e6:.1f} MB for {described_views(config)} views, measured",
        ),
        # uint8 crops of the step before, this one and the two after it, and the views of this one's chunk
        Estimate(
            "pixels", float(pixels * (4 * images + views_bytes * chunk)), "bytes",
            f"p (4 n + {views_bytes} n / chunks)",
        ),
        Estimate("loss", loss[0], "bytes", loss[1]),
    ]  # fmt: skip
    if sizes.teacher_bytes:
        parts.append(Estimate("teacher", sizes.teacher_bytes, "bytes", "4 P of encoder and head, and their buffers"))
    if config.engine.precision == "bf16":
        parts.append(Estimate("weights cast to bf16", 2.0 * sizes.parameters, "bytes", "2 P"))
    total = sum(part.value for part in parts)
    return [*parts, Estimate("memory a GPU", total, "bytes", "the sum; allocator and kernels' workspace come on top")]


def shared_memory(config: Config, ranks: int, ranks_of_node: int) -> Estimate:
    """Of a node's /dev/shm: the crops that data workers hold ready, and the four batches that a rank has in hand."""
    data = config.data
    if data.num_workers == 0:
        return Estimate("shared memory, a node", 0.0, "bytes", "no workers, none")
    images = -(-config.train.global_batch_size // ranks)
    batches = data.num_workers * data.prefetch_batches + 4
    value = float(ranks_of_node * batches * images * pixel_values(config))
    return Estimate("shared memory, a node", value, "bytes", "ranks of it * (workers * prefetch + 4) * n p")


def wire(config: Config, sizes: Sizes) -> list[Estimate]:
    """Bytes that one rank sends in a step, by ring algorithms: what a ring can't undercut."""
    p, w, stage = sizes.parameters, sizes.ranks, config.engine.zero_stage
    share, width, chunks = (w - 1) / w, sizes.z_dim, config.objective.chunks
    reduction = {
        0: (2, "all-reduce of gradients: 2 * 4 P (W-1)/W"),
        1: (3, "all-reduce of gradients, all-gather of weights: 3 * 4 P (W-1)/W"),
        2: (2 * chunks + 1, "all-reduce of each chunk's gradients, all-gather of weights: (2 chunks + 1) 4 P (W-1)/W"),
        3: (2, "all-gather of weights, reduce-scatter of gradients: 2 * 4 P (W-1)/W"),
    }[stage]
    channels = sum(sizes.batch_norm_channels)
    peers = max(1, w // config.batch_norm_slices)  # who share a slice of the batch, all ranks where it is not cut
    by_student = sum(moments.sent_bytes(each, peers, sizes.moment_bytes) for each in sizes.batch_norm_channels)
    by_teacher = sum(moments.sent_bytes(each, peers, sizes.moment_bytes) for each in sizes.teacher_channels)
    # GradCache runs the encoder twice forward and once backward for every chunk.
    passes, forwards = config.objective.chunks, 2 if config.objective.chunks > 1 else 1
    norms = passes * (forwards * by_student + by_teacher + 2 * 2 * channels * FP32 * (peers - 1) / peers)
    if config.batch_norm_slices > 1:
        norms += 2 * sizes.buffer_bytes * (2 if sizes.teacher_channels else 1) * share
    what, loss_sends, loss_formula = method_costs.sent(config, config.augment.num_views, width, w)
    parts = [
        Estimate("gradients and weights", reduction[0] * FP32 * p * share, "bytes", reduction[1]),
        Estimate(what, loss_sends, "bytes", loss_formula),
        Estimate(
            "batch norm", norms, "bytes",
            f"{sizes.moment_bytes} (2c + 1) (G-1) a layer forward or, if that is over 1 MiB, 2 * 8 (2c + 1) (G-1)/G; "
            "2 * 4 * 2c (G-1)/G backward; c channels, the teacher's forward too; G ranks to a slice of "
            "model.batch_norm_images, or W; of slices, 2 * buffers (W-1)/W as well",
        ),
    ]  # fmt: skip
    if sizes.num_classes:
        parts.append(online_probe(config, sizes))
    return [*parts, Estimate("wire a rank and step", sum(part.value for part in parts), "bytes", "the sum")]


def online_probe(config: Config, sizes: Sizes) -> Estimate:
    """Bytes that one rank sends in a step for the probes of h and z."""
    images = config.train.global_batch_size
    spread, value = exchange(sizes.num_classes, (sizes.h_dim, sizes.z_dim), images, sizes.ranks)
    if spread:
        formula = "features gathered, ranks share the classes: (4 (D + d + 1) + 2 * 12 * 2) N (W-1)/W, D of h"
        return Estimate("online probe", value, "bytes", formula)
    formula = "2 * 4 (C (D + d + 2) + 2 (D + d + 2)) (W-1)/W, C classes, D of h"
    return Estimate("online probe", value, "bytes", formula)


def checkpoint(config: Config, sizes: Sizes) -> list[Estimate]:
    """One checkpoint, and what the retention keeps of them; manifests are left out."""
    values, w = 1 + sizes.optimizer_values, sizes.ranks
    if config.engine.zero_stage in (0, 3):  # each rank writes its part of each tensor
        pieces = sum(min(size, w) for size in sizes.tensors)
    else:
        pieces = len(sizes.tensors) + w - 1
    one = FP32 * sizes.parameters * values + sizes.buffer_bytes + sizes.teacher_bytes + PIECE_BYTES * pieces * values
    first = FP32 * sizes.parameters + sizes.buffer_bytes + sizes.teacher_bytes
    kept, teacher = config.checkpoint.keep_last + 1, " + teacher" if sizes.teacher_bytes else ""
    return [
        Estimate("a checkpoint", one, "bytes", f"4 P (1 + k) + buffers{teacher} + {PIECE_BYTES} a piece of a tensor"),
        Estimate("kept checkpoints", kept * one + first, "bytes", "(keep_last + 1) * one, and step 0"),
        Estimate("host memory for it, a rank", one / sizes.ranks, "bytes", "one / W"),
    ]


def data(config: Config, manifest: Manifest, ranks: int, nodes: int, images_per_second: float | None) -> list[Estimate]:
    """Cache and store: what the shards are read with."""
    shards = manifest.columns.num_bytes.tolist()
    mean, largest = sum(shards) / manifest.num_samples, max(shards)
    streams, batch = config.data.streams, config.train.global_batch_size
    # As data/stream.py counts them: a rank's streams overlap its neighbours'; a small batch comes from all of them.
    overlapping = (-(-streams * (rank + 1) // ranks) - streams * rank // ranks for rank in range(ranks))
    of_a_rank = streams if batch < streams else max(overlapping)
    here = min(streams, of_a_rank * -(-ranks // nodes))
    block = min(config.data.block_shards, -(-len(shards) // streams) + 1)
    estimates = [
        Estimate(
            "cache working set, a node", min(here * block * largest, sum(shards)), "bytes",
            f"streams of a node ({here}) * block ({block}) * largest shard",
        ),
        Estimate("the data set", sum(shards), "bytes", f"{manifest.num_samples} images in {len(shards)} shards"),
    ]  # fmt: skip
    if images_per_second is not None:
        rate = images_per_second * ranks * mean
        estimates.append(Estimate("store to cluster", rate, "bytes/s", "images/s a GPU * W * mean image"))
    return estimates


def duration(config: Config, num_samples: int, ranks: int, images_per_second: float) -> list[Estimate]:
    steps, batch = configuration.total_steps(config, num_samples), config.train.global_batch_size
    seconds = batch / (images_per_second * ranks)
    return [
        Estimate("steps", steps, "", "train.steps, or ceil(epochs * images / B)"),
        Estimate("a step", seconds, "s", "B / (W * images/s a GPU)"),
        Estimate("hours", steps * seconds / 3600, "h", "steps * a step / 3600"),
    ]


def of_run(
    config: Config,
    nodes: int,
    gpus_per_node: int,
    manifest: Manifest | None = None,
    num_images: int | None = None,
    images_per_second: float | None = None,
    gigabits_per_second: float | None = None,
    sizes: Sizes | None = None,
) -> list[Estimate]:
    """All estimates, in the order of a report; what a missing number would be needed for is left out.

    images_per_second is of one GPU, gigabits_per_second of the network between two ranks.
    """
    ranks = nodes * gpus_per_node
    sizes = sizes or Sizes.of(config, ranks)
    estimates = [
        Estimate("parameters", sizes.parameters, "", f"P, counted; {config.objective.name}"),
        *memory(config, sizes),
        shared_memory(config, ranks, gpus_per_node),
        *(wires := wire(config, sizes)),
    ]
    if gigabits_per_second is not None:
        seconds = wires[-1].value * 8 / (gigabits_per_second * 1e9)
        estimates.append(Estimate("wire time of a step", seconds, "s", "8 * bytes / bandwidth; part hides in backward"))
    estimates += checkpoint(config, sizes)
    if manifest is not None:
        estimates += data(config, manifest, ranks, nodes, images_per_second)
        num_images = manifest.num_samples
    elif images_per_second is not None:
        rate = images_per_second * ranks
        estimates.append(Estimate("store to cluster", rate, "images/s", "images/s a GPU * W; the shards tell bytes"))
    if images_per_second is not None and (num_images is not None or config.train.steps is not None):
        estimates += duration(config, num_images or 0, ranks, images_per_second)
    return estimates


def table(title: str, estimates: list[Estimate]) -> Table:
    rows = Table("", "predicted", "formula", title=title)
    for estimate in estimates:
        rows.add_row(estimate.name, shown(estimate), estimate.formula)
    return rows


def shown(estimate: Estimate) -> str:
    """The value as a person reads it: 1.57 GB, 4096, 0.31 s."""
    if estimate.unit.startswith("bytes"):
        value, rest = estimate.value, estimate.unit.removeprefix("bytes")
        for name in ("B", "kB", "MB", "GB", "TB"):
            if value < 1000 or name == "TB":
                return f"{value:.3g} {name}{rest}" if value < 1000 else f"{value:.0f} {name}{rest}"
            value /= 1000
    number = f"{estimate.value:,.0f}" if estimate.value >= 1000 else f"{estimate.value:.3g}"
    return f"{number} {estimate.unit}".rstrip()
