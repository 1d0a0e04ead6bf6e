"""From shards to batches: worker processes read, decode once and crop all views; what they hand over is uint8.

What stands in a batch follows from the plan and the cursor; workers decide only when it is ready. A sample that can't
be decoded is replaced by the next of its shard, keeping its position and the randomness of its views. A storage fault
is retried, then raised by the iterator as the error it is.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dist_ssl.augment import crop_box, draw
from dist_ssl.augment.parameters import NUM_UNIFORMS
from dist_ssl.config import AugmentConfig, Config, DataConfig, StorageConfig, UserError
from dist_ssl.config.environment import STOP_SIGNALS, ranks_on_this_node
from dist_ssl.data.decode import BadSample, centre_crop, channels_first, crop_and_resize, decode
from dist_ssl.data.manifest import Manifest
from dist_ssl.data.plan import Plan
from dist_ssl.data.random import view_uniforms
from dist_ssl.data.reader import Reader
from dist_ssl.data.requests import seconds_a_step, turn

# A fork of the rank itself would inherit locks that its threads hold; a fresh start takes seconds a worker.
START_METHOD = "forkserver"
LOOK_AHEAD_BATCHES = 64  # of an evaluation: whose shards are fetched to the cache


@dataclass
class Batch:
    """One step's samples of one rank, n of them."""

    crops: list[Tensor]  # uint8 (n, V_s, 3, S, S), one a size, in the order of the config's views
    parameters: Tensor  # float32 (n, V, P), on the CPU: the draws of `augment`
    sample_ids: Tensor  # int64 (n,): the index in the manifest
    epochs: Tensor  # int64 (n,)
    positions: Tensor  # int64 (n,)
    labels: Tensor  # int64 (n,), -1 where there is none; a replaced row has its replacement's
    keys: list[str]  # "shard/key"
    replaced_by: dict[int, str]  # row -> "shard/key" whose image stands there
    quarantined: list[dict[str, str]] = field(default_factory=list)  # shard, key, reason

    def on_device(self) -> list[Tensor]:
        """What `to` moves. Parameters stay: `augment` reads them on the host."""
        return [*self.crops, self.sample_ids, self.labels]

    def of_each_size(self, rows: slice = slice(None)) -> Iterator[tuple[Tensor, Tensor]]:
        """(crops (n, V_s, 3, S, S), parameters (n, V_s, P)) of these rows' views, for `augment`."""
        parameters = self.parameters[rows].split([crops.shape[1] for crops in self.crops], dim=1)
        yield from zip((crops[rows] for crops in self.crops), parameters, strict=True)

    def pin_memory(self) -> Batch:
        """With what goes to the device in pinned memory, so that `to` does not wait."""
        return self._with(*(tensor.pin_memory() for tensor in self.on_device()))

    def to(self, device: torch.device) -> Batch:
        return self._with(*(tensor.to(device, non_blocking=True) for tensor in self.on_device()))

    def _with(self, *moved: Tensor) -> Batch:
        *crops, sample_ids, labels = moved
        return replace(self, crops=crops, sample_ids=sample_ids, labels=labels)


@dataclass
class EvaluationBatch:
    images: Tensor  # uint8 (n, 3, S, S)
    labels: Tensor  # int64 (n,), -1 where there is none
    sample_ids: Tensor  # int64 (n,): the index in the manifest
    factors: list[dict[str, Any]] | None  # the members' .json, where every sample of the batch has one
    quarantined: list[dict[str, str]] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)  # rows where another image stands for a bad one

    def pin_memory(self) -> EvaluationBatch:
        return replace(self, images=self.images.pin_memory())


