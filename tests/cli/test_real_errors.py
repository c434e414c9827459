"""Errors of the real pipeline through the command line: one line, the right code, nothing left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cli_support import Invoke

ROWS = "text,label\n" + "".join(f"some text {index},{'ab'[index % 2]}\n" for index in range(40))


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        (["output.directory=config.yaml/below"], 2, "error: cannot write "),
        (["output.directory=/proc/layerlens"], 2, "error: cannot write /proc/layerlens: "),
        (["data.source=none.csv"], 4, "error: data.source: no file at "),
        (["data.source=empty.csv"], 4, "error: data.source: "),
        (["data.source=numbers.csv"], 2, "error: model.task: cannot be guessed: numbers.csv has x, y"),
        (
            ["data.source=numbers.csv", "model.task=sequence-classification"],
            4,
            "error: data.label_column: found no usable column in ",
        ),
        (["data.source=rows.csv", "model.name_or_path=./no-such-model"], 4, "error: model.name_or_path: no model "),
        (["data.source=rows.csv", "model.name_or_path=package:no_such_package"], 4, "error: model.name_or_path: "),
        (["runtime.cache_dir=config.yaml/below"], 2, "error: runtime.cache_dir: cannot use "),
    ],
)
def test_run(invoke: Invoke, tmp_path: Path, settings: list[str], code: int, message: str) -> None:
    (tmp_path / "rows.csv").write_text(ROWS, encoding="utf-8")
    (tmp_path / "empty.csv").write_text("text,label\n", encoding="utf-8")
    (tmp_path / "numbers.csv").write_text("x,y\n1,2\n3,4\n", encoding="utf-8")
    before = sorted(os.listdir(tmp_path))
    result = invoke("run", "config.yaml", "--quiet", *(part for setting in settings for part in ("--set", setting)))
    assert result.stderr.startswith(message)
    assert len(result.stderr.splitlines()) == 1
    assert (result.exit_code, result.stdout) == (code, "")
    assert [name for name in sorted(os.listdir(tmp_path)) if name != "cache"] == before


def test_optimize_without_a_usable_statistics_file(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no statistics")
    for name in ("none.safetensors", "broken.safetensors"):
        result = invoke("optimize", name, "--config", "config.yaml", "--quiet")
        assert result.exit_code == 2
        assert name in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
