"""Config: strictness, errors that name key, file and nearest key, round trips, and every file in configs/."""

import pytest

from dist_ssl import config
from dist_ssl.config import Config, UserError
from tests.complete_configs import CONFIGS, completed, header


def written(tmp_path, text):
    path = tmp_path / "a.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_files_are_complete_and_say_what_to_expect(path):
    assert path.read_text() == completed(path), "run: python -m tests.complete_configs"
    opening = header(path.read_text())
    for word in ("# Command:", "# Hardware:", "# Time:", "# Expected:"):
        assert word in opening, f"{path.name} opens without {word!r}"


def test_the_configs_that_the_readme_names_are_there():
    names = {path.stem for path in CONFIGS}
    assert names >= {"debug_cpu", "quickstart", "simclr_resnet50_imagenet", "simclr_vit_b16_imagenet", "evaluate"}


def test_round_trip():
    assert config.loads(config.dumps(Config())) == Config()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[objective]\ntemprature = 0.1", ["a.toml", "'objective.temprature'", "'objective.temperature'"]),
        ("[modle]\nencoder = 'x'", ["a.toml", "'modle'", "'model'"]),
        ("[train]\nglobal_batch_size = '8'\nsteps = 1", ["a.toml", "train.global_batch_size", "'8'"]),
        ("[train]\nsteps = 1\nepochs = 1", ["train.steps", "train.epochs"]),
        ("[train]\nglobal_batch_size = 8", ["exactly one of train.steps and train.epochs"]),
        ("[objective]\ntemperature = -0.1", ["objective.temperature", "greater than 0", "-0.1"]),
        ("[model.head]\nkind = 'conv'", ["model.head.kind", "'mlp'", "'conv'"]),
        ("[run\n", ["not readable as TOML"]),
    ],
)
def test_mistakes_are_named(tmp_path, text, expected):
    with pytest.raises(UserError) as error:
        config.load(written(tmp_path, text))
    assert "\n" not in str(error.value)
    for part in expected:
        assert part in str(error.value)


def test_overrides(tmp_path):
    path = written(tmp_path, "[train]\nepochs = 3\n")
    loaded = config.load(path, ["train.steps=5", "model.encoder=resnet18", "data.ledger=true", "run.dir='a b'"])
    assert (loaded.train.steps, loaded.train.epochs) == (5, None)
    assert loaded.model.encoder == "resnet18"
    assert loaded.data.ledger
    assert loaded.run.dir == "a b"
    for bad in ("train.stepz=5", "steps=5", "train.steps"):
        with pytest.raises(UserError):
            config.load(path, [bad])


def test_missing_file_is_one_line():
    with pytest.raises(UserError, match=r"nowhere\.toml: no such config file"):
        config.load("nowhere.toml")


def test_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().run.seed = 3


def test_resume_diff_lets_resources_differ_and_nothing_else():
    saved = Config()
    free = ["engine.zero_stage=3", "data.num_workers=7", "log.every_steps=3", "checkpoint.keep_last=9", "run.dir=x"]
    assert config.resume_diff(saved, config.with_overrides(saved, free)) == []
    bound = ["objective.temperature=0.7", "run.seed=4", "optimizer.base_learning_rate=1.0", "data.streams=3"]
    lines = config.resume_diff(saved, config.with_overrides(saved, bound))
    assert len(lines) == len(bound)
    assert "objective.temperature: 0.1 -> 0.7" in lines


def test_total_steps_covers_whole_epochs():
    values = {"train": {"epochs": 3, "global_batch_size": 8}}
    assert config.total_steps(config.validate(values, "x"), 21) == 8  # 63 samples
