"""``run`` and ``optimize``: what they hand to the pipeline, what they show, and how they fail."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from cli_support import FakePipeline, Invoke, parsed

from layerlens import exceptions
from layerlens.exceptions import DataError, InfeasibleError, LayerLensError, ModelNotFoundError, ProfilingError


def test_run_shows_what_was_chosen_and_what_to_type_next(
    invoke: Invoke, pipeline: FakePipeline, tmp_path: Path
) -> None:
    result = invoke("run", "config.yaml")
    assert (result.exit_code, result.stdout) == (0, "")
    (call,) = pipeline.calls
    assert call["base_dir"] == tmp_path
    assert call["use_cache"] is True
    for shown in (
        "warning: data.calibration_samples: asked for 256, the data has 9\n",
        "Measuring gradients: ",
        "23 of 42 layers adapted",
        "within 0.03 % of the optimum (proved)",
        "exactly 0",
        "  out/manifest.json  ",
        "1.8 s (profile 1.2, solve 0.5); statistics from the cache\n",
        "Next:\n",
        "layerlens open out\n",
        "layerlens train out/manifest.json\n",
        "layerlens export out/manifest.json --to peft --lora-part\n",
    ):
        assert shown in result.stderr


def test_paths_in_the_file_start_from_the_file_and_typed_ones_from_here(
    invoke: Invoke, pipeline: FakePipeline, tmp_path: Path
) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "config.yaml").rename(tmp_path / "job/config.yaml")
    assert invoke("run", "job/config.yaml", "-q").exit_code == 0
    assert invoke("run", "job/config.yaml", "-q", "--output", "typed", "--no-cache").exit_code == 0
    first, second = pipeline.calls
    assert first["base_dir"] == tmp_path / "job"
    assert first["config"].output.directory == "out"
    assert second["config"].output.directory == str(tmp_path / "typed")
    assert second["use_cache"] is False


def test_settings_replace_those_of_the_file(invoke: Invoke, pipeline: FakePipeline) -> None:
    assert invoke("run", "config.yaml", "--set", "optimization.max_trainable_params=2e4", "--set", "runtime.seed=9")
    config = pipeline.calls[0]["config"]
    assert (config.optimization.max_trainable_params, config.runtime.seed) == (20_000, 9)


def test_the_next_command_can_be_pasted_whatever_the_name(invoke: Invoke, pipeline: FakePipeline) -> None:
    stderr = invoke("optimize", "s.safetensors", "-c", "config.yaml", "--output", "my out; $(x)").stderr
    lines = [line.split(maxsplit=1) for line in stderr[stderr.index("Next:\n") :].splitlines()[1:]]
    words = {what: shlex.split(line) for what, line in lines if what in ("report", "adapter")}
    assert words["report"] == ["layerlens", "open", "my out; $(x)"]
    assert words["adapter"] == ["layerlens", "show", "my out; $(x)/manifest.json", "--output", "my out; $(x)"]


def test_json_goes_to_stdout_alone(invoke: Invoke, pipeline: FakePipeline, tmp_path: Path) -> None:
    result = invoke("run", "config.yaml", "--json", "--quiet")
    document = parsed(result)
    assert result.stderr == ""
    assert document["files"]["manifest_json"] == str(tmp_path / "out/manifest.json")
    assert document["status"] == "feasible"
    assert document["gap"] == 0.0003
    assert len(document["allocations"]) == 42
    assert document["measured"]["step_zero_max_abs_delta"] == 0
    assert document["warnings"] == ["data.calibration_samples: asked for 256, the data has 9"]


def test_what_the_package_logs(invoke: Invoke, pipeline: FakePipeline) -> None:
    shown, verbose = invoke("run", "config.yaml").stderr, invoke("--verbose", "run", "config.yaml").stderr
    assert "warning: metric 'proxy_eval' is left out\n" in shown
    assert "layerlens.utility: 42 layers" not in shown
    assert "layerlens.utility: 42 layers\n" in verbose
    assert invoke("run", "config.yaml", "--quiet").stderr == ""


def test_optimize_needs_no_model_and_tells_how_to_write_the_adapter(
    invoke: Invoke, pipeline: FakePipeline, tmp_path: Path
) -> None:
    result = invoke("optimize", "statistics.safetensors", "--config", "config.yaml")
    assert result.exit_code == 0
    assert pipeline.calls[0]["statistics"] == Path("statistics.safetensors")
    assert pipeline.calls[0]["base_dir"] == tmp_path
    assert "layerlens show out/manifest.json --output out\n" in result.stderr
    assert "Checked on the model" not in result.stderr
    assert "from the cache" not in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelNotFoundError("model.name_or_path: no model directory at x; give an existing one"), 4),
        (DataError("data.source: no usable column"), 4),
        (InfeasibleError("budget too small; the smallest that would do: 192 trainable parameters"), 3),
        (ProfilingError("layer 'a': trace is NaN"), 1),
        (exceptions.OutputError("cannot write out: Read-only file system; choose another"), 2),
    ],
)
@pytest.mark.parametrize("command", [["run"], ["optimize", "s.safetensors", "--config"]])
def test_each_error_is_one_line_and_its_code(
    invoke: Invoke, pipeline: FakePipeline, command: list[str], error: LayerLensError, code: int
) -> None:
    pipeline.fail = error
    result = invoke(*command, "config.yaml", "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", f"error: {error}\n")


def test_the_unforeseen_is_one_line_too_and_a_traceback_with_debug(invoke: Invoke, pipeline: FakePipeline) -> None:
    pipeline.fail = ZeroDivisionError("float division\nby zero")
    result = invoke("run", "config.yaml", "--quiet")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: unexpected ZeroDivisionError: float division by zero; run again with --debug for the traceback\n"
    )
    for arguments in (["run", "config.yaml", "-q", "--debug"], ["--debug", "run", "config.yaml", "-q"]):
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert "Traceback (most recent call last)" in result.stderr
        assert result.stderr.endswith("error: unexpected ZeroDivisionError: float division by zero\n")
    assert "Traceback" not in invoke("run", "config.yaml", "-q").stderr


def test_interrupted(invoke: Invoke, pipeline: FakePipeline) -> None:
    pipeline.fail = KeyboardInterrupt()
    result = invoke("run", "config.yaml", "--quiet")
    assert result.exit_code == 130
    assert result.stderr.startswith("error: interrupted; no result was written")
    assert len(result.stderr.splitlines()) == 1


def test_out_of_memory(invoke: Invoke, pipeline: FakePipeline) -> None:
    pipeline.fail = MemoryError()
    result = invoke("run", "config.yaml", "--quiet")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: out of memory; lower data.batch_size")


def test_every_error_class_has_the_exit_code_of_the_design() -> None:
    codes = {
        name: kind.exit_code
        for name, kind in vars(exceptions).items()
        if isinstance(kind, type) and issubclass(kind, LayerLensError)
    }
    assert codes["ConfigurationError"] == codes["ModelSpecError"] == codes["OutputError"] == codes["ManifestError"] == 2
    assert codes["InfeasibleError"] == 3
    assert codes["ModelNotFoundError"] == codes["DataNotFoundError"] == codes["DataError"] == 4
    assert set(codes.values()) == {1, 2, 3, 4}
