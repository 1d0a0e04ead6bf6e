"""The teacher: a momentum copy that follows the student's applied steps, on any ranks, through kills and resumes."""

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from dist_ssl import checkpoint, cli
from dist_ssl import config as config_module
from dist_ssl.checkpoint import checkpoint_store, export_encoder, load_run, open_checkpoint, read_model_state
from dist_ssl.config import UserError
from dist_ssl.evaluation import evaluate, results
from dist_ssl.planning import estimate
from dist_ssl.report.page import build
from dist_ssl.training import teacher
from tests import trajectory
from tests.faults import inject
from tests.faults.forked import ForkedLaunch
from tests.pool import ranks
from tests.trajectory import small_config

STEPS = 8


def settings(folder, shards, name, *overrides):
    labelled = [f"evaluation.{split}_shards={json.dumps(str(shards))}" for split in ("train", "test")]
    method = [f"objective.name={name}", "objective.teacher_decay=0.5", f"train.steps={STEPS}"]
    return small_config(folder, shards, *method, *labelled, *overrides)


def states(config, step):
    """(student, teacher) as a checkpoint holds them."""
    found = open_checkpoint(checkpoint_store(config), step)
    return read_model_state(found), read_model_state(found, teacher=True)


def far_apart(a, b):
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in b)


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_shards):
    """Method -> the config of a run on two ranks that nobody stopped; each is made once."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = settings(tmp_path_factory.mktemp(name), small_shards, name)
            assert ranks(2).run(trajectory.pretrain, made[name]) == [0, 0]
        return made[name]

    return of


def test_the_decay_rises_from_its_first_value_to_one():
    steps = [teacher.decay(0.99, step / 100) for step in range(101)]
    assert steps[0] == pytest.approx(0.99)
    assert steps[50] == pytest.approx(0.995)
    assert steps[100] == 1.0
    assert all(after > before for before, after in pairwise(steps))


@pytest.mark.parametrize("bad", [[], [2]], ids=["all applied", "step 2 thrown away"])
def test_it_is_the_moving_average_of_the_students_that_were(tmp_path, small_shards, bad):
    """By hand, from a checkpoint a step. Step 2 has a NaN among rank 1's pixels: its batch norms have seen it too."""
    overrides = ["checkpoint.every_steps=1", "checkpoint.keep_last=9", "optimizer.base_learning_rate=0.01"]
    config = settings(tmp_path / "run", small_shards, "byol", "train.steps=4", *overrides)
    assert ranks(2).run(inject.pretrain_with_poison, config, bad) == [0, 0]
    kept = [step for step in range(5) if step not in bad]
    assert checkpoint.committed_steps(checkpoint_store(config)) == kept
    by_hand = states(config, 0)[0]
    parameters = [name for name, tensor in by_hand.items() if "running" not in name and "num_batches" not in name]
    parameters = [name for name in parameters if not name.startswith("predictor.")]
    before = None
    for step in kept:
        student, taught = states(config, step)
        assert not any(name.startswith("predictor.") for name in taught)
        if step:
            keep = 1 - 0.5 * (math.cos(math.pi * (step - 1) / 4) + 1) / 2
            by_hand = {name: keep * by_hand[name] + (1 - keep) * student[name] for name in parameters}
        assert far_apart(taught, {name: by_hand[name] for name in parameters}) <= 1e-6
        assert before is None or far_apart(before, {name: taught[name] for name in parameters}) > 1e-4
        before = taught
    # It counts the batches that it saw, in batch norms of its own.
    assert int(taught["encoder.stem.1.num_batches_tracked"]) == 4 - len(bad)
    moved = {name: taught[name] for name in taught if name.endswith("running_mean")}
    assert far_apart(student, moved) > 1e-5
    assert export_encoder(tmp_path / "run", tmp_path / "e.safetensors", with_head=True, teacher=True) == 4
    exported = load_file(tmp_path / "e.safetensors")
    expected = {name.removeprefix("encoder."): tensor for name, tensor in taught.items()}
    assert exported.keys() == expected.keys()
    assert far_apart(exported, expected) == 0
    assert json.loads((tmp_path / "e.json").read_text())["teacher"] is True


