"""The input side, measured: python -m tests.benchmarks.input [views] [crops] [gpu] [workers] [s3] [plan] [shapes]

Photographs-like JPEGs of 500x375 and about 80 KB, made here. Contestants of a section take turns in one process, one
thread each, and the best of their rounds counts, since other programs only ever slow them down. `views` and `crops`
use CPU time, which is the wall's on a quiet machine; `workers` and `s3` use the wall's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from dist_ssl import config as configuration
from dist_ssl import storage
from dist_ssl.augment import augment, crop_box
from dist_ssl.augment import views as views_module
from dist_ssl.config import AugmentConfig, Config, StorageConfig, ViewsConfig
from dist_ssl.data.cache import ShardCache
from dist_ssl.data.decode import crop_and_resize, decode
from dist_ssl.data.indexing import index_shards
from dist_ssl.data.manifest import load_manifest, read_member_index
from dist_ssl.data.plan import Plan
from dist_ssl.data.reader import Reader
from dist_ssl.data.shards import write_shards
from dist_ssl.data.sources import open_source
from dist_ssl.data.stream import draw_views, empty_crops, training_batches
from tests.s3 import s3_server

ROUNDS = 5


def photograph(rng: np.random.Generator) -> bytes:
    """Clouds of every scale with grain: about as hard to compress as a photograph."""
    image = np.zeros((375, 500, 3), np.float32)
    for scale in (4, 8, 16, 32, 64, 125):
        noise = rng.standard_normal((scale * 3 // 4 + 2, scale + 2, 3)).astype(np.float32)
        planes = [np.asarray(Image.fromarray(noise[..., c]).resize((500, 375), 3)) for c in range(3)]
        image += np.stack(planes, axis=-1) / scale**0.7
    image += 0.16 * rng.standard_normal(image.shape).astype(np.float32)
    image = (image - image.min()) / (image.max() - image.min())
    buffer = io.BytesIO()
    Image.fromarray((image * 255).astype(np.uint8)).save(buffer, "JPEG", quality=91)
    return buffer.getvalue()


def photographs(n: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [photograph(rng) for _ in range(n)]


def best(contestants: dict[str, Callable[[], Any]], count: int, clock: Callable[[], float]) -> dict[str, float]:
    """Things a second of each contestant, the best of interleaved rounds."""
    seconds = dict.fromkeys(contestants, float("inf"))
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            started = clock()
            run()
            seconds[name] = min(seconds[name], clock() - started)
    return {name: count / value for name, value in seconds.items()}


def show(title: str, rates: dict[str, float], unit: str) -> None:
    print(f"\n{title}")
    for name, rate in rates.items():
        print(f"  {name:58s} {rate:10.1f} {unit}")


def views(n: int = 32) -> None:
    """Two views of an image, from JPEG bytes to normalised float tensors, on one CPU thread."""
    from torchvision.transforms import v2

    config, data = AugmentConfig(), photographs(n)
    print(f"mean JPEG: {np.mean([len(one) for one in data]) / 1000:.0f} KB")
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(224, scale=(0.08, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], 0.5),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config.mean, config.std),
        ]
    )

    def torchvision_on_pil() -> None:
        for one in data:
            image = Image.open(io.BytesIO(one)).convert("RGB")
            torch.stack([theirs(image), theirs(image)])

    def ours() -> None:
        augment_all(decode_and_crop(data, config), config)

    def ours_on_device() -> None:
        augment_all(made, config)

    made = decode_and_crop(data, config)
    contestants: dict[str, Callable[[], Any]] = {"PIL + torchvision v2, per image": torchvision_on_pil}
    with contextlib.suppress(ImportError):
        from lightly.transforms import SimCLRTransform

        lightlys = SimCLRTransform(input_size=224)
        contestants["lightly SimCLRTransform"] = lambda: [
            lightlys(Image.open(io.BytesIO(one)).convert("RGB")) for one in data
        ]
    contestants |= {"dist_ssl": ours, "  its part on the training device": ours_on_device}
    contestants["  its part in the workers"] = lambda: decode_and_crop(data, config)
    contestants["  decode + two resized crops, bare"] = lambda: bare(data, config)
    rates = best(contestants, n, time.process_time)
    show("two views an image, 224 pixels, one thread", rates, "images/s")
    for name in list(contestants)[: -4 if len(contestants) > 4 else None]:
        print(f"  dist_ssl / {name}: {rates['dist_ssl'] / rates[name]:.2f}x")
    print(f"  bare / workers: {rates['  decode + two resized crops, bare'] / rates['  its part in the workers']:.2f}x")


def crops(n: int = 32) -> None:
    """Two views of 224 pixels and six of 96 beside the two alone, from JPEG bytes; one CPU thread."""
    data, two = photographs(n), AugmentConfig(min_scale=0.25)
    small = ViewsConfig(count=6, crop_size=96, min_scale=0.05, max_scale=0.25)
    eight = two.model_copy(update={"views": [ViewsConfig(count=2), small]})
    contestants: dict[str, Callable[[], Any]] = {"decode": lambda: [decode(one, 10**8) for one in data]}
    for name, config in (("2 x 224", two), ("2 x 224 + 6 x 96", eight)):
        made = decode_and_crop(data, config)
        contestants |= {
            f"{name}: decode and crop, in the workers": partial(decode_and_crop, data, config),
            f"{name}: augment, where there is no GPU": partial(augment_all, made, config),
        }
    rates = best(contestants, n, time.process_time)
    show("two views and six more", rates, "images/s")
    decoding, *rest = (1 / rate for rate in rates.values())
    (few, few_augmented), (many, many_augmented) = rest[:2], rest[2:]
    print(f"  2 + 6 / 2 in the workers: {few / many:.2f}x; with augmentation on the CPU: "
          f"{(few + few_augmented) / (many + many_augmented):.2f}x")  # fmt: skip
    print(f"  decoding, of the workers' time: {decoding / few:.0%} for 2, {decoding / many:.0%} for 2 + 6; "
          f"decoded once a view, 2 + 6 would run at {many / (many + 7 * decoding):.2f} of its rate")  # fmt: skip


def augment_all(made: tuple[list[torch.Tensor], torch.Tensor], config: AugmentConfig) -> list[torch.Tensor]:
    crops, parameters = made
    drawn = parameters.split([of_size.shape[1] for of_size in crops], dim=1)
    return [augment(*of_size, config) for of_size in zip(crops, drawn, strict=True)]


def decode_and_crop(data: list[bytes], config: AugmentConfig) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What a worker does for a batch, without reading: crops, one tensor a size, and the parameters of `augment`."""
    parameters, uniforms = draw_views(0, np.zeros(len(data), np.int64), np.arange(len(data)), config)
    crops, policies = empty_crops(len(data), config), config.policies()
    of_view = [of_size.numpy()[:, view] for of_size in crops for view in range(of_size.shape[1])]
    for row, one in enumerate(data):
        image = decode(one, 10**8)
        for policy, u, made in zip(policies, uniforms[row], of_view, strict=True):
            box = crop_box(u, image.height, image.width, policy.min_scale, policy.max_scale)
            made[row] = crop_and_resize(image, box, policy.crop_size)
    return crops, parameters


