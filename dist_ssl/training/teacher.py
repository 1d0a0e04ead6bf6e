"""The teacher: a momentum copy of encoder and head, whose z the student's predictions are held against.

It is state of the run, the same on every rank, and follows the student on the device after each step that was applied.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dist_ssl.config import BYOLConfig, Config, MoCoV3Config
from dist_ssl.models import ContrastiveModel, build_teacher


class Teacher:
    """Starts as the student does. Its batch norm takes its own batch's statistics, as in MoCo v3's and BYOL's code."""

    def __init__(self, config: Config, device: torch.device):
        assert isinstance(config.objective, MoCoV3Config | BYOLConfig)
        self.model = build_teacher(config).to(device)
        if config.engine.compile:
            self.model.compile()
        self._bf16 = config.engine.precision == "bf16"
        self._decay = config.objective.teacher_decay

    def start_as(self, student: ContrastiveModel) -> None:
        """Take the weights of a student that begins, wherever they are from; this rank must hold them whole."""
        kept = {name: t for name, t in student.state_dict().items() if not name.startswith("predictor.")}
        self.model.load_state_dict(kept)

    @torch.no_grad()
    def __call__(self, *views: Tensor) -> Tensor:
        """Its z of some views, as the student's, without gradient. Collective where there is batch norm."""
        with torch.autocast(views[0].device.type, torch.bfloat16, enabled=self._bf16):
            z: Tensor = self.model(*views)[1]
        return z

    @torch.no_grad()
    def follow(self, student: ContrastiveModel, applied: Tensor, progress: float) -> None:
        """Move towards the student's weights, which this rank must hold whole.

        applied: a bool scalar on the device, which the host does not read; where it is false nothing moves.
        progress: the share of the run's steps that were taken before this one.
        """
        weight = applied * (1 - decay(self._decay, progress))
        own: list[Tensor] = list(self.model.parameters())
        followed: list[Tensor] = [*student.encoder.parameters(), *student.head.parameters()]
        ways = torch._foreach_sub(followed, own)
        torch._foreach_mul_(ways, weight)
        torch._foreach_add_(own, list(ways))


def decay(first: float, progress: float) -> float:
    """What a teacher keeps of itself in a step: from `first` to 1 by half a cosine (Grill et al. 2020, section 3.2)."""
    return 1 - (1 - first) * (math.cos(math.pi * progress) + 1) / 2
