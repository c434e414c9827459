"""A statistic that is registered from outside is measured, saved, resumed, streamed, predicted, kept and cached."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from brute_force import pieces, profile, sample_gradients
from own_statistic import NAME, STATISTIC, TOTAL, registered
from streamed_support import save
from test_architectures import CASES, spec_of
from test_saved_pass import KEY, StoppedAfter

from layerlens.cli.main import app
from layerlens.exceptions import ConfigurationError, ProfilingError
from layerlens.jobs.memory_mode import _sum_bytes
from layerlens.models import ModelStatistics
from layerlens.profiling.cache import SensitivityCache
from layerlens.profiling.measure import measure
from layerlens.profiling.request import BY_SAMPLES, StatisticsRequest
from layerlens.profiling.statistics_file import load_statistics, statistics_to_bytes
from layerlens.registry import STATISTICS
from layerlens.utils.progress import silent


@pytest.fixture(autouse=True)
def own() -> Iterator[None]:
    with registered():
        yield


def measured() -> tuple[ModelStatistics, dict[str, np.ndarray]]:
    """Of three batches, and every sample's gradients by brute force."""
    case = CASES["bert-classification"]
    model = case.make().double().eval()
    batch = case.batch()
    found = profile(model, spec_of(model), pieces(batch, 2, 1, 2), case.loss, statistics=(NAME,), everything=False)
    return found, sample_gradients(model, batch, case.loss)


def test_it_is_what_one_backward_pass_per_sample_gives():
    found, gradients = measured()
    of_samples = np.zeros(5)
    for layer in found.layers:
        if "lora" in layer.by_method:
            biases = gradients[f"{layer.layer}.bias"]  # a bias' gradient is the sum of the output gradients
            extra = layer.by_method["lora"].extra
            assert extra is not None
            np.testing.assert_allclose(extra[f"{NAME}.mean"], biases.mean(axis=0), rtol=1e-9, atol=1e-15)
            of_samples += np.square(biases).sum(axis=1)
    assert found.extra is not None
    np.testing.assert_allclose(found.extra[f"{NAME}.of_samples"], of_samples, rtol=1e-9)
    squares = [layer.by_method["lora"].value(f"{NAME}.square") for layer in found.layers if "lora" in layer.by_method]
    assert np.mean(found.extra[f"{NAME}.over_layers"]) == pytest.approx(sum(squares), rel=1e-9)
    assert found.extra[f"{NAME}.layers"] == len(squares)


def test_its_file_has_it_again(tmp_path: Path):
    found, _ = measured()
    spec = spec_of(CASES["bert-classification"].make())
    path = tmp_path / "statistics.safetensors"
    path.write_bytes(statistics_to_bytes(spec, found))
    again = load_statistics(path)[1]
    assert statistics_to_bytes(spec, again) == path.read_bytes()
    for one, other in zip(found.layers, again.layers, strict=True):
        for method, values in one.by_method.items():
            for name, value in (values.extra or {}).items():
                np.testing.assert_array_equal(other.by_method[method].value(name), value)


def test_an_interrupted_pass_ends_with_the_same_bits(tmp_path: Path):
    case = CASES["bert-classification"]
    model = case.make().float().eval()
    spec, batches = spec_of(model), pieces(case.batch(), 2, 1, 1, 1)

    def run(saved, progress=silent) -> bytes:
        found = measure(
            model, spec, batches, request=StatisticsRequest.of([NAME]), sequence_length=6, threads=1,
            progress=progress, loss=case.loss, saved=saved,
        )  # fmt: skip
        return statistics_to_bytes(spec, found)

    with pytest.raises(KeyboardInterrupt):
        run(SensitivityCache(tmp_path).saved_pass(KEY, 1.0), StoppedAfter(2))
    again = StoppedAfter(100)
    assert run(SensitivityCache(tmp_path).saved_pass(KEY), again) == run(None)
    assert again.ran == [2, 1, 1]


