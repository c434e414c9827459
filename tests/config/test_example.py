"""The configuration that ``init`` writes is valid, complete, and says what the models say."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from layerlens.config import RunConfig, parse_run_config
from layerlens.config.base import ConfigModel
from layerlens.config.example import example_config, short_config
from layerlens.config.schema import as_model

REQUIRED = {
    "model": {"name_or_path": "m"},
    "data": {"source": "s"},
    "optimization": {"max_trainable_params": 7},
}
SET = {"model.name_or_path": "m", "data.source": "s", "optimization.max_trainable_params": 7}


def opened(text: str) -> str:
    """The example with every commented key opened (`#key:` and what is below it; `# prose` stays)."""
    return re.sub(r"^( *)#(?=[a-z_]+:|  )", r"\1", text, flags=re.MULTILINE)


def test_it_is_valid_and_means_the_defaults() -> None:
    text = example_config(SET)
    assert parse_run_config(text) == RunConfig(**REQUIRED)


def test_every_commented_key_shows_its_default() -> None:
    text = opened(example_config(SET))
    assert parse_run_config(text) == RunConfig(**REQUIRED)
    assert "  latency_profile:\n    # Device" in text


def test_every_key_is_there_with_its_description() -> None:
    words = " ".join(line.strip(" #") for line in example_config().splitlines())

    def visit(section: type[ConfigModel]) -> None:
        for name, known in section.model_fields.items():
            inner = as_model(known.annotation)
            assert f"{name}:" in words
            if inner is not None:
                visit(inner)
            else:
                assert known.description, f"{section.__name__}.{name} has no description"
                assert " ".join(known.description.split()) in words

    visit(RunConfig)


@pytest.mark.parametrize("write", [example_config, short_config])
def test_values_that_need_quotes_survive(write: Callable[..., str]) -> None:
    config = parse_run_config(write({"model.name_or_path": "yes: no # 'x'", "data.source": "C:\\data\\ä.csv"}))
    assert config.model.name_or_path == "yes: no # 'x'"
    assert config.data.source == "C:\\data\\ä.csv"


def test_lines_fit_a_screen() -> None:
    assert max(len(line) for line in example_config().splitlines()) <= 102


def test_the_short_one_is_a_dozen_lines_that_mean_the_same() -> None:
    text = short_config(SET, {"data.source": "3 columns\nin 2 lines"})
    assert parse_run_config(text) == RunConfig(**REQUIRED)
    assert len(text.splitlines()) <= 13
    assert "  source: s # 3 columns in 2 lines" in text
    opened = parse_run_config(re.sub(r"^  # ", "  ", text, flags=re.MULTILINE))
    assert (opened.optimization.max_vram_gb, opened.optimization.latency_target_ms) == (8.0, 20.0)


def test_a_budget_that_is_given_is_the_only_one() -> None:
    config = parse_run_config(short_config({"optimization.max_vram_gb": "8GB", "optimization.methods": ["lora"]}))
    assert config.optimization.budgets() == {
        "trainable_params": None, "flops": None, "vram_gb": 8.0, "latency_ms": None, "step_ms": None
    }  # fmt: skip
    assert config.optimization.methods == ("lora",)
