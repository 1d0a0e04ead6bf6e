"""The projection head g: h -> z, whose every layer can be read.

Legend: B rows (views), D width of h, d width of z.
"""

from __future__ import annotations

from torch import Tensor, nn

from dist_ssl.config import HeadConfig
from dist_ssl.models.batch_norm import GlobalBatchNorm


class ProjectionHead(nn.Module):
    """g: h (B, D) -> z (B, d): nothing, one linear layer, or an MLP of `num_layers` linear layers.

    With `batch_norm` every linear layer is without bias and followed by batch norm, the last one too, as in SimCLR's
    published code (Chen et al. 2020), unless `last_batch_norm` is false; ReLU between layers.
    """

    def __init__(self, input_dim: int, config: HeadConfig):
        super().__init__()
        match config.kind:
            case "none":
                dims = []
            case "linear":
                dims = [config.output_dim]
            case "mlp":
                dims = [config.hidden_dim] * (config.num_layers - 1) + [config.output_dim]
        self.output_dim = dims[-1] if dims else input_dim
        layers = []
        for depth, dim in enumerate(dims):
            batch_norm = config.batch_norm and (config.last_batch_norm or depth < len(dims) - 1)
            layer = nn.Sequential(nn.Linear(input_dim, dim, bias=not batch_norm))
            if batch_norm:
                layer.append(GlobalBatchNorm(dim))
            if depth < len(dims) - 1:
                layer.append(nn.ReLU(inplace=True))
            layers.append(layer)
            input_dim = dim
        self.stack = nn.ModuleList(layers)

    def layers(self, h: Tensor) -> list[tuple[str, Tensor]]:
        """(name, output) of each layer: "g1", "g2", ... after their ReLU, and the last, named "z"."""
        outputs, names = [h], [f"g{i + 1}" for i in range(len(self.stack) - 1)] + ["z"]
        for layer in self.stack:
            outputs.append(layer(outputs[-1]))
        return list(zip(names, outputs[1:] or outputs, strict=True))

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.stack:
            h = layer(h)
        return h
