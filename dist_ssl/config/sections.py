"""The sections of a config: frozen, strict pydantic models, each key with its default, and what a resume may change."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, Strict, model_validator

from dist_ssl.config.encoders import TIMM
from dist_ssl.config.heads import HeadConfig, PredictorConfig
from dist_ssl.config.methods import OF_TWO_VIEWS, WITH_PREDICTOR, WITH_TEACHER, NTXentConfig, ObjectiveConfig
from dist_ssl.config.section import Section

Probe = Literal[
    "linear",
    "knn",
    "head_information",
    "geometry",
    "few_labels",
    "linear_augmented",
    "fine_tuned",
    "few_labels_fine_tuned",
]
Triple = Annotated[tuple[float, float, float], Strict(False)]


class RunConfig(Section):
    dir: str = Field(
        "runs/default", min_length=1, description="the run's directory: config, metrics, checkpoints, evaluations"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the weights, the order of samples and every augmentation")


class StorageConfig(Section):
    """How object stores are reached. Credentials come from the environment, files or roles only, never from here."""

    endpoint_url: str | None = Field(None, description="of an S3 store that is not Amazon's")
    anonymous: bool = Field(False, description="read public buckets without credentials")
    profile: str | None = Field(None, description="whose credentials of ~/.aws/credentials are taken")
    retry_seconds: float = Field(120.0, ge=0, description="total budget of one read's or write's retries")
    timeout_seconds: float = Field(30.0, gt=0, description="of one request")
    requests_per_second: float = Field(
        5500.0, gt=0, description="that the store takes before it refuses some: a start spreads its reads by it"
    )


class DataConfig(Section):
    shards: str = Field(
        "", description="a directory that `shards write` filled, a brace pattern, a manifest, or folder:DIR"
    )
    num_workers: int = Field(2, ge=0, description="processes that read and decode, per rank")
    prefetch_batches: int = Field(2, ge=1, description="per worker, ready in shared memory")
    streams: int = Field(16, ge=1, description="K of the plan: samples of so many shards stand side by side")
    block_shards: int = Field(4, ge=1, description="G of the plan: a stream permutes its samples within so many shards")
    ledger: bool = Field(False, description="write which samples each step consumed, a file a rank")
    cache_dir: str | None = Field(
        None, description="of remote shards; unset: a folder of this user under the system's temporary directory"
    )
    cache_gb: float = Field(20.0, gt=0, description="per node, only for remote shards")
    max_pixels: int = Field(50_000_000, ge=1, description="an image of more counts as bad")
    max_bad_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="of what a rank took since its start, or of the files of `shards write`; of 1000 at least",
    )


Side = Annotated[int, Field(ge=8, le=4096)]
Scale = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=1.25)]


class ViewPolicy(Section):
    """How a view is made: SimCLR's augmentation (Chen et al. 2020, appendix A), and BYOL's solarisation."""

    crop_size: Side = Field(224, description="side of a view, in pixels")
    min_scale: Scale = Field(0.08, description="a crop's smallest share of the image's area")
    max_scale: Scale = Field(1.0, description="a crop's largest share of the image's area")
    flip_probability: Probability = Field(0.5, description="of a horizontal flip")
    jitter_probability: Probability = Field(0.8, description="of brightness, contrast, saturation and hue together")
    jitter_strength: Strength = Field(1.0, description="1 is the paper's: 0.8, 0.8, 0.8 and 0.2")
    grey_probability: Probability = Field(0.2, description="of a view without colour")
    blur_probability: Probability = Field(0.5, description="of a Gaussian blur, sigma 0.1 to 2")
    solarise_probability: Probability = Field(0.0, description="of values from 0.5 on turned over (BYOL, appendix B)")


class ViewsConfig(Section):
    """A set of views that are made alike; what it leaves unset is as [augment] says."""

    count: int = Field(1, ge=1, le=64, description="views of the set")
    crop_size: Side | None = Field(None, description="unset: augment.crop_size")
    min_scale: Scale | None = Field(None, description="unset: augment.min_scale")
    max_scale: Scale | None = Field(None, description="unset: augment.max_scale")
    flip_probability: Probability | None = Field(None, description="unset: augment.flip_probability")
    jitter_probability: Probability | None = Field(None, description="unset: augment.jitter_probability")
    jitter_strength: Strength | None = Field(None, description="unset: augment.jitter_strength")
    grey_probability: Probability | None = Field(None, description="unset: augment.grey_probability")
    blur_probability: Probability | None = Field(None, description="unset: augment.blur_probability")
    solarise_probability: Probability | None = Field(None, description="unset: augment.solarise_probability")


class AugmentConfig(ViewPolicy):
    """The views of an image: how they are made unless their set says otherwise, and the sets."""

    mean: Triple = Field((0.485, 0.456, 0.406), description="subtracted from each channel, of values in [0, 1]")
    std: Triple = Field((0.229, 0.224, 0.225), description="that each channel is divided by")
    views: list[ViewsConfig] = Field([], description="sets of views, those of one size side by side; none: two views")

    def policies(self) -> tuple[ViewPolicy, ...]:
        """Of each view of an image, V in all."""
        own = self.model_dump(include=set(ViewPolicy.model_fields))
        return tuple(
            ViewPolicy(**own | views.model_dump(exclude={"count"}, exclude_none=True))
            for views in self.views or [ViewsConfig(count=2)]
            for _ in range(views.count)
        )

    def sizes(self) -> list[tuple[int, int]]:
        """(S, V_s) of each size: its side and how many views have it, in the order of the views."""
        sides = [policy.crop_size for policy in self.policies()]
        return [(side, len(list(alike))) for side, alike in groupby(sides)]

    @property
    def num_views(self) -> int:
        """V, of an image."""
        return len(self.policies())

    @property
    def image_size(self) -> int:
        """Side of the largest view, which is what an evaluation reads and a ViT has position embeddings for."""
        return max(side for side, _ in self.sizes())

    @model_validator(mode="after")
    def views_can_be_made(self) -> Self:
        sides = [side for side, _ in self.sizes()]
        for least, most in ((policy.min_scale, policy.max_scale) for policy in self.policies()):
            if least > most:
                raise ValueError(f"views: expected min_scale <= max_scale, got {least:g} and {most:g}")
        if self.num_views < 2:
            raise ValueError(f"views: expected at least 2 views of an image, got {self.num_views}; raise a count")
        if len(set(sides)) < len(sides):
            said = ", ".join(f"{count} of {side}" for side, count in self.sizes())
            raise ValueError(f"views: expected views of one size side by side, got {said} pixels; reorder the sets")
        return self


class ModelConfig(Section):
    encoder: str = Field("resnet50", description="its name; a wrong one lists what there is; timm/NAME: one of timm's")
    drop_path_rate: float = Field(0.0, ge=0, lt=1, description="stochastic depth, of timm's encoders only")
    init: str | None = Field(
        None, description="path or URL of the encoder's starting weights: safetensors, or a torch file of tensors only"
    )
    activation_checkpointing: bool = Field(
        False, description="compute activations again in backward instead of keeping them"
    )
    batch_norm_images: int | None = Field(
        None, ge=2, description="of the global batch, side by side, share batch norm's statistics; unset: all of it"
    )
    head: HeadConfig = HeadConfig()
    predictor: PredictorConfig | None = Field(None, description="unset: the method's own")

    @model_validator(mode="after")
    def drop_path_is_timms(self) -> Self:
        if self.drop_path_rate and not self.encoder.startswith(TIMM):
            raise ValueError(
                f"drop_path_rate: expected 0, since only {TIMM} encoders have it, got {self.drop_path_rate}"
            )
        return self


class OptimizerConfig(Section):
    name: Literal["lars", "adamw"] = Field("lars", description="LARS for large batches, AdamW otherwise")
    base_learning_rate: float = Field(0.3, gt=0, description="of a batch of 256, before `scaling`")
    scaling: Literal["linear", "sqrt", "none"] = Field(
        "linear", description="how the rate grows with global_batch_size / 256"
    )
    weight_decay: float = Field(1e-6, ge=0, description="not of biases and norms")
    momentum: float = Field(0.9, ge=0, lt=1, description="of LARS")
    trust_coefficient: float = Field(0.001, gt=0, description="of LARS")
    beta1: float = Field(0.9, ge=0, lt=1, description="of AdamW")
    beta2: float = Field(0.95, ge=0, lt=1, description="of AdamW")
    warmup_epochs: float = Field(10.0, ge=0, description="in which the rate rises from 0")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up")


class TrainConfig(Section):
    global_batch_size: int = Field(4096, ge=2, description="images a step, of all ranks together")
    steps: int | None = Field(None, ge=1, description="the run's length in optimizer steps; or give epochs")
    epochs: int | None = Field(None, ge=1, description="the run's length in passes over the data; or give steps")
    max_skipped_steps: int = Field(10, ge=0, description="steps in a row whose loss or gradient is not finite")

    @model_validator(mode="after")
    def one_length(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("expected exactly one of train.steps and train.epochs")
        return self


class EngineConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="partitioned over ranks: 1 optimizer state, 2 gradients too, 3 weights too"
    )
    precision: Literal["fp32", "bf16"] = Field("bf16", description="of autocast; weights and reductions are fp32")
    deterministic: bool = Field(False, description="bit-identical on CUDA too, slower")
    compile: bool = Field(False, description="run the model through torch.compile")
    hang_minutes: float = Field(
        30.0, gt=0, description="without a step or a save; the process then shows its stacks and ends"
    )
    grace_seconds: float = Field(
        25.0, gt=0, description="after a signal, until all agree on a last step; holds two steps"
    )
    threads_per_rank: int | None = Field(
        None,
        ge=1,
        description="CPU only; unset: CPUs that it may use / ranks that share them; 1 where other programs use them, "
        "since in bf16 threads wait for each other by spinning",
    )
    deepspeed: dict[str, Any] = Field({}, description="raw DeepSpeed keys; those that we derive are refused")


class CheckpointConfig(Section):
    url: str | None = Field(None, description="where to; unset: RUN_DIR/checkpoints")
    every_steps: int = Field(1000, ge=1, description="between two commits")
    every_minutes: float | None = Field(None, gt=0, description="also after so much time")
    keep_last: int = Field(3, ge=1, description="newest ones that are kept")
    keep_every_steps: int | None = Field(None, ge=1, description="multiples of it are kept for good")
    export_every_commits: int | None = Field(None, ge=1, description="also write export/step-<n>.safetensors")
    asynchronous: bool = Field(True, description="write while training goes on")
    wall_time_minutes: float | None = Field(
        None, gt=0, description="commit and exit 75 before so much time since the start has passed"
    )


class LogConfig(Section):
    every_steps: int = Field(10, ge=1, description="between two lines of metrics.jsonl")
    tensorboard: bool = Field(True, description="write curves for TensorBoard too")
    wandb_project: str | None = Field(
        None, description="also log to this project of Weights & Biases, by the extra wandb"
    )
    mlflow_experiment: str | None = Field(
        None,
        description="also log to this experiment of the MLflow that MLFLOW_TRACKING_URI names, by the extra mlflow",
    )


class DiagnosticsConfig(Section):
    every_steps: int = Field(50, ge=1, description="between two measurements of h's and z's geometry")
    sample: int = Field(512, ge=16, description="views of this rank that the spectra are computed on")
    online_probe: bool = Field(True, description="train linear probes beside the run, where the shards carry labels")


class EvaluationConfig(Section):
    train_shards: str | None = Field(None, description="labelled, what probes are fitted on")
    test_shards: str | None = Field(None, description="labelled, what they are scored on")
    teacher: bool = Field(False, description="probe the run's teacher (moco_v3, byol) instead of its student")
    image_size: int | None = Field(None, ge=8, description="unset: that of the largest view")
    resize_ratio: float = Field(1.0, ge=1, description="resize to image_size * ratio, then a centre crop")
    batch_size_per_rank: int = Field(256, ge=1, description="images of one forward")
    num_workers: int = Field(2, ge=0, description="processes that read and decode, per rank")
    num_seeds: int = Field(3, ge=1, description="of each probe; results are their mean and spread")
    knn_k: int = Field(20, ge=1, description="neighbours that vote")
    knn_temperature: float = Field(0.07, gt=0, description="of their votes' weights")
    probes: list[Probe] = Field(["linear", "knn", "head_information"], description="what is measured")
    raw_pixels_up_to: int = Field(
        12288, ge=0, description="numbers an image (3 x side x side) up to which pixels are probed beside h; 0: never"
    )
    few_label_fractions: list[float] = Field(
        [0.01, 0.1], description="of the training images, the same number for each class"
    )
    sgd_epochs: int = Field(90, ge=1, description="of linear_augmented (SimCLR, appendix B.5)")
    fine_tune_epochs: int = Field(60, ge=1, description="of fine_tuned")
    fine_tune_from: str = Field("h", description="h, or a layer of the head such as g1, as SimCLRv2 does")
    head_information_images: int = Field(6000, ge=64, description="two thirds train its probes, one third scores them")
    geometry_images: int = Field(512, ge=16, description="test images whose views the geometry is measured on")
    keep_features: bool = Field(True, description="false: cached features are removed once results are written")


Method = Annotated[
    ObjectiveConfig,
    Field(discriminator="name"),
    BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value),
]


class LabConfig(Section):
    """A matched grid of objectives and heads on one set of data.

    `run.dir` is its folder, the other sections are every cell's.
    """

    source: str | None = Field(
        None, description="what to write shards of where data.shards is empty: shapes:COUNT, folder:DIR, ..."
    )
    source_image_size: int = Field(64, ge=8, description="of shapes:COUNT, in pixels")
    test_fraction: float = Field(0.25, gt=0, lt=1, description="of the source that is held out")
    heads: list[str] = Field(
        ["none", "linear", "mlp2", "mlp3"],
        min_length=1,
        description='kinds, mlpN for N linear layers; other keys of the head after it: "mlp2 activation=silu"',
    )
    controls: list[str] = Field(
        [], description="what else each head is trained with: same_class, without_jitter, always_grey, ..."
    )
    objectives: list[Method] = Field(
        [], description='methods compared: "byol", or { name = "byol", teacher_decay = 0.99 }; none: [objective] alone'
    )
    batch_norm: list[bool] = Field([True], min_length=1, description="each value is tried")
    output_dims: list[int] = Field([128], min_length=1, description="widths of z; each is tried")
    num_seeds: int = Field(3, ge=1, description="runs of each head")
    ranks: int = Field(1, ge=1, description="of each pretraining, started by launch.local when more than one")


class Config(Section):
    run: RunConfig = RunConfig()
    storage: StorageConfig = StorageConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = Field(NTXentConfig(), discriminator="name")
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig(epochs=100)
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    lab: LabConfig | None = Field(None, description="only in files for `dist-ssl lab`")

    @property
    def evaluated_size(self) -> int:
        """Side of the images that an evaluation reads, in pixels."""
        return self.evaluation.image_size or self.augment.image_size

    @property
    def batch_norm_slices(self) -> int:
        """Into how many the global batch, or each chunk of it, is cut for batch norm's statistics."""
        images = self.train.global_batch_size // self.objective.chunks
        return images // self.model.batch_norm_images if self.model.batch_norm_images else 1

    @model_validator(mode="before")
    @classmethod
    def nt_xent_where_no_method_is_named(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(objective := values.get("objective"), dict):
            return values | {"objective": {"name": "nt_xent"} | objective}
        return values

    @model_validator(mode="after")
    def method_has_what_it_needs(self) -> Config:
        name = self.objective.name
        if name in OF_TWO_VIEWS and self.augment.num_views != 2:
            raise ValueError(
                f"augment.views: {name} is of exactly two views of an image, got {self.augment.num_views}; nt_xent, "
                "decoupled, supervised and lejepa take more"
            )
        if name in WITH_TEACHER and self.engine.zero_stage == 3:
            raise ValueError(
                f"engine.zero_stage: {name} needs 0, 1 or 2, got 3: the teacher follows whole weights, of which a rank "
                "holds only its part under stage 3"
            )
        if self.evaluation.teacher and name not in WITH_TEACHER:
            raise ValueError(f"evaluation.teacher: {name} has none, only {', '.join(WITH_TEACHER)} do; leave it out")
        images, chunks = self.train.global_batch_size, self.objective.chunks
        if self.model.batch_norm_images and images % (self.model.batch_norm_images * chunks):
            of = (
                f"train.global_batch_size / objective.chunks = {images} / {chunks}"
                if chunks > 1
                else (f"train.global_batch_size = {images}")
            )
            raise ValueError(f"model.batch_norm_images: expected a divisor of {of}, got {self.model.batch_norm_images}")
        if self.model.predictor is not None and name not in WITH_PREDICTOR:
            raise ValueError(
                f"model.predictor: {name} has none, only {', '.join(WITH_PREDICTOR)} do; leave the section out"
            )
        return self


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
