"""`dist-ssl doctor`: can this machine, and the cluster it belongs to, run this config? One line a question.

Nothing here raises: what goes wrong is the finding. Started by srun or torchrun, the collectives are measured between
those ranks; started alone, between two processes of this machine, or one a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape

from dist_ssl import storage
from dist_ssl.config import Config
from dist_ssl.config.environment import FIRST_PORT, NUM_PORTS, rank_in_environment, ranks_in_environment

PROBE_BYTES = 64 * 2**20
PROBE_IMAGES = 256  # where they lie in no shard
SLOW_GBIT = {"nccl": 20.0, "gloo": 0.5}  # below it the finding is red: something is wrong with the network


@dataclass(frozen=True)
class Finding:
    """An answer; `remedy` is None where all is well."""

    question: str
    answer: str
    remedy: str | None = None


def examine(config: Config | None) -> Iterator[Finding]:
    """Findings, one after the other as they are made. Collective where ranks are in the environment."""
    questions: list[Callable[[], Iterator[Finding]]] = [versions, gpus, collectives, ports, slurm]
    questions.append(lambda: memory_for_workers(config))
    if config is not None:
        questions += [lambda: store(config), lambda: commits(config), lambda: disk(config)]
    for question in questions:
        try:
            yield from question()
        except Exception as error:
            name = getattr(question, "__name__", "check").strip("<>")
            yield Finding(name, f"{type(error).__name__}: {error}", "this check itself failed; the message says where")


def show(findings: Iterable[Finding], say: Callable[..., object] | None) -> int:
    """Tell each finding as it is made, by rich's `print` or to nobody; how many are red."""
    red = 0
    for finding in findings:
        red += finding.remedy is not None
        word = "[green]ok [/green]" if finding.remedy is None else "[red]red[/red]"
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        if say is not None:
            say(f"{word} {escape(f'{finding.question}: {finding.answer}{remedy}')}", soft_wrap=True, highlight=False)
    return red


def versions() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("Python", python, None if sys.version_info >= (3, 11) else "install Python 3.11 or newer")
    for name, needed in (("torch", (2, 11)), ("torchvision", (0, 26)), ("deepspeed", (0, 19)), ("webdataset", (1, 0))):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "not installed", f"pip install '{name}>={'.'.join(map(str, needed))}'")
            continue
        found = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
        yield Finding(name, version, None if found >= needed else f"expected at least {'.'.join(map(str, needed))}")


def gpus() -> Iterator[Finding]:
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        present = shutil.which("nvidia-smi") is not None
        remedy = (
            "nvidia-smi is here but torch sees no GPU: install torch's CUDA build, or ask for a GPU"
            if present
            else None
        )
        yield Finding("GPUs", "none; ranks compute on the CPU", remedy)
        return
    names = {torch.cuda.get_device_name(i) for i in range(count)}
    gigabytes = min(torch.cuda.get_device_properties(i).total_memory for i in range(count)) / 1e9
    yield Finding("GPUs", f"{count} x {', '.join(sorted(names))}, {gigabytes:.0f} GB")
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    peers = sum(torch.cuda.can_device_access_peer(i, j) for i, j in pairs)
    remedy = (
        None
        if peers == len(pairs)
        else "traffic goes through the host: expect slow collectives, see nvidia-smi topo -m"
    )
    if pairs:
        yield Finding("GPU peers", f"{peers} of {len(pairs)} pairs reach each other's memory", remedy)


