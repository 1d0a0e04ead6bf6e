"""Shards that stay on a web server or on the Hub give the samples and pixels that the files give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_ssl.data.indexing import index_shards
from dist_ssl.data.manifest import Manifest
from tests import terminal
from tests.proxy import faulty_proxy
from tests.stream.consumed import BATCH, Ledger, config_of, consume, part
from tests.web import certificate, web_server


def test_the_stream_is_that_of_the_files(
    shapes: Path, manifest: Manifest, quiet: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with web_server(shapes) as server, faulty_proxy(server.port, tls=certificate(tmp_path)) as https:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.port}")
        last = len(manifest.shards) - 1
        for scheme, root in (("https", f"{https.endpoint_url}/bucket/shapes"), ("hf", "hf://datasets/bucket/shapes")):
            config = config_of({"retry_seconds": 60}, cache_dir=str(tmp_path / f"cache-{scheme}"))
            https.refused = https.cut = 0.0
            pattern = f"{root}/{{000000..{last:06d}}}.tar"
            there = index_shards(pattern, config.storage, output=str(tmp_path / scheme), checksums=True, num_workers=0)
            assert there.hash == manifest.hash
            https.refused = https.cut = 0.15
            assert consume(config, there, steps=4, world_size=2) == part(quiet, 0, 4 * BATCH)
        assert https.faults > 0


@pytest.mark.slow
def test_a_pretraining_from_the_hub_is_that_from_the_files(shapes: Path, tmp_path: Path) -> None:
    """By the commands: the same samples in the same order, the same losses."""
    with web_server(shapes) as server:
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.port}"}
        place = ["hf://datasets/bucket/shapes/*.tar", "--checksums", "--output", str(tmp_path / "index")]
        done = terminal.forked("shards", "index", *place, **hub)
        assert done.returncode == 0, done.stderr
        runs = []
        for shards in (tmp_path / "index", shapes / "bucket" / "shapes"):
            run_dir = tmp_path / f"run-of-{shards.name}"
            settings = [
                f"data.shards={json.dumps(str(shards))}", f"run.dir={json.dumps(str(run_dir))}", "train.steps=3",
                f"data.cache_dir={json.dumps(str(tmp_path / 'cache'))}", "data.num_workers=1", "data.ledger=true",
            ]  # fmt: skip
            options = [part for setting in settings for part in ("--set", setting)]
            done = terminal.forked("pretrain", "configs/debug_cpu.toml", *options, **hub)
            assert done.returncode == 0, done.stderr
            steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            losses = [line["loss"] for line in steps if "loss" in line]
            runs.append((losses, (run_dir / "ledger-rank0.jsonl").read_text()))
        assert len(runs[0][0]) > 0
        assert runs[0] == runs[1]
        assert any("/resolve/" in path for path, _ in server.seen)
