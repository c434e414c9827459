"""Sketched statistics: exact to within the error that is told with them, whatever the batches and threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as hf
from brute_force import pieces, profile, sample_gradients
from test_architectures import CASES, spec_of

from layerlens.models import LayerSpec, ModelSpec
from layerlens.profiling import request as request_module
from layerlens.profiling.projections import COLUMNS, PROBES, ROWS, Projection, worth_sketching
from layerlens.profiling.statistics.ntk import kernel_statistics
from layerlens.profiling.statistics.sketches import add_rows, factor_from, spectrum_from
from layerlens.profiling.statistics_file import load_statistics, statistics_to_bytes
from layerlens.tasks import Batch
from layerlens.tasks.losses import classification_loss

WIDE = 640  # the smallest square matrix that is worth sketching is 2 · 248 wide


def decaying(n_out: int, n_in: int, power: float, seed: int = 0) -> torch.Tensor:
    """A matrix with singular values i^-power."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((n, min(n_out, n_in))))[0] for n in (n_out, n_in))
    return torch.from_numpy((left * np.arange(1.0, min(n_out, n_in) + 1) ** -power) @ right.T)


def sketch_of(matrix: torch.Tensor, name: str = "test") -> tuple[np.ndarray, float]:
    """The sketched spectrum of ``matrix``, added row by row of its rows as tokens, the same for both halves."""
    n_out, n_in = matrix.shape
    projection = Projection(name)
    right, left = matrix.new_zeros(2, n_out, COLUMNS + PROBES), matrix.new_zeros(2, ROWS, n_in)
    d, z = torch.eye(n_out, dtype=matrix.dtype), matrix  # Σ_t e_t m_tᵀ
    for half in (0, 1):
        add_rows(right[half], d, projection.of_inputs(z))
        add_rows(left[half], projection.of_gradients(d), z)
    return spectrum_from(right, left, [1, 1], projection)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_the_error_that_is_told_bounds_every_singular_value(power: float):
    """Weyl: |σ_i − σ̂_i| ≤ ‖G − Ĝ‖_F, which 8 probes estimate to about 1/√(2·8) = 25 % (χ² with the tail's freedom)."""
    matrix = decaying(WIDE, WIDE, power)
    spectrum, error = sketch_of(matrix)
    exact = torch.linalg.svdvals(matrix).numpy()[: len(spectrum)]
    told = error * float(torch.linalg.matrix_norm(matrix))
    assert np.abs(np.sqrt(np.maximum(spectrum, 0.0)) - exact).max() <= 2.0 * told
    # No more than 80 columns can do is (Σ_{i>80} σ_i²)^½; being within some times that is what the sketch promises.
    best = float(np.sqrt(np.square(np.arange(COLUMNS + 1.0, WIDE + 1) ** -power).sum()))
    assert told <= 4.0 * best


def test_a_single_view_sketch_would_lose_the_tail_without_saying_so():
    """The trap: the 64th singular value of G Ω / √80 is off by percents; here it is within what is told, and less."""
    matrix = decaying(WIDE, WIDE, 2.0)
    exact = torch.linalg.svdvals(matrix).numpy()
    omega = Projection("test").omega__ik(WIDE, matrix)[:, :COLUMNS]
    single = torch.linalg.svdvals(matrix @ omega / COLUMNS**0.5).numpy()
    spectrum, _ = sketch_of(matrix)
    two_sided = np.sqrt(np.maximum(spectrum, 0.0))
    errors = [np.abs(found[31:64] / exact[31:64] - 1.0).max() for found in (single, two_sided)]
    assert errors[0] > 0.2
    assert errors[1] < errors[0] / 2


def test_a_matrix_of_low_rank_is_found_exactly():
    torch.manual_seed(0)
    matrix = torch.randn(WIDE, 30, dtype=torch.float64) @ torch.randn(30, WIDE, dtype=torch.float64)
    spectrum, error = sketch_of(matrix)
    exact = torch.linalg.svdvals(matrix).numpy()[:30]
    # float64 through an ill-conditioned solve (Ψ: 160 × 80): 1e-9 is a million roundings.
    np.testing.assert_allclose(np.sqrt(spectrum[:30]), exact, rtol=1e-9)
    assert error < 1e-6
    assert np.abs(spectrum[30:]).max() < 1e-9 * exact[0] ** 2


