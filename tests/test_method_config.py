"""The section [objective]: a method each, old files read as before, mistakes told with the method's own keys."""

import pytest

from dist_ssl import config
from dist_ssl.config import METHODS, Config, MoCoV3Config, NTXentConfig, UserError, VICRegConfig
from tests.terminal import dist_ssl
from tests.test_config import written


@pytest.mark.parametrize(
    "text",
    ["", "[objective]\n", "[objective]\nname = 'nt_xent'\n", "[objective]\ntemperature = 0.1\nchunks = 1\n"],
)
def test_files_of_before_there_was_a_choice_read_as_they_did(tmp_path, text):
    loaded = config.load(written(tmp_path, text))
    assert loaded.objective == NTXentConfig(temperature=0.1, chunks=1)
    assert config.resume_diff(loaded, Config()) == []


@pytest.mark.parametrize("name", METHODS)
def test_a_config_of_each_method_is_written_and_read_back(tmp_path, name):
    path = written(tmp_path, f"[objective]\nname = '{name}'\nchunks = 3\n")
    loaded = config.load(path)
    assert (loaded.objective.name, loaded.objective.chunks) == (name, 3)
    assert config.loads(config.dumps(loaded)) == loaded
    said = config.dumps_with_origins(loaded, config.origins(path))
    assert config.loads(said) == loaded
    assert f'name = "{name}"' in said
    assert config.with_overrides(loaded, ["objective.chunks=1"]).objective == METHODS[name]()
    assert config.resume_diff(loaded, config.with_overrides(loaded, ["objective.chunks=1"])) == [
        "objective.chunks: 3 -> 1"
    ]


def test_a_method_set_by_override_leaves_the_old_ones_keys_behind(tmp_path):
    path = written(tmp_path, "[objective]\ntemperature = 0.3\nchunks = 2\n")
    assert config.load(path, ["objective.name=vicreg"]).objective == VICRegConfig(chunks=2)
    # What both have is kept where the file said it, and is the new one's own where nobody did.
    assert config.load(path, ["objective.name=moco_v3"]).objective == MoCoV3Config(chunks=2, temperature=0.3)
    assert config.with_overrides(Config(), ["objective.name=moco_v3"]).objective == MoCoV3Config()
    # What an override says is never left behind, wherever it stands.
    overrides = ["objective.name=vicreg", "objective.variance=3.0"]
    for given in (overrides, overrides[::-1]):
        assert config.load(path, given).objective == VICRegConfig(chunks=2, variance=3.0)
    with pytest.raises(
        UserError, match=r"--set: unknown key 'objective\.temperature': a key of nt_xent, .*'vicreg' has"
    ):
        config.load(path, ["objective.temperature=0.5", "objective.name=vicreg"])
    lines = config.dumps_with_origins(
        config.load(path, ["objective.name=moco_v3"]), config.origins(path, ["objective.name=moco_v3"])
    ).splitlines()
    found = {line.split(" = ")[0]: line.split("# ")[1] for line in lines if line.startswith(("name", "temp", "teach"))}
    assert found["temperature"] == "file"
    assert found["teacher_decay"] == "default"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[objective]\nname='vicreg'\nvariances = 1.0", ["'objective.variance'", "vicreg", "invariance, variance, "]),
        ("[objective]\nname='vicreg'\ntemperature = 1.0", ["a key of nt_xent", "moco_v3", "'vicreg' has chunks, "]),
        ("[objective]\nname='byol'\nema = 0.9", ["did you mean 'objective.teacher_decay'?", "'byol' has chunks, "]),
        ("[objective]\nname='swav'", ["a.toml: objective.name: expected one of nt_xent, decoupled", "got 'swav'"]),
        ("[objective]\nname='lejepa'\nnum_points = 4", ["objective.num_points: expected an odd number", "got 4"]),
        ("[objective]\nname='byol'\nteacher_decay = 1.5", ["a.toml: objective.teacher_decay: ", "got 1.5"]),
        ("[objective]\nname='byol'\n[engine]\nzero_stage = 3", ["a.toml: engine.zero_stage: byol needs 0, 1 or 2,"]),
        ("[objective]\nname='vicreg'\n[[augment.views]]\ncount=3", ["a.toml: augment.views: vicreg is of exactly two"]),
        ("[evaluation]\nteacher = true", ["a.toml: evaluation.teacher: nt_xent has none, only moco_v3, byol do"]),
        ("[lab]\nobjectives=[{name='byol', teacher_deca=0.9}]", ["'lab.objectives.0.teacher_deca'", "teacher_decay'?"]),
        ("[model.predictor]\nnum_layers = 3", ["a.toml: model.predictor: nt_xent has none, only moco_v3"]),
    ],
)  # fmt: skip
def test_mistakes_name_the_method_and_its_keys(tmp_path, text, expected):
    with pytest.raises(UserError) as error:
        config.load(written(tmp_path, text))
    assert "\n" not in str(error.value)
    for part in expected:
        assert part in str(error.value)


def test_a_method_without_a_predictor_leaves_the_files_behind(tmp_path):
    path = written(tmp_path, "[objective]\nname = 'byol'\n[model.predictor]\nnum_layers = 3\n")
    assert config.load(path, ["objective.name=simsiam"]).model.predictor.num_layers == 3
    assert config.load(path, ["objective.name=vicreg"]).model.predictor is None


def test_a_wrong_override_of_a_method_is_blamed(tmp_path):
    path = written(tmp_path, "[objective]\nname = 'barlow_twins'\n")
    with pytest.raises(UserError, match=r"^--set: unknown key 'objective\.lambd'; .*'objective\.off_diagonal'"):
        config.load(path, ["objective.lambd=1"])
    with pytest.raises(UserError, match=r"^--set: objective\.name: expected one of nt_xent, .*, got 'dino'"):
        config.load(path, ["objective.name=dino"])


def test_all_methods_keys_are_explained_apart():
    lines = dist_ssl("config", "--explain", "objective").stdout.splitlines()
    assert lines == config.explain("objective")
    keys = [line.split("  ")[0] for line in lines]
    assert keys[:2] == ["objective.name", "objective.chunks"]
    assert {"objective.temperature (nt_xent, decoupled, supervised)", "objective.temperature (moco_v3)"} <= set(keys)
    assert len(keys) == len(set(keys))
    assert {key.name for key in config.known_keys() if key.section == "objective"} == {
        name for method in METHODS.values() for name in method.model_fields
    }
