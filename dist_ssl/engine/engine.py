"""The DeepSpeed engine: its configuration derived from ours, its start, and the skipping of a step.

Together with `partition.py` this is all that knows DeepSpeed.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns on every rank that it had to guess
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# DeepSpeed 0.19 still calls collectives by the names that torch 2.14 warns of.
warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)

# DeepSpeed's autotuner, which nothing here uses, imports MLflow wherever it is installed: 1.3 s of a core a rank.
_mlflow = sys.modules.get("mlflow")
sys.modules["mlflow"] = None  # type: ignore[assignment]
import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402

del sys.modules["mlflow"]
if _mlflow is not None:
    sys.modules["mlflow"] = _mlflow

# DeepSpeed asks whether the optimizer is Muon, and Muon's decorators would start torch's compiler: 2 s a rank.
_before = os.environ.get("TORCHDYNAMO_DISABLE")
os.environ["TORCHDYNAMO_DISABLE"] = "1"
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402

del os.environ["TORCHDYNAMO_DISABLE"]
if _before is not None:
    os.environ["TORCHDYNAMO_DISABLE"] = _before

from dist_ssl.config import Config, UserError  # noqa: E402
from dist_ssl.distributed import Verdict, World, on_gpu, world_size  # noqa: E402
from dist_ssl.engine import partition  # noqa: E402
from dist_ssl.engine.optimizers import LARS, build_optimizer  # noqa: E402
from dist_ssl.engine.threads import threads_of_this_rank  # noqa: E402
from dist_ssl.models import ContrastiveModel  # noqa: E402

BUCKET = 50_000_000  # elements that are reduced or gathered at once
OVERLAPPED_BUCKET = 6_553_600  # 25 MiB: the first is full, and on its way, while most of backward is still to come
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


class Engine:
    """A ContrastiveModel on DeepSpeed: forward, backward of this rank's loss, and the optimizer's step.

    `__call__`, `backward` and `step` are collective. Gradients are averaged over ranks in fp32.
    """

    def __init__(self, deepspeed_engine: Any):
        self._engine = deepspeed_engine
        self.optimizer: torch.optim.Optimizer = deepspeed_engine.basic_optimizer
        self.fragments = partition.read(deepspeed_engine)
        if getattr(deepspeed_engine.optimizer, "overlap_comm", False):
            _wait_on_the_device(deepspeed_engine.optimizer)
        self._apply = self.optimizer.step
        self._decide: Callable[[Tensor], Verdict] | None = None
        self._verdict: Verdict | None = None  # of the step that is under way
        # Deep inside its own step DeepSpeed calls this; everything around it (freeing gradients, gathering weights)
        # must happen for a skipped step too, so the skip is here and nowhere else.
        self.optimizer.step = self._guarded_step

    @property
    def model(self) -> ContrastiveModel:
        """The module itself. Under ZeRO 3 its parameters are empty between steps."""
        return self._engine.module

    def __call__(self, *views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._engine(*views)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self, learning_rate: float, decide: Callable[[Tensor], Verdict]) -> Verdict:
        """Apply the gradients of the `backward`s since the last step, or throw them away.

        `decide`, which may be collective, is called once on every rank with what the rank adds to the squared norm of
        the averaged gradient; where its verdict is not finite nothing is applied: on a GPU by a flag that the
        optimizer's kernels read, so that the host waits for nothing (under ZeRO 3 DeepSpeed waits, for its own norm).
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._decide, self._verdict = decide, None
        self._engine.step()
        if self._verdict is None:  # ZeRO 3 has thrown a gradient that is not finite away itself, on all ranks
            self._verdict = decide(torch.full((), torch.nan, device=self._engine.device))
        return self._verdict

    def _guarded_step(self, *arguments: Any, **keywords: Any) -> Any:
        if self._verdict is None:  # DeepSpeed calls this once a parameter group or sub-group
            assert self._decide is not None
            self._verdict = self._decide(self._squared_norm())
        if not on_gpu(self._verdict.finite):
            return self._apply(*arguments, **keywords) if self._verdict.finite else None
        # torch's fused kernels know this flag of its gradient scaler, and so does our LARS.
        self.optimizer.found_inf = (~self._verdict.finite).float()  # type: ignore[attr-defined]
        return self._apply(*arguments, **keywords)

    def _squared_norm(self) -> Tensor:
        """This rank's part of it, a scalar in fp64: the ranks' sum is the squared norm of the averaged gradient."""
        held = partition.gradients(self._engine, self.fragments)
        norms = torch.stack(torch._foreach_norm(held)) if held else torch.zeros(1, device=self._engine.device)
        replicated = bool(self.fragments) and self.fragments[0].replicated
        return norms.double().square().sum() / (world_size() if replicated else 1)

    def before_load(self) -> None:
        """Call before writing to `fragments`."""
        partition.before_load(self._engine)

    def after_load(self) -> None:
        """Call after writing to `fragments`: brings the weights that forward uses up to date. Collective."""
        partition.after_load(self._engine)


