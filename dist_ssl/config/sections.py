"""The sections of a config: frozen, strict pydantic models, each key with its default, and what a resume may change."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

Triple = Annotated[tuple[float, float, float], Strict(False)]


class UserError(ValueError):
    """A mistake that the user can mend: the CLI prints it as one line and exits with code 2."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())


class RunConfig(Section):
    dir: str = "runs/default"
    seed: int = Field(0, ge=0, lt=2**63)


class StorageConfig(Section):
    """How object stores are reached. Credentials come from the environment, files or roles only, never from here."""

    endpoint_url: str | None = None
    anonymous: bool = False
    profile: str | None = None
    retry_seconds: float = Field(120.0, ge=0)  # total budget of one read's or write's retries
    timeout_seconds: float = Field(30.0, gt=0)  # one request


class DataConfig(Section):
    shards: str = ""  # a directory that `shards write` filled, a brace pattern, or a manifest
    num_workers: int = Field(2, ge=0)  # per rank
    prefetch_batches: int = Field(2, ge=1)  # per worker
    streams: int = Field(16, ge=1)  # K of the plan
    block_shards: int = Field(4, ge=1)  # G of the plan
    ledger: bool = False
    cache_dir: str | None = None  # None: a folder of this user under the system's temporary directory
    cache_gb: float = Field(20.0, gt=0)  # per node, only for remote shards
    max_pixels: int = Field(50_000_000, ge=1)  # an image of more counts as bad
    # Of what a rank took since it started, or of the files of `shards write`, or of 1000 if that is more.
    max_bad_fraction: float = Field(0.01, ge=0, le=1)


class AugmentConfig(Section):
    """SimCLR's augmentation (Chen et al. 2020, appendix A)."""

    crop_size: int = Field(224, ge=8, le=4096)
    min_scale: float = Field(0.08, gt=0, le=1)
    flip_probability: float = Field(0.5, ge=0, le=1)
    jitter_probability: float = Field(0.8, ge=0, le=1)
    jitter_strength: float = Field(1.0, ge=0, le=1.25)
    grey_probability: float = Field(0.2, ge=0, le=1)
    blur_probability: float = Field(0.5, ge=0, le=1)
    mean: Triple = (0.485, 0.456, 0.406)
    std: Triple = (0.229, 0.224, 0.225)


class HeadConfig(Section):
    kind: Literal["none", "linear", "mlp"] = "mlp"
    num_layers: int = Field(2, ge=2)  # linear layers; only of kind "mlp"
    hidden_dim: int = Field(2048, ge=1)
    output_dim: int = Field(128, ge=1)
    batch_norm: bool = True


class ModelConfig(Section):
    encoder: str = "resnet50"
    activation_checkpointing: bool = False
    head: HeadConfig = HeadConfig()


class ObjectiveConfig(Section):
    name: Literal["nt_xent", "decoupled", "supervised"] = "nt_xent"
    temperature: float = Field(0.1, gt=0)
    chunks: int = Field(1, ge=1)  # GradCache: encoder passes a step, for large batches on few ranks


