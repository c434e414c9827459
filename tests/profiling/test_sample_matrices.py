"""The pieces of the pass against plain NumPy, in each of the forms that they choose between by size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerlens import kernels
from layerlens.profiling.sample_matrices import SampleMatrices, gram_matrix, norms_on_device
from layerlens.profiling.statistics.factors import add_gram, whole_gram

RELATIVE = 1e-12  # float64, sums of fewer than 1000 products


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("tokens", "n_out", "n_in", "form"), [(3, 20, 30, "gram"), (60, 5, 4, "direct")])
def test_norms_on_a_device_are_those_of_the_kernel(tokens: int, n_out: int, n_in: int, form: str):
    """The torch form that a GPU runs, here on the CPU; both of its ways."""
    assert kernels.ghost_form(tokens, n_in, n_out) == form
    d, z = random(4, tokens, n_out), random(4, tokens, n_in)
    np.testing.assert_allclose(norms_on_device(d, z), kernels.ghost_norms(z, d), rtol=RELATIVE)


@pytest.mark.parametrize(("tokens", "features"), [(1, 40), (30, 3)])
def test_the_gram_matrix_of_uneven_batches_in_both_of_its_ways(tokens: int, features: int):
    batches = [
        SampleMatrices(random(n, 2, tokens + n, features), random(n, 2, tokens + n, features + 1)) for n in (1, 3)
    ]
    each = [
        np.einsum("bgto,bgti->bgoi", batch.d__bgto, batch.z__bgti).reshape(batch.n_samples, -1) for batch in batches
    ]
    flat = np.concatenate(each)
    expected = flat @ flat.T
    np.testing.assert_allclose(gram_matrix(batches, 1), expected, rtol=RELATIVE, atol=RELATIVE * np.trace(expected))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gram_sums_are_symmetric_and_equal_the_product(groups: int, dtype: torch.dtype):
    total = torch.zeros(groups, 7, 7, dtype=torch.promote_types(dtype, torch.float32))
    batches = [random(groups, rows, 7).to(dtype) for rows in (5, 2)]
    for rows in batches:
        add_gram(total, rows)
    joined = torch.cat(batches, dim=1).double()
    result = whole_gram(total).numpy()
    np.testing.assert_array_equal(result, result.transpose(0, 2, 1))
    tolerance = RELATIVE if dtype == torch.float64 else 1e-5  # half precision is summed in float32
    np.testing.assert_allclose(result, (joined.mT @ joined).numpy(), rtol=tolerance, atol=tolerance)
