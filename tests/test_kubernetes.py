"""docker/jobset.yaml: no cluster runs here, so it is held against JobSet's own models, and against what we promise."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
from pydantic import ValidationError
from typer.main import get_command

from dist_ssl import config as configuration
from dist_ssl.config import environment
from launch import local

ROOT = Path(__file__).parent.parent
MANIFEST = yaml.safe_load((ROOT / "docker" / "jobset.yaml").read_text())
JOB = MANIFEST["spec"]["replicatedJobs"][0]
POD = JOB["template"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
GIB = {"Gi": 1, "Ti": 1024}


def problems(manifest):
    """What the published schema has no place for: what is lost on the way through its models; or what it refuses."""
    try:
        read = JobsetV1alpha2JobSet.from_dict(copy.deepcopy(manifest)).to_dict()
    except ValidationError as refused:
        return [str(refused)]

    def lost(given, kept, path):
        if isinstance(given, dict):
            for key, value in given.items():
                yield from lost(value, kept.get(key, ...), f"{path}.{key}") if isinstance(kept, dict) else [path]
        elif isinstance(given, list):
            for number, value in enumerate(given):
                yield from lost(value, kept[number], f"{path}[{number}]") if isinstance(kept, list) else [path]
        elif given != kept:
            yield path

    return list(lost(manifest, read, ""))


def test_manifest_holds_against_jobsets_schema():
    assert problems(MANIFEST) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("completionMode", "completionsMode"), ("onExitCodes", "exitCodes"), ("mountPath", "path"), ("rules:", "rule:")],
)
def test_a_wrong_key_is_found(right, wrong):
    text = (ROOT / "docker" / "jobset.yaml").read_text()
    assert problems(yaml.safe_load(text.replace(right, wrong))) != []


def test_every_node_runs_the_same_command_and_finds_node_0():
    job, name = JOB["template"]["spec"], MANIFEST["metadata"]["name"]
    given = {entry["name"]: entry["value"] for entry in CONTAINER["env"]}
    assert job["completionMode"] == "Indexed"
    assert {job["parallelism"], job["completions"], int(given["NODES"])} == {4}
    given["JOB_COMPLETION_INDEX"] = "3"
    command = [re.sub(r"\$\((\w+)\)", lambda found: given[found[1]], word) for word in CONTAINER["command"]]
    assert command[:4] == ["python", "-m", "launch.local", "pretrain"]
    pretrain = get_command(local.app).commands["pretrain"]
    options = pretrain.make_context("pretrain", command[4:]).params
    # Pods of an indexed job are JOBSET-JOB-INDEX_OF_JOB-INDEX_OF_POD under the set's own headless service.
    assert options["master_addr"] == f"{name}-{JOB['name']}-0-0.{name}"
    assert local.Nodes(options["nodes"], options["node_rank"], options["master_addr"]).checked().rank == 3
    assert CONTAINER["ports"] == [{"containerPort": options["master_port"]}]
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == options["ranks"]
    config = configuration.load(ROOT / options["config"], options["overrides"])
    assert POD["terminationGracePeriodSeconds"] > 2 * config.engine.grace_seconds  # and a commit
    mounts = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"]}
    assert {volume["name"] for volume in POD["volumes"]} == set(mounts.values())
    assert config.run.dir.startswith("/runs/")
    assert mounts[config.data.cache_dir] == "cache"
    sizes = {volume["name"]: volume["emptyDir"]["sizeLimit"] for volume in POD["volumes"] if "emptyDir" in volume}
    assert int(sizes["cache"][:-2]) * GIB[sizes["cache"][-2:]] * 1.0737 > config.data.cache_gb


def test_exit_codes_decide_who_starts_again():
    policy, job = MANIFEST["spec"]["failurePolicy"], JOB["template"]["spec"]
    assert (job["backoffLimit"], POD["restartPolicy"]) == (0, "Never")  # one pod that fails ends the set
    codes = [rule["onExitCodes"]["values"] for rule in job["podFailurePolicy"]["rules"]]
    assert codes == [[environment.EXIT_RUN_ME_AGAIN], [environment.EXIT_USERS_MISTAKE, environment.EXIT_FENCED]]
    actions = {rule["onJobFailureMessagePatterns"][0]: rule["action"] for rule in policy["rules"]}
    for index, action in enumerate(("RestartJobSetAndIgnoreMaxRestarts", "FailJobSet")):
        told = f"Container ranks for pod default/x failed with exit code 0 matching FailJob rule at index {index}"
        assert [actions[pattern] for pattern in actions if re.search(pattern, told)] == [action]