def bare(data: list[bytes], config: AugmentConfig) -> None:
    """The least that such a worker could do: the same boxes, drawn before, and nothing checked or kept."""
    _, uniforms = draw_views(0, np.zeros(len(data), np.int64), np.arange(len(data)), config)
    for row, one in enumerate(data):
        image = Image.open(io.BytesIO(one))
        image.load()
        for policy, u in zip(config.policies(), uniforms[row], strict=True):
            top, left, height, width = crop_box(u, image.height, image.width, policy.min_scale, policy.max_scale)
            crop = image.crop((left, top, left + width, top + height))
            np.asarray(crop.resize((policy.crop_size, policy.crop_size), Image.Resampling.BILINEAR))


def photo_shards(folder: Path, n: int, shard_mb: float) -> str:
    (folder / "images").mkdir(parents=True)
    for i, one in enumerate(photographs(min(n, 64)) * -(-n // 64)):
        (folder / "images" / f"{i:05d}.jpg").write_bytes(one)
    source = open_source(f"folder:{folder / 'images'}")
    write_shards(source, str(folder / "shards"), StorageConfig(), shard_mb=shard_mb, num_workers=0)
    return str(folder / "shards")


def stream_config(batch: int, **values: Any) -> Config:
    base: dict[str, Any] = {
        "data": {"streams": 2, "block_shards": 2},
        "train": {"global_batch_size": batch, "steps": 1},
    }
    for section, entries in values.items():
        base[section] = base.get(section, {}) | entries
    return configuration.validate(base, "benchmark")


def decoding_rate(_: int, n: int = 32, rounds: int = 24) -> float:
    """Images a second that a process decodes and crops, which has nothing else to do."""
    torch.set_num_threads(1)
    data, config = photographs(n), AugmentConfig()
    started = time.perf_counter()
    for _ in range(rounds):
        decode_and_crop(data, config)
    return n * rounds / (time.perf_counter() - started)


def workers() -> None:
    """Batches a second out of the loader with one worker and with as many as there are cores."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        shards = photo_shards(Path(folder), 512, 8)
        rates = {}
        for count in (1, cores):
            config = stream_config(64, data={"num_workers": count, "prefetch_batches": 2})
            manifest = load_manifest(shards, config.storage)
            steps = 12 * count
            with training_batches(
                config, manifest, cursor=0, first_step=0, num_steps=4 + steps + 2 * count, rank=0, world_size=1
            ) as batches:
                for _ in range(4):
                    next(batches)
                started = time.perf_counter()
                for _ in range(steps):
                    next(batches)
                rates[f"{count} workers"] = 64 * steps / (time.perf_counter() - started)
        with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
            list(pool.map(decoding_rate, range(cores)))  # every process has started
            for count in (1, cores):
                rates[f"  decoding alone, {count} processes"] = sum(pool.map(decoding_rate, range(count)))
        show("loader", rates, "images/s")
        one, many, alone, together = rates.values()
        print(f"  {cores} workers / one worker: {many / one:.2f} ({many / one / cores:.2f} of {cores})")
        print(f"  what this machine's cores do for processes that share nothing: {together / alone:.2f}")


@contextlib.contextmanager
def store(n: int, shard_mb: float) -> Iterator[tuple[str, Config, Path]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photo_shards(folder / "store" / "bucket", n, shard_mb)
        with s3_server(folder / "store", listing_seconds=300) as server:
            os.environ.update(server.environment)
            config = stream_config(
                256,
                storage={"endpoint_url": server.endpoint_url},
                data={"cache_dir": str(folder / "cache"), "streams": 1},
            )
            yield "s3://bucket/shards", config, folder


def s3(n: int = 6000, shard_mb: float = 32) -> None:
    """The bytes of every image of a set, in the plan's order, from `rclone serve s3` on this machine."""
    with store(n, shard_mb) as (url, config, folder):
        manifest = load_manifest(url, config.storage)
        megabytes = sum(shard.num_bytes for shard in manifest.shards) / 1e6
        plan = Plan(manifest.counts, 0, manifest.hash, config.data.streams, config.data.block_shards)
        _, shards, members = plan.locate(plan.batch(0, plan.num_samples))
        system, _ = storage.filesystem(url, config.storage)

        def plain(size: int = 8 * 2**20) -> None:
            for shard in manifest.shards:
                for start in range(0, shard.num_bytes, size):
                    system.cat_file(shard.url, start=start, end=min(start + size, shard.num_bytes))

        def plain_whole() -> None:
            for shard in manifest.shards:
                system.cat_file(shard.url)

        def one_get_a_sample(limit: int = 200) -> float:
            indexes = {
                shard: read_member_index(manifest.shards[shard], config.storage) for shard in set(shards[:limit])
            }
            started, total = time.perf_counter(), 0
            for shard, member in zip(shards[:limit].tolist(), members[:limit].tolist(), strict=True):
                start, size = int(indexes[shard].offsets[member]), int(indexes[shard].sizes[member])
                total += len(system.cat_file(manifest.shards[shard].url, start=start, end=start + size))
            return total / 1e6 / (time.perf_counter() - started)

        def streamed() -> None:
            reader = Reader(manifest, config.storage, config.data)
            for start in range(0, len(shards), 256):
                reader.aim(*plan.upcoming_shards(start, range(config.data.streams), 2))
                reader.images(shards[start : start + 256], members[start : start + 256])
            reader.close()

        def fetched() -> None:
            cache = ShardCache(config.data, config.storage)
            for shard in manifest.shards:
                cache.fetch(shard)

        def indexed(at_once: int) -> None:
            index_shards(url, config.storage, output=str(folder / "index"), num_workers=at_once)

        rates: dict[str, float] = {}
        for _ in range(ROUNDS):
            for name, run in (
                ("plain s3fs, whole objects", plain_whole),
                ("plain s3fs, ranges of 8 MiB", plain),
                ("dist_ssl: the shards to an empty cache, summed", fetched),
                ("dist_ssl: every sample in the plan's order, empty cache", streamed),
                ("dist_ssl: shards index, 4 at a time", lambda: indexed(4)),
                ("dist_ssl: shards index, one at a time", lambda: indexed(0)),
            ):
                started = time.perf_counter()
                run()
                rates[name] = max(rates.get(name, 0.0), megabytes / (time.perf_counter() - started))
                for made in ("cache", "index"):
                    shutil.rmtree(folder / made, ignore_errors=True)
            name = "one GET a sample"
            rates[name] = max(rates.get(name, 0.0), one_get_a_sample())
        show(f"{megabytes:.0f} MB in {len(manifest.shards)} shards from rclone serve s3", rates, "MB/s")
        asyncio.set_event_loop(None)


def plan() -> None:
    """A hundred million samples."""
    for counts in ([10_000] * 10_000, [1_000] * 100_000):
        array = np.array(counts)
        rates = {}
        for streams in (16, 64):
            setting_up, seeking = [], []
            for attempt in range(7):
                started = time.perf_counter()
                made = Plan(array, attempt, "hash", streams, 4)
                made.locate(np.arange(1))
                setting_up.append(time.perf_counter() - started)
                started = time.perf_counter()
                made.locate(made.batch(123_456_789, 4096))
                seeking.append(time.perf_counter() - started)
            rates |= {f"set-up, K={streams}": min(setting_up) * 1e3, f"seek, K={streams}": min(seeking) * 1e3}
        show(f"{len(counts)} shards of {counts[0]} samples, G=4", rates, "ms")


def gpu(n: int = 256) -> None:
    """The part of two views that the training device does, on CUDA: crops in its memory -> normalised views."""
    if not torch.cuda.is_available():
        print("\ngpu: no CUDA device")
        return
    config = AugmentConfig()
    crops = torch.randint(0, 256, (n, 2, 3, 224, 224), dtype=torch.uint8, device="cuda")
    drawn, _ = draw_views(0, np.zeros(n, np.int64), np.arange(n), config)

    def run(kernels: bool) -> None:
        with mock.patch.object(views_module, "_has_kernels", return_value=kernels):
            augment(crops, drawn, config)
        torch.cuda.synchronize()

    contestants = {"Triton kernels": lambda: run(True), "torch, grouped by flip and order": lambda: run(False)}
    for contestant in contestants.values():
        contestant()
    show(f"{n} images on {torch.cuda.get_device_name()}", best(contestants, n, time.perf_counter), "images/s")


def shapes(n: int = 20_000) -> None:
    """`shards write shapes:N` of 64x64 images with a process a core, scaled to 100,000."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        write_shards(open_source(f"shapes:{n}"), folder, StorageConfig(), shard_mb=16)
        seconds = time.perf_counter() - started
    print(f"\nshapes: {n} images in {seconds:.1f} s; 100,000 would take {seconds * 100_000 / n:.0f} s")


SECTIONS = {"views": views, "crops": crops, "gpu": gpu, "workers": workers, "s3": s3, "plan": plan, "shapes": shapes}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=[])
    torch.set_num_threads(1)
    for section in parser.parse_args().sections or SECTIONS:
        SECTIONS[section]()
