"""Counts what a GPU would do, without one: code runs on fake tensors, which have shapes and no data, and every operator
that reaches them is counted as the kernels it starts.

A fake tensor stands for one on the GPU, a real one for one on the host. Fake tensors of device "cuda" do not get
through autograd without a driver, so they say that they are on the CPU, and `distributed.as_on_gpu` sends our code the
GPU's way. What differs from CUDA: autocast is the CPU's, which lets layer_norm, softmax and sums stay in bf16 where
CUDA's takes fp32 (ViTs: batch norm is on neither list); attention is one flash kernel on both; cuDNN's own copies of
weights to channels-last, and its batch norm where torch chooses that, are not seen; neither are the memsets of torch's
batch norm kernels, which are those of the bare network too.

A copy from the host is seen where a real tensor is sent `.to` a named device, or made there, or meets a fake one in an
operator; without `non_blocking` it waits for the device. `.item()` and its like answer 1 and are counted, a boolean
index takes all; another operator whose shape follows from values raises torch's error.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dist_ssl.distributed import HAS_TRITON, as_on_gpu

aten: Any = torch.ops.aten
# Allocations and what only looks at memory that is there: no launch, no bytes.
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "_unsafe_view", "resize_"}
FREE |= {
    "lift_fresh",
    "set_",
    "record_stream",
    "alias",
    "_reshape_alias",
    "expand",
    "is_same_size",
    "empty_permuted",
    "as_strided_",
}
WRITES_ONLY = {"copy_", "zero_", "fill_", "normal_", "uniform_", "_foreach_zero_", "_foreach_copy_"}
# Kernels of an operator and how often each of its large inputs is read, where that is not once: batch norm in training
# as torch's own kernels do it, which on several ranks are operators of their own (statistics, running statistics,
# normalise; sums, gradient). The last number is the place of the argument that says whether it is training.
KERNELS = {"native_batch_norm": (3, 2, 5), "native_batch_norm_backward": (2, 2, 7)}
CHUNK, CHUNKS = 65_536, 320  # of the _foreach and fused optimizer kernels: elements a block, blocks a launch
PEAK_FLOPS = 800e12
LAUNCH_SECONDS = 5e-6
GPUS = {"H100": 3.35e12, "H200": 4.8e12}  # bytes a second


@dataclass
class Counts:
    """Of one part of a step."""

    bytes: int = 0
    flops: int = 0
    launches: int = 0
    collectives: int = 0
    wire_bytes: int = 0
    host_syncs: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(GPUS, 0.0))

    def add(self, num_bytes: int, flops: int, launches: int) -> None:
        self.bytes, self.flops, self.launches = self.bytes + num_bytes, self.flops + flops, self.launches + launches
        for gpu, bandwidth in GPUS.items():
            self.seconds[gpu] += max(num_bytes / bandwidth, flops / PEAK_FLOPS, launches * LAUNCH_SECONDS)


FAKE_MODE = FakeTensorMode(allow_non_fake_inputs=True)  # one, since what one trace caches the next may use


class Tracer:
    """`with tracer.tracing(): ...` counts into `parts[part]`; `to_device` makes of a host tensor one on the GPU."""

    def __init__(self) -> None:
        self.fake_mode = FAKE_MODE
        self.part = "other"
        self.parts: dict[str, Counts] = defaultdict(Counts)
        self.operators: Counter[str] = Counter()  # launches
        self.operator_bytes: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.kept_bytes = 0
        self._kept: set[int] = set()

    @property
    def total(self) -> Counts:
        total = Counts()
        for counts in self.parts.values():
            for name in ("bytes", "flops", "launches", "collectives", "wire_bytes", "host_syncs"):
                setattr(total, name, getattr(total, name) + getattr(counts, name))
            for gpu in GPUS:
                total.seconds[gpu] += counts.seconds[gpu]
        return total

    def to_device(self, tensor: Tensor) -> Tensor:
        return self.fake_mode.from_tensor(tensor)

    def launched(self, name: str, num_bytes: int, flops: int, launches: int = 1) -> None:
        self.parts[self.part].add(num_bytes, flops, launches)
        self.operators[name] += launches
        self.operator_bytes[name] += num_bytes

    def sync(self, why: str) -> None:
        self.parts[self.part].host_syncs += 1
        self.syncs[f"{self.part}: {why}"] += 1

    @contextlib.contextmanager
    def keeping(self, parameters: list[Tensor]) -> Iterator[None]:
        """Counts what autograd keeps for backward, each storage once, without parameters and their copies in bf16."""
        shapes = {shape for p in parameters for shape in (p.shape, p.shape[::-1])}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if is_fake(tensor) and tensor.shape not in shapes and storage._cdata not in self._kept:
                self._kept.add(storage._cdata)
                self.kept_bytes += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if HAS_TRITON:
                from triton.runtime.jit import JITFunction

                stack.enter_context(mock.patch.object(JITFunction, "run", _triton_launch(self)))
            # Autograd's engine calls Python functions without the mode.
            apply = torch.autograd.function.BackwardCFunction.apply

            def backward(node: Any, *gradients: Any) -> Any:
                with _Copies(self):
                    return apply(node, *gradients)

            stack.enter_context(mock.patch.object(torch.autograd.function.BackwardCFunction, "apply", backward))
            stack.enter_context(as_on_gpu())
            stack.enter_context(_Operators(self))
            stack.enter_context(_Copies(self))
            yield


def is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)


def size_of(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor: an expanded dimension has none of its own."""
    numel = math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or n == 0)
    return numel * tensor.element_size()


