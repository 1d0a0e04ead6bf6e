"""The losses, each exact over the global batch on any number of ranks, with no collective in backward.

The mean over ranks of what a loss returns, and of the gradients that follow, is the loss of the global batch and its
gradient. Light to import: torch with its numpy, so that another project's loop can take a loss alone.
"""

from dist_ssl.objective.contrastive import (
    decoupled,
    decoupled_views,
    nt_xent,
    nt_xent_views,
    supervised,
    supervised_views,
)
from dist_ssl.objective.covariance import barlow_twins, vicreg
from dist_ssl.objective.gaussian import lejepa, sigreg
from dist_ssl.objective.momentum import byol, moco_v3, simsiam

__all__ = [
    "barlow_twins",
    "byol",
    "decoupled",
    "decoupled_views",
    "lejepa",
    "moco_v3",
    "nt_xent",
    "nt_xent_views",
    "sigreg",
    "simsiam",
    "supervised",
    "supervised_views",
    "vicreg",
]
