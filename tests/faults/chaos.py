"""A run that is killed again and again at random moments, then held against one that nobody disturbed.

    python -m tests.faults.chaos --kills 100 --seed 0                # ranks change between starts: losses to 1e-3
    python -m tests.faults.chaos --kills 100 --seed 0 --fixed-ranks  # ledger, losses and weights equal bit by bit

Writes what it did to chaos.log in its folder (`--folder`, kept), and exits 1 where the outcome differs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dist_ssl import checkpoint
from dist_ssl.config import Config, StorageConfig
from dist_ssl.data.shards import write_shards
from dist_ssl.data.sources import open_source
from tests.faults.harness import Launch, last_step, send
from tests.trajectory import ledger, losses, small_config

ACTIONS = ("kill all", "kill one rank", "SIGTERM", "stop, continue, kill")
MOMENTS = ("start-up", "a step", "a write", "a rename")


class Chaos:
    def __init__(self, folder: Path, shards: Path, seed: int, steps: int, fixed_ranks: bool):
        self.folder, self.shards, self.steps, self.fixed_ranks = folder, shards, steps, fixed_ranks
        self.random = random.Random(seed)
        self.log = open(folder / "chaos.log", "w", buffering=1)  # noqa: SIM115  kept for the whole run

    def config(self, name: str) -> Config:
        overrides = [f"train.steps={self.steps}", "checkpoint.every_steps=3", "checkpoint.keep_last=2"]
        return small_config(self.folder / name / "run", self.shards, *overrides)

    def launch(self, config: Config) -> Launch:
        size = 2 if self.fixed_ranks else self.random.randint(1, 4)
        return Launch(config, size)

    def disturb(self, number: int, config: Config) -> None:
        """Start, wait for a random moment, do one random harm, wait for the end of it."""
        before, moment = last_step(Path(config.run.dir)), self.random.choice(MOMENTS)
        action = self.random.choice(ACTIONS)
        launch = self.launch(config)
        self.wait_for(moment, launch, before)
        if action == "SIGTERM":
            os.kill(launch.process.pid, signal.SIGTERM)
            launch.wait(90)
        elif action == "kill one rank":
            ranks = launch.ranks()
            send(ranks[-1:], signal.SIGKILL)
            if ranks:
                launch.wait(90)
            else:
                launch.kill()
        else:
            if action.startswith("stop"):
                ranks = launch.ranks()
                send(ranks[:1], signal.SIGSTOP)
                time.sleep(self.random.uniform(0, 1))
                send(ranks[:1], signal.SIGCONT)
                time.sleep(self.random.uniform(0, 0.3))
            launch.kill()
        after = last_step(Path(config.run.dir))
        self.say(f"{number}: {action} at {moment}; steps {before} -> {after}; exit code {launch.process.returncode}")

    def wait_for(self, moment: str, launch: Launch, before: int) -> None:
        if moment == "start-up":
            time.sleep(self.random.uniform(0, 8))
            return
        deadline = time.monotonic() + 60
        while last_step(launch.run_dir) == before and launch.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if moment == "a step":
            time.sleep(self.random.uniform(0, 1.5))
            return
        # A write is seen by a file under its temporary name; a rename is about to come when ranks' files are there
        # and the manifest is not.
        checkpoints = launch.run_dir / "checkpoints"
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and launch.process.poll() is None:
            newest = max(checkpoints.glob("step-*"), default=checkpoints)
            if moment == "a write" and next(newest.rglob(".*"), None) is not None:
                return
            if moment == "a rename" and next(newest.rglob("rank-*"), None) and not (newest / "manifest.json").exists():
                return

    def say(self, text: str) -> None:
        print(text, file=self.log)
        print(text, flush=True)

    def run(self, kills: int) -> list[str]:
        """The differences to the undisturbed run; empty where there are none."""
        quiet, chaotic = self.config("quiet"), self.config("chaotic")
        launch = Launch(quiet, 2)
        assert launch.wait(1800) == 0, launch.said()
        for number in range(1, kills + 1):
            if last_step(Path(chaotic.run.dir)) >= self.steps:
                self.say(f"complete after {number - 1} kills; the rest would find nothing to kill")
                break
            self.disturb(number, chaotic)
        launch = self.launch(chaotic)
        code = launch.wait(1800)
        self.say(f"undisturbed from here: exit code {code}")
        return [] if code == 0 and not (found := self.differences(quiet, chaotic)) else [launch.said(), *found]

    def differences(self, quiet: Config, chaotic: Config) -> list[str]:
        expected, found = Path(quiet.run.dir), Path(chaotic.run.dir)
        problems = []
        if ledger(found) != ledger(expected):
            problems.append("the ledgers differ")
        pairs = list(zip(losses(found), losses(expected), strict=True))
        worst = max(abs(a - b) / abs(b) for a, b in pairs)
        self.say(f"{len(pairs)} losses, worst relative difference {worst:.2g}")
        if worst > (0 if self.fixed_ranks else 1e-3):
            problems.append(f"losses differ by {worst:.2g}")
        weights = [
            checkpoint.read_model_state(checkpoint.checkpoint_url(c), self.steps, StorageConfig())
            for c in (quiet, chaotic)
        ]
        if self.fixed_ranks and not all(torch.equal(t, weights[1][name]) for name, t in weights[0].items()):
            problems.append("final weights differ")
        return problems


def main(arguments: Any = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
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
