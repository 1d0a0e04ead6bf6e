"""Config: strictness, errors that name key, file and nearest key, round trips, and every file in configs/."""

import os
import tomllib
from pathlib import Path

import pytest

from dist_ssl import config
from dist_ssl.config import Config, LabConfig, UserError
from tests.terminal import dist_ssl

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(ROOT.glob("configs/*.toml"))
DEFAULTS = Path(__file__).parent / "golden" / "defaults-0.1.0.toml"


def written(tmp_path, text):
    path = tmp_path / "a.toml"
    path.write_text(text)
    return path


def flat(values, prefix=""):
    """Dotted key -> value."""
    found = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def defaults(method):
    """Dotted key -> its own default, as TOML would give it, with the keys of one method."""
    given = {key.dotted: key.field.default for key in config.known_keys() if not key.methods or method in key.methods}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_files_say_what_to_expect_and_hold_only_what_differs(path):
    loaded = config.load(path)
    opening = path.read_text().partition("\n\n")[0]
    for word in ("# Command:", "# Hardware:", "# Time:", "# Expected:"):
        assert word in opening, f"{path.name} opens without {word!r}"
        assert word.upper()[2:-1] not in opening, f"{path.name} holds a placeholder"
    known = defaults(loaded.objective.name)
    same = [key for key, value in flat(tomllib.loads(path.read_text())).items() if value == known[key]]
    assert same == [], f"{path.name} repeats defaults: leave these out"


def test_a_file_that_leaves_keys_out_goes_on_meaning_what_it_meant():
    """Every default of 0.1.0, written out. A default that changes on purpose changes there, and in the CHANGELOG."""
    assert config.load(DEFAULTS) == Config(lab=LabConfig())


def test_the_resolved_config_is_toml_and_says_where_each_value_came_from(tmp_path):
    path = written(tmp_path, "[model.head]\noutput_dim = 32\n[train]\nsteps = 3\nglobal_batch_size = 8\n")
    options = ["--set", "optimizer.base_learning_rate=0.5", "--set", "train.epochs=2"]
    done = dist_ssl("config", str(path), *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert config.loads(done.stdout) == config.load(path, options[1::2])
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for line in (
        "output_dim = 32 # file",
        "base_learning_rate = 0.5 # --set",
        "epochs = 2 # --set",
        "global_batch_size = 8 # file",
        "mean = [0.485, 0.456, 0.406] # default",
        "# endpoint_url is not set",
        "# steps is not set",
    ):
        assert line in lines, line


def test_every_key_is_explained():
    lines = config.explain()
    assert len(lines) == len(list(config.known_keys()))
    assert [key.dotted for key in config.known_keys() if not key.field.description] == []
    (line,) = [line for line in lines if line.startswith("optimizer.momentum ")]
    assert line.split() == ["optimizer.momentum", "float", ">=", "0,", "<", "1", "0.9", "of", "LARS"]
    assert config.explain("model.head")[0].split()[0] == "model.head.kind"
    assert dist_ssl("config", "--explain", "log").stdout.splitlines() == config.explain("log")
    with pytest.raises(UserError, match="expected a section, one of run, storage,"):
        config.explain("heads")


@pytest.mark.parametrize(
    "text",
    [
        "[run]\ndir = 'a \"b\"\\c # \u00e9'\n",
        "[engine.deepspeed]\nwall_clock_breakdown = true\n[engine.deepspeed.'a.b']\nc = [{ d = 1 }, { d = 'x' }]\n",
        "[lab]\ncontrols = []\n[data]\ncache_gb = 1e-7\n",
    ],
)
def test_what_is_written_reads_back_the_same(tmp_path, text):
    path = written(tmp_path, text)
    loaded = config.load(path)
    assert config.loads(config.dumps(loaded)) == loaded
    assert config.loads(config.dumps_with_origins(loaded, config.origins(path))) == loaded


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


def test_an_override_that_is_made_holds_its_value():
    for shards in ("a b", "photos 📷", 'say "é\\" \n\x7f', "", os.fsdecode(b"caf\xe9")):
        made = config.with_overrides(config.Config(), [config.override("evaluation.train_shards", shards)])
        assert made.evaluation.train_shards == shards
    settings = {"evaluation.probes": ["knn"], "augment.mean": [0.1, 0.2, 0.3], "data.ledger": True}
    made = config.with_overrides(config.Config(), [config.override(*one) for one in settings.items()])
    assert (made.evaluation.probes, made.augment.mean, made.data.ledger) == (["knn"], (0.1, 0.2, 0.3), True)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr=1", "unknown key 'optimizer.lr'; did you mean 'optimizer.base_learning_rate'?"),
        ("optim.lr=1", "unknown key 'optim.lr'; did you mean 'optimizer.base_learning_rate'?"),
        ("optimizer.wd=1", "'optimizer.weight_decay'"),
        ("train.batch_size=1", "'train.global_batch_size'"),
        ("evaluation.batch_size=1", "'evaluation.batch_size_per_rank'"),
        ("objective.tau=1", "'objective.temperature'"),
        ("train.seed=1", "'run.seed'"),
        ("modle.encoder=x", "'model.encoder'"),
        ("model.hidden_dim=1", "'model.head.hidden_dim'"),
        ("lab.head=1", "'lab.heads'"),
        ("lr=1", "expected section.key=value, such as optimizer.base_learning_rate=..."),
    ],
)
def test_a_wrong_override_is_blamed_and_the_key_that_was_meant_is_named(tmp_path, override, expected):
    with pytest.raises(UserError) as error:
        config.load(written(tmp_path, "[run]\ndir = 'x'\n"), [override])
    assert str(error.value).startswith("--set")
    assert expected in str(error.value)


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