def collectives() -> Iterator[Finding]:
    """All-reduce of 64 MB: the bandwidth that a ring of these ranks reached."""
    if (values := ranks_in_environment()) is not None:
        if int(values["WORLD_SIZE"]) == 1:
            yield Finding("collectives", "one rank, so nothing to measure; start as many as the run will have")
            return
        seconds, ranks, backend = _all_reduce()
    else:
        import torch

        ranks = max(2, torch.cuda.device_count())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "dist_ssl.planning.doctor"]
        base = os.environ | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)}
        processes = [
            subprocess.Popen(
                command, env=base | {"RANK": str(r), "LOCAL_RANK": str(r), "MASTER_ADDR": "127.0.0.1"},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for r in range(ranks)
        ]  # fmt: skip
        try:
            outputs = [process.communicate(timeout=120) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(process.returncode for process in processes):
            last = next(err.strip().splitlines()[-1] for _, err in outputs if err.strip())
            yield Finding(
                "collectives", last, f"{ranks} ranks of this machine can't reach each other; try NCCL_DEBUG=INFO"
            )
            return
        measured, backend = outputs[0][0].split()
        seconds = float(measured)
    gbit = 2 * (ranks - 1) / ranks * PROBE_BYTES * 8 / seconds / 1e9
    remedy = (
        None
        if gbit >= SLOW_GBIT[backend]
        else f"expected {SLOW_GBIT[backend]:g} or more: look at NCCL_DEBUG=INFO, cables, NCCL_SOCKET_IFNAME"
    )
    yield Finding("collectives", f"{gbit:.1f} Gbit/s all-reduce, {ranks} ranks, {backend}", remedy)


def memory_for_workers(config: Config | None) -> Iterator[Finding]:
    """Data workers hand their batches over in shared memory; containers give 64 MB of it unless told otherwise."""
    if not Path("/dev/shm").exists():
        return
    free, needed, said = shutil.disk_usage("/dev/shm").free, 2.0**30, ""
    if config is not None:
        from dist_ssl.planning import estimate

        size, here = _ranks()
        needed = estimate.shared_memory(config, size, here).value
        said = f"{needed / 1e9:.1f} GB needed by {here} of {size} ranks, "
    remedy = None
    if free < needed:
        remedy = f"start the container with --shm-size={max(1, math.ceil(1.1 * needed / 2**30))}g (or --ipc=host)"
        remedy += ", or lower data.prefetch_batches or data.num_workers" if config is not None else ""
    yield Finding("shared memory", f"{said}{free / 1e9:.1f} GB free in /dev/shm", remedy)


def ports() -> Iterator[Finding]:
    free = 0
    for port in range(FIRST_PORT, FIRST_PORT + NUM_PORTS, NUM_PORTS // 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            free += 1
    first = Path("/proc/sys/net/ipv4/ip_local_port_range")
    begins = int(first.read_text().split()[0]) if first.exists() else 32768
    answer = f"{free} of 100 tried in {FIRST_PORT} to {FIRST_PORT + NUM_PORTS - 1} are free"
    remedy = None if free >= 90 else "set MASTER_PORT to a free one"
    if begins < FIRST_PORT + NUM_PORTS:
        remedy = f"the system hands out ports from {begins} on: a rank's port may be taken; see ip_local_port_range"
    yield Finding("ports", answer, remedy)


def slurm() -> Iterator[Finding]:
    if shutil.which("sinfo") is None:
        yield Finding("Slurm", "not installed here; python -m launch.local runs on this machine")
        return
    if "SLURM_CONF" not in os.environ and not Path("/etc/slurm/slurm.conf").exists():
        yield Finding("Slurm", "its commands are here, but no cluster is configured (no SLURM_CONF, no /etc/slurm)")
        return
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%P %F"], capture_output=True, text=True, timeout=30
    )  # allocated/idle/other/total
    if done.returncode != 0:
        complaint = (done.stderr.strip() or "no answer").splitlines()[0]
        yield Finding("Slurm", complaint, "the controller does not answer: ask its administrator, see scontrol ping")
        return
    partitions = [line.split() for line in done.stdout.splitlines()]
    shown = ", ".join(
        f"{name.rstrip('*')} {counts.split('/')[1]}/{counts.split('/')[3]} idle" for name, counts in partitions
    )
    accounting = subprocess.run(["sacct", "--noheader"], capture_output=True, text=True, timeout=30).returncode == 0
    remedy = None if accounting else "no accounting (sacct fails): the state of ended jobs will read UNKNOWN"
    yield Finding("Slurm", shown, remedy)


def store(config: Config) -> Iterator[Finding]:
    """Whether the shards are there, and how fast they are read from here."""
    from dist_ssl.data.in_place import read_image
    from dist_ssl.data.manifest import load_manifest, manifest_folder, read_member_index

    try:
        manifest = load_manifest(config.data.shards, config.storage)
        largest = max(manifest.shards, key=lambda shard: shard.num_bytes)
        began = time.monotonic()
        if largest.kind == "tar":
            read = len(storage.read_bytes(largest.url, config.storage, 0, min(largest.num_bytes, PROBE_BYTES)))
        else:
            index = read_member_index(largest, config.storage)
            read = sum(len(read_image(largest, index, i, config.storage)) for i in range(min(len(index), PROBE_IMAGES)))
        seconds = max(time.monotonic() - began, 1e-9)
    except Exception as error:
        remote = "check data.shards, storage.endpoint_url and the credentials"
        local = "give the place that `dist-ssl shards write` or `index` filled: --set data.shards=PLACE"
        is_local = manifest_folder(config.data.shards) is not None or storage.is_local(config.data.shards)
        yield Finding("shards", storage.redact(str(error)), local if is_local else remote)
        return
    yield Finding("shards", f"{manifest.num_samples} images in {len(manifest.shards)} shards")
    mean = int(manifest.columns.num_bytes.sum()) / manifest.num_samples
    rate = read / seconds
    yield Finding(
        "read rate", f"{rate / 1e6:.0f} MB/s by one reader, {rate / mean:,.0f} images/s of {mean / 1e3:.0f} kB"
    )


def commits(config: Config) -> Iterator[Finding]:
    """Whether the run directory and the checkpoints' place can be written to."""
    for name, place in (("run.dir", config.run.dir), ("checkpoint.url", config.checkpoint.url)):
        if place is None:
            continue
        probe = storage.join(place, f".doctor-{uuid.uuid4().hex}")
        created = (
            [] if "://" in place else [folder for folder in (Path(place), *Path(place).parents) if not folder.exists()]
        )
        try:
            storage.write_bytes(probe, b"doctor", config.storage)
            storage.remove(probe, config.storage)
            yield Finding(name, f"{storage.redact(place)} can be written to")
        except Exception as error:
            yield Finding(name, storage.redact(str(error)), f"give another place: --set {name}=...")
        for folder in created:
            with contextlib.suppress(OSError):
                folder.rmdir()  # an examination leaves nothing


def disk(config: Config) -> Iterator[Finding]:
    """Room for the checkpoints that are kept, and for the shard cache."""
    from dist_ssl.planning import estimate

    if "://" not in (config.checkpoint.url or ""):
        place = Path(config.checkpoint.url or config.run.dir).absolute()
        existing = next(folder for folder in (place, *place.parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        needed = estimate.checkpoint(config, estimate.Sizes.of(config, 1, measure=False))[1].value
        remedy = None if free > needed else "free space, or lower checkpoint.keep_last"
        yield Finding("disk for checkpoints", f"{needed / 1e9:.2f} GB needed, {free / 1e9:.0f} GB free", remedy)
    if "://" in config.data.shards and not config.data.shards.startswith("file:"):
        place = Path(config.data.cache_dir or tempfile.gettempdir()).absolute()
        existing = next(folder for folder in (place, *place.parents) if folder.exists())
        room = shutil.disk_usage(existing).free / 1e9
        remedy = None if room > config.data.cache_gb else "lower data.cache_gb, or set data.cache_dir to a larger disk"
        yield Finding(
            "disk for the cache", f"{config.data.cache_gb:g} GB wanted, {room:.0f} GB free in {existing}", remedy
        )


def _ranks() -> tuple[int, int]:
    """(all ranks, those of this node): the environment's, or what `launch.local` would start here."""
    import torch

    values = ranks_in_environment()
    if values is not None:
        return int(values["WORLD_SIZE"]), int(values["LOCAL_WORLD_SIZE"])
    return (torch.cuda.device_count() or 2,) * 2


def _all_reduce() -> tuple[float, int, str]:
    """Seconds of one all-reduce of 64 MB (the median of 5), ranks, backend. Collective."""
    import torch
    import torch.distributed as dist

    from dist_ssl import distributed

    world = distributed.initialize(2.0)
    try:
        values = torch.ones(PROBE_BYTES // 4, device=world.device)
        seconds = []
        for _ in range(6):
            distributed.gather_objects(None)  # all begin together
            began = time.perf_counter()
            dist.all_reduce(values)
            float(values[0])  # a GPU's work is done when a number of it is here
            seconds.append(time.perf_counter() - began)
        return sorted(seconds[1:])[2], world.size, "nccl" if world.device.type == "cuda" else "gloo"
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    measured, _, backend = _all_reduce()
    if rank_in_environment() == 0:
        sys.stdout.write(f"{measured} {backend}\n")
