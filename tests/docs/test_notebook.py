"""The notebook runs from its first cell to its last, on a small model and few steps, and is kept without outputs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "notebooks/colab_quick_start.ipynb"
SMALL = (
    'MODEL, CALIBRATION_SAMPLES, HEAD_SAMPLES = "./my-model", 16, 64\n'
    "MAX_TRAINABLE_PARAMS, MAX_VRAM_GB, STEPS = 2_000, 0.2, 2\n"
)


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def tagged(notebook: nbformat.NotebookNode, tag: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def test_it_is_kept_without_outputs(notebook):
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
    assert len(tagged(notebook, "install")) == len(tagged(notebook, "parameters")) == 1


def test_every_cell_runs(notebook, tmp_path, monkeypatch, small_model_dir, pages_cache):
    shutil.copytree(small_model_dir, tmp_path / "my-model")
    monkeypatch.setenv("LAYERLENS_CACHE", str(pages_cache))
    monkeypatch.setenv("JUPYTER_PATH", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    tagged(notebook, "parameters")[0].source = SMALL
    # A kernel of this very Python, whatever kernels the machine has.
    kernel = tmp_path / "kernels/this-python"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "this", "language": "python"}))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    client = NotebookClient(
        notebook, timeout=1800, kernel_name="this-python", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    shown = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    said = {name: "".join(output.get("text", "") for output in outputs) for name, outputs in shown.items()}
    assert "no allocation within the budgets exceeds" in said["run"]
    assert "srcdoc" in shown["report"][-1].data["text/html"]
    assert any("image/png" in output.get("data", {}) for output in shown["frontier"])
    assert "largest change of a logit at step 0: 0" in said["train"]
    assert list((tmp_path / "tuned").glob("*.safetensors"))
