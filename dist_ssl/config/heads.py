"""The sections [model.head] and [model.predictor]: what may stand between h and the loss, each kind from its paper."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from dist_ssl.config.section import Section

HEADS = {
    "none": "the loss takes h itself",
    "linear": "one linear layer (Chen et al. 2020)",
    "mlp": "linear layers with an activation between them (Chen et al. 2020)",
    "direct": "the first output_dim numbers of h (DirectCLR, Jing et al. 2021)",
    "fixed_reweight": "h times a fixed diagonal, 1, 1/kappa, 1/kappa^2, ... (Xue et al. 2024)",
    "shortcut": "an mlp whose output stands beside h, both alike in weight (after RED, Ma et al. 2023)",
    "discrete": "an mlp whose numbers are rounded to a few levels (Ouyang et al. 2025)",
    "sae": "a sparse code, of which the top_k largest pass, and a linear layer (Ouyang et al. 2025)",
}
OF_AN_MLP = ("mlp", "shortcut", "discrete")  # kinds that have num_layers, hidden_dim and activation
AS_WIDE_AS_H = ("none", "fixed_reweight")  # kinds that output_dim says nothing of
WITHOUT_BATCH_NORM = ("none", "direct", "fixed_reweight", "sae")
Activation = Literal["relu", "silu", "tanh"]


class HeadConfig(Section):
    kind: Literal["none", "linear", "mlp", "direct", "fixed_reweight", "shortcut", "discrete", "sae"] = Field(
        "mlp", description="what stands between h and the loss; `dist-ssl list` says what each is, and whose"
    )
    num_layers: int = Field(2, ge=2, description="linear layers of an mlp (mlp, shortcut, discrete)")
    hidden_dim: int = Field(2048, ge=1, description="width of an mlp's hidden layers")
    output_dim: int = Field(128, ge=1, description="width of z; direct: how many numbers of h the loss takes")
    batch_norm: bool = Field(True, description="after each linear layer of an mlp or a linear head")
    last_batch_norm: bool = Field(True, description="false: not after the last linear layer")
    activation: Activation = Field("relu", description="between an mlp's layers")
    kappa: float = Field(1.02, gt=1, description="of fixed_reweight: number i of h is divided by kappa^i")
    levels: int = Field(8, ge=2, description="of discrete: values that each number of z may have, from -1 to 1")
    latent_dim: int = Field(4096, ge=1, description="of sae: width of its code")
    top_k: int = Field(40, ge=1, description="of sae: how many numbers of an image's code are not 0")
    l1: float = Field(
        0.0, ge=0, description="weight of the L1 norm of z's linear layer, added in the gradient (Song et al. 2023)"
    )

    @model_validator(mode="after")
    def keys_fit_the_kind(self) -> Self:
        if self.l1 and self.kind in ("none", "direct", "fixed_reweight"):
            raise ValueError(f"l1: kind {self.kind!r} has no linear layer to make sparse; leave it out")
        if self.kind == "sae" and self.top_k > self.latent_dim:
            raise ValueError(f"top_k: expected at most latent_dim, {self.latent_dim}, got {self.top_k}")
        return self


class PredictorConfig(Section):
    """What stands between z and the loss of moco_v3, byol and simsiam; its output is as wide as z."""

    kind: Literal["none", "linear", "mlp"] = Field("mlp", description="none: the loss takes z itself")
    num_layers: int = Field(2, ge=2, description="linear layers, only of kind mlp")
    hidden_dim: int | None = Field(None, ge=1, description="width of an mlp's hidden layers; unset: as of the head")
    batch_norm: bool = Field(True, description="after each linear layer of an mlp")
    last_batch_norm: bool = Field(False, description="true: after the last linear layer too")
