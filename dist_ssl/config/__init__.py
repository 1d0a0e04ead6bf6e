"""What a run is told: its config, frozen and strict, TOML in and out; and by its launcher, ranks and exit codes.

Nothing is ever changed after loading; what follows from a config (steps, learning rates) is a function of it. `load`
reads a file and lays `--set section.key=value` over it, `dumps` gives the resolved config that reproduces the run, and
`resume_diff` says what a resumed run may not change. `environment` is apart: a launcher needs it and little else.
"""

from dist_ssl.config.loading import load, loads, origins, resume_diff, total_steps, validate, with_overrides
from dist_ssl.config.sections import (
    MAY_DIFFER_ON_RESUME,
    AugmentConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DiagnosticsConfig,
    EngineConfig,
    EvaluationConfig,
    HeadConfig,
    LabConfig,
    LogConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    Section,
    StorageConfig,
    TrainConfig,
    UserError,
    ViewPolicy,
    ViewsConfig,
)
from dist_ssl.config.writing import dumps, dumps_with_origins, explain, known_keys

__all__ = [
    "MAY_DIFFER_ON_RESUME",
    "AugmentConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DiagnosticsConfig",
    "EngineConfig",
    "EvaluationConfig",
    "HeadConfig",
    "LabConfig",
    "LogConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RunConfig",
    "Section",
    "StorageConfig",
    "TrainConfig",
    "UserError",
    "ViewPolicy",
    "ViewsConfig",
    "dumps",
    "dumps_with_origins",
    "explain",
    "known_keys",
    "load",
    "loads",
    "origins",
    "resume_diff",
    "total_steps",
    "validate",
    "with_overrides",
]