@pytest.mark.slow
@pytest.mark.parametrize("name", ["byol", "moco_v3"])
def test_killed_and_resumed_it_is_the_same_bits(tmp_path, small_shards, run, name):
    config = settings(tmp_path / "run", small_shards, name, "checkpoint.every_steps=2")
    launch = ForkedLaunch(config, 2)
    launch.wait_for_step(3)
    while checkpoint.committed_steps(checkpoint_store(config))[-1] < 2:  # it is written while training goes on
        assert launch.process.poll() is None, launch.said()
    launch.kill()
    assert checkpoint.committed_steps(checkpoint_store(config))[-1] < STEPS
    assert ranks(2).run(trajectory.pretrain, config) == [0, 0]
    assert trajectory.losses(tmp_path / "run") == trajectory.losses(Path(run(name).run.dir))
    assert trajectory.ledger(tmp_path / "run") == trajectory.ledger(Path(run(name).run.dir))
    for here, there in zip(states(config, STEPS), states(run(name), STEPS), strict=True):
        assert here.keys() == there.keys()
        assert far_apart(here, there) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "stage"), [("byol", 1, 0), ("byol", 3, 2), ("moco_v3", 2, 0), ("moco_v3", 1, 2)]
)
def test_it_goes_on_with_other_ranks_and_stages(tmp_path, small_shards, run, name, size, stage):
    """Stopped on two ranks under ZeRO 1, gone on with on others: samples and losses are as if it had not been."""
    config = settings(tmp_path, small_shards, name)
    assert ranks(2).run(inject.pretrain_with_signal, config, 5, 15) == [75, 75]
    other = config_module.with_overrides(config, [f"engine.zero_stage={stage}"])
    assert ranks(size).run(trajectory.pretrain, other) == [0] * size
    assert trajectory.ledger(tmp_path) == trajectory.ledger(Path(run(name).run.dir))
    assert trajectory.losses(tmp_path) == pytest.approx(trajectory.losses(Path(run(name).run.dir)), rel=1e-4)
    for here, there in zip(states(config, STEPS), states(run(name), STEPS), strict=True):
        assert far_apart(here, there) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "stage"), [("byol", 2, 0), ("byol", 3, 1), ("moco_v3", 2, 2)])
def test_whole_runs_on_any_ranks_and_stages(tmp_path, small_shards, run, name, size, stage):
    config = settings(tmp_path, small_shards, name, f"engine.zero_stage={stage}")
    assert ranks(size).run(trajectory.pretrain, config) == [0] * size
    assert trajectory.ledger(tmp_path) == trajectory.ledger(Path(run(name).run.dir))
    assert trajectory.losses(tmp_path) == pytest.approx(trajectory.losses(Path(run(name).run.dir)), rel=1e-4)


def test_each_rank_writes_its_share_and_plan_knows_of_it(run):
    config = run("byol")
    found = open_checkpoint(checkpoint_store(config), STEPS)
    table = found.table
    probe = sum(4 * math.prod(shape) for (name, _), shape in table.shapes.items() if name.startswith("probe."))
    written = sum(file["bytes"] for name, file in found.manifest["files"].items() if name.endswith(".safetensors"))
    predicted = estimate.checkpoint(config, estimate.Sizes.of(config, 2, measure=False))[0].value
    assert written - probe == pytest.approx(predicted, rel=0.05)  # and its headers
    written = Counter()
    for name, kind in table.shapes:
        if kind == "teacher":
            written.update({fragment.file: fragment.length for fragment in table.fragments(name, kind)})
    assert len(written) == 2
    assert max(written.values()) <= 1.01 * min(written.values())
    student, taught = ({name for name, kind in table.shapes if kind == wanted} for wanted in ("master", "teacher"))
    assert taught == {name for name in student if not name.startswith("predictor.")}


@pytest.mark.slow
def test_student_and_teacher_are_probed_apart(tmp_path, run):
    overrides, folder = ['evaluation.probes=["knn"]', "evaluation.num_workers=0"], run("byol").run.dir
    for extra, name in (([], None), (["evaluation.teacher=true"], None), (["evaluation.teacher=true"], "again")):
        subject = evaluate.run_subject(folder, None, [*overrides, *extra], name)
        evaluate.evaluate(subject, torch.device("cpu"))
    student, taught, again = results.stored(folder)
    assert (student.name, taught.name, again.name) == ("", "teacher", "teacher-again")
    assert (student.values["teacher"], taught.values["teacher"]) == (False, True)
    assert student.values["encoder_digest"] != taught.values["encoder_digest"]
    assert student.data != taught.data
    assert list(taught.values["layers"]) == ["h", "g1", "z", "h_untrained", "pixels"]
    page = build([Path(folder)], tmp_path / "report.html").read_text()
    assert "On its own data, by the teacher" in page
    assert "--teacher" in page


def test_a_run_without_a_teacher_says_so(tmp_path, small_shards):
    config = small_config(tmp_path, small_shards, "train.steps=1")
    assert ranks(1).run(trajectory.pretrain, config) == [0]
    for call in (
        lambda: load_run(tmp_path, teacher=True),
        lambda: export_encoder(tmp_path, "e.safetensors", teacher=True),
    ):
        with pytest.raises(UserError, match="expected a teacher, but its method has none; leave --teacher out"):
            call()
    done = CliRunner().invoke(cli.app, ["export", str(tmp_path), str(tmp_path / "e.safetensors"), "--teacher"])
    assert isinstance(done.exception, UserError)