@pytest.mark.parametrize(("features", "rank"), [(300, 40), (300, 300), (30, 30)])
def test_a_factor_s_sketch_lacks_exactly_the_trace_that_it_tells(features: int, rank: int):
    torch.manual_seed(1)
    rows = torch.randn(500, rank, dtype=torch.float64) @ decaying(rank, features, 1.0)
    exact = rows.mT @ rows / 500
    projection, total, squares = Projection("factor"), rows.new_zeros(features, COLUMNS), 0.0
    for part in rows.split(200):
        add_rows(total, part, projection.of_inputs(part)[:, :COLUMNS])
        squares += float(part.square().sum())
    found = factor_from(total, squares, projection.omega__ik(features, rows), 500)
    approximation = (found.vectors * found.values.astype(np.float32)) @ found.vectors.T
    assert found.trace == pytest.approx(float(exact.trace()), rel=1e-12)
    missing = float(exact.trace()) - found.values.sum()
    assert found.error == pytest.approx(missing / found.trace, abs=1e-9)
    if rank <= COLUMNS:
        assert found.error < 1e-6
        np.testing.assert_allclose(approximation, exact.numpy(), atol=1e-5 * float(exact.abs().max()))
    # A − Â is positive semidefinite, to the rounding of float32 vectors: no direction gets more than it has.
    assert np.linalg.eigvalsh(exact.numpy() - approximation).min() > -1e-5 * found.trace


def test_a_layer_without_gradient_has_an_empty_sketch_that_can_be_kept(tmp_path):
    model, batch = wide()
    names = ("sketched_spectrum", "sketched_factors")

    def nothing(output: torch.Tensor, batch: Batch) -> torch.Tensor:
        return 0.0 * classification_loss(output, batch)

    found = profile(model, WIDE_SPEC, [batch], nothing, statistics=names, everything=False)
    measured = found.layers[0].by_method["lora"]
    assert measured.output_sketch.trace == measured.output_sketch.values.sum() == measured.output_sketch.error == 0.0
    assert not measured.sketched_spectrum.any()
    path = tmp_path / "statistics.safetensors"
    path.write_bytes(statistics_to_bytes(WIDE_SPEC, found))
    again = load_statistics(path)[1].layers[0].by_method["lora"]
    np.testing.assert_array_equal(again.input_sketch.vectors, measured.input_sketch.vectors)
    assert again.output_sketch.trace == 0.0


