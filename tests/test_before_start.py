"""A mistake that would be the same at every start: one line, exit code 2, one start of the ranks, nothing left."""

import json
import sys
from pathlib import Path

import pytest

from dist_ssl import config as configuration
from dist_ssl.config import Config, UserError
from dist_ssl.planning.before_start import check_config, check_extras
from tests.s3 import s3_server
from tests.terminal import run

# Python runs this before anything else: wandb is gone, and every start of a rank leaves a line.
SITE = """
import sys
sys.modules["wandb"] = None
if "dist_ssl.cli" in sys.orig_argv:
    with open({starts!r}, "a") as file:
        file.write("started\\n")
"""


@pytest.fixture
def launched(tmp_path):
    """A function that starts `python -m MODULE pretrain` of a tiny run and gives the process and its ranks' starts."""
    starts, run_dir = tmp_path / "starts", tmp_path / "run"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE.format(starts=str(starts)))

    def launch(module, setting=None, *options, shards="none", **environment):
        places = [f"run.dir={json.dumps(str(run_dir))}", f"data.shards={json.dumps(str(shards))}"]
        settings = [part for one in (*places, setting) if one for part in ("--set", one)]
        command = [sys.executable, "-m", module, "pretrain", "configs/debug_cpu.toml", *settings, *options]
        path = f"{tmp_path / 'site'}:{Path(__file__).parent.parent}"
        done = run(command, timeout=300, PYTHONPATH=path, **environment)
        assert not run_dir.exists()
        return done, len(starts.read_text().splitlines()) if starts.exists() else 0

    return launch


STARTING = "starting 2 ranks, which takes some seconds"


def one_line(done, expected, before=()):
    """The mistake, and nothing else but what was said `before`."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    *said, line = done.stderr.splitlines()
    assert said == list(before)
    assert line.startswith("error: ")
    assert expected in line


def test_what_the_config_tells_starts_no_rank(launched):
    for setting, expected in (
        ("log.wandb_project=mine", "wandb is not installed here; pip install wandb"),
        ("objective.chunks=64", "64 is less than the 2 ranks x 64 chunks"),
    ):
        done, starts = launched("launch.local", setting, "--ranks", "2")
        one_line(done, expected)
        assert starts == 0


@pytest.mark.slow
def test_what_the_ranks_find_starts_them_once(launched):
    done, starts = launched("launch.local")
    one_line(done, "no manifest.json there", [STARTING])
    assert starts == 2


@pytest.mark.slow
def test_a_package_that_is_not_there_is_found_without_a_launcher_too(launched):
    done, starts = launched("dist_ssl.cli", "log.wandb_project=mine")
    one_line(done, "wandb is not installed here")
    assert starts == 1


@pytest.mark.slow
def test_raw_keys_and_a_cache_that_is_too_small_leave_no_run_directory(launched, small_shards):
    done, starts = launched("dist_ssl.cli", "engine.deepspeed={fp16={enabled=true}}", shards=small_shards)
    assert (done.returncode, starts) == (2, 1)
    assert "error: engine.deepspeed.fp16: derived from the rest of the config" in done.stderr.splitlines()[-1]
    with s3_server(small_shards.parent) as server:
        place = ["--set", f"storage.endpoint_url={json.dumps(server.endpoint_url)}"]
        bucket = {"shards": f"s3://{small_shards.name}", **server.environment}
        done, starts = launched("dist_ssl.cli", "data.cache_gb=1e-6", *place, **bucket)
    assert done.returncode == 2  # where it found credentials is logged too
    assert "more than data.cache_gb" in done.stderr.splitlines()[-1]


def test_each_check_says_what_to_do():
    with pytest.raises(UserError, match=r"data\.shards: expected where .* got nothing; --set data\.shards=URL"):
        check_config(Config(), 1)
    sound = configuration.with_overrides(Config(), ["data.shards=s3://bucket/x"])
    check_config(sound, 4096)
    check_extras(sound)
    with pytest.raises(UserError, match="4096 is less than the 4097 ranks"):
        check_config(sound, 4097)
    with pytest.raises(UserError, match="pipe"):
        check_config(configuration.with_overrides(sound, ["data.shards='pipe:rm -rf /'"]), 1)
