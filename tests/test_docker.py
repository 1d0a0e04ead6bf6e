"""docker/: no engine runs here, so what is held is what can be: schema, linter, and that everything named exists."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
BIN = Path(sys.executable).parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def check_compose(path: Path) -> subprocess.CompletedProcess[str]:
    return run(str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(path))


def test_compose_file_holds_against_the_published_schema(tmp_path):
    checked = check_compose(DOCKER / "compose.yaml")
    assert checked.returncode == 0, checked.stdout
    broken = tmp_path / "compose.yaml"
    broken.write_text((DOCKER / "compose.yaml").read_text().replace("depends_on:", "depend_on:"))
    assert check_compose(broken).returncode != 0


def test_dockerfile_passes_hadolint(tmp_path):
    linted = run(str(BIN / "hadolint"), str(DOCKER / "Dockerfile"))
    assert linted.returncode == 0, linted.stdout
    broken = tmp_path / "Dockerfile"
    broken.write_text(DOCKERFILE.replace("--no-install-recommends ", ""))
    assert run(str(BIN / "hadolint"), str(broken)).returncode != 0


def test_every_path_named_exists():
    copied = [source for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.M) for source in line.split()[:-1]]
    assert len(copied) > 5
    for source in copied:
        assert (ROOT / source).exists(), source
    build = COMPOSE["x-slurm"]["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).exists()
    assert f"AS {build['target']}" in DOCKERFILE
    for named in re.findall(
        r"\b(?:configs|docker|launch/profiles)/[\w./-]+\w", (DOCKER / "compose.yaml").read_text() + DOCKERFILE
    ):
        assert (ROOT / named).exists(), named


@pytest.mark.skipif(shutil.which("apt-cache") is None, reason="needs Debian's apt-cache")
def test_every_debian_package_exists():
    packages = [name for line in re.findall(r"--no-install-recommends (.+) \\", DOCKERFILE) for name in line.split()]
    assert {"munge", "slurm-wlm", "slurmdbd", "gcc"} <= set(packages)
    if "Version" not in run("apt-cache", "show", "bash").stdout:
        pytest.skip("apt's lists have not been fetched here (apt-get update)")
    shown = run("apt-cache", "show", *packages).stdout
    assert [package for package in packages if f"Package: {package}\n" not in shown] == []


def test_services_are_roles_of_the_start_script():
    script = (DOCKER / "start.sh").read_text()
    assert run("bash", "-n", str(DOCKER / "start.sh")).returncode == 0
    roles = set(re.findall(r"^    (\w+)\)", script, re.M))
    ours = {name: service for name, service in COMPOSE["services"].items() if service["image"] == "dist_ssl-cluster"}
    assert {service["command"] for service in ours.values()} == roles
    for name in re.findall(r"\$\{(\w+)\}", script):
        assert name in COMPOSE["x-slurm"]["environment"], name


def test_slurm_of_the_containers_is_the_one_that_the_tests_run():
    """Same plugins; and the nodes and hosts of slurm.conf are services."""
    pattern = re.compile(
        r"(?:^|\")(\w+Type|\w+Plugin|\w+TypeParameters|PreemptMode|KillWait|MpiDefault)=([\w/]+)", re.M
    )
    ours = dict(pattern.findall((DOCKER / "slurm.conf").read_text()))
    tested = dict(
        pattern.findall((ROOT / "tests" / "cluster" / "slurm.py").read_text().replace("{", "").replace("}", ""))
    )
    assert len(ours) > 8
    for key, value in ours.items():
        assert tested[key] == value, key
    for name in ("n1", "n2", "slurmctld", "slurmdbd", "database"):
        assert name in COMPOSE["services"]
