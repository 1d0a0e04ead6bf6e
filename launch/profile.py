"""What a cluster wants to be told, in `launch/profiles/NAME.toml`: partition, account, modules, container, sizes."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path

from pydantic import Field, ValidationError

from dist_ssl.config import Section, UserError

PROFILES = Path(__file__).parent / "profiles"


class EvaluationResources(Section):
    """An evaluation's job is smaller than the pretraining's; None: as the profile's own."""

    partition: str | None = None
    gpus: int | None = Field(None, ge=0)  # None: one where the partition has any
    cpus: int = Field(8, ge=1)
    time_minutes: int = Field(120, ge=1)


class Profile(Section):
    partition: str | None = None  # None: the cluster's default one
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclusive: bool = False
    cpus_per_task: int = Field(8, ge=1)
    memory_gb: float | None = Field(None, gt=0)  # per node; None: the partition's default
    signal_seconds: int = Field(90, ge=1)  # how long before the time limit the ranks are told to commit
    setup: list[str] = Field([])  # shell lines before anything else
    modules: list[str] = Field([])  # `module load` each
    environment: dict[str, str] = Field({})
    # A command put before python on every rank: ["apptainer", "exec", "--nv", "IMAGE"]
    container: list[str] = Field([])
    python: str | None = None  # the ranks' interpreter; None: the one that submits
    srun: list[str] = Field([])  # further options of srun, such as Pyxis' --container-image
    sbatch: dict[str, str | bool] = Field({})  # further options of sbatch
    evaluation: EvaluationResources = EvaluationResources()


def load(name: str | None) -> Profile:
    """The profile NAME of `launch/profiles`, or of a TOML file whose path is given; None: every default."""
    if name is None:
        return Profile()
    path = Path(name) if name.endswith(".toml") else PROFILES / f"{name}.toml"
    try:
        return Profile.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError:
        known = ", ".join(sorted(profile.stem for profile in PROFILES.glob("*.toml")))
        raise UserError(f"--profile {name}: expected one of {known}, or a path that ends in .toml") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: not readable as TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key, message = ".".join(map(str, first["loc"])), first["msg"]
        known = ", ".join(Profile.model_fields)
        raise UserError(f"{path}: {key}: {message}; the keys of a profile are {known}") from None


def setup_lines(profile: Profile) -> list[str]:
    """The shell lines that a job of this profile begins with."""
    modules = [f"module load {shlex.quote(module)}" for module in profile.modules]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()]
    return [*profile.setup, *modules, *exports]
