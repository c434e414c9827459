"""Choosing again from saved statistics imports no torch: that alone would take longer than the choice."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from safetensors.numpy import load_file, save_file

from layerlens.tuning.task_head import write_head
from layerlens.utils.when_used import ImportedWhenUsed

SLOW = ("torch", "transformers", "peft", "torchvision")


def loaded_after(code: str, *arguments: str) -> set[str]:
    """Slow modules that a process has imported which ran ``code``."""
    told = f"import json; print(json.dumps([name for name in {SLOW!r} if name in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}{told}", *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_choices_from_statistics(settings, saved_statistics, tmp_path):
    code = """
import json
from pathlib import Path
from layerlens.config import RunConfig
from layerlens.pipeline import optimize_statistics, run_pipeline, trace_frontier
config = RunConfig.model_validate(json.loads(sys.argv[2]))
result = optimize_statistics(Path(sys.argv[1]), config, base_dir=Path(sys.argv[3]))
assert result.files["report"].is_file()
"""
    assert loaded_after(code, str(saved_statistics), json.dumps(settings), str(tmp_path)) == set()


def test_a_head_is_written_as_torch_writes_it(saved_statistics, tmp_path):
    torch = pytest.importorskip("torch")
    from layerlens.profiling.statistics_file import load_statistics

    head = dict(load_statistics(saved_statistics)[1].head)
    assert head
    tensors = {name: torch.as_tensor(value) for name, value in head.items()}
    for folder, kept in (("arrays", head), ("tensors", tensors)):
        (tmp_path / folder).mkdir()
        write_head(kept, tmp_path / folder)
    files = [tmp_path / folder / "head.safetensors" for folder in ("arrays", "tensors")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_module_stands_for_another():
    module = ImportedWhenUsed("safetensors.numpy")
    assert module.load_file is load_file
    assert module.save_file is save_file
    with pytest.raises(AttributeError, match="no_such"):
        _ = module.no_such
