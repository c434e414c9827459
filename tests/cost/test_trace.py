"""What a traced step records of single operations, and what a device profile makes of it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from layerlens.cost.device import FORMAT, DeviceProfile, Rates, load_profile, save_profile
from layerlens.cost.trace import StepTrace, trace_step
from layerlens.models.step import (
    ATTENTION,
    KINDS,
    MATMUL,
    MEMORY,
    RANDOM,
    REUSED_BYTES,
    SAFE_SOFTMAX,
    STRIDED,
    TracedOperation,
)


class Of(torch.nn.Module):
    """A model that is one function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def traced(function, *shape: int) -> StepTrace:
    return trace_step(Of(function).train(), {"x": torch.zeros(*shape)}, torch.sum)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (torch.nn.functional.dropout, RANDOM),
        (torch.nn.functional.gelu, "curve"),
        (lambda x: torch.softmax(x, -1), "norm"),
        (lambda x: torch.nn.functional.layer_norm(x, (32,)), "norm"),
        (lambda x: torch.ops.aten._safe_softmax(x, -1), SAFE_SOFTMAX),
        (lambda x: x.transpose(1, 2).contiguous(), STRIDED),
        (lambda x: x.clone(), MEMORY),
        (lambda x: x @ x.transpose(1, 2), MATMUL),
    ],
)  # fmt: skip
def test_operations_are_of_the_kind_that_prices_them(function, kind):
    kinds = Counter(operation.kind for operation in traced(function, 2, 16, 32).operations)
    # the loss of every case adds a sum, which moves elements
    assert kinds[kind] >= (2 if kind == MEMORY else 1)
    assert set(kinds) <= {kind, MEMORY, "view"}


def test_dropout_in_attention_is_drawn_and_not_fused_away():
    attention = torch.nn.functional.scaled_dot_product_attention
    kinds = Counter(each.kind for each in traced(lambda x: attention(x, x, x, dropout_p=0.1), 2, 3, 16, 8).operations)
    assert kinds[RANDOM] == kinds[SAFE_SOFTMAX] == 1
    assert kinds[ATTENTION] == 0


@pytest.mark.parametrize(("extra", "fresh"), [(0, 0), (1, REUSED_BYTES + 4)])
def test_only_blocks_above_what_malloc_reuses_are_fresh(extra, fresh):
    trace = traced(lambda x: x + 1.0, REUSED_BYTES // 4 + extra)
    assert sum(operation.fresh_bytes for operation in trace.operations) == fresh


def test_an_operation_costs_its_overhead_its_flops_its_bytes_and_its_fresh_memory():
    rates = dict.fromkeys(KINDS, Rates(0.0, 0.0, 0.0)) | {MEMORY: Rates(5.0, 2.0, 30.0)}
    device = DeviceProfile("", 1, rates, parameter_us=1.0, fresh_ms_per_gb=400.0)
    operation = TracedOperation(MEMORY, flops=1e9, n_bytes=2e9, fresh_bytes=1e9)
    assert device.operation_ms(operation) == pytest.approx(0.005 + 2.0 + 60.0 + 400.0)
    # the update of 1e9 elements in 3 tensors: 28 bytes for each at 30 ms a GB, one operation, 3 µs
    trace = StepTrace((operation,), 0)
    assert device.step_ms(trace, 3, 10**9) == pytest.approx(462.005 + 28 * 30.0 + 0.005 + 0.003)


def test_a_profile_is_read_as_written_and_measured_again_after_a_change_of_format(tmp_path):
    device = DeviceProfile("cpu", 2, dict.fromkeys(KINDS, Rates(1.0, 2.0, 3.0)), 4.0, 5.0, {MATMUL: 0.1})
    path = save_profile(device, tmp_path / "device.json")
    assert load_profile(path) == device
    path.write_text(path.read_text().replace(f'"format": {FORMAT}', '"format": 1'))
    assert load_profile(path) is None