class Batches:
    """An iterator of batches with the worker processes behind it. `close` ends them; so does leaving a `with`."""

    def __init__(self, dataset: _Training | _Evaluation, num_batches: int, num_workers: int, prefetch: int):
        self._dataset = dataset
        options: dict[str, Any] = {}
        if num_workers:
            context = torch.multiprocessing.get_context(START_METHOD)
            context.set_forkserver_preload(["dist_ssl.data.forkserver"])
            options = {
                "prefetch_factor": prefetch,
                "multiprocessing_context": context,
                "worker_init_fn": partial(_start_worker, dict(os.environ), os.getpid()),
            }
        with warnings.catch_warnings():
            # More workers than cores are right where reading waits for a network.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader = DataLoader(
                dataset,
                batch_size=None,
                sampler=range(num_batches),
                num_workers=num_workers,
                pin_memory=torch.cuda.is_available(),
                **options,
            )
            self._iterator: Any = iter(loader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            raise StopIteration
        batch = next(self._iterator)
        if isinstance(batch, Exception):
            self.close()
            raise batch
        return batch

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, which may be in the middle of a retry that would last minutes."""
        iterator, self._iterator = self._iterator, None
        for process in getattr(iterator, "_workers", ()):
            process.kill()
        del iterator
        self._dataset.reader.close()


def _start_worker(environment: dict[str, str], rank_pid: int, _: int) -> None:
    """Signals are the parent's affair; a parent that is killed takes its workers along.

    The environment is that of the rank now: the fork server's is older, and may lack credentials.
    """
    os.environ.update(environment)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_die_with, args=(rank_pid,), daemon=True).start()
    torch.set_num_threads(1)


def _die_with(rank_pid: int) -> None:
    """End this worker when the rank has ended, however it ended.

    torch's own watch looks at the worker's parent, which is the fork server, and the server lives as long as a worker
    holds its pipe: without this, a rank killed with -9 leaves all of them behind.
    """
    with contextlib.suppress(ProcessLookupError):
        rank = os.pidfd_open(rank_pid)
        select.select([rank], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


class _Training(Dataset[Any]):
    """Item i is the rank's batch of step i, or the exception that making it raised."""

    def __init__(self, config: Config, manifest: Manifest, cursor: int, rank: int, world_size: int):
        self.config, self.manifest = config, manifest
        self.cursor, self.rank, self.world_size = cursor, rank, world_size
        self.plan = plan_of(config, manifest)
        self.starts = np.concatenate([[0], np.cumsum(manifest.counts)])
        self.pace = seconds_a_step(config.train.global_batch_size, config.storage.requests_per_second)
        self.reader = Reader(manifest, config.storage, config.data, self.pace)

    def __getitem__(self, step: int) -> Batch | Exception:
        try:
            return self._batch(step)
        except Exception as error:
            if get_worker_info() is None:
                raise
            return error

    def _batch(self, step: int) -> Batch:
        config, batch_size = self.config, self.config.train.global_batch_size
        positions = self.plan.rank_batch(
            self.cursor + step * batch_size, batch_size, self.rank, self.world_size, config.objective.chunks
        )
        self._aim(self.cursor + step * batch_size)
        epochs, shards, members = self.plan.locate(positions)
        sample_ids = self.starts[shards] + members
        parameters, uniforms = draw_views(config.run.seed, epochs, sample_ids, config.augment)
        policies, crops = config.augment.policies(), empty_crops(len(positions), config.augment)
        of_view = [of_size.numpy()[:, view] for of_size in crops for view in range(of_size.shape[1])]
        labels, replaced, quarantined = np.empty(len(positions), np.int64), {}, []
        data = self.reader.images(shards, members, turn(step, config.data, self.pace))
        for row, (shard, member) in enumerate(zip(shards.tolist(), members.tolist(), strict=True)):
            image, used, bad = _decode_or_replace(self.reader, data[row], shard, member, config.data.max_pixels)
            quarantined += bad
            if used != member:
                replaced[row] = self.reader.key(shard, used)
            labels[row] = self.reader.index(shard).labels[used]
            for policy, u, made in zip(policies, uniforms[row], of_view, strict=True):
                box = crop_box(u, image.height, image.width, policy.min_scale, policy.max_scale)
                made[row] = crop_and_resize(image, box, policy.crop_size)
        return Batch(
            crops,
            parameters,
            torch.from_numpy(sample_ids),
            torch.from_numpy(epochs),
            torch.from_numpy(positions),
            torch.from_numpy(labels),
            [self.reader.key(shard, member) for shard, member in zip(shards.tolist(), members.tolist(), strict=True)],
            replaced,
            quarantined,
        )

    def _aim(self, cursor: int) -> None:
        """Fetch ahead what this rank reads in the blocks that its streams are in, then in those after them."""
        streams = rank_streams(self.config, self.rank, self.world_size)
        self.reader.aim(*self.plan.upcoming_shards(cursor, streams, 2))


class _Evaluation(Dataset[Any]):
    """Item i is the i-th batch of samples [start, stop), in the manifest's order."""

    def __init__(
        self, manifest: Manifest, storage: StorageConfig, data: DataConfig, size: int, ratio: float, span: range
    ):
        self.manifest, self.data, self.size, self.ratio, self.span = manifest, data, size, ratio, span
        self.ends = np.cumsum(manifest.counts)
        self.reader = Reader(manifest, storage, data)

    def __getitem__(self, i: int) -> EvaluationBatch | Exception:
        try:
            return self._batch(i)
        except Exception as error:
            if get_worker_info() is None:
                raise
            return error

    def _batch(self, i: int) -> EvaluationBatch:
        ids = np.arange(self.span[i], min(self.span[i] + self.span.step, self.span.stop))
        shards = np.searchsorted(self.ends, ids, side="right")
        members = ids - (self.ends[shards] - self.manifest.counts[shards])
        images = torch.empty((len(ids), 3, self.size, self.size), dtype=torch.uint8)
        labels, quarantined, used_members = np.empty(len(ids), np.int64), [], []
        ahead = min(ids[0] + LOOK_AHEAD_BATCHES * len(ids), self.span.stop) - 1
        last = int(np.searchsorted(self.ends, ahead, side="right"))
        self.reader.aim(range(int(shards[0]), int(shards[-1]) + 1), range(int(shards[-1]) + 1, last + 1))
        data = self.reader.images(shards, members)
        for row, (shard, member) in enumerate(zip(shards.tolist(), members.tolist(), strict=True)):
            image, used, bad = _decode_or_replace(self.reader, data[row], shard, member, self.data.max_pixels)
            quarantined += bad
            used_members.append(used)
            labels[row] = self.reader.index(shard).labels[used]
            images.numpy()[row] = channels_first(centre_crop(image, self.size, self.ratio))
        factors = self.reader.factors(shards, np.array(used_members))
        replaced = np.flatnonzero(np.array(used_members) != members).tolist()
        return EvaluationBatch(images, torch.from_numpy(labels), torch.from_numpy(ids), factors, quarantined, replaced)


def draw_views(
    seed: int, epochs: NDArray[np.int64], sample_ids: NDArray[np.int64], config: AugmentConfig
) -> tuple[Tensor, NDArray[np.float64]]:
    """The augmentation of n samples: parameters (n, V, P) float32, and uniforms (n, V, 22) for `crop_box`."""
    policies = config.policies()
    return draw(view_uniforms(seed, epochs, sample_ids, len(policies), NUM_UNIFORMS), policies)


def empty_crops(n: int, config: AugmentConfig) -> list[Tensor]:
    """Room for the crops of n images, uint8 (n, V_s, 3, S, S), one a size."""
    shapes = [(n, num_views, 3, side, side) for side, num_views in config.sizes()]
    return [torch.from_numpy(np.empty(shape, np.uint8)) for shape in shapes]


def plan_of(config: Config, manifest: Manifest) -> Plan:
    """The plan of a run: which sample stands where."""
    data = config.data
    return Plan(manifest.counts, config.run.seed, manifest.hash, data.streams, data.block_shards)


def training_batches(
    config: Config,
    manifest: Manifest,
    *,
    cursor: int,
    first_step: int,
    num_steps: int,
    rank: int,
    world_size: int,
) -> Batches:
    """A closable iterator of `Batch`: those of this rank for `num_steps` steps, the first of which starts at `cursor`.

    Raises UserError where a rank would have no row, or the cache can't hold what is read at a time; StorageError from
    the iterator when a read fails for longer than the budget. `first_step` is named in errors only.
    """
    plan_of(config, manifest).rows_per_rank(config.train.global_batch_size, world_size, config.objective.chunks)
    _check_workers(manifest, config.data.num_workers)
    check_working_set(config, manifest, rank, world_size)
    dataset = _Training(config, manifest, cursor, rank, world_size)
    return Batches(dataset, num_steps, config.data.num_workers, config.data.prefetch_batches)


def evaluation_batches(
    manifest: Manifest,
    storage: StorageConfig,
    *,
    image_size: int,
    resize_ratio: float,
    start: int,
    stop: int,
    batch_size: int,
    num_workers: int,
    data: DataConfig | None = None,
) -> Batches:
    """A closable iterator of `EvaluationBatch`: samples [start, stop) in the manifest's order.

    The shorter side is resized to `image_size * resize_ratio`, then the centre is cropped.
    """
    if not 0 <= start <= stop <= manifest.num_samples:
        raise UserError(f"expected 0 <= start <= stop <= {manifest.num_samples} samples, got {start} and {stop}")
    _check_workers(manifest, num_workers)
    span = range(start, stop, batch_size)
    dataset = _Evaluation(manifest, storage, data or DataConfig(), image_size, resize_ratio, span)
    return Batches(dataset, len(span), num_workers, 2)


def check_working_set(config: Config, manifest: Manifest, rank: int, world_size: int) -> None:
    """Raise UserError where the shards that this node reads at a time don't fit into its cache."""
    remote = manifest.columns.num_bytes[manifest.columns.remote]
    if not len(remote):
        return
    data, largest = config.data, int(remote.max())
    ranks_here = min(ranks_on_this_node(), world_size)
    streams = min(len(rank_streams(config, rank, world_size)) * ranks_here, data.streams)
    # A stream that begins in the middle of a shard reads one more; none reads more than its part of the epoch.
    block = min(data.block_shards, -(-len(remote) // data.streams) + 1)
    needed, room = min(streams * block * largest, int(remote.sum())), data.cache_gb * 1e9
    if needed > room:
        fits = max(int(room // (largest * block)) * world_size // ranks_here, 1)
        raise UserError(
            f"{streams} streams of this node read {block} shards of up to {largest / 1e6:.0f} MB each at a time: "
            f"{needed / 1e9:.3g} GB, more than data.cache_gb = {data.cache_gb:g}; set data.cache_gb to "
            f"{1.01 * needed / 1e9:.3g}, or, for a new run, data.streams to at most {fits}, or lower data.block_shards"
        )


def rank_streams(config: Config, rank: int, world_size: int) -> range:
    """The streams whose samples a rank reads, nearly: a batch is sorted by stream, then cut into the ranks' slices."""
    streams = config.data.streams
    if config.train.global_batch_size < streams:
        return range(streams)
    return range(streams * rank // world_size, -(-streams * (rank + 1) // world_size))


def _check_workers(manifest: Manifest, num_workers: int) -> None:
    if num_workers and manifest.url.startswith("memory:"):
        raise UserError(f"{manifest.url}: only its own process sees it; set data.num_workers to 0")


def _decode_or_replace(
    reader: Reader, data: bytes | BadSample, shard: int, member: int, max_pixels: int
) -> tuple[Image.Image, int, list[dict[str, str]]]:
    """The image of a member, or of the next good one of its shard; which member it is; what was found bad."""
    bad: list[dict[str, str]] = []
    count = len(reader.index(shard))
    for used in range(member, member + count):
        try:
            if isinstance(data, BadSample):
                raise data
            return decode(data, max_pixels), used % count, bad
        except BadSample as error:
            key = reader.key(shard, used % count)
            bad.append({"shard": reader.manifest.shards[shard].url, "key": key, "reason": str(error)})
            data = reader.images(np.array([shard]), np.array([(used + 1) % count]))[0]
    raise UserError(
        f"{reader.manifest.shards[shard].url}: none of its {count} samples can be decoded: {bad[0]['reason']}; "
        "put back the shard that was indexed, or begin a new run on an index without it"
    )
