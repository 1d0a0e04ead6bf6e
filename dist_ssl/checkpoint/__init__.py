"""Checkpoints: fragments of named parameters, committed as one transaction, read at any world size and ZeRO stage.

`Checkpointer` writes them beside the training, `newest_valid` and `load` bring an engine back, `load_run` gives an
evaluation its model, `write_export` others an encoder. Nothing is ever unpickled; reading needs no DeepSpeed.
"""

from dist_ssl.checkpoint.export import (
    NormStatistics,
    export_encoder,
    load_run,
    read_model_state,
    read_run_config,
    write_export,
)
from dist_ssl.checkpoint.read import Checkpoint, DamagedCheckpoint, RunState, load, newest_valid, open_checkpoint
from dist_ssl.checkpoint.write import Checkpointer, Fenced, NotFiniteCheckpoint
from dist_ssl.storage.layout import checkpoint_store, committed_steps, newest_incarnation, step_name, take_incarnation

__all__ = [
    "Checkpoint",
    "Checkpointer",
    "DamagedCheckpoint",
    "Fenced",
    "NormStatistics",
    "NotFiniteCheckpoint",
    "RunState",
    "checkpoint_store",
    "committed_steps",
    "export_encoder",
    "load",
    "load_run",
    "newest_incarnation",
    "newest_valid",
    "open_checkpoint",
    "read_model_state",
    "read_run_config",
    "step_name",
    "take_incarnation",
    "write_export",
]