def distinct(tensors: Any) -> list[Tensor]:
    return list({id(t): t for t in tree_leaves(tensors) if is_fake(t)}.values())


class _Operators(TorchDispatchMode):
    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # what C++ asks of a tensor
            return func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        name = func._schema.name.split("::")[1]
        if name == "_local_scalar_dense" and is_fake(args[0]):
            self.tracer.sync("a number is read")
            return torch.ones((), dtype=args[0].dtype).item()
        if name == "index" and any(is_fake(i) and i.dtype == torch.bool for i in args[1]):
            self.tracer.sync("a boolean index counts its rows")
            func, name, args = aten.clone.default, "clone", args[:1]  # as if all were taken
        if any(map(is_fake, tensors)):
            for tensor in tensors:
                if not is_fake(tensor) and tensor.dim() and name not in FREE:
                    self.tracer.sync(f"{name} takes a tensor of the host")
        out = func(*args, **kwargs)
        if any(map(is_fake, tree_leaves((args, kwargs, out)))):
            self._count(func, name, args, kwargs, out)
        return out

    def _collective(self, func: Any, args: Any, kwargs: Any) -> Any:
        size, counts = dist.get_world_size(), self.tracer.parts[self.tracer.part]
        name = func._schema.name.split("::")[1]
        # What every rank has in the end, or of a reduce-scatter all ranks together.
        num_bytes = sum(size_of(t) for t in distinct(args[1 if "reduce_scatter" in name else 0]))
        counts.collectives += 1
        counts.wire_bytes += round((2 if "allreduce" in name else 1) * num_bytes * (size - 1) / size)
        return func(*args, **kwargs)

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        schema = func._schema
        if name in FREE or any(r.alias_info and not r.alias_info.is_write for r in schema.returns):
            return
        written, read = [], []
        named = [*zip(schema.arguments, args, strict=False)]
        named += [(argument, kwargs[argument.name]) for argument in schema.arguments if argument.name in kwargs]
        for argument, value in named:
            mutated = argument.alias_info is not None and argument.alias_info.is_write
            written += distinct(value) if mutated else []
            read += [] if mutated and name in WRITES_ONLY else distinct(value)
        launches, reads, training = KERNELS.get(name, (1, 1, None))
        if training is not None and not args[training]:
            launches, reads = 1, 1
        num_bytes = sum(size_of(t) * (reads if t.dim() > 1 else 1) for t in distinct(read))
        num_bytes += sum(size_of(t) for t in distinct([written, out]))
        if name == "convolution_backward" and args[-1][0] and args[-1][1]:  # two kernels, of input and weight
            launches, num_bytes = 2, num_bytes + size_of(args[0])
        if name.startswith(("_foreach", "_fused")):
            launches = -(-sum(-(-t.numel() // CHUNK) for t in distinct(args[0])) // CHUNKS)
        formula = flop_registry.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula else attention_flops(name, args)
        self.tracer.launched(name, num_bytes, flops, launches)


def attention_flops(name: str, args: Any) -> int:
    """The CPU's flash attention is in no registry: two products forward; five backward."""
    if not name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
        return 0
    backward = name.endswith("backward")
    query, key = args[1:3] if backward else args[:2]
    return (5 if backward else 2) * 2 * query.numel() * key.shape[2]


class _Copies(TorchFunctionMode):
    """Sees what goes to the device and back; the dispatcher can't, since all tensors say that they are on the CPU."""

    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        here = args[0] if args and isinstance(args[0], Tensor) else None
        name = getattr(func, "__name__", "")
        if here is None and kwargs.get("device") is not None:
            if name in ("tensor", "as_tensor"):
                self.tracer.sync(f"torch.{name} copies from the host")
                return self.tracer.to_device(func(*args, **kwargs))
            with self.tracer.fake_mode:
                return func(*args, **kwargs)
        if here is not None and not is_fake(here) and name in ("to", "cuda"):
            target = next((v for v in (*args[1:], kwargs.get("device")) if isinstance(v, torch.device | str)), None)
            if target is not None or any(map(is_fake, args[1:])):
                if not kwargs.get("non_blocking"):
                    self.tracer.sync("a copy from the host waits")
                return self.tracer.to_device(func(*args, **kwargs) if target is not None else here)
        if here is not None and is_fake(here):
            to_host = name == "to" and any(isinstance(v, Tensor) and not is_fake(v) for v in args[1:])
            if name in ("cpu", "tolist", "numpy") or to_host:
                self.tracer.sync(f".{name} copies to the host")
                answer = torch.zeros(here.shape, dtype=args[1].dtype if to_host else here.dtype)
                return answer if name in ("cpu", "to") else getattr(answer, name)()
        return func(*args, **kwargs)


def _triton_launch(tracer: Tracer) -> Callable[..., None]:
    """Instead of `JITFunction.run`: one launch, which reads or writes each tensor once."""

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        tensors = distinct((args, kwargs))
        flops = TRITON_FLOPS.get(kernel.__name__, lambda _: 0)(dict(zip(kernel.arg_names, args, strict=False)))
        tracer.launched(kernel.__name__, sum(map(size_of, tensors)), flops)

    return run


# NT-Xent's tiles are made again in backward: one product of M x m x d forward, two backward.
TRITON_FLOPS: dict[str, Callable[[dict[str, Any]], int]] = {
    "_exponential_sums": lambda a: 2 * a["m"] * a["M"] * a["z"].shape[1],
    "_query_sums": lambda a: 4 * a["n"] * a["N"] * a["q"].shape[1],
    "_weighted_sums": lambda a: 4 * a["m"] * a["M"] * a["z"].shape[1],
}
