"""The networks: encoders f, the projection head g, both as one model, and batch norm over the global batch.

`build_model(config)` gives what a run trains; `build_encoder(name)` an encoder alone; ProjectionHead.layers reads g.
"""

from dist_ssl.models.batch_norm import GlobalBatchNorm, frozen_running_statistics
from dist_ssl.models.encoders import ENCODERS, build_encoder
from dist_ssl.models.head import ProjectionHead
from dist_ssl.models.model import ContrastiveModel, build_model

__all__ = [
    "ENCODERS",
    "ContrastiveModel",
    "GlobalBatchNorm",
    "ProjectionHead",
    "build_encoder",
    "build_model",
    "frozen_running_statistics",
]