def deepspeed_config(
    config: Config, num_parameters: int, largest_parameter: int = 0, overlapped: bool = False
) -> dict[str, Any]:
    """The DeepSpeed configuration that follows from ours, with the raw keys of `engine.deepspeed` merged in.

    Sizes are in elements; `overlapped`: there are other ranks, and streams on which they are talked to meanwhile.
    Raises UserError for a raw key that is derived here or that would break a contract.
    """
    bucket = min(num_parameters + num_parameters % 2, BUCKET)  # DeepSpeed wants it even
    # Of a parameter that is larger than its bucket ZeRO 2 frees the gradient while the reduction still reads it.
    overlapped_bucket = min(num_parameters, max(OVERLAPPED_BUCKET, largest_parameter))
    zero: dict[str, Any] = {
        "stage": config.engine.zero_stage,
        "reduce_bucket_size": overlapped_bucket if overlapped else bucket,
        "allgather_bucket_size": bucket,
        "round_robin_gradients": False,  # it breaks the mapping of fragments
    }
    if config.engine.zero_stage in (1, 2):
        zero["compute_grad_norm"] = False  # an all-reduce and a host synchronisation a step that nothing here needs
    chunks, raw = config.objective.chunks, config.engine.deepspeed.get("zero_optimization")
    if chunks > 1 or not isinstance(raw, dict) or "overlap_comm" not in raw:
        zero["overlap_comm"] = _overlaps(config.engine.zero_stage, chunks, overlapped)
    derived: dict[str, Any] = {
        # Rows differ between ranks and DeepSpeed never sees them: it only checks that these three multiply.
        "train_batch_size": world_size(),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # GradCache calls backward once a chunk and steps once.
        "managed_gradient_accumulation": config.objective.chunks == 1,
        "steps_per_print": 2**31,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # LARS is tested here, under every stage
        "torch_autocast": {
            "enabled": config.engine.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # gradients are reduced in fp32
        },
        "communication_data_type": "fp32",
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},  # would cast the whole model, batch norm included
    }
    return _merge(derived, config.engine.deepspeed, "engine.deepspeed")


def _overlaps(zero_stage: int, chunks: int, overlapped: bool) -> bool:
    """Whether gradients are reduced while backward still runs.

    DeepSpeed has no such way under ZeRO 0, and for GradCache's many backwards only under ZeRO 2.
    """
    match zero_stage:
        case 1:
            return overlapped and chunks == 1
        case 2:
            return overlapped or chunks > 1
        case 3:
            return chunks == 1
    return False


def _wait_on_the_device(optimizer: Any) -> None:
    """At the end of an overlapped backward under ZeRO 1 and 2 DeepSpeed lets the host wait for the whole device.

    What that guards is memory which the reductions' stream still uses, and which is freed to the stream that calls:
    it is enough that this stream waits for that one.
    """
    finish, accelerator = optimizer.independent_gradient_partition_epilogue, deepspeed.accelerator.get_accelerator()

    def finish_without_the_host() -> None:
        accelerator.synchronize = lambda: accelerator.current_stream().wait_stream(optimizer.reduction_stream)
        try:
            finish()
        finally:
            del accelerator.synchronize  # the class's own is found again

    optimizer.independent_gradient_partition_epilogue = finish_without_the_host


def _merge(derived: dict[str, Any], raw: dict[str, Any], path: str) -> dict[str, Any]:
    merged = dict(derived)
    for key, value in raw.items():
        if key not in derived:
            merged[key] = value
        elif isinstance(derived[key], dict) and isinstance(value, dict) and key == "zero_optimization":
            merged[key] = _merge(derived[key], value, f"{path}.{key}")
        else:
            raise UserError(f"{path}.{key}: derived from the rest of the config, can't be set; remove it")
    for key in ("offload_optimizer", "offload_param"):
        if key in raw:
            raise UserError(f"{path}.{key}: offload is not supported: the fragment checkpoint can't read it; remove it")
    return merged


def initialize(model: nn.Module, config: Config, world: World) -> Engine:
    """A DeepSpeed engine around the model on this rank's device. Collective; the process group must exist.

    Raises UserError for a model that DeepSpeed can't split under ZeRO 3.
    """
    model = model.to(world.device)
    if config.engine.compile:
        model.compile()
    if world.device.type == "cpu":
        # DeepSpeed would compile a shared-memory operator for a minute, and need a compiler; gloo does without.
        deepspeed.ops.__compatible_ops__ = {}
    parameters = [p for p in model.parameters() if p.requires_grad]
    sizes = [p.numel() for p in parameters]
    overlapped = world.size > 1 and on_gpu(parameters[0])
    lone = [p for p in parameters if p.dim() == 0]
    if lone and config.engine.zero_stage == 3:
        raise UserError(
            "engine.zero_stage = 3: DeepSpeed can't split a parameter without dimensions, as "
            f"{config.model.encoder} has; take 0, 1 or 2"
        )
    for p in lone:  # DeepSpeed would send its bytes, which torch has no view of; not where it finds this attribute
        dist.broadcast(p.data, 0)
        p.ds_optim_param = True  # type: ignore[attr-defined]
    deepspeed_engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config.optimizer),
        config=deepspeed_config(config, sum(sizes), max(sizes), overlapped),
        dist_init_required=False,
    )
    for p in lone:
        del p.ds_optim_param  # type: ignore[attr-defined]
    engine = Engine(deepspeed_engine)
    if isinstance(engine.optimizer, LARS):
        layers = {name: number for number, (name, _) in enumerate(model.named_parameters())}
        partitioned = config.engine.zero_stage > 0 and world_size() > 1
        engine.optimizer.attach(partition.segments(engine.fragments, layers), len(layers), partitioned)
    return engine


def prepare(config: Config, world: World) -> None:
    """Threads, precision and determinism of this process, by the config. Collective on a CPU."""
    if world.device.type == "cpu":
        torch.set_num_threads(config.engine.threads_per_rank or threads_of_this_rank(world.local_size))
        _keep_freed_memory()
    # TF32 rounds fp32 to ten bits: never where the config says fp32, neither in products nor in convolutions.
    tf32 = config.engine.precision == "bf16"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not config.engine.deterministic
    if config.engine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _keep_freed_memory() -> None:
    """Have glibc keep large blocks that torch frees, for the next step's activations.

    By default it maps each anew and gives it back, and the kernel clears every page again: 30 to 50 ms of 400 in a step
    of a small ResNet. What a process holds stays what its largest step took.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's only
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
