"""The configuration that ``init`` writes is valid, complete, and says what the models say."""

from __future__ import annotations

import re

from layerlens.config import RunConfig, parse_run_config
from layerlens.config.base import ConfigModel
from layerlens.config.schema import as_model, example_config

REQUIRED = {
    "model": {"name_or_path": "m"},
    "data": {"source": "s"},
    "optimization": {"max_trainable_params": 7},
}


def opened(text: str) -> str:
    """The example with every commented key opened (`#key:` and what is below it; `# prose` stays)."""
    return re.sub(r"^( *)#(?=[a-z_]+:|  )", r"\1", text, flags=re.MULTILINE)


def test_it_is_valid_and_means_the_defaults() -> None:
    text = example_config("m", "s", 7)
    assert parse_run_config(text) == RunConfig(**REQUIRED)


def test_every_commented_key_shows_its_default() -> None:
    text = opened(example_config("m", "s", 7))
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


def test_values_that_need_quotes_survive() -> None:
    config = parse_run_config(example_config("yes: no # 'x'", "C:\\data\\ä.csv", 1))
    assert config.model.name_or_path == "yes: no # 'x'"
    assert config.data.source == "C:\\data\\ä.csv"


def test_lines_fit_a_screen() -> None:
    assert max(len(line) for line in example_config().splitlines()) <= 102
