"""The command line as a user meets it: help with examples, and mistakes in one line."""

import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dist_ssl import cli
from dist_ssl.cli import shards_app
from dist_ssl.config import UserError
from launch.command import app
from tests.terminal import run

MISTAKES = [
    ("dist_ssl.cli", "evaluat", "Did you mean 'evaluate'"),
    ("dist_ssl.cli", "pretrain", "Missing argument 'config'"),
    ("dist_ssl.cli", "pretrain none.toml", "none.toml: no such config file"),
    ("dist_ssl.cli", "shards write shapes:9 x --seed one", "'--seed'"),
    ("dist_ssl.cli", "shards write shapes:9 LICENSE/x --workers 0", "a file is where a folder would be"),
    ("dist_ssl.cli", "export none encoder.safetensors", "not a run directory"),
    ("dist_ssl.cli", "export none encoder.pth", "a name that ends in .safetensors"),
    ("dist_ssl.cli", "pretrain configs/debug_cpu.toml --set train.stepz=3", "--set: unknown key 'train.stepz'"),
    ("dist_ssl.cli", "config", "expected a TOML file, or --explain"),
    ("dist_ssl.cli", "plan configs/debug_cpu.toml --num-images 9 --images-per-second 0", "'--images-per-second'"),
    ("dist_ssl.cli", "plan configs/debug_cpu.toml --num-images 9 --nodes 5000", "take fewer ranks or a larger batch"),
    ("dist_ssl.cli", "plan configs/debug_cpu.toml --num-images 9 --latency-ms 9", "--latency-ms: expected --simulate"),
    ("dist_ssl.cli", "plan configs/debug_cpu.toml --num-classes 9", "--num-classes: expected --num-images beside it"),
    ("dist_ssl.cli", "plan configs/debug_cpu.toml --num-images 9 --data photos", "leave one of them out"),
    ("dist_ssl.cli", "evaluate none --probes ,", "--probes: expected names with commas"),
    ("launch.command", "lab configs/lab_cpu.toml --cell 1 --summary", "leave one of them out"),
    ("launch.command", "lab configs/debug_cpu.toml", "the config has no [lab] section"),
    ("launch.local", "pretrain configs/debug_cpu.toml --ranks 0", "'--ranks'"),
    ("launch.slurm", "pretrain", "Missing argument 'config'"),
]


@pytest.mark.parametrize(("module", "arguments", "expected"), MISTAKES, ids=[f"{m} {a}" for m, a, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(module, arguments, expected):
    done = run([sys.executable, "-m", module, *arguments.split()])
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert expected in line


@pytest.mark.parametrize(
    "given", ["--name a/b", "--name features", "--data photos/features", "--data tensorboard=x", "--data s3://b/.."]
)
def test_results_on_other_data_take_no_folder_of_ours(given):
    done = CliRunner().invoke(app, ["evaluate", "none", *given.split()])
    assert isinstance(done.exception, UserError)
    assert "expected the name of a folder, without a path, and not features, tensorboard or .." in str(done.exception)


@pytest.mark.parametrize("command", [*app.registered_commands, *shards_app.registered_commands])
def test_every_command_has_an_example(command):
    assert "Example: dist-ssl " in command.callback.__doc__


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    fills = typer.Typer()
    fills.command()(lambda: Path("/dev/full").write_text("more than there is room for") and None)
    monkeypatch.setattr("sys.argv", ["dist-ssl"])
    with pytest.raises(SystemExit, match="1"):
        cli.run(fills)
    (line,) = capsys.readouterr().err.splitlines()
    assert "the disk or your quota is full: make room, then run the same command again" in line
