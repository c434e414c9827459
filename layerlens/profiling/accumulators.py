"""Running sums from which every statistic of DESIGN section 4 follows, for one gradient matrix and for one input.

Axes as in ``sample_matrices``. Sums of scalars are float64. Sums of matrices have the model's precision, at least
float32: they are updated in place by the matrix product itself, which saves a pass over the largest arrays of all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from layerlens import kernels
from layerlens.models import MethodStatistics
from layerlens.profiling.device import uses_kernels
from layerlens.profiling.gram_sum import GramSum
from layerlens.profiling.kernel_sketch import KernelSketch
from layerlens.profiling.request import StatisticsRequest
from layerlens.profiling.sample_matrices import SampleMatrices
from layerlens.profiling.sketches import FactorSum, Projection, SpectrumSketch, worth_sketching
from layerlens.profiling.spectra import split_half_spectrum
from layerlens.profiling.sum_shards import SumShards


class InputAccumulator:
    """Sums over tokens of z² and z zᵀ. Layers with the same input (query, key and value) share one."""

    def __init__(self, request: StatisticsRequest, threads: int) -> None:
        self.request = request
        self.threads = threads
        self.n_tokens = 0
        self.square_sum = 0.0
        self.factor = GramSum()
        self.sketch = FactorSum()
        self.projection: Projection | None = None
        self._exact: np.ndarray | None = None

    def add(self, z__bgti: torch.Tensor, mask__bt: torch.Tensor | None) -> None:
        """Add the inputs of one call, zero where ``mask__bt`` is 0."""
        request = self.request
        b, g, t, i = z__bgti.shape
        if request.masked_inputs:
            self.n_tokens += b * t if mask__bt is None else int(mask__bt.sum())
        if request.input_scale or request.sketched_factors:
            squares = _sum_of_squares(z__bgti.reshape(-1, i), self.threads)
            self.square_sum += squares / (g * i)
            if request.sketched_factors and self.projection is not None and g == 1:
                rows__ni = z__bgti.reshape(-1, i)
                self.sketch.add(rows__ni, self.projection.of_inputs(rows__ni), squares)
        if request.exact_factors:
            self.factor.add(z__bgti.transpose(0, 1).flatten(1, 2))

    def exact_factor(self) -> np.ndarray:
        """A as float32, one array for all layers that share it."""
        if self._exact is None:
            self._exact = (self.factor.result() / self.n_tokens).float().cpu().numpy()
        return self._exact


class MatrixAccumulator:
    """Sums over samples of M_n, of ‖M_n‖² and, for the whitened spectrum, of d dᵀ.

    Args:
        request: which of them.
        threads: for the kernels.
        inputs: where the same layer's inputs are summed.
        shape: (g, o, i) of the matrix.
        projection: for sketches; None for matrices that are not sketched (lookups, heads).
        kernel: where the layer's part of a sketched kernel goes, None where it has none.
        shards: where the sums of M_n are spread over processes; None where each keeps its own.
    """

    def __init__(
        self,
        request: StatisticsRequest,
        threads: int,
        inputs: InputAccumulator,
        shape: tuple[int, int, int],
        projection: Projection | None = None,
        kernel: KernelSketch | None = None,
        shards: SumShards | None = None,
    ) -> None:
        self.request = request
        self.threads = threads
        self.inputs = inputs
        self.shape = shape
        self.projection = projection
        self.kernel = kernel
        self.shards = shards
        self.sketched = request.sketched_spectrum and projection is not None and worth_sketching(shape)
        self.halves = request.halves or (request.sketched_spectrum and not self.sketched)
        self.n_samples = [0, 0]
        self.trace_sum = 0.0
        self.mean_sums: list[torch.Tensor] = []
        self.output_factor = GramSum()
        self.output_sketch = FactorSum()
        self.spectrum_sketch: SpectrumSketch | None = None
        self.kept: dict[int, SampleMatrices] = {}

    def add(self, matrices: SampleMatrices, half__b: torch.Tensor, before: int) -> None:
        """Add one batch.

        Args:
            matrices: of its samples.
            half__b: which half (0 or 1) of the calibration set each sample belongs to.
            before: samples in the batches that come before it, measured here or elsewhere.
        """
        request = self.request
        for half in (0, 1):
            self.n_samples[half] += int((half__b == half).sum())
        if request.fisher:
            self.trace_sum += float(matrices.squared_norms(self.threads).sum())
        if request.gradient or self.halves:
            self._add_mean(matrices, half__b)
        if request.exact_factors and matrices.d__bgto is not None:
            self.output_factor.add(matrices.d__bgto.transpose(0, 1).flatten(1, 2))
        if self.sketched or request.sketched_factors or self.kernel is not None:
            self._add_sketches(matrices, half__b)
        if request.ntk and self.kernel is None and before < request.ntk_samples:
            self.kept[before] = matrices.first(request.ntk_samples - before)

    def kept_in_order(self) -> list[SampleMatrices]:
        """What is kept of the samples for the exact kernel, in the order of the batches."""
        return [self.kept[before] for before in sorted(self.kept)]

    def add_nothing(self, matrices: SampleMatrices) -> None:
        """Take part in what the processes add up together, with a batch that is not counted."""
        if self.shards is not None and (self.request.gradient or self.halves):
            self._add_mean(matrices, torch.full((matrices.n_samples,), -1))

    def _add_mean(self, matrices: SampleMatrices, half__b: torch.Tensor) -> None:
        first = matrices.d__bgto if matrices.d__bgto is not None else matrices.rows__bti
        assert first is not None
        dtype = torch.promote_types(first.dtype, torch.float32)
        if not self.mean_sums:
            zeros = self.shards.zeros if self.shards else torch.zeros
            count = 2 if self.halves else 1
            self.mean_sums = [zeros(self.shape, dtype=dtype, device=first.device) for _ in range(count)]
        if self.shards is not None:
            for half, share in enumerate(self.mean_sums):
                part = torch.zeros(self.shape, dtype=dtype, device=first.device)
                of_half__b = half__b if len(self.mean_sums) == 2 else half__b.clamp_max(0)
                chosen__b = samples_of(half, of_half__b)
                if chosen__b is not None:
                    matrices.add_sum_to(part, chosen__b)
                self.shards.add(share, part)
            return
        if len(self.mean_sums) == 1:
            matrices.add_sum_to(self.mean_sums[0])
            return
        for half, total in enumerate(self.mean_sums):
            chosen__b = samples_of(half, half__b)
            if chosen__b is not None:
                matrices.add_sum_to(total, chosen__b)

    def _add_sketches(self, matrices: SampleMatrices, half__b: torch.Tensor) -> None:
        if self.projection is None or matrices.d__bgto is None or matrices.z__bgti is None:
            return
        d__bto, z__bti = matrices.d__bgto[:, 0], matrices.z__bgti[:, 0]
        p__btl = self.projection.of_gradients(d__bto)
        if self.request.sketched_factors:
            rows__no = d__bto.flatten(0, 1)
            self.output_sketch.add(rows__no, p__btl.flatten(0, 1), _sum_of_squares(rows__no, self.threads))
        if not self.sketched and self.kernel is None:
            return
        q__btk = self.projection.of_inputs(z__bti)
        self.projection.forget()
        if self.kernel is not None:
            self.kernel.add(p__btl, q__btk)
        if self.sketched:
            if self.spectrum_sketch is None:
                self.spectrum_sketch = SpectrumSketch(self.shape[1], self.shape[2], d__bto)
            for half in (0, 1):
                chosen__b = samples_of(half, half__b)
                if chosen__b is not None:
                    rows = [tensor[chosen__b].flatten(0, 1) for tensor in (d__bto, z__bti, p__btl, q__btk)]
                    self.spectrum_sketch.add(half, rows[0], rows[1], rows[2], rows[3])

    def result(self, damping: float) -> MethodStatistics:
        """The statistics of everything added so far; None for what was not asked for."""
        request, n = self.request, sum(self.n_samples)
        found: dict[str, Any] = {}
        if request.mean:
            mean = self.mean_sums[0] if len(self.mean_sums) == 1 else self.mean_sums[0] + self.mean_sums[1]
            found["energy"] = squared_norm(mean, self.threads) / n**2
        if request.fisher:
            found["trace"] = self.trace_sum / n
        if request.mean and request.fisher:
            found["signal"] = found["energy"] - (found["trace"] - found["energy"]) / (n - 1)
        if request.input_scale and self.inputs.n_tokens:
            found["input_mean_square"] = self.inputs.square_sum / self.inputs.n_tokens
        return MethodStatistics(**found, **self._factors(), **self._spectra(damping))

    def _factors(self) -> dict[str, Any]:
        """Factors and their sketches, where they are asked for; what is looked up has none."""
        found: dict[str, Any] = {}
        n = sum(self.n_samples)
        if self.request.factors and self.output_factor.total is not None:
            found["input_factor"] = self.inputs.exact_factor()
            found["output_factor"] = (self.output_factor.result() / n).float().cpu().numpy()
        if self.projection is not None and self.output_sketch.total__ik is not None:
            like, (_, n_out, n_in) = self.output_sketch.total__ik, self.shape
            found["output_sketch"] = self.output_sketch.result(self.projection.psi__ol(n_out, like), n)
            assert self.inputs.projection is not None
            drawn = self.inputs.projection.omega__ik(n_in, like)
            found["input_sketch"] = self.inputs.sketch.result(drawn, self.inputs.n_tokens)
        return found

    def _spectra(self, damping: float) -> dict[str, Any]:
        """Split-half spectra of all heads together, descending; empty where not asked for."""
        found: dict[str, Any] = {}
        if 0 in self.n_samples:
            return found
        if self.spectrum_sketch is not None:
            assert self.projection is not None
            spectrum, error = self.spectrum_sketch.result(self.n_samples, self.projection)
            found |= {"sketched_spectrum": spectrum, "sketch_error": error}
        if not self.halves:
            return found
        halves = [total.double() / count for total, count in zip(self.mean_sums, self.n_samples, strict=True)]
        heads = range(self.shape[0])
        if self.request.spectrum or (self.request.sketched_spectrum and not self.sketched):
            plain = _descending([split_half_spectrum(halves[0][head], halves[1][head]) for head in heads])
            if self.request.spectrum:
                found["plain_spectrum"] = plain
            if self.request.sketched_spectrum and not self.sketched:
                found |= {"sketched_spectrum": plain, "sketch_error": 0.0}
        if self.request.whitened_spectrum and self.output_factor.total is not None:
            place = halves[0].device  # main memory where the sums were spread over processes
            inputs = self.inputs.factor.result().to(place) / self.inputs.n_tokens
            outputs = self.output_factor.result().to(place) / sum(self.n_samples)
            found["spectrum"] = _descending(
                [
                    split_half_spectrum(halves[0][head], halves[1][head], inputs[head], outputs[head], damping)
                    for head in heads
                ]
            )
        return found


def samples_of(half: int, half__b: torch.Tensor) -> slice | torch.Tensor | None:
    """Where a batch has the samples of a half: a slice where they are together, which copies nothing; None for none."""
    chosen__b = (half__b == half).nonzero().flatten()
    if len(chosen__b) == 0:
        return None
    first, last = int(chosen__b[0]), int(chosen__b[-1])
    return slice(first, last + 1) if last - first + 1 == len(chosen__b) else chosen__b


def _sum_of_squares(rows: torch.Tensor, threads: int) -> float:
    if uses_kernels(rows):
        return float(kernels.row_sum_of_squares(rows.contiguous(), threads=threads).sum())
    return float(rows.square().sum(dtype=torch.float64))


def squared_norm(tensor: torch.Tensor, threads: int) -> float:
    """Sum of squares, in float64."""
    if uses_kernels(tensor):
        return kernels.gradient_energy(tensor, threads=threads)
    return float(tensor.square().sum(dtype=torch.float64))


def _descending(spectra: list[np.ndarray]) -> np.ndarray:
    return np.sort(np.concatenate(spectra))[::-1].copy()
