"""Running sums from which every statistic of DESIGN section 4 follows, for one gradient matrix and for one input.

Axes as in ``sample_matrices``. Sums of scalars are float64. Sums of matrices have the model's precision, at least
float32: they are updated in place by the matrix product itself, which saves a pass over the largest arrays of all.
"""

from __future__ import annotations

import numpy as np
import torch

from layerlens import kernels
from layerlens.models import MethodStatistics
from layerlens.profiling.device import uses_kernels
from layerlens.profiling.gram_sum import GramSum
from layerlens.profiling.request import StatisticsRequest
from layerlens.profiling.sample_matrices import SampleMatrices
from layerlens.profiling.spectra import split_half_spectrum


class InputAccumulator:
    """Sums over tokens of z² and z zᵀ. Layers with the same input (query, key and value) share one."""

    def __init__(self, request: StatisticsRequest, threads: int) -> None:
        self.request = request
        self.threads = threads
        self.n_tokens = 0
        self.square_sum = 0.0
        self.factor = GramSum()

    def add(self, z__bgti: torch.Tensor, mask__bt: torch.Tensor | None) -> None:
        """Add the inputs of one call; tokens where ``mask__bt`` is 0 are padding."""
        b, g, t, i = z__bgti.shape
        if self.request.whitened_spectrum or self.request.input_scale:
            if mask__bt is not None:
                z__bgti = z__bgti * mask__bt[:, None, :, None].to(z__bgti.dtype)
            self.n_tokens += b * t if mask__bt is None else int(mask__bt.sum())
        if self.request.input_scale:
            rows = z__bgti.reshape(-1, i)
            if uses_kernels(rows):
                squares = float(kernels.row_sum_of_squares(rows.contiguous(), threads=self.threads).sum())
            else:
                squares = float(rows.square().sum(dtype=torch.float64))
            self.square_sum += squares / (g * i)
        if self.request.whitened_spectrum:
            self.factor.add(z__bgti.transpose(0, 1).flatten(1, 2))


class MatrixAccumulator:
    """Sums over samples of M_n, of ‖M_n‖² and, for the whitened spectrum, of d dᵀ.

    Args:
        request: which of them.
        threads: for the kernels.
        inputs: where the same layer's inputs are summed.
        shape: (g, o, i) of the matrix.
    """

    def __init__(
        self, request: StatisticsRequest, threads: int, inputs: InputAccumulator, shape: tuple[int, int, int]
    ) -> None:
        self.request = request
        self.threads = threads
        self.inputs = inputs
        self.shape = shape
        self.n_samples = [0, 0]
        self.trace_sum = 0.0
        self.mean_sums: list[torch.Tensor] = []
        self.output_factor = GramSum()
        self.kept: list[SampleMatrices] = []

    def add(self, matrices: SampleMatrices, half__b: torch.Tensor) -> None:
        """Add one batch; ``half__b`` says which half (0 or 1) of the calibration set each sample belongs to."""
        request = self.request
        n_kept = sum(self.n_samples)
        for half in (0, 1):
            self.n_samples[half] += int((half__b == half).sum())
        if request.fisher:
            self.trace_sum += float(matrices.squared_norms(self.threads).sum())
        if request.mean:
            self._add_mean(matrices, half__b)
        if request.whitened_spectrum and matrices.d__bgto is not None:
            self.output_factor.add(matrices.d__bgto.transpose(0, 1).flatten(1, 2))
        if request.ntk and n_kept < request.ntk_samples:
            self.kept.append(matrices.first(request.ntk_samples - n_kept))

    def _add_mean(self, matrices: SampleMatrices, half__b: torch.Tensor) -> None:
        if not self.mean_sums:
            first = matrices.d__bgto if matrices.d__bgto is not None else matrices.rows__bti
            assert first is not None
            dtype = torch.promote_types(first.dtype, torch.float32)
            count = 2 if self.request.halves else 1
            self.mean_sums = [torch.zeros(self.shape, dtype=dtype, device=first.device) for _ in range(count)]
        if len(self.mean_sums) == 1:
            matrices.add_sum_to(self.mean_sums[0])
            return
        for half, total in enumerate(self.mean_sums):
            chosen__b = (half__b == half).nonzero().flatten().to(total.device)
            if len(chosen__b):
                matrices.add_sum_to(total, chosen__b)

    def result(self, damping: float) -> MethodStatistics:
        """The statistics of everything added so far; None for what was not asked for."""
        n = sum(self.n_samples)
        energy = trace = signal = scale = None
        if self.request.mean:
            mean = self.mean_sums[0] if len(self.mean_sums) == 1 else self.mean_sums[0] + self.mean_sums[1]
            energy = squared_norm(mean, self.threads) / n**2
        if self.request.fisher:
            trace = self.trace_sum / n
        if energy is not None and trace is not None:
            signal = energy - (trace - energy) / (n - 1)
        if self.request.input_scale and self.inputs.n_tokens:
            scale = self.inputs.square_sum / self.inputs.n_tokens
        plain, whitened = self._spectra(damping)
        return MethodStatistics(energy, trace, signal, scale, whitened, plain)

    def _spectra(self, damping: float) -> tuple[np.ndarray, np.ndarray]:
        """(plain, whitened) split-half spectra of all heads together, descending; empty where not asked for."""
        plain, whitened = np.zeros(0), np.zeros(0)
        if not self.request.halves or 0 in self.n_samples:
            return plain, whitened
        halves = [total.double() / count for total, count in zip(self.mean_sums, self.n_samples, strict=True)]
        heads = range(self.shape[0])
        if self.request.spectrum:
            plain = _descending([split_half_spectrum(halves[0][head], halves[1][head]) for head in heads])
        if self.request.whitened_spectrum and self.output_factor.total is not None:
            inputs = self.inputs.factor.result() / self.inputs.n_tokens
            outputs = self.output_factor.result() / sum(self.n_samples)
            whitened = _descending(
                [
                    split_half_spectrum(halves[0][head], halves[1][head], inputs[head], outputs[head], damping)
                    for head in heads
                ]
            )
        return plain, whitened


def squared_norm(tensor: torch.Tensor, threads: int) -> float:
    """Sum of squares, in float64."""
    if uses_kernels(tensor):
        return kernels.gradient_energy(tensor, threads=threads)
    return float(tensor.square().sum(dtype=torch.float64))


def _descending(spectra: list[np.ndarray]) -> np.ndarray:
    return np.sort(np.concatenate(spectra))[::-1].copy()
