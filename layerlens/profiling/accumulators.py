"""Running sums of the gradient matrices of one layer, from which every statistic of DESIGN section 4 follows.

Axes of a batch: b samples, g heads (1 for a plain module), t tokens, o outputs, i inputs of the option.
"""

from __future__ import annotations

import numpy as np
import torch

from layerlens import kernels
from layerlens.models import MethodStatistics
from layerlens.profiling.spectra import split_half_spectrum


class MatrixAccumulator:
    """Sums over samples of M_n = Σ_t d_t z_tᵀ (in two halves), of ‖M_n‖², of z² and, if asked for, of z zᵀ and d dᵀ.

    Sums over samples are kept in float64; the matrices of single samples have the model's precision.
    """

    def __init__(self, with_factors: bool, threads: int) -> None:
        self.with_factors = with_factors
        self.threads = threads
        self.n_samples = [0, 0]
        self.n_tokens = 0
        self.trace_sum = 0.0
        self.input_square_sum = 0.0
        self.half_sums: list[torch.Tensor] = []
        self.input_factor: torch.Tensor | None = None
        self.output_factor: torch.Tensor | None = None

    def add(self, d__bgto: torch.Tensor, z__bgti: torch.Tensor, mask__bt: torch.Tensor, half__b: torch.Tensor) -> None:
        """Add one batch.

        Args:
            d__bgto: gradient of each sample's own loss with respect to the outputs; zero at padded tokens.
            z__bgti: inputs of the option.
            mask__bt: 1 for tokens, 0 for padding.
            half__b: 0 or 1, which half of the calibration set each sample belongs to.
        """
        mask__b1t1 = mask__bt[:, None, :, None].to(d__bgto.dtype)
        d__bgto = d__bgto * mask__b1t1
        matrices__bgoi = d__bgto.transpose(-1, -2) @ z__bgti
        flat = matrices__bgoi.reshape(matrices__bgoi.shape[0], -1).cpu().contiguous()
        self.trace_sum += float(kernels.row_sum_of_squares(flat, threads=self.threads).sum())
        in_half__hb = torch.stack([half__b == 0, half__b == 1])
        sums__hn = in_half__hb.to(flat) @ flat  # one pass over the matrices, which are the bulk of all memory traffic
        if not self.half_sums:
            self.half_sums = [torch.zeros(matrices__bgoi.shape[1:], dtype=torch.float64) for _ in range(2)]
        for half in (0, 1):
            self.n_samples[half] += int(in_half__hb[half].sum())
            self.half_sums[half] += sums__hn[half].view(matrices__bgoi.shape[1:])
        z__bgti = z__bgti * mask__b1t1
        self.n_tokens += int(mask__bt.sum())
        self.input_square_sum += float((z__bgti.double() ** 2).sum()) / (z__bgti.shape[1] * z__bgti.shape[-1])
        if self.with_factors:
            self.input_factor = _add_gram(self.input_factor, z__bgti)
            self.output_factor = _add_gram(self.output_factor, d__bgto)

    def result(self, damping: float) -> MethodStatistics:
        """The statistics of everything added so far."""
        n = sum(self.n_samples)
        mean = (self.half_sums[0] + self.half_sums[1]).numpy() / n
        energy = kernels.gradient_energy(mean, threads=self.threads)
        trace = self.trace_sum / n
        return MethodStatistics(
            energy=energy,
            trace=trace,
            signal=energy - (trace - energy) / (n - 1),
            input_mean_square=self.input_square_sum / self.n_tokens,
            spectrum=self._spectrum(damping) if self.with_factors else np.zeros(0),
        )

    def _spectrum(self, damping: float) -> np.ndarray:
        """Spectra of all heads together, descending."""
        if self.input_factor is None or self.output_factor is None or 0 in self.n_samples:
            return np.zeros(0)
        halves = [total.numpy() / count for total, count in zip(self.half_sums, self.n_samples, strict=True)]
        inputs = self.input_factor.numpy() / self.n_tokens
        outputs = self.output_factor.numpy() / sum(self.n_samples)
        heads = [
            split_half_spectrum(halves[0][head], halves[1][head], inputs[head], outputs[head], damping)
            for head in range(inputs.shape[0])
        ]
        return np.sort(np.concatenate(heads))[::-1].copy()


def _add_gram(total: torch.Tensor | None, rows__bgtk: torch.Tensor) -> torch.Tensor:
    """total + Σ over b, t of row rowᵀ, for each g; float64 [g, k, k]."""
    rows__gnk = rows__bgtk.transpose(0, 1).flatten(1, 2)
    gram = (rows__gnk.transpose(-1, -2) @ rows__gnk).double().cpu()
    return gram if total is None else total + gram