class OptimizerConfig(Section):
    name: Literal["lars", "adamw"] = "lars"
    base_learning_rate: float = Field(0.3, gt=0)
    scaling: Literal["linear", "sqrt", "none"] = "linear"
    weight_decay: float = Field(1e-6, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)  # LARS
    trust_coefficient: float = Field(0.001, gt=0)  # LARS
    beta1: float = Field(0.9, ge=0, lt=1)  # AdamW
    beta2: float = Field(0.95, ge=0, lt=1)  # AdamW
    warmup_epochs: float = Field(10.0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"


class TrainConfig(Section):
    global_batch_size: int = Field(4096, ge=2)
    steps: int | None = Field(None, ge=1)
    epochs: int | None = Field(None, ge=1)
    max_skipped_steps: int = Field(10, ge=0)  # steps in a row with a loss that is not finite

    @model_validator(mode="after")
    def one_length(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("expected exactly one of train.steps and train.epochs")
        return self


class EngineConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "bf16"
    deterministic: bool = False
    compile: bool = False
    hang_minutes: float = Field(30.0, gt=0)
    grace_seconds: float = Field(25.0, gt=0)  # what a launcher leaves between SIGTERM and SIGKILL
    threads_per_rank: int | None = Field(None, ge=1)  # CPU only; None: cores / ranks on the node
    deepspeed: dict[str, Any] = {}  # raw DeepSpeed keys; those that we derive are refused


class CheckpointConfig(Section):
    url: str | None = None  # None: RUN_DIR/checkpoints
    every_steps: int = Field(1000, ge=1)
    every_minutes: float | None = Field(None, gt=0)
    keep_last: int = Field(3, ge=1)
    keep_every_steps: int | None = Field(None, ge=1)
    export_every_commits: int | None = Field(None, ge=1)  # also write export/step-<n>.safetensors
    asynchronous: bool = True
    wall_time_minutes: float | None = Field(None, gt=0)  # commit and exit 75 before this much time has passed


class LogConfig(Section):
    every_steps: int = Field(10, ge=1)
    tensorboard: bool = True
    wandb_project: str | None = None


class DiagnosticsConfig(Section):
    every_steps: int = Field(50, ge=1)
    sample: int = Field(512, ge=16)  # views of this rank that the spectra are computed on
    online_probe: bool = True  # where the shards carry labels


class EvaluationConfig(Section):
    train_shards: str | None = None
    test_shards: str | None = None
    image_size: int | None = Field(None, ge=8)  # None: augment.crop_size
    resize_ratio: float = Field(1.0, ge=1)  # resize to image_size * ratio, then a centre crop
    batch_size_per_rank: int = Field(256, ge=1)
    num_workers: int = Field(2, ge=0)
    num_seeds: int = Field(3, ge=1)
    knn_k: int = Field(20, ge=1)
    knn_temperature: float = Field(0.07, gt=0)
    probes: list[
        Literal[
            "linear", "knn", "head_information", "few_labels", "linear_augmented", "fine_tuned", "few_labels_fine_tuned"
        ]
    ] = ["linear", "knn", "head_information"]
    few_label_fractions: list[float] = [0.01, 0.1]  # of the training images, the same number for each class
    sgd_epochs: int = Field(90, ge=1)  # of linear_augmented (SimCLR, appendix B.5)
    fine_tune_epochs: int = Field(60, ge=1)
    fine_tune_from: str = "h"  # h, or a layer of the head such as "g1", as SimCLRv2 does
    head_information_images: int = Field(6000, ge=64)  # two thirds train its probes, one third scores them
    keep_features: bool = True  # False: cached features are removed once results are written


class LabConfig(Section):
    """A matched grid of heads on one set of data; `run.dir` is its folder, the other sections are every cell's."""

    source: str | None = None  # what to write shards of where data.shards is empty: shapes:COUNT, folder:DIR, ...
    source_image_size: int = Field(64, ge=8)
    test_fraction: float = Field(0.25, gt=0, lt=1)
    heads: list[str] = ["none", "linear", "mlp2", "mlp3"]  # mlpN has N linear layers
    batch_norm: list[bool] = [True]
    output_dims: list[int] = [128]
    num_seeds: int = Field(3, ge=1)
    ranks: int = Field(1, ge=1)  # of each pretraining, started by launch.local when more than one


class Config(Section):
    run: RunConfig = RunConfig()
    storage: StorageConfig = StorageConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig(epochs=100)
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    lab: LabConfig | None = None  # only in files for `dist-ssl lab`


# What a resumed run may change: everything about where and how it computes, nothing about what it computes.
MAY_DIFFER_ON_RESUME = (
    "run.dir",
    "storage",
    "data.shards",  # the manifest's hash, not the URL, says which data it is
    "data.num_workers",
    "data.prefetch_batches",
    "data.ledger",
    "data.cache_dir",
    "data.cache_gb",
    "data.max_bad_fraction",
    "model.activation_checkpointing",
    "train.max_skipped_steps",
    "engine",
    "checkpoint",
    "log",
    "diagnostics",
    "evaluation",
    "lab",
)
