"""Linear classifiers on h and z, trained beside the run: what the loop calls every step where images have labels.

    probe = OnlineProbe(num_classes, {"h": D, "z": d}, rows_per_rank).to(device)
    probe.update({"h": h[:, 0], "z": z[:, 0]}, labels)    # collective
    probe.metrics()                                       # {"online_accuracy_h": ..., ...}

They are outside the encoder's graph and outside DeepSpeed. Of few classes every rank holds all, and gradients are
summed over ranks. Of so many that the features of a batch are less than the gradients (21,000 classes: 37 MB, not
366), ranks hold a share of the classes each, gather the features, and agree on what a softmax needs of the others.

Legend: n images of this rank, N of all, W ranks, D the encoder's width, d the head's, C classes, L = 2 layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ssl.distributed import gather_rows, rank, world_size

SPREAD = ("weight", "exp_avg", "exp_avg_sq")  # (dim + 1, C) of a layer


def exchange(num_classes: int, dims: Sequence[int], rows: int, ranks: int) -> tuple[bool, float]:
    """Whether ranks share the classes, and the bytes that one of them sends in a step of `rows` images by rings."""
    share, width = (ranks - 1) / ranks, sum(dims)
    reduced = 2 * 4 * (num_classes * (width + len(dims)) + 2 * width + 2 * len(dims)) * share
    gathered = 4 * (width + 1) * rows * share + 2 * (8 + 4) * len(dims) * rows * share
    spread = num_classes >= ranks > 1 and gathered < reduced
    return spread, gathered if spread else reduced


class OnlineProbe(nn.Module):
    """Linear classifiers on detached features, trained beside the run by Adam, the same on every rank and ZeRO stage.

    All its state is in buffers: it is no part of the model, and DeepSpeed never sees it. `whole_state` is the same on
    any number of ranks, and `load_state_dict` takes it. `rows_per_rank`: of a batch, on all W ranks; without them no
    rank shares its classes.
    Features are standardised by running statistics that all ranks share. Accuracy is measured on each batch before
    the update that learns from it (prequential), and smoothed over about 1 / (1 - smoothing) updates.
    """

    accuracy: Tensor
    updates: Tensor

    def __init__(
        self,
        num_classes: int,
        dims: Mapping[str, int],
        rows_per_rank: Sequence[int] = (),
        learning_rate: float = 2e-3,
        smoothing: float = 0.98,
    ) -> None:
        super().__init__()
        self.num_classes, self.dims, self.rows_per_rank = num_classes, dict(dims), rows_per_rank
        best = exchange(num_classes, list(dims.values()), sum(rows_per_rank), world_size())[0]
        self.spread = best and len(rows_per_rank) == world_size()
        shares = [num_classes * edge // world_size() for edge in range(world_size() + 1)]
        self.shares = [b - a for a, b in pairwise(shares)] if self.spread else [num_classes]
        self.own = slice(shares[rank()], shares[rank() + 1]) if self.spread else slice(0, num_classes)
        self.learning_rate, self.smoothing = learning_rate, smoothing
        for layer, dim in self.dims.items():
            for name in SPREAD:
                self.register_buffer(f"{layer}_{name}", torch.zeros(dim + 1, self.own.stop - self.own.start))
            self.register_buffer(f"{layer}_mean", torch.zeros(dim))
            self.register_buffer(f"{layer}_variance", torch.ones(dim))
        self.register_buffer("accuracy", torch.zeros(len(self.dims)))
        self.register_buffer("updates", torch.zeros(()))
        self.register_load_state_dict_pre_hook(_take_own)

    def whole_state(self) -> Iterator[tuple[str, Tensor]]:
        """Each buffer under its name, of all classes, one after another. Collective where ranks share the classes."""
        for name, held in self.state_dict().items():
            is_spread = self.spread and name.endswith(SPREAD)
            yield name, gather_rows(held.T, self.shares).T if is_spread else held

    @torch.no_grad()
    def update(self, features: Mapping[str, Tensor], labels: Tensor) -> None:
        """One step on features {layer: (n, dim)} and labels (n,); -1 marks a row without a label.

        Collective: one all-reduce of all layers' gradients, feature sums and counts; where ranks share the classes,
        one all-gather of features and labels and two all-reduces of a number a row and layer. No host synchronisation.
        """
        with torch.autocast(labels.device.type, enabled=False):
            x = [features[layer].detach().float() for layer in self.dims]
            if self.spread:
                rows = gather_rows(torch.cat([*x, labels[:, None].float()], dim=1), self.rows_per_rank)
                *x, labels = rows.split([*self.dims.values(), 1], dim=1)  # fp32 holds classes up to 2^24
                labels = labels[:, 0].long()
            known = labels >= 0
            inputs = [self._normal(layer, part, known) for layer, part in zip(self.dims, x, strict=True)]
            weights = [self._buffer(layer, "weight") for layer in self.dims]
            found = self._softmax([given @ weight for (given, _), weight in zip(inputs, weights, strict=True)])
            parts = [self._sums(*of_layer, *outputs, labels) for of_layer, outputs in zip(inputs, found, strict=True)]
            flat = torch.cat([part for parts_of_layer in parts for part in parts_of_layer])
            if world_size() > 1 and not self.spread:
                dist.all_reduce(flat)
            sums = flat.split([sum(part.numel() for part in parts_of_layer) for parts_of_layer in parts])
            count = sums[0][-1]
            # An update of no labelled row anywhere changes nothing: every factor below carries `seen`.
            seen = (count > 0).float()
            self.updates += seen
            for position, layer in enumerate(self.dims):
                self._learn(position, layer, sums[position], count.clamp(min=1), seen)

    def metrics(self) -> dict[str, float]:
        """{"online_accuracy_h": ...}: smoothed top-1 accuracy in [0, 1]; empty before the first labelled batch."""
        updates = float(self.updates)
        if updates == 0:
            return {}
        unbias = 1 - self.smoothing**updates
        values = (self.accuracy / unbias).tolist()
        return {f"online_accuracy_{layer}": value for layer, value in zip(self.dims, values, strict=True)}

    def _normal(self, layer: str, x: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """What the classifier is given, (n, dim + 1) with a last column for the bias, and the centred rows (n, dim)."""
        mask = known.float()[:, None]
        centred = (x - self._buffer(layer, "mean")) * mask
        normal = centred * self._buffer(layer, "variance").add(1e-5).rsqrt()
        return torch.cat([normal, mask], dim=1), centred

    def _softmax(self, logits: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Of each layer the probabilities of this rank's classes and the first class of the largest logit, (n,).

        Collective where ranks share the classes.
        """
        if not self.spread:
            return [(each.softmax(dim=1), each.argmax(dim=1)) for each in logits]
        tops = torch.stack([_sortable(*each.max(dim=1), self.own.start) for each in logits])
        dist.all_reduce(tops, op=dist.ReduceOp.MAX)
        largest, classes = _sorted(tops)
        powers = [(each - top[:, None]).exp() for each, top in zip(logits, largest, strict=True)]
        totals = torch.stack([each.sum(dim=1) for each in powers])
        dist.all_reduce(totals)
        return [(each / total[:, None], top) for each, total, top in zip(powers, totals, classes, strict=True)]

    def _sums(self, inputs: Tensor, centred: Tensor, gradient: Tensor, top: Tensor, labels: Tensor) -> list[Tensor]:
        """Flat: the gradient of this rank's classes, sums of rows and squares, of correct rows and of labelled ones."""
        mask = inputs[:, -1:]
        target = labels - self.own.start
        own = (target >= 0) & (target < gradient.shape[1])
        rows = torch.arange(len(labels), device=labels.device)
        gradient[rows, target.clamp(0, gradient.shape[1] - 1)] -= own.float()
        gradient *= mask
        correct = (top == labels).float().sum()
        sums = [(inputs.T @ gradient).flatten(), centred.sum(0), centred.square().sum(0)]
        return [*sums, correct[None], mask.sum()[None]]

    def _learn(self, position: int, layer: str, sums: Tensor, count: Tensor, seen: Tensor) -> None:
        dim = self.dims[layer]
        gradient, total, squares, correct, _ = sums.split([len(sums) - 2 * dim - 2, dim, dim, 1, 1])
        gradient = gradient.view(dim + 1, -1) / count
        exp_avg, exp_avg_sq = self._buffer(layer, "exp_avg"), self._buffer(layer, "exp_avg_sq")
        exp_avg.lerp_(gradient, 0.1 * seen)
        exp_avg_sq.lerp_(gradient.square(), 0.01 * seen)
        first = exp_avg / (1 - 0.9 ** self.updates.clamp(min=1))
        second = exp_avg_sq / (1 - 0.99 ** self.updates.clamp(min=1))
        self._buffer(layer, "weight").sub_(self.learning_rate * seen * first / (second.sqrt() + 1e-8))
        # The first batch sets the statistics, later ones move them by a tenth.
        rate = torch.where(self.updates <= 1, 1.0, 0.1) * seen
        shift = total / count
        self._buffer(layer, "variance").lerp_((squares / count - shift.square()).clamp(min=0), rate)
        self._buffer(layer, "mean").add_(rate * shift)
        self.accuracy[position].lerp_(correct[0] / count, (1 - self.smoothing) * seen)

    def _buffer(self, layer: str, name: str) -> Tensor:
        return self.get_buffer(f"{layer}_{name}")


def _take_own(probe: OnlineProbe, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Of the classes in a state that is loaded, those of this rank."""
    for name in state:
        if name.startswith(prefix) and name.endswith(SPREAD):
            state[name] = state[name][:, probe.own]


def _sortable(value: Tensor, index: Tensor, first: int) -> Tensor:
    """int64 that sort as fp32 values do, and those of equal ones by the lower class."""
    bits = (value + 0.0).view(torch.int32).long()  # -0.0 as 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) | (0xFFFFFFFF - first - index)


def _sorted(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The values and classes of `_sortable`."""
    ordered = keys >> 32
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.int().view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)
