"""The torch forms of all statistics, which a GPU runs, equal the kernels; and no activation leaves the device for them.

There is no GPU here: the torch forms run on the CPU, and tensors without data show what would be moved.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from brute_force import SIGNAL, pieces, profile
from test_architectures import CASES, spec_of

from layerlens.exceptions import ConfigurationError
from layerlens.integrations.torch_modules import usable_device
from layerlens.models import ModelStatistics
from layerlens.profiling import accumulators
from layerlens.profiling.request import STATISTICS, StatisticsRequest
from layerlens.profiling.sample_matrices import SampleMatrices, gram_matrix
from layerlens.profiling.statistics.ntk import kept_samples
from layerlens.profiling.statistics_file import statistics_to_bytes
from layerlens.tasks import Batch

RELATIVE = 1e-9  # float64 on both ways, as in test_architectures
MODULES = ("sample_matrices", "statistics.factors", "statistics.fisher_diagonal")
NOT_BY_SAMPLES = {"activation_memory", "flops", "time"}


def everything(case_name: str) -> ModelStatistics:
    case = CASES[case_name]
    torch.manual_seed(1)
    model = case.make().double().eval()
    spec = spec_of(model)
    left_out = NOT_BY_SAMPLES if spec.layers else NOT_BY_SAMPLES | {"ntk"}
    names = tuple(name for name in STATISTICS if name not in left_out)
    return profile(model, spec, pieces(case.batch(), 3, 2), case.loss, statistics=names)


@pytest.mark.parametrize("case_name", ["bert-masked-lm-tied", "gpt2-causal-tied", "convnet"])
def test_torch_alone_finds_what_the_kernels_find(case_name: str, monkeypatch: pytest.MonkeyPatch):
    by_kernels = everything(case_name)
    for module in MODULES:
        monkeypatch.setattr(f"layerlens.profiling.{module}.uses_kernels", lambda tensor: False)
    by_torch = everything(case_name)
    pairs = [
        (one.by_method[method], other.by_method[method])
        for one, other in zip(by_kernels.layers, by_torch.layers, strict=True)
        for method in one.by_method
    ]
    pairs += [(found, by_torch.other_weights[name]) for name, found in by_kernels.other_weights.items()]
    assert len(pairs) >= 4
    for one, other in pairs:
        assert other.trace == pytest.approx(one.trace, rel=RELATIVE)
        assert other.energy == pytest.approx(one.energy, rel=RELATIVE, abs=RELATIVE * one.trace)
        if one.input_mean_square is not None:
            assert other.input_mean_square == pytest.approx(one.input_mean_square, rel=RELATIVE)
        for name in ("spectrum", "plain_spectrum"):
            # Singular vectors of near-equal values may turn into each other: the sums are what is well defined.
            total = np.abs(getattr(one, name)).sum()
            assert getattr(other, name).sum() == pytest.approx(getattr(one, name).sum(), abs=1e-6 * total)
    if by_kernels.kernel is not None:
        np.testing.assert_allclose(
            by_torch.kernel.gram, by_kernels.kernel.gram, rtol=RELATIVE, atol=RELATIVE * by_kernels.kernel.trace
        )
    assert statistics_to_bytes(spec_of(CASES[case_name].make()), by_torch)


def test_on_a_device_only_sums_leave_it(monkeypatch: pytest.MonkeyPatch):
    """The accumulators on the meta device, whose tensors have no data that could be read behind our back."""
    read: list[int] = []

    def to_host(tensor: torch.Tensor) -> torch.Tensor:
        read.append(tensor.numel())
        return torch.ones(tensor.shape, dtype=tensor.dtype)

    monkeypatch.setattr(torch.Tensor, "cpu", to_host)
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: read.append(tensor.numel()) or 1.0)
    names = [name for name in STATISTICS if name not in NOT_BY_SAMPLES]
    request = StatisticsRequest.of(names)
    b, t, o, i = 3, 50, 20, 30
    d, z = torch.empty(b, 1, t, o, device="meta"), torch.empty(b, 1, t, i, device="meta")
    inputs = accumulators.InputAccumulator(request.input_sums, 1)
    inputs.add(z, None)
    place = request.place((1, o, i), "lora", projected=False)
    found = accumulators.MatrixAccumulator(request.sums(place), place, 1, inputs)
    found.add(SampleMatrices(d, z), torch.tensor([0, 0, 1]), 0)
    assert found.totals
    assert all(total.is_meta for total in found.totals.values())
    kept = kept_samples(found)
    assert kept
    assert all(x.first.is_meta for x in kept)
    gram_matrix(kept, 1)
    assert read
    assert max(read) <= b * b  # norms of samples and their Gram matrix, never b·t numbers


def test_a_device_that_is_not_there_is_refused():
    assert usable_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigurationError, match=r"runtime\.device: cuda was asked for, but torch .* set runtime"):
            usable_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_statistics_on_a_gpu_equal_those_on_the_cpu():
    case = CASES["bert-classification"]
    torch.manual_seed(1)
    model = case.make().double().eval()
    names = (*SIGNAL, "whitened_spectrum", "ntk")
    on_cpu = profile(model, spec_of(model), [case.batch()], case.loss, statistics=names)
    batch: Batch = case.batch().to(torch.device("cuda"))
    on_gpu = profile(model.cuda(), spec_of(model), [batch], case.loss, statistics=names)
    for one, other in zip(on_cpu.layers, on_gpu.layers, strict=True):
        for method, found in one.by_method.items():
            assert other.by_method[method].trace == pytest.approx(found.trace, rel=RELATIVE)
            assert other.by_method[method].energy == pytest.approx(found.energy, rel=RELATIVE)
