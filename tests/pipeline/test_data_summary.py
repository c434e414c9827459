"""A run, ``validate --show-sample`` and training say what they read, with the same figures."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as hf
import yaml
from typer.testing import CliRunner

from layerlens.cli.main import app


def test_what_was_read_is_said_by_every_job(tmp_path: Path, minilm_path: str):
    tokenizer = hf.AutoTokenizer.from_pretrained(minilm_path)
    torch.manual_seed(0)
    config = hf.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=len(tokenizer)
    )
    hf.BertModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": f"item {n}", "labels": ["odd"] * (n % 2) + ["third"] * (n % 3 == 0), "id": n} for n in range(60)]
    lines = [json.dumps(row) for row in rows] + ["{broken"]
    (tmp_path / "d.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    job = {
        "model": {"name_or_path": "model"},
        "data": {"source": "d.jsonl", "calibration_samples": 8, "max_length": 16},
        "optimization": {"max_trainable_params": 1000},
        "training": {"max_steps": 2, "batch_size": 4, "eval_samples": 4},
        "runtime": {"threads": 1, "cache_dir": "cache"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(job))

    def invoke(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    file = str(tmp_path / "c.yaml")
    read = json.loads(invoke("validate", file, "--show-sample", "--json"))["read"]
    assert (read["rows"], read["samples"], read["unused"]) == (61, 60, ["id"])
    assert read["classes"] == {"odd": 30, "third": 20}
    assert "is not JSON" in read["left_out"][0]["reason"]
    assert read["shown"]["input"].startswith("[CLS] item ")
    ran = json.loads(invoke("run", file, "--json"))["data"]
    assert ran == read
    report = (tmp_path / "out/report.html").read_text(encoding="utf-8") if (tmp_path / "out").is_dir() else ""
    report = report or next(tmp_path.glob("*/report.html")).read_text(encoding="utf-8")
    assert "used: text, labels; not used: id" in report
    assert read["shown"]["input"] in report
    manifest = next(tmp_path.glob("*/manifest.json"))
    trained = json.loads(invoke("train", str(manifest), "-c", file, "--json"))
    assert trained["data"]["classes"] == read["classes"]
    assert "f1_micro" in trained["after"]
