"""Costs of single modules: counted by hand on a small model, each only where it is asked for."""

from __future__ import annotations

import pytest
import torch
from brute_force import profile
from test_architectures import CASES, spec_of

from layerlens.models import ModelSpec, ModuleCosts
from layerlens.profiling.measure import measure
from layerlens.profiling.request import OF_MODULES, StatisticsRequest
from layerlens.profiling.statistics_file import load_statistics, statistics_to_bytes
from layerlens.tasks import Batch
from layerlens.tasks.losses import classification_loss
from layerlens.utils.progress import silent


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh())
        self.head = torch.nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.inner[1](x)))


def test_flops_and_memory_counted_by_hand():
    batch = Batch({"x": torch.randn(2, 6)}, torch.arange(2), torch.arange(2))
    found = profile(
        Small(), ModelSpec("", 0), [batch], classification_loss, statistics=OF_MODULES, everything=False
    ).modules
    assert set(found) == {"inner", "inner.0", "inner.1", "head"}
    # A frozen Linear keeps nothing of its own (its weight is the model's); each tanh keeps its output: 6 and 10 floats.
    flops = {"inner": 2 * 6 * 10, "inner.0": 2 * 6 * 10, "inner.1": 0, "head": 2 * 10 * 3}
    kept = {"inner": 4 * 10, "inner.0": 0, "inner.1": 4 * (6 + 10), "head": 0}
    for name, costs in found.items():
        assert costs.forward_flops == flops[name], name
        assert costs.activation_bytes == kept[name], name
        assert costs.forward_ms is not None
        assert costs.forward_ms > 0.0


@pytest.mark.parametrize("asked", OF_MODULES)
def test_each_alone_measures_nothing_else(asked: str):
    case = CASES["bert-classification"]
    torch.manual_seed(1)
    model = case.make().eval()
    statistics = profile(model, spec_of(model), [case.batch()], case.loss, statistics=(asked,), everything=False)
    field = {"activation_memory": "activation_bytes", "flops": "forward_flops", "time": "forward_ms"}[asked]
    assert statistics.modules
    for costs in statistics.modules.values():
        assert [name for name in ModuleCosts.__dataclass_fields__ if getattr(costs, name) is not None] == [field]
    assert all(found.trace is None for layer in statistics.layers for found in layer.by_method.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_blocks_sum_to_the_model_and_are_kept_in_the_file(tmp_path):
    case = CASES["llama-causal-gqa"]
    torch.manual_seed(1)
    model, batch = case.make().eval(), case.batch()
    statistics = measure(
        model, spec_of(model), [batch], request=StatisticsRequest.of(["activation_memory", "flops"]), sequence_length=6,
        threads=1, progress=silent, loss=case.loss,
    )  # fmt: skip
    assert sum(statistics.modules[name].forward_flops or 0 for name in ("model", "lm_head")) == pytest.approx(
        statistics.forward_flops
    )
    blocks = [statistics.modules[f"model.layers.{index}"] for index in range(2)]
    assert all(0 < (block.activation_bytes or 0) < statistics.activation_bytes for block in blocks)
    assert sum(block.activation_bytes or 0 for block in blocks) <= statistics.activation_bytes
    path = tmp_path / "statistics.safetensors"
    path.write_bytes(statistics_to_bytes(spec_of(model), statistics))
    assert load_statistics(path)[1].modules == statistics.modules
