"""Amounts with units: in every place that takes a budget, and plain numbers from then on."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerlens.config import OptimizationConfig, RunConfig, config_schema, parse_run_config
from layerlens.exceptions import ConfigurationError
from layerlens.quantities import COUNT, MEMORY, TIME, Quantity

TEXT = """\
model: {{name_or_path: m}}
data: {{source: s}}
optimization: {{{key}: {value}}}
"""


@pytest.mark.parametrize(
    ("kind", "text", "amount"),
    [
        (COUNT, "300k", 300_000),
        (COUNT, "300K", 300_000),
        (COUNT, "1.1M", 1_100_000),  # 1.1 * 1e6 in binary would be off by one unit in the last place
        (COUNT, "2B", 2_000_000_000),
        (COUNT, "1.5 G", 1_500_000_000),
        (COUNT, "2T", 2e12),
        (COUNT, "80e6", 80_000_000),
        (COUNT, "60_000", 60_000),
        (MEMORY, "8GB", 8),
        (MEMORY, "8G", 8),
        (MEMORY, "512MB", 0.512),
        (MEMORY, "200 mb", 0.2),
        (MEMORY, "8GiB", 8.589934592),
        (MEMORY, "0.2", 0.2),
        (TIME, "20ms", 20),
        (TIME, "0.5s", 500),
        (TIME, "500us", 0.5),
        (TIME, "500µs", 0.5),
        (TIME, "500\N{GREEK SMALL LETTER MU}s", 0.5),
    ],
)
def test_amounts_are_exact(kind: Quantity, text: str, amount: float) -> None:
    assert kind.parse(text) == amount


@pytest.mark.parametrize(
    "text", ["", "k", "300q", "3 00k", "300kk", "8GB", "1e9999999999", "1,5M", "0x10", "none", "nan"]
)
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(ValueError, match=r"300000, 300k or 1\.5M"):
        COUNT.parse(text)


@given(st.floats(min_value=1e-9, max_value=1e12))
def test_a_plain_number_stays_what_it_was(number: float) -> None:
    assert MEMORY.parse(repr(number)) == number


@pytest.mark.parametrize(
    ("key", "value", "number"),
    [
        ("max_trainable_params", "300k", 300_000),
        ("max_flops", "1.5G", 1.5e9),
        ("max_vram_gb", "512MB", 0.512),
        ("latency_target_ms", "0.5s", 500.0),
    ],
)
def test_every_budget_takes_a_unit_and_is_recorded_as_a_number(key: str, value: str, number: float) -> None:
    config = parse_run_config(TEXT.format(key=key, value=value))
    assert config.model_dump(mode="json")["optimization"][key] == number
    assert type(getattr(config.optimization, key)) is type(number)
    assert OptimizationConfig(**{key: value}) == config.optimization
    assert parse_run_config(TEXT.format(key=key, value=number)) == config


def test_shares_and_counts_in_a_study() -> None:
    text = TEXT.format(key="max_flops", value="1M") + "study: {budgets: [60k, 0.01]}\n"
    assert parse_run_config(text).study.budgets == (0.01, 60_000.0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("300q", "must be a number such as 300000, 300k or 1.5M, got 300q"),
        ("1.2345k", "must be a whole number, got 1.2345k"),
        ("-3k", "must be greater than 0, got -3k"),
        ("true", "must be a whole number, got true (a yes/no value)"),
    ],
)
def test_a_wrong_amount_names_the_key_what_came_and_what_would_work(value: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(f"optimization.max_trainable_params: {message}")):
        parse_run_config(TEXT.format(key="max_trainable_params", value=value))


def test_the_schema_admits_texts_with_units() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = config_schema()

    def problems(**optimization: Any) -> list[Any]:
        config = {"model": {"name_or_path": "m"}, "data": {"source": "s"}, "optimization": optimization}
        return list(jsonschema.Draft202012Validator(schema).iter_errors(config))

    assert not problems(max_trainable_params="300k", max_flops="1.5G", max_vram_gb="8GiB", latency_target_ms="0.5s")
    assert not problems(max_trainable_params=300_000, max_flops=None)
    assert problems(max_trainable_params="300q")
    assert problems(max_vram_gb="20ms")
    assert RunConfig.model_json_schema()["$defs"]["StudyConfig"]["properties"]["budgets"]["items"]["anyOf"]
