"""The diagonal of the empirical Fisher against one backward pass per sample, and its sum against the trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from brute_force import pieces, profile, sample_gradients
from test_architectures import CASES, spec_of

from layerlens.exceptions import ActivationCacheError
from layerlens.profiling import activation_cache_from_gradients
from layerlens.profiling.statistics.fisher_diagonal import QUANTILES

RELATIVE = 1e-9  # float64 on both ways, as in test_architectures


@pytest.mark.parametrize("name", ["bert-classification", "gpt2-causal-tied", "llama-causal-gqa"])
def test_it_is_the_mean_square_of_every_weight_s_sample_gradients(name: str):
    case = CASES[name]
    torch.manual_seed(1)
    model = case.make().double().eval()
    batch = case.batch()
    gradients = sample_gradients(model, batch, case.loss)
    names = ("fisher", "fisher_diagonal")
    found = profile(model, spec_of(model), pieces(batch, 2, 1, 2), case.loss, statistics=names, everything=False)
    assert found.layers
    for layer, spec in zip(found.layers, spec_of(model).layers, strict=True):
        for method, measured in layer.by_method.items():
            extra = {name.partition(".")[2]: value for name, value in (measured.extra or {}).items()}
            size = {"lora": spec.n_out * spec.n_in, "adapter": spec.n_out**2}.get(method)
            if size is not None:
                assert extra["mean"] * size == pytest.approx(measured.trace, rel=RELATIVE)
            assert extra["of_outputs"].sum() == pytest.approx(measured.trace, rel=RELATIVE)
            if method != "lora":
                continue
            diagonal = np.square(gradients[f"{layer.layer}.weight"]).mean(axis=0)
            weight = model.get_submodule(layer.layer).weight
            diagonal = diagonal.reshape(weight.shape)
            if not isinstance(model.get_submodule(layer.layer), torch.nn.Linear):
                diagonal = diagonal.T  # Conv1D
            scale = diagonal.max()
            np.testing.assert_allclose(extra["of_outputs"], diagonal.sum(axis=1), rtol=RELATIVE, atol=1e-12 * scale)
            quantiles = np.quantile(diagonal, QUANTILES)
            np.testing.assert_allclose(extra["quantiles"], quantiles, rtol=RELATIVE, atol=1e-12 * scale)
            participation = diagonal.sum() ** 2 / (diagonal.size * np.square(diagonal).sum())
            assert extra["participation"] == pytest.approx(participation, rel=RELATIVE)


def test_weights_that_are_looked_up_have_none():
    case = CASES["bert-masked-lm-tied"]
    model = case.make().eval()
    found = profile(model, spec_of(model), [case.batch()], case.loss, statistics=("fisher_diagonal",))
    assert found.other_weights
    assert all(measured.extra is None for measured in found.other_weights.values())
    assert all(measured.extra for layer in found.layers for measured in layer.by_method.values())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scalars_of_ones_own_gradients_are_those_of_numpy(dtype: type):
    generator = np.random.default_rng(0)
    gradients = {name: generator.standard_normal((9, *shape)).astype(dtype) for name, shape in
                 {"a": (4, 5), "b": (300,), "c": (2, 3, 3, 3)}.items()}  # fmt: skip
    cache = activation_cache_from_gradients(gradients | {"d": torch.from_numpy(gradients["a"])}, threads=2)
    for name, each in gradients.items():
        rows = each.reshape(9, -1).astype(np.float64)
        # float32 products round at 6e-8, a float64 sum of nine rows far below.
        relative = 1e-6 if dtype == np.float32 else 1e-12
        assert cache[name]["grad_norm"] == pytest.approx(np.linalg.norm(rows.mean(axis=0)), rel=relative)
        assert cache[name]["fisher_trace"] == pytest.approx(np.square(rows).sum(axis=1).mean(), rel=relative)
    assert cache["d"] == cache["a"]


@pytest.mark.parametrize(
    ("gradients", "reason"),
    [
        (np.zeros((0, 3)), "at least one"),
        ("text", "per-sample gradients"),
        (np.full((2, 3), np.nan), "is not finite"),
        (np.zeros((2, 3), dtype=np.int64), "per-sample gradients"),
    ],
)
def test_gradients_that_are_none_are_refused_by_layer(gradients: object, reason: str):
    with pytest.raises(ActivationCacheError, match=rf"^first: .*{reason}"):
        activation_cache_from_gradients({"first": gradients})
