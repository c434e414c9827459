"""Random configurations survive being written and read, and random bytes never do worse than a ConfigurationError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from layerlens.config import RunConfig, load_run_config, parse_run_config
from layerlens.config.yaml_source import read_yaml
from layerlens.exceptions import ConfigurationError

TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=30)
POSITIVE = st.floats(min_value=1e-12, max_value=1e18, allow_nan=False)
SIZES = st.lists(st.integers(1, 512), min_size=1, max_size=6)


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


CONFIGURATIONS = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries({"name_or_path": TEXT}, optional={"head_fit_samples": st.integers(0, 10_000)}),
        "data": st.fixed_dictionaries(
            {"source": TEXT},
            optional={
                "text_column": st.none() | TEXT,
                "label_column": st.none() | TEXT,
                "calibration_samples": st.integers(2, 10**6),
                "batch_size": st.integers(1, 512),
            },
        ),
        "optimization": st.fixed_dictionaries(
            {"max_trainable_params": st.integers(1, 10**12)},
            optional={
                "max_flops": st.none() | POSITIVE,
                "max_vram_gb": st.none() | POSITIVE,
                "lora_ranks": SIZES,
                "alpha_over_r": POSITIVE,
                "refine": st.booleans(),
                "gap_tolerance": st.floats(0, 0.99),
                "method_penalties": optional(lora=POSITIVE, adapter=POSITIVE),
                "latency_profile": optional(
                    device_type=st.sampled_from(["cpu", "gpu"]), model_family=TEXT, peak_gflops=st.none() | POSITIVE
                ),
            },
        ),
    },
    optional={
        "profiling": optional(metric_weights=st.fixed_dictionaries({"fisher": POSITIVE})),
        "output": optional(directory=TEXT),
        "runtime": optional(seed=st.integers(0, 2**31 - 1), cache_dir=st.none() | TEXT),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=CONFIGURATIONS, flow=st.booleans())
@example(
    values={"model": {"name_or_path": "yes"}, "data": {"source": "1e5"}, "optimization": {"max_flops": 1e-6}},
    flow=False,
)
@example(
    values={"model": {"name_or_path": "1:30"}, "data": {"source": "~"}, "optimization": {"max_flops": 1e16}}, flow=True
)
def test_round_trip(values: dict[str, Any], flow: bool) -> None:
    """PyYAML writes for YAML 1.1, and what it writes is read as it was meant."""
    text = yaml.safe_dump(values, allow_unicode=True, default_flow_style=flow)
    config = RunConfig(**values)
    assert parse_run_config(text) == config
    whole = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    assert parse_run_config(whole) == config


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("abmodel:- \n\t[]{}&*!#|>'\"%@`?,.~<=0123456789eE+_\\ux\0\u2028é"), max_size=60))
@example(text="<<: &a [*a]")
@example(text="? ")
@example(text='"\\ud800"')
@example(text="!<tag:yaml.org,2002:int> x")
@example(text="!!int ")
@example(text="%YAML 99999999999999999999.1\n---\na")
@example(text="&a *a")
@example(text="0x_")
@example(text="._e1")
@example(text="- !!set {a, b}")
def test_no_text_does_worse_than_a_configuration_error(text: str) -> None:
    try:
        document = read_yaml(text, "config.yaml")
    except ConfigurationError as error:
        assert str(error).startswith("config.yaml")  # noqa: PT017 - not every text fails
    else:
        assert document.place(()) is not None
        with pytest.raises(ConfigurationError):  # nothing so short is a whole configuration
            parse_run_config(text)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_no_bytes_do_worse_than_a_configuration_error(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigurationError):
        load_run_config(path)


@settings(max_examples=150, deadline=None)
@given(
    setting=st.text(max_size=40) | st.builds("{}={}".format, st.sampled_from(["data.source", "data", "a.b"]), st.text())
)
def test_no_override_does_worse_than_a_configuration_error(setting: str) -> None:
    text = "model: {name_or_path: m}\ndata: {source: s}\noptimization: {max_flops: 1}\n"
    try:
        parse_run_config(text, overrides=[setting])
    except ConfigurationError as error:
        assert "--set" in str(error)  # noqa: PT017 - some settings are right