class Wide(torch.nn.Module):
    """Two wide layers, so that sketches are what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Linear(WIDE, WIDE), torch.nn.Linear(WIDE, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x))).mean(dim=1)


WIDE_SPEC = ModelSpec(
    "wide",
    1,
    [LayerSpec("one", WIDE, "linear", methods=("lora",)), LayerSpec("two", WIDE, "linear", methods=("lora",))],
)


def wide() -> tuple[Wide, Batch]:
    torch.manual_seed(2)
    model = Wide().double().eval()
    x = torch.randn(12, 5, WIDE, dtype=torch.float64)
    return model, Batch({"x": x}, torch.arange(12) % 3, torch.arange(12))


def test_in_a_model_they_are_the_exact_ones_where_the_gradient_has_few_directions():
    """12 samples of 5 tokens give gradients of rank 60 at most, fewer than the columns: everything is found exactly."""
    model, batch = wide()
    assert worth_sketching((1, WIDE, WIDE))
    assert not worth_sketching((1, 3, WIDE))
    names = ("spectrum", "sketched_spectrum", "factors", "sketched_factors")
    found = profile(model, WIDE_SPEC, pieces(batch, 5, 7), classification_loss, statistics=names, everything=False)
    for layer in found.layers:
        measured = layer.by_method["lora"]
        # Vectors of near-equal values may turn into each other: the sums are what is well defined.
        exact, sketched = measured.plain_spectrum, measured.sketched_spectrum
        assert sketched.sum() == pytest.approx(exact.sum(), abs=1e-6 * np.abs(exact).sum())
        assert measured.sketch_error is not None
        assert measured.sketch_error < 1e-6
        for side in ("input", "output"):
            sketch, factor = getattr(measured, f"{side}_sketch"), getattr(measured, f"{side}_factor")[0]
            assert sketch.trace == pytest.approx(np.trace(factor), rel=1e-6)  # the factor is float32
            values = np.linalg.eigvalsh(factor.astype(np.float64))[::-1][: len(sketch.values)]
            np.testing.assert_allclose(sketch.values, values, atol=1e-5 * values[0])


def test_factors_are_the_means_over_tokens_and_samples():
    model, batch = wide()
    found = profile(model, WIDE_SPEC, [batch], classification_loss, statistics=("factors",), everything=False)
    measured = found.layers[0].by_method["lora"]
    z = batch.inputs["x"].flatten(0, 1)
    np.testing.assert_allclose(measured.input_factor[0], (z.mT @ z / 60).numpy(), rtol=1e-6, atol=1e-6)
    hidden = model.one(batch.inputs["x"])
    (d,) = torch.autograd.grad(classification_loss(model.two(torch.tanh(hidden)).mean(dim=1), batch).sum(), hidden)
    d = d.flatten(0, 1)
    scale = float((d.mT @ d).abs().max()) / 12
    np.testing.assert_allclose(measured.output_factor[0], (d.mT @ d / 12).numpy(), rtol=1e-5, atol=1e-6 * scale)
    assert measured.energy is None
    assert measured.trace is None


@pytest.mark.parametrize("threads", [1, 2])
def test_batches_and_threads_do_not_change_them(threads: int):
    model, batch = wide()
    names = ("sketched_spectrum", "sketched_factors")
    cuts = ([12], [5, 7], [1, 1, 10])
    runs = [
        profile(
            model, WIDE_SPEC, pieces(batch, *cut), classification_loss, statistics=names, everything=False, threads=n
        )
        for cut, n in zip(cuts, (1, threads, threads), strict=True)
    ]
    for other in runs[1:]:
        for one, again in zip(runs[0].layers, other.layers, strict=True):
            a, b = one.by_method["lora"], again.by_method["lora"]
            assert b.sketched_spectrum.sum() == pytest.approx(a.sketched_spectrum.sum(), rel=1e-9)
            np.testing.assert_allclose(b.input_sketch.values, a.input_sketch.values, atol=1e-9 * a.input_sketch.trace)
            assert b.output_sketch.trace == pytest.approx(a.output_sketch.trace, rel=1e-12)


def test_a_sketched_kernel_is_within_the_error_that_it_tells(monkeypatch: pytest.MonkeyPatch):
    """40 samples, of which exactness is allowed for 3 here, so that the sketch is what runs."""
    monkeypatch.setattr(request_module, "EXACT_NTK_SAMPLES", 3)
    torch.manual_seed(3)
    config = hf.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, num_labels=3,
        initializer_range=0.3,
    )  # fmt: skip
    model = hf.BertForSequenceClassification(config).double().eval()
    ids = torch.randint(1, 40, (40, 6))
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.arange(40) % 3, torch.arange(40))
    spec = spec_of(model)
    gradients = sample_gradients(model, batch, classification_loss)
    names = [f"{layer.name}.weight" for layer in spec.layers if "lora" in layer.methods]
    exact = sum(gradients[name] @ gradients[name].T for name in names)
    kernels = [
        profile(model, spec, pieces(batch, *cut), classification_loss, statistics=("ntk",), everything=False).kernel
        for cut in ((40,), (13, 27))
    ]
    found = kernels[0]
    np.testing.assert_allclose(kernels[1].gram, found.gram, atol=1e-9 * np.abs(exact).max())
    error = np.linalg.norm(found.gram - exact) / np.linalg.norm(exact)
    # The spread of four sketches has three degrees of freedom in each entry, many entries, few of them independent:
    # within a factor of two. What it can be at most follows from 16 projections on each side, four times, 12 layers.
    assert error / 2 < found.relative_error < 2 * error
    assert error < 0.25
    assert found.trace == pytest.approx(np.trace(exact), rel=0.15)
    values = np.linalg.eigvalsh(exact)
    assert found.effective_rank == pytest.approx(values.sum() ** 2 / np.square(values).sum(), rel=0.4)


def test_the_kernel_s_energy_is_free_of_the_sketches_noise():
    """Estimates with independent noise: plain ‖mean‖² is too large by the noise, products of different ones are not."""
    rng = np.random.default_rng(0)
    truth = np.eye(60)
    energies, plain = [], []
    for _ in range(50):
        grams = truth + 0.2 * rng.standard_normal((4, 60, 60))
        found = kernel_statistics(grams, np.zeros(60))
        energies.append(found.trace**2 / found.effective_rank)
        plain.append(np.square(found.gram).sum())
    assert np.mean(plain) > 1.4 * 60  # 0.04/4 · 60² = 36 on top of 60
    assert np.mean(energies) == pytest.approx(60, abs=4 * np.std(energies) / 50**0.5)


def test_only_the_layers_own_weights_are_kept_for_the_kernel():
    """Adapters' and prefixes' matrices have no part in it."""
    from layerlens.profiling.capture import Capture
    from layerlens.profiling.request import StatisticsRequest

    model, case = CASES["bert-classification"].make().eval(), CASES["bert-classification"]
    model.requires_grad_(False)
    capture = Capture(model, spec_of(model), StatisticsRequest.of(["ntk"]), 1)
    with capture.open():
        capture.run(case.batch(), case.loss)
    assert {key[1] for key, one in capture.sums.accumulators.items() if one.kept} == {"lora"}
