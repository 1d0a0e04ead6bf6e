"""A run that is killed again and again at random moments, then held against one that nobody disturbed.

    python -m tests.faults.chaos --kills 100 --seed 0                # ranks change between starts: losses to 1e-3
    python -m tests.faults.chaos --kills 100 --seed 0 --fixed-ranks  # ledger, losses and weights equal bit by bit

Writes what it did, and a summary, to chaos.log in its folder (`--folder`, kept), and exits 1 where the outcome differs
or where the run was complete before all kills were done. The seed fixes what is done; the moments depend on timing too.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch

from dist_ssl import checkpoint
from dist_ssl.checkpoint import newest_incarnation
from dist_ssl.config import Config, StorageConfig
from dist_ssl.data.shards import write_shards
from dist_ssl.data.sources import open_source
from tests.faults.forked import ForkedLaunch
from tests.faults.harness import Launch, last_step, send
from tests.trajectory import ledger, losses, small_config

# Weights of what is drawn.
ACTIONS = {"kill all": 3, "kill one rank": 3, "SIGTERM to the launcher": 1, "SIGTERM to a rank": 1, "stop, continue": 2}
# Most kills aim at a commit; one at start-up comes anywhere between the launch and about the first step.
MOMENTS = {"start-up": 2, "a step": 3, "a write": 4, "a rename": 4}
EVERY_STEPS = 3
PATIENCE_SECONDS = 900  # a chaos run in the background may be stopped for minutes


class Chaos:
    def __init__(self, folder: Path, shards: Path, seed: int, steps: int, fixed_ranks: bool):
        self.folder, self.shards, self.steps, self.fixed_ranks = folder, shards, steps, fixed_ranks
        self.random = random.Random(seed)
        self.log = open(folder / "chaos.log", "w", buffering=1)  # noqa: SIM115  kept for the whole run
        self.longest_start = 5.0  # seconds to the first step, of the starts so far
        self.done: Counter[str] = Counter()

    def config(self, name: str) -> Config:
        overrides = [
            f"train.steps={self.steps}",
            f"checkpoint.every_steps={EVERY_STEPS}",
            "checkpoint.keep_last=2",
            # Other ranks round otherwise, and a low temperature or a small batch amplifies that past 1e-3 by itself.
            "objective.temperature=1.0",
            "train.global_batch_size=48",
        ]
        return small_config(self.folder / name / "run", self.shards, *overrides)

    def size(self) -> int:
        return 2 if self.fixed_ranks else self.random.randint(1, 4)

    def launch(self, config: Config, size: int) -> Launch:
        """One start in eight by the real launcher, the others without its minute of imports."""
        return Launch(config, size) if self.random.random() < 1 / 8 else ForkedLaunch(config, size)

    def draw(self, weights: dict[str, int]) -> str:
        return self.random.choices(list(weights), list(weights.values()))[0]

    def disturb(self, number: int, config: Config) -> None:
        """Start, wait for a random moment, do one random harm, wait until every process has ended."""
        moment, action, size = self.draw(MOMENTS), self.draw(ACTIONS), self.size()
        before, started = last_step(Path(config.run.dir)), time.monotonic()
        launch = self.launch(config, size)
        met, ranks = self.wait_for(moment, launch, size)
        waited = time.monotonic() - started
        if launch.process.poll() is not None:
            raise AssertionError(f"kill {number}: the run ended before it, at {moment}:\n{launch.said()}")
        self.harm(action, launch, ranks)
        torn = uncommitted(launch.run_dir)
        self.done.update([action, f"at {moment}" if met else f"missed {moment}", f"{size} ranks"])
        self.done["in the middle of a commit"] += torn
        by = "" if isinstance(launch, ForkedLaunch) else " by launch.local"
        self.say(
            f"{number}: {size} ranks{by}, {action} at {moment}{'' if met else ' (missed)'} after {waited:.1f} s; "
            f"steps {before} -> {last_step(launch.run_dir)}; {'a commit was torn; ' if torn else ''}"
            f"exit code {launch.process.returncode}"
        )

    def wait_for(self, moment: str, launch: Launch, size: int) -> tuple[bool, list[psutil.Process]]:
        """Whether the moment came, and the ranks: listed before it, since listing takes longer than a commit."""
        if moment == "start-up":
            wait_for_progress(launch, 1, timeout=self.random.uniform(0, self.longest_start))
            return True, launch.ranks()
        steps, pause = self.random.randint(1, 4), self.random.uniform(0, 0.1)
        started = time.monotonic()
        first = wait_for_progress(launch, 1)
        self.longest_start = max(self.longest_start, time.monotonic() - started)
        ranks, number = launch.ranks(), newest_incarnation(launch.run_dir)
        if moment == "a step":
            wait_for_progress(launch, steps, first)
            time.sleep(pause)
            return True, ranks
        came = False
        while not came and launch.process.poll() is None and last_step(launch.run_dir) < first + 3 * EVERY_STEPS:
            came = (
                being_written(launch.run_dir, number) if moment == "a write" else renaming(launch.run_dir, number, size)
            )
            time.sleep(0.0005)
        return came, ranks

    def harm(self, action: str, launch: Launch, ranks: list[psutil.Process]) -> None:
        """Do it at once; return when every process has ended."""
        one, pauses = self.random.randrange(4), (self.random.uniform(0, 1), self.random.uniform(0, 0.3))
        launcher = [psutil.Process(launch.process.pid)]
        rank = ranks[one % len(ranks) :][:1] if ranks else launcher
        if action == "SIGTERM to the launcher":
            send(launcher, signal.SIGTERM)
        elif action == "SIGTERM to a rank":
            send(rank, signal.SIGTERM)
        elif action == "kill one rank":
            send(rank, signal.SIGKILL)
        elif action == "kill all":
            send([*ranks, *launcher], signal.SIGKILL)
        else:
            send(rank, signal.SIGSTOP)
            time.sleep(pauses[0])
            send(rank, signal.SIGCONT)
            time.sleep(pauses[1])
            send([*ranks, *launcher], signal.SIGKILL)
        launch.wait(PATIENCE_SECONDS)
        _, alive = psutil.wait_procs(ranks, timeout=PATIENCE_SECONDS)
        assert not alive, f"{action}: {alive} outlived their launcher:\n{launch.said()}"

    def say(self, text: str) -> None:
        print(text, file=self.log)
        print(text, flush=True)

    def run(self, kills: int) -> list[str]:
        """The differences to the undisturbed run; empty where there are none."""
        quiet, chaotic = self.config("quiet"), self.config("chaotic")
        launch = ForkedLaunch(quiet, 2)
        assert launch.wait(PATIENCE_SECONDS) == 0, launch.said()
        if not self.fixed_ranks:
            other = self.config("quiet-3")
            launch = ForkedLaunch(other, 3)
            assert launch.wait(PATIENCE_SECONDS) == 0, launch.said()
            self.say(f"rounding alone, 2 ranks against 3: losses differ by {worst_difference(other, quiet):.2g}")
        for number in range(1, kills + 1):
            self.disturb(number, chaotic)
        launch = self.launch(chaotic, self.size())
        code = launch.wait(PATIENCE_SECONDS)
        self.say(f"undisturbed from here: exit code {code}")
        self.say("; ".join(f"{count} {what}" for what, count in sorted(self.done.items())))
        return self.differences(quiet, chaotic) if code == 0 else [launch.said()]

    def differences(self, quiet: Config, chaotic: Config) -> list[str]:
        expected, found = Path(quiet.run.dir), Path(chaotic.run.dir)
        problems = []
        if ledger(found) != ledger(expected):
            problems.append("the ledgers differ")
        worst = worst_difference(chaotic, quiet)
        self.say(f"{self.steps} losses, worst relative difference {worst:.2g}")
        if worst > (0 if self.fixed_ranks else 1e-3):
            problems.append(f"losses differ by {worst:.2g}")
        weights = [
            checkpoint.read_model_state(checkpoint.checkpoint_url(c), self.steps, StorageConfig())
            for c in (quiet, chaotic)
        ]
        if self.fixed_ranks and not all(torch.equal(t, weights[1][name]) for name, t in weights[0].items()):
            problems.append("final weights differ")
        return problems


def worst_difference(found: Config, expected: Config) -> float:
    """The largest relative difference of two runs' losses; both must have the same steps."""
    pairs = zip(*(losses(Path(config.run.dir)) for config in (found, expected)), strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def wait_for_progress(launch: Launch, steps: int, since: int | None = None, timeout: float = PATIENCE_SECONDS) -> int:
    """Until this launch has done `steps` steps, or ended; returns the last. A resume first trims what it will redo."""
    deadline = time.monotonic() + timeout
    seen = last_step(launch.run_dir) if since is None else since
    target = seen + steps
    while (
        launch.process.poll() is None and time.monotonic() < deadline and (step := last_step(launch.run_dir)) < target
    ):
        if step < seen and since is None:
            seen, target = step, step + steps
        time.sleep(0.01)
    return last_step(launch.run_dir)


def being_written(run_dir: Path, incarnation: int) -> bool:
    """Whether a file of this incarnation stands under its temporary name."""
    return any((run_dir / "checkpoints").glob(f"step-*/i{incarnation:04d}/.*"))


def renaming(run_dir: Path, incarnation: int, size: int) -> bool:
    """Whether all ranks' files are in place and the manifest is about to be."""
    files = list((run_dir / "checkpoints").glob(f"step-*/i{incarnation:04d}/rank-*"))
    newest = max((file.parent.parent for file in files), default=run_dir)
    return sum(newest in file.parents for file in files) == size and not (newest / "manifest.json").exists()


def uncommitted(run_dir: Path) -> bool:
    """Whether the newest incarnation has left files of a checkpoint that has no manifest."""
    written = (run_dir / "checkpoints").glob(f"step-*/i{newest_incarnation(run_dir):04d}")
    return any(not (folder.parent / "manifest.json").exists() for folder in written)


def main(arguments: Any = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--fixed-ranks", action="store_true")
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args(arguments)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(open_source("shapes:90"), str(folder / "shards"), StorageConfig(), shard_mb=0.1, num_workers=0)
    chaos = Chaos(folder, folder / "shards", options.seed, options.steps, options.fixed_ranks)
    problems = chaos.run(options.kills)
    chaos.say("; ".join(problems) if problems else f"equal to the undisturbed run; log in {folder / 'chaos.log'}")
    chaos.log.close()
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
