"""Whitened split-half spectra: exact where there is no noise, unbiased where there is."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from layerlens.models import ModelSpec
from layerlens.models.model_spec import LayerSpec
from layerlens.profiling.measure import measure
from layerlens.profiling.request import StatisticsRequest
from layerlens.profiling.statistics import spectra
from layerlens.tasks.batches import Batch
from layerlens.utils.progress import silent


def split_half_spectrum(*matrices, damping=0.0):
    return spectra.split_half_spectrum(*map(torch.from_numpy, matrices), damping=damping)


def test_without_noise_it_is_the_squared_spectrum_of_the_whitened_matrix():
    rng = np.random.default_rng(0)
    gradient = rng.standard_normal((5, 8))
    a, s = rng.standard_normal((8, 20)), rng.standard_normal((5, 20))
    a, s = a @ a.T / 20, s @ s.T / 20
    damping = 1e-3
    damped_a = a + damping * np.trace(a) / 8 * np.eye(8)
    damped_s = s + damping * np.trace(s) / 5 * np.eye(5)
    roots = [np.linalg.inv(scipy.linalg.sqrtm(factor).real) for factor in (damped_s, damped_a)]
    expected = np.linalg.svd(roots[0] @ gradient @ roots[1], compute_uv=False) ** 2
    got = split_half_spectrum(gradient, gradient, a, s, damping=damping)
    # Both routes condition like the damped factors (about 1e4 here): 1e4 · 2^-53 ≈ 1e-12, with a margin of 1e3.
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_noise_does_not_inflate_it():
    rng = np.random.default_rng(1)
    n_out, n_in, noise, trials = 12, 10, 0.3, 200
    truth = np.outer(rng.standard_normal(n_out), rng.standard_normal(n_in))
    truth /= np.linalg.norm(truth)
    split, plain = [], []
    for _ in range(trials):
        halves = [truth + noise * rng.standard_normal((n_out, n_in)) for _ in range(2)]
        split.append(split_half_spectrum(*halves, np.eye(n_in), np.eye(n_out), damping=1e-9).sum())
        plain.append(np.sum(((halves[0] + halves[1]) / 2) ** 2))
    # The truth has energy 1; the plain estimate carries noise²·n_out·n_in/2 = 5.4 on top of it.
    assert np.mean(plain) > 5.0
    # Σ_i σ_i⁽¹⁾ u_iᵀ G⁽²⁾ v_i = <G⁽¹⁾, G⁽²⁾>, unbiased; four standard errors of the mean.
    assert abs(np.mean(split) - 1.0) < 4 * np.std(split) / np.sqrt(trials)


def test_a_module_without_gradient_has_no_gain():
    zero = np.zeros((3, 4))
    assert split_half_spectrum(zero, zero, np.eye(4), np.zeros((3, 3)), damping=1e-2) == pytest.approx(np.zeros(3))


@pytest.mark.parametrize("name", ["spectrum", "sketched_spectrum"])
def test_small_singular_values_are_not_lost(name: str):
    """Squares from 1 down to 1e-10: eigenvalues of a float32 Gram matrix would be noise below 1e-7 of the largest.

    One layer y = W x with loss ⟨y, d⟩, so that a sample's gradient is d xᵀ exactly; the samples of each half add up to
    U diag(σ) Vᵀ. Sums in float64 round at 1e-16 of the largest value, which is 1e-11 of the smallest.
    """
    size = 6
    rng = np.random.default_rng(3)
    left, right = (np.linalg.qr(rng.standard_normal((size, size)))[0] for _ in range(2))
    sigma = np.logspace(0, -5, size)
    pairs = [part for pair in zip(left.T * np.sqrt(sigma)[:, None], right.T * np.sqrt(sigma)[:, None], strict=True)
             for part in [pair, pair]]  # fmt: skip
    targets, inputs = (torch.from_numpy(np.array(side)) for side in zip(*pairs, strict=True))
    model = torch.nn.Sequential(torch.nn.Linear(size, size)).double()
    layer = LayerSpec("0", size * size + size, "linear", n_in=size, n_out=size, methods=("lora",))
    batch = Batch({"input": inputs}, targets, torch.arange(2 * size))
    statistics = measure(
        model, ModelSpec("one", size * size + size, [layer]), [batch],
        request=StatisticsRequest.of([name]), sequence_length=1, threads=1, progress=silent,
        loss=lambda output, batch: (output * batch.labels).sum(dim=1),
    )  # fmt: skip
    found = statistics.layers[0].by_method["lora"]
    values = found.plain_spectrum if name == "spectrum" else found.sketched_spectrum
    # Each half has the mean of its 6 rank-one gradients: σ_i / 6.
    np.testing.assert_allclose(values, (sigma / size) ** 2, rtol=1e-9)
