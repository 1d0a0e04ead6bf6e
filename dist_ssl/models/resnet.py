"""torchvision's ResNets, parameter names included, with the ReLU and the addition handed to the batch norm before them.

On CUDA it does them in one pass (`fused_batch_norm`); elsewhere it does as torchvision does, one after the other.

Legend: B rows (views), C channels, H and W pixels.
"""

from __future__ import annotations

from typing import cast

import torchvision
from torch import Tensor


class BasicBlock(torchvision.models.resnet.BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x), relu=True)
        shortcut = x if self.downsample is None else self.downsample(x)
        return cast(Tensor, self.bn2(self.conv2(y), shortcut, relu=True))


class Bottleneck(torchvision.models.resnet.Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x), relu=True)
        y = self.bn2(self.conv2(y), relu=True)
        shortcut = x if self.downsample is None else self.downsample(x)
        return cast(Tensor, self.bn3(self.conv3(y), shortcut, relu=True))


class ResNet(torchvision.models.ResNet):
    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x), relu=True))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return cast(Tensor, self.fc(self.avgpool(x).flatten(1)))
