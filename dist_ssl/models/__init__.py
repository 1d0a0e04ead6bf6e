"""The networks: encoders f, the projection head g, both and a predictor as one model, batch norm over the global batch.

`build_model(config)` gives what a run trains, `build_teacher(config)` what follows it; `build_encoder(name)` an encoder
alone; ProjectionHead.layers reads g.
"""

from dist_ssl.config import ENCODERS
from dist_ssl.models.batch_norm import GlobalBatchNorm, frozen_running_statistics, slices_of
from dist_ssl.models.drop_path import Rows
from dist_ssl.models.encoders import build_encoder
from dist_ssl.models.head import ProjectionHead
from dist_ssl.models.model import ContrastiveModel, build_model, build_teacher, kept_buffers

__all__ = [
    "ENCODERS",
    "ContrastiveModel",
    "GlobalBatchNorm",
    "ProjectionHead",
    "Rows",
    "build_encoder",
    "build_model",
    "build_teacher",
    "frozen_running_statistics",
    "kept_buffers",
    "slices_of",
]
