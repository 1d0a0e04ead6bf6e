"""The section [objective]: a tagged union, one class a method, each with its own keys and the defaults of its paper."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, field_validator

from dist_ssl.config.section import Section

NAME = "which method trains; it decides what other keys there are"


class _Method(Section):
    chunks: int = Field(1, ge=1, description="gradient accumulation, exact (GradCache): encoder passes a step")


class _Contrastive(_Method):
    temperature: float = Field(0.1, gt=0, description="tau: similarities are divided by it")


class NTXentConfig(_Contrastive):
    """SimCLR (Chen et al. 2020)."""

    name: Literal["nt_xent"] = Field("nt_xent", description=NAME)


class DecoupledConfig(_Contrastive):
    """DCL (Yeh et al. 2021)."""

    name: Literal["decoupled"] = Field("decoupled", description=NAME)


class SupervisedConfig(_Contrastive):
    """SupCon (Khosla et al. 2020)."""

    name: Literal["supervised"] = Field("supervised", description=NAME)


class MoCoV3Config(_Method):
    """Chen et al. 2021, MoCo v3."""

    name: Literal["moco_v3"] = Field("moco_v3", description=NAME)
    temperature: float = Field(0.2, gt=0, description="tau: similarities are divided by it")
    teacher_decay: float = Field(
        0.99, ge=0, le=1, description="what the teacher keeps of itself in a step, at first; it rises to 1 by a cosine"
    )


class BYOLConfig(_Method):
    """Grill et al. 2020."""

    name: Literal["byol"] = Field("byol", description=NAME)
    teacher_decay: float = Field(
        0.996, ge=0, le=1, description="what the teacher keeps of itself in a step, at first; it rises to 1 by a cosine"
    )


class SimSiamConfig(_Method):
    """Chen and He 2021."""

    name: Literal["simsiam"] = Field("simsiam", description=NAME)


class VICRegConfig(_Method):
    """Bardes et al. 2022."""

    name: Literal["vicreg"] = Field("vicreg", description=NAME)
    invariance: float = Field(25.0, ge=0, description="weight of the squared distance of the two views")
    variance: float = Field(25.0, ge=0, description="weight of the hinge that holds each dimension's deviation at 1")
    covariance: float = Field(1.0, ge=0, description="weight of the squared covariances of different dimensions")


class BarlowTwinsConfig(_Method):
    """Zbontar et al. 2021."""

    name: Literal["barlow_twins"] = Field("barlow_twins", description=NAME)
    off_diagonal: float = Field(0.0051, ge=0, description="lambda: weight of the correlations of different dimensions")


class LeJEPAConfig(_Method):
    """Balestriero and LeCun 2025."""

    name: Literal["lejepa"] = Field("lejepa", description=NAME)
    weight: float = Field(0.05, ge=0, le=1, description="lambda: of SIGReg; 1 - lambda is the prediction's")
    num_slices: int = Field(256, ge=1, description="random directions a step that z is looked at along")
    num_points: int = Field(17, ge=3, description="of the characteristic function, odd")
    largest_t: float = Field(5.0, gt=0, description="the points lie between -largest_t and largest_t")

    @field_validator("num_points")
    @classmethod
    def with_zero(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("expected an odd number, so that t = 0 is among the points")
        return value


ObjectiveConfig = (
    NTXentConfig
    | DecoupledConfig
    | SupervisedConfig
    | MoCoV3Config
    | BYOLConfig
    | SimSiamConfig
    | VICRegConfig
    | BarlowTwinsConfig
    | LeJEPAConfig
)
METHODS: dict[str, type[Section]] = {
    method.model_fields["name"].default: method for method in get_args(ObjectiveConfig)
}
WITH_PREDICTOR = ("moco_v3", "byol", "simsiam")
WITH_TEACHER = ("moco_v3", "byol")
OF_TWO_VIEWS = (*WITH_PREDICTOR, "vicreg", "barlow_twins")