def test_a_streamed_model_gives_the_same_bytes_also_after_a_stop(tmp_path: Path):
    saved = save("llama-causal-gqa", tmp_path / "model")
    expected = saved.in_memory((NAME,))
    assert NAME.encode() in expected
    assert saved.streamed((NAME,)) == expected
    with pytest.raises(KeyboardInterrupt):  # three batches of the tail, of a block, and one of the other block
        saved.streamed((NAME,), progress=StoppedAfter(7), directory=tmp_path / "stream")
    assert saved.streamed((NAME,), directory=tmp_path / "stream") == expected


def test_its_memory_is_predicted_from_what_it_declares():
    layer = next(x for x in spec_of(CASES["bert-classification"].make()).layers if "lora" in x.methods)
    place = StatisticsRequest.of([NAME]).place((1, layer.n_out, layer.n_in), "lora", projected=True)
    one_row_each = 3 * 4  # numbers take nothing; rows of samples have no shape of their own here
    assert TOTAL.bytes(place) == 4 * layer.n_out
    added = _sum_bytes(layer, StatisticsRequest.of(["fisher", NAME]), 16)
    assert TOTAL.bytes(place) <= added - _sum_bytes(layer, StatisticsRequest.of(["fisher"]), 16)
    assert added <= TOTAL.bytes(place) + one_row_each


@pytest.mark.parametrize("finite", [True, False])
def test_what_is_not_finite_is_refused_by_name_unless_it_says_otherwise(finite: bool):
    name = "nothing"
    own = dataclasses.replace(
        STATISTIC, name=name, sums=lambda place: (), result=lambda matrix: {"value": float("nan")}, part=None,
        model_result=None, finite=finite,
    )  # fmt: skip
    STATISTICS.register(name, own)
    try:
        case = CASES["bert-classification"]
        model = case.make().eval()
        arguments = model, spec_of(model), [case.batch()], case.loss
        if finite:
            with pytest.raises(ProfilingError, match=r"the nothing\.value statistic for .* is not finite"):
                profile(*arguments, statistics=(name,), everything=False)
        else:
            profile(*arguments, statistics=(name,), everything=False)
    finally:
        STATISTICS.unregister(name)


def test_names_follow_the_registry():
    assert NAME in BY_SAMPLES or NAME in StatisticsRequest.of([NAME]).names
    with pytest.raises(ConfigurationError, match=f"known: .*{NAME}"):
        StatisticsRequest.of(["no such"])


def test_the_whole_job_measures_it_and_takes_it_from_the_cache(
    tmp_path: Path, tiny_bert_dir: Path, reviews_jsonl: Path
):
    from typer.testing import CliRunner

    config = tmp_path / "config.yaml"
    settings = {
        "model": {"name_or_path": str(tiny_bert_dir), "head_fit_samples": 20},
        "data": {"source": str(reviews_jsonl), "calibration_samples": 20, "max_length": 16, "batch_size": 8},
        "profiling": {"statistics": [NAME, "fisher_diagonal"]},
        "optimization": {"max_trainable_params": 2000, "latency_profile": {"sequence_length": 16}},
        "output": {"directory": str(tmp_path / "out")},
        "runtime": {"threads": 1, "cache_dir": str(tmp_path / "cache")},
    }
    config.write_text(json.dumps(settings))
    for again in (False, True):
        outcome = CliRunner().invoke(app, ["run", str(config), "--json"])
        assert outcome.exit_code == 0, outcome.output
        found = load_statistics(tmp_path / "out" / "statistics.safetensors")[1]
        values = [layer.by_method["lora"] for layer in found.layers if "lora" in layer.by_method]
        assert all(value.value(f"{NAME}.square") > 0.0 for value in values)
        assert all(0.0 < value.value("fisher_diagonal.participation") <= 1.0 for value in values)
        assert NAME in found.provenance["identity"]["settings"]["statistics"]
        assert len(SensitivityCache(tmp_path / "cache").entries()) == 1, again
    assert dataclasses.replace(STATISTIC, version=2).identity == f"{NAME}@2"
