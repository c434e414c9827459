"""The built-in generator: LoRA factors of all layers from layer and task embeddings by one shared network.

The idea is HyperLoRA's (Xiao et al. 2023, "Task-Agnostic Low-Rank Adapters for Unseen English Dialects",
arXiv:2311.00915) and HyperFormer's (Mahabadi et al. 2021, arXiv:2106.04489): layers and tasks share what they have in
common. h = GELU(W·[layer; task] + c); A = A₀ + U_s·h and B = V_s·h, with one U and V for each shape s of a factor. A₀
is drawn as PEFT draws A and is not trained; U and V begin at zero, so B = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from layerlens.integrations.peft import name_seed
from layerlens.tuning.generators.generated_layer import GeneratedLayer

LAYER_WIDTH, TASK_WIDTH, HIDDEN_WIDTH = 16, 8, 32


class HyperLora(torch.nn.Module):
    """See the module's text.

    Args:
        layers: what to generate.
        tasks: how many task embeddings there are.
        seed: of embeddings, W and A₀.
    """

    def __init__(self, layers: Sequence[GeneratedLayer], *, tasks: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.layers = tuple(layers)
        generator = torch.Generator().manual_seed(name_seed(seed, "hyperlora"))

        def normal(*shape: int, scale: float = 1.0) -> torch.nn.Parameter:
            return torch.nn.Parameter(scale * torch.randn(shape, generator=generator))

        self.layer_embedding = normal(len(self.layers), LAYER_WIDTH)
        self.task_embedding = normal(tasks, TASK_WIDTH)
        width = LAYER_WIDTH + TASK_WIDTH
        self.trunk = normal(HIDDEN_WIDTH, width, scale=1 / math.sqrt(width))
        self.trunk_bias = torch.nn.Parameter(torch.zeros(HIDDEN_WIDTH))
        self.to_a = torch.nn.ParameterDict()
        self.to_b = torch.nn.ParameterDict()
        for index, layer in enumerate(self.layers):
            for heads, rows, columns in ((self.to_a, layer.rank, layer.n_in), (self.to_b, layer.n_out, layer.rank)):
                key = f"{rows}x{columns}"
                if key not in heads:
                    heads[key] = torch.nn.Parameter(torch.zeros(rows * columns, HIDDEN_WIDTH))
            bound = 1 / math.sqrt(layer.n_in)
            drawn = torch.empty(layer.rank, layer.n_in).uniform_(-bound, bound, generator=generator)
            self.register_buffer(f"start_{index}", drawn)

    def forward(self, task: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A and B of every layer for one task."""
        tasks = self.task_embedding[task].expand(len(self.layers), -1)
        inner = torch.cat([self.layer_embedding, tasks], dim=1) @ self.trunk.T + self.trunk_bias
        hidden = torch.nn.functional.gelu(inner)
        factors = {}
        for index, layer in enumerate(self.layers):
            a = self.to_a[f"{layer.rank}x{layer.n_in}"] @ hidden[index]
            b = self.to_b[f"{layer.n_out}x{layer.rank}"] @ hidden[index]
            start: torch.Tensor = getattr(self, f"start_{index}")
            factors[layer.name] = (start + a.view(layer.rank, layer.n_in), b.view(layer.n_out, layer.rank))
        return factors
